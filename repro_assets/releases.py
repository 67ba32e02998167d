"""Releases on main: which is in force, writing one, rolling back. A release is never changed; a rollback is a new one.

Deciding whether something may be released is `evaluation/policy.py`; who may decide is in the trust configuration. No Dagster here.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from repro_assets.trust.blob import Blob, BlobStore
from repro_assets.trust.canonical import canonical
from resources.errors import NotFound
from resources.lake import MAIN, Lake, Placement

ROOT = "releases"


class ReleaseError(Exception):
    """A release that cannot be made, found or gone back to; the message says why and what to do."""


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry on main. `documents`: asset to content digest of the whole chain. `adapter`: released files by name.

    `kind` rollback: `restores` names the earlier release whose adapter is in force again.
    """

    number: int
    kind: Literal["promotion", "rollback"]
    snapshot: str
    recipe: str
    documents: dict[str, str]
    adapter: dict[str, Blob]
    decision: str
    reason: str
    restores: int | None = None


class Releases:
    """The releases of one repository."""

    def __init__(self, lake: Lake, blobs: BlobStore) -> None:
        self.lake, self.blobs = lake, blobs

    def all(self, commit: str | None = None) -> list[Release]:
        """Every release on main, oldest first."""
        head = commit or self.lake.head(MAIN)
        numbers = sorted({int(part) for entry in self.lake.list(head, f"{ROOT}/") if (part := entry.path.split("/")[1]).isdecimal()})
        return [self._read(head, number) for number in numbers]

    def _read(self, commit: str, number: int) -> Release:
        digest = self.lake.stat(commit, f"{ROOT}/{number}/release.json").sha256
        if digest is None:
            raise ReleaseError(f"{ROOT}/{number}/release.json was not written by this project; find its author with `lakectl log`")
        return msgspec.json.decode(self.blobs.get_bytes(digest), type=Release)

    def get(self, number: int) -> Release:
        try:
            return self._read(self.lake.head(MAIN), number)
        except NotFound:
            known = ", ".join(str(release.number) for release in self.all()) or "none yet"
            raise ReleaseError(f"there is no release {number}; releases: {known}") from None

    def in_force(self, recipe: str) -> Release | None:
        """The newest release of a recipe, or None before the first. Another recipe's model is no baseline for this one."""
        return next((release for release in reversed(self.all()) if release.recipe == recipe), None)

    def of_documents(self, documents: Mapping[str, str]) -> Release | None:
        """The promotion that already released exactly this chain."""
        return next((release for release in self.all() if release.kind == "promotion" and release.documents == dict(documents)), None)

    def write(self, release: Release, files: Mapping[str, Blob], metadata: Mapping[str, str]) -> str:
        """Write `releases/<n>/` in one transaction and tag it; the commit id. Every step may be repeated.

        `files`: readable names of the chain's statements and documents. Raises ReleaseError when the number is taken by another.
        """
        head = self.lake.head(MAIN)
        prefix = f"{ROOT}/{release.number}"
        body = self.blobs.put_bytes(canonical(release))
        try:
            there = self.lake.stat(head, f"{prefix}/release.json").sha256
        except NotFound:
            there = None
        if there not in (None, body.sha256):
            raise ReleaseError(
                f"release {release.number} was written by somebody else meanwhile; materialize promotion again for the next number"
            )
        adapter = {f"adapter/{name}": blob for name, blob in release.adapter.items()}
        commit = self.lake.write_all(
            MAIN,
            [Placement(prefix, {**adapter, **files, "release.json": body})],
            message=f"release {release.number}: {release.kind} of snapshot {release.snapshot} ({release.recipe})",
            metadata=metadata,
        ).commit
        self.lake.tag(f"release-{release.number}", commit)
        return commit

    def next_number(self) -> int:
        return max((release.number for release in self.all()), default=0) + 1


def told(release: Release) -> dict[str, Any]:
    """One row for tables."""
    return {
        "release": release.number,
        "kind": release.kind if release.restores is None else f"rollback to {release.restores}",
        "snapshot": release.snapshot,
        "recipe": release.recipe,
        "reason": release.reason,
    }
