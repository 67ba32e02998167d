"""Reading the raw branch: which objects belong to a recipe, their SHA-256, and which commit brought each of them.

Raw objects may come by any tool, so lakeFS's checksum proves nothing: bytes are hashed here, once a physical address.
"""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import BinaryIO

from repro_assets.data import manifest
from repro_assets.documents import RawFile
from repro_assets.memo import Memo
from repro_assets.recipe import RawSection
from resources.lake import Entry, Lake
from resources.settings import Connections

CHUNK = 1 << 20
THREADS = 4
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Opener:
    """Opens raw objects at one commit, in whatever process it is sent to."""

    connections: Connections
    commit: str

    @cached_property
    def _lake(self) -> Lake:
        return Lake.connect(self.connections)

    def __getstate__(self) -> dict[str, object]:
        return {"connections": self.connections, "commit": self.commit}

    def __call__(self, file: RawFile) -> BinaryIO:
        return self._lake.open(self.commit, file.path)


class Reader:
    """Raw objects at commits. `again`: hash every object even when its digest is remembered (`repro/no-memo`, `verify --deep`)."""

    def __init__(self, lake: Lake, memo: Memo, *, again: bool = False, progress: Callable[[str], None] = lambda said: None) -> None:
        self.lake, self.memo, self.again, self.progress = lake, memo, again, progress

    def files(self, commit: str, section: RawSection) -> list[RawFile]:
        """The recipe's raw files at `commit`, sorted by path."""
        entries = {entry.path: entry for entry in self.lake.list(commit)}
        chosen = manifest.selected(sorted(entries), section)
        digests: list[str] = []
        said = time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            for found in pool.map(lambda path: self.digest(commit, entries[path]), chosen):
                digests.append(found)
                if time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    self.progress(f"hashed {len(digests):,} of {len(chosen):,} raw objects")
        self.progress(f"{len(chosen)} of {len(entries)} raw objects belong to the recipe")
        return [
            RawFile(path=path, sha256=found, size=entries[path].size, format=manifest.format_of(path))
            for path, found in zip(chosen, digests, strict=True)
        ]

    def digest(self, commit: str, entry: Entry) -> str:
        """SHA-256 of one object, remembered by its immutable physical address, size and lakeFS checksum."""
        place = {"raw_object": entry.address, "size": entry.size, "checksum": entry.checksum}
        if not self.again and (known := self.memo.digest_of(place)):
            return known
        found = hashlib.sha256()
        size = 0
        with self.lake.open(commit, entry.path) as stream:
            while chunk := stream.read(CHUNK):
                found.update(chunk)
                size += len(chunk)
        if size != entry.size:
            raise OSError(
                f"{entry.path!r} at {commit[:12]} gave {size} bytes, lakeFS lists {entry.size}: read it again, then `repro verify --deep`"
            )
        self.memo.keep_digest(place, found.hexdigest(), size)
        return found.hexdigest()

    def history(self, commit: str, paths: list[str]) -> tuple[dict[str, str], tuple[str, str]]:
        """Path to the commit that brought the object as it is at `commit`; and the oldest and newest of those commits' times, UTC."""
        waiting, seen, times = set(paths), dict[str, str](), list[int]()
        for info in self.lake.log(commit):
            if not waiting:
                break
            if info.parents:
                brought = {change.path for change in self.lake.diff(info.parents[0], info.id) if change.kind != "removed"}
            else:
                brought = set(waiting)
            for path in sorted(waiting & brought):
                seen[path] = info.id
                times.append(info.created)
            waiting -= brought
        return dict(sorted(seen.items())), (_utc(min(times)), _utc(max(times))) if times else ("", "")


def _utc(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
