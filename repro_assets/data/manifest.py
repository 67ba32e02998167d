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

#: suffix -> format
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".text": "txt",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
OTHER = "other"
#: what `repro import --delta` or `--iceberg` writes beside a table's files: where they come from. No data, so in no manifest.
WINDOW = "_window.json"

_ARCHIVE = "an archive: which of its members are data, and in which order, is nowhere fixed; unpack it and import the files"
_COMPRESSED = "compressed in a way that is not read here; decompress it, or compress it as .gz or .zst"
#: ends of names that are no data, and what to do about each
REMEDIES = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tbz2", ".txz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".lzma", ".br", ".z"), _COMPRESSED),
    ".dvc": "a DVC pointer, not the data; run `dvc pull` where it came from and import the data itself",
}


def format_of(path: str) -> str:
    """`jsonl`, `json`, `csv`, `tsv`, `txt`, `parquet`; a text format with `.gz` or `.zst` behind it; `other` when no reader knows the name."""
    name = path.rsplit("/", 1)[-1].lower()
    if name.endswith(tuple(REMEDIES)):
        return OTHER
    stem, dot, _ = name.rpartition(".")
    compression = COMPRESSIONS.get(name[len(stem) :]) if dot else None
    if compression:
        name = stem
    base = SUFFIXES.get(name[name.rfind(".") :], OTHER) if "." in name else OTHER
    if not compression:
        return base
    # Parquet compresses its columns itself, and its footer could not be reached in a compressed stream.
    return OTHER if base in (OTHER, "parquet") else f"{base}.{compression}"


def parts(format: str) -> tuple[str, str]:
    """A format without its compression, and the compression: `gz`, `zst` or nothing."""
    base, _dot, compression = format.partition(".")
    return base, compression


def remedy_for(path: str) -> str | None:
    """What to do about a file whose name says that it is no data; None for any other."""
    lower = path.lower()
    if "/_delta_log/" in f"/{lower}":
        return "the log of a Delta table, whose files are not all in force; import the table with `repro import --delta URI --version N`"
    if re.search(r"(^|/)metadata/[^/]*\.metadata\.json$", lower):
        return "the metadata of an Iceberg table; import the table with `repro import --iceberg METADATA --snapshot-id ID`"
    # The longest end wins: a .tar.gz is an archive, whatever .gz is.
    ends = sorted((end for end in REMEDIES if lower.endswith(end)), key=len)
    return REMEDIES[ends[-1]] if ends else None


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
    """Those of `paths` that match an include and no exclude pattern, in bytewise order; the windows of tables (`WINDOW`) are never among
    them, so that the same rows under another table version are the same data."""
    kept = (
        path
        for path in paths
        if path.rsplit("/", 1)[-1] != WINDOW
        and any(matches(path, glob) for glob in section.include)
        and not any(matches(path, glob) for glob in section.exclude)
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
