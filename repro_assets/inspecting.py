"""Answers about what is there: snapshots, one document, why an asset would be made again, verification, health. Reads only."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from repro_assets import raw
from repro_assets.bench import Bench
from repro_assets.documents import KINDS, Document, RawFile
from repro_assets.memo import Memo
from repro_assets.releases import Releases
from repro_assets.shelf import MissingDocument, Shelf, Snapshot
from repro_assets.stage import SECTIONS
from repro_assets.trust.blob import BlobError
from repro_assets.trust.closure import closure
from repro_assets.trust.memo import differing
from repro_assets.trust.statements import PROVENANCE, TEST_RESULT, VSA, timeless
from repro_assets.trust.canonical import digest
from repro_assets.trust.verification import Refused, verify

ROLES = {
    "training_bundle": ("builder", PROVENANCE),
    "qlora_checkpoint": ("builder", PROVENANCE),
    "eval_results": ("evaluator", TEST_RESULT),
    "promotion": ("approver", VSA),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `good` or not, and what was seen."""

    what: str
    good: bool
    seen: str


class Inspector:
    """Looks through one bench's eyes, under its recipe."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.lake = bench.lake.client
        self.shelf = Shelf(self.lake, bench.blobs.store)
        self.recipe = bench.recipe.load().recipe

    def head(self, key: str) -> tuple[Snapshot, str]:
        snapshot = self.shelf.snapshot(key)
        return snapshot, self.lake.head(snapshot.branch)

    def snapshots(self) -> list[dict[str, Any]]:
        """Every snapshot, newest first: key, raw commit, assets made under the recipe, decision, release."""
        self.lake.ensure()
        released = {release.snapshot: release.number for release in Releases(self.lake, self.shelf.blobs).all() if release.kind == "promotion"}
        rows = []
        for key, commit in self.shelf.raw_commits():
            made, decision = 0, ""
            if self.lake.exists(f"snapshot-{key}"):
                head = self.lake.head(f"snapshot-{key}")
                made = sum(self.shelf.digest_at(head, key, self.recipe.name, asset) is not None for asset in KINDS)
                promotion = self.shelf.read(head, key, self.recipe.name, "promotion")
                decision = promotion.result.decision if promotion else ""
            rows.append({"snapshot": key, "raw_commit": commit, "assets": made, "decision": decision, "release": released.get(key)})
        return rows

    def show(self, asset: str, key: str | None) -> Document[Any, Any]:
        """The document of an asset. Raises MissingDocument naming the command that makes it."""
        if key is None:
            return self.shelf.shared(self.recipe.name, asset, None)
        _snapshot, head = self.head(key)
        found = self.shelf.read(head, key, self.recipe.name, asset)
        if found is None:
            raise MissingDocument(
                f"{asset} of snapshot {key} was never made under recipe {self.recipe.name!r}: run `repro materialize --snapshot {key} --select {asset}`"
            )
        return found

    def why(self, asset: str, key: str | None) -> list[str]:
        """What differs, in words, between how the asset was last made and how it would be made now. Empty: nothing does."""
        document = self.show(asset, key)
        was = document.made.components
        now = {**was, "section": SECTIONS[asset](self.recipe), "schema": KINDS[asset][0].schema}
        said = differing(was, now)
        if document.made.sources:
            code = closure(_code(asset))
            said += [f"{asset}: code of {name} changed" for name, found in sorted(code.sources.items()) if document.made.sources.get(name) != found]
            said += [f"{asset}: code of {name} is no longer reached" for name in sorted(document.made.sources.keys() - code.sources.keys())]
        if key is not None:
            _snapshot, head = self.head(key)
            for upstream, read in document.inputs.items():
                there = self.shelf.digest_at(head, key, self.recipe.name, upstream) if upstream in KINDS and upstream not in ("base_model", "eval_suites") else None
                if there and there != read:
                    said.append(f"{asset}: input {upstream} was {read[:12]}, is {there[:12]} now")
        return said

    def verify(self, key: str, deep: bool = False) -> Iterator[Finding]:
        """Read every document and every blob it names, check every signature; `deep` hashes the raw objects again too."""
        snapshot, head = self.head(key)
        documents: dict[str, Document[Any, Any]] = {}
        for asset in KINDS:
            if asset in ("base_model", "eval_suites"):
                continue
            try:
                found = self.shelf.read(head, key, self.recipe.name, asset)
            except (BlobError, ValueError) as error:
                yield Finding(asset, False, str(error))
                continue
            if found is None:
                continue
            documents[asset] = found
            yield from self._blobs(asset, found)
            if asset in ROLES:
                yield self._signature(asset, found)
            for upstream, read in found.inputs.items():
                if upstream in documents and documents[upstream].digest != read:
                    yield Finding(asset, False, f"was made from {upstream} {read[:12]}, which is {documents[upstream].digest[:12]} now")
        if not documents:
            yield Finding(key, False, f"nothing was made of this snapshot under recipe {self.recipe.name!r}")
        if deep and "raw_snapshot" in documents:
            yield from self._raw(snapshot, documents["raw_snapshot"].result.files_listed)

    def _blobs(self, asset: str, document: Document[Any, Any]) -> Iterator[Finding]:
        bad = 0
        files = document.files()
        for path, blob in files.items():
            try:
                with self.bench.blobs.store.without_cache().open(blob.sha256) as stream:
                    while stream.read(1 << 20):
                        pass
            except BlobError as error:
                bad += 1
                yield Finding(f"{asset}/{path}", False, str(error))
        if not bad:
            yield Finding(asset, True, f"document {document.digest[:12]} and {len(files)} blobs")

    def _signature(self, asset: str, document: Document[Any, Any]) -> Finding:
        role, predicate = ROLES[asset]
        try:
            envelope = self.shelf.blobs.get_bytes(document.observed.envelope.sha256)
            statement = verify(envelope, trust=self.bench.signing.trust, role=role, predicate_type=predicate, subjects=_subject(asset, document, envelope))
        except (BlobError, Refused) as error:
            return Finding(f"{asset}: signature", False, str(error))
        if asset == "training_bundle" and digest(timeless(statement)) != document.result.statement.sha256:
            return Finding(f"{asset}: signature", False, "the signed statement is not the one that the document names")
        return Finding(f"{asset}: signature", True, f"signed by a trusted {role}")

    def _raw(self, snapshot: Snapshot, files: tuple[RawFile, ...]) -> Iterator[Finding]:
        reader = raw.Reader(self.lake, Memo(self.bench.objects, self.bench.blobs.store, self.bench.signing), again=True)
        bad = 0
        for file in files:
            found = reader.digest(snapshot.commit, self.lake.stat(snapshot.commit, file.path))
            if found != file.sha256:
                bad += 1
                yield Finding(f"raw {file.path}", False, f"SHA-256 is {found}, the snapshot says {file.sha256}: restore the object from a copy")
        if not bad:
            yield Finding("raw", True, f"{len(files)} raw objects read again, every SHA-256 as recorded")

    def doctor(self) -> Iterator[Finding]:
        """Whether this machine and its servers can do the work."""
        from repro_assets.trust.environment import capture, hardware_class

        where = self.bench.lake.connections
        self.lake.ensure()
        yield Finding("lakeFS", True, f"{where.lakefs_endpoint}, repository {where.repository}, main at {self.lake.head('main')[:12]}")
        self.bench.objects.list("memo/none")
        yield Finding("S3", True, f"{where.s3_endpoint or 'AWS'}, buckets {where.blobs_bucket}, {where.jobs_bucket}, {where.lake_bucket}")
        staged = list(self.lake.uncommitted("raw"))
        yield Finding("raw", not staged, f"{len(staged)} uncommitted objects: `repro commit-raw`" if staged else "nothing uncommitted")
        trust = self.bench.signing.trust
        yield Finding("keys", True, f"{len(trust.keys)} trusted keys, {len(trust.revoked.keys)} revoked ({self.bench.signing.trust_file})")
        free = shutil.disk_usage(where.home if where.home.exists() else ".").free
        yield Finding("disk", free > 5 * 10**9, f"{free / 1e9:.0f} GB free" + ("" if free > 5 * 10**9 else ": below 5 GB, make room before training"))
        environment = capture()
        yield Finding("hardware", True, hardware_class())
        yield Finding("lock", environment.lock is not None, environment.lock or "no requirements.lock beside the package: set REPRO_LOCK")
        state = environment.git
        yield Finding("git", True, f"{state.commit[:12]}{' with uncommitted changes' if state.dirty else ''}" if state else environment.git_absent)


def _code(asset: str) -> str:
    from repro_assets import assets  # noqa: F401  the asset modules name the module whose closure makes them
    import sys

    return str(sys.modules[f"repro_assets.assets.{asset}"].CODE)


def _subject(asset: str, document: Document[Any, Any], envelope: bytes) -> dict[str, str] | str:
    if asset == "qlora_checkpoint":
        return {f"adapter/{name}": blob.sha256 for name, blob in document.result.adapter.items()}
    from repro_assets.trust.statements import subject_digests
    import base64

    statement = msgspec.json.decode(base64.b64decode(msgspec.json.decode(envelope)["payload"]))
    return subject_digests(statement)
