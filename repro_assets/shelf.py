"""Where documents lie in lakeFS, and reading them: snapshots, pins, shared assets, documents by place or by digest.

Read-only except for pins and branches. Writing a document is `stage.py`; releases on main are `releases.py`. No Dagster here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from repro_assets.documents import KINDS, Document, DocumentError, Result, parse, parse_content
from repro_assets.partitions import checked, commit_prefix, key_of
from repro_assets.trust.blob import BlobStore
from resources.errors import NotFound, Refused
from resources.lake import RAW, SHARED, Lake

SHARED_ASSETS = ("base_model", "eval_suites")


class MissingDocument(Exception):
    """A document that has to be there first; the message names the command that makes it."""


class UncommittedRaw(Exception):
    """Objects staged on the raw branch but committed by nobody."""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot key, the raw commit it names, and the branch that holds all work on it."""

    key: str
    commit: str

    @property
    def branch(self) -> str:
        return f"snapshot-{self.key}"


def folder(key: str, recipe: str, asset: str) -> str:
    """The prefix of one asset's document and blobs."""
    return f"shared/{recipe}/{asset}" if asset in SHARED_ASSETS else f"snapshots/{key}/{recipe}/{asset}"


class Shelf:
    """Documents of one lakeFS repository; their bytes come from the blob store and are verified there."""

    def __init__(self, lake: Lake, blobs: BlobStore) -> None:
        self.lake, self.blobs = lake, blobs

    # ---- snapshots

    def raw_commits(self) -> Iterator[tuple[str, str]]:
        """(key, commit) of every raw commit that brought data, newest first; the repository's first commit has none."""
        for commit in self.lake.log(RAW):
            if commit.parents:
                yield key_of(commit.id, commit.created), commit.id

    def snapshot(self, key: str) -> Snapshot:
        """The snapshot of `key`, its raw commit pinned and its branch there. Raises MissingDocument when no raw commit made this key, BadKey
        for a text that is none."""
        pin = f"pin-{checked(key)}"
        if self.lake.exists(pin):
            commit = self.lake.head(pin)
        else:
            commit = self._find(key)
            self.lake.pin(key, commit)
        snapshot = Snapshot(key, commit)
        self.lake.ensure_branch(snapshot.branch, commit)
        return snapshot

    def _find(self, key: str) -> str:
        try:
            info = self.lake.commit_info(commit_prefix(key))
        except (NotFound, Refused):
            info = None
        if info is None or key_of(info.id, info.created) != key:
            raise MissingDocument(f"no raw commit made the snapshot {key!r}; `repro snapshots` lists the keys there are")
        return info.id

    def refuse_uncommitted(self) -> None:
        """Raise UncommittedRaw when objects are staged on raw: they belong to no commit, so no snapshot could ever name them."""
        staged = list(self.lake.uncommitted(RAW))
        if staged:
            shown = ", ".join(repr(path) for path in staged[:5]) + (f" and {len(staged) - 5} more" if len(staged) > 5 else "")
            raise UncommittedRaw(
                f"{len(staged)} objects on the branch raw are not committed: {shown}. Commit them with `repro commit-raw -m MESSAGE` "
                "(or `lakectl commit`), or drop them with `lakectl branch reset`; then try again"
            )

    # ---- documents

    def digest_at(self, commit: str, key: str, recipe: str, asset: str) -> str | None:
        """Data version of the asset's document at `commit`, or None when there is none."""
        try:
            return self.lake.stat(commit, f"{folder(key, recipe, asset)}/document.json").sha256
        except NotFound:
            return None

    def read(self, commit: str, key: str, recipe: str, asset: str) -> Document[Any, Any] | None:
        """The asset's document at `commit`, or None when there is none. Raises DocumentError or BlobDamaged when it cannot be trusted."""
        kind, observed = KINDS[asset]
        place = folder(key, recipe, asset)
        try:
            entries = [self.lake.stat(commit, f"{place}/{name}") for name in ("document.json", "observed.json")]
        except NotFound:
            return None
        digests = [entry.sha256 for entry in entries]
        if None in digests:
            raise DocumentError(f"{place}: document.json was not written by this project (no SHA-256 in lakeFS); materialize {asset} again")
        content, beside = (self.blobs.get_bytes(str(digest)) for digest in digests)
        return parse(kind, observed, content, beside)

    def by_digest(self, digest: str, kind: type[Result]) -> tuple[dict[str, str], Any]:
        """(inputs, result) of the document whose content has `digest`, wherever it was committed."""
        inputs, _section, result = parse_content(kind, self.blobs.get_bytes(digest))
        return inputs, result

    def section_of(self, digest: str, kind: type[Result]) -> dict[str, Any]:
        """The recipe section that the document with this digest was made under."""
        return parse_content(kind, self.blobs.get_bytes(digest))[1]

    def shared(self, recipe: str, asset: str, key: str | None) -> Document[Any, Any]:
        """The newest document of a shared asset. Raises MissingDocument with the command that makes it."""
        found = self.read(self.lake.head(SHARED), "", recipe, asset) if self.lake.exists(SHARED) else None
        if found is None:
            again = f", then `repro materialize --snapshot {key}`" if key else ""
            raise MissingDocument(
                f"{asset} of recipe {recipe!r} was never made: run `repro materialize --select base_model,eval_suites`{again}, "
                "or click Materialize on it in the UI"
            )
        return found

    def recipes(self, commit: str, key: str) -> list[str]:
        """Names of the recipes that have documents for this snapshot at `commit`."""
        prefix = f"snapshots/{key}/"
        return sorted({entry.path[len(prefix) :].split("/", 1)[0] for entry in self.lake.list(commit, prefix)})
