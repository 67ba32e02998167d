"""Which raw files belong to a recipe, their format by suffix, and the snapshot's manifest.

Hashing the raw objects is the caller's; reading what is in them is `readers.py`.
"""

import itertools
import re
from collections.abc import Iterable
from functools import lru_cache

from repro_assets.data.errors import SnapshotError
from repro_assets.documents import RawFile, RawSnapshot
from repro_assets.recipe import RawSection
from repro_assets.trust.blob import BlobStore
from repro_assets.trust.canonical import canonical

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
OTHER = "other"


def format_of(path: str) -> str:
    """`jsonl`, `parquet`, or `other` when no reader knows the suffix (compressed files included)."""
    name = path.rsplit("/", 1)[-1].lower()
    dot = name.rfind(".")
    return SUFFIXES.get(name[dot:], OTHER) if dot >= 0 else OTHER


@lru_cache(maxsize=512)
def _pattern(glob: str) -> re.Pattern[str]:
    out, at = "", 0
    while at < len(glob):
        if glob.startswith("**/", at) and (at == 0 or glob[at - 1] == "/"):
            out, at = out + "(?:[^/]+/)*", at + 3
        elif glob.startswith("**", at):
            out, at = out + ".*", at + 2
        elif glob[at] == "*":
            out, at = out + "[^/]*", at + 1
        elif glob[at] == "?":
            out, at = out + "[^/]", at + 1
        elif glob[at] == "[" and (end := glob.find("]", at + 2)) > 0:
            inside = glob[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            out += "(?!/)[" + ("^" + inside[1:] if inside[0] == "!" else inside.replace("^", "\\^")) + "]"
            at = end + 1
        else:
            out, at = out + re.escape(glob[at]), at + 1
    return re.compile(out, re.DOTALL)


def matches(path: str, glob: str) -> bool:
    """Whether the whole `path` matches: `*`, `?` and `[...]` stay inside a folder, `**` crosses folders, `**/` may be no folder at all."""
    return _pattern(glob).fullmatch(path) is not None


def bytewise(path: str) -> bytes:
    """Sort key of paths: their UTF-8 bytes, the same in every locale."""
    return path.encode("utf-8", "surrogatepass")


def selected(paths: Iterable[str], section: RawSection) -> list[str]:
    """Those of `paths` that match an include and no exclude pattern, in bytewise order."""
    kept = (
        path
        for path in paths
        if any(matches(path, glob) for glob in section.include) and not any(matches(path, glob) for glob in section.exclude)
    )
    return sorted(kept, key=bytewise)


def build(files: Iterable[RawFile], store: BlobStore, section: RawSection | None = None) -> RawSnapshot:
    """The snapshot of `files` (already hashed and selected); its manifest is stored as canonical JSON, sorted by path.

    An empty file is a file like any other here: `records` lists it in the quarantine.
    Raises SnapshotError for no files (naming the patterns of `section`) and for a path that comes twice.
    """
    listed = sorted(files, key=lambda file: bytewise(file.path))
    if not listed:
        section = section or RawSection()
        raise SnapshotError(
            f"the snapshot is empty: no raw file matches include {list(section.include)} without exclude {list(section.exclude)}; "
            "import data with `repro import PATH`, or change raw.include / raw.exclude in the recipe"
        )
    for before, after in itertools.pairwise(listed):
        if before.path == after.path:
            raise SnapshotError(f"{after.path}: listed twice in one snapshot; a raw commit holds a path once")
    manifest = canonical([{"path": file.path, "sha256": file.sha256, "size": file.size} for file in listed])
    return RawSnapshot(manifest=store.put_bytes(manifest), files_listed=tuple(listed), size=sum(file.size for file in listed))
