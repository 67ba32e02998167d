"""Bringing data to the branch raw: importing local files or a table's as one commit, and committing what other tools staged.

Which files a table has is `tables.py`. Raw data is read by `data/readers.py`, never here.
"""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from repro_assets.data.errors import TableError
from repro_assets.data.manifest import WINDOW
from repro_assets.partitions import key_of
from repro_assets.shelf import Shelf
from repro_assets.tables import DataFile, Table, in_one_line
from repro_assets.trust.blob import Blob
from resources.blobs import Blobs
from resources.errors import NothingToCommit
from resources.lake import RAW, Lake, checked_path

BATCH = 64


class CannotImport(Exception):
    """A path that cannot be imported; the message names it, the reason and the remedy."""


@dataclass(frozen=True)
class Imported:
    """The snapshot that an import made or found: its key, raw commit, how many files, and whether anything was new.

    `size` in bytes, of imported files; null for what other tools wrote, which is not read here.
    """

    key: str
    commit: str
    files: int
    size: int | None
    new: bool


def listed(paths: Iterable[Path], to: str = "") -> dict[str, Path]:
    """Raw path -> local file of every regular file under `paths`. A folder keeps its inner structure, without its own name.

    Raises CannotImport for a missing path, a symbolic link, a name that lakeFS or we refuse, or two files of one raw path.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise CannotImport(f"{path}: no such file or folder; check the spelling, and quote a name that has spaces")
        root = path if path.is_dir() else path.parent
        for file in sorted(_walk(path)) if path.is_dir() else [path]:
            raw = str(PurePosixPath(to, *file.relative_to(root).parts))
            if file.is_symlink() or not stat.S_ISREG(file.stat().st_mode):
                raise CannotImport(
                    f"{file}: not a regular file; import what it stands for (links are not followed: they may lead out of the folder)"
                )
            try:
                checked_path(raw)
            except ValueError as error:
                raise CannotImport(f"{file}: {error}") from None
            if raw in found and found[raw].samefile(file):
                continue
            if raw in found:
                raise CannotImport(
                    f"{file} and {found[raw]} would both become {raw!r} on raw: rename one, or import them with different --to"
                )
            found[raw] = file
    if not found:
        raise CannotImport("nothing to import: the folders hold no file")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below, and links to folders, so that they are refused rather than left out unseen."""

    def unreadable(error: OSError) -> None:
        raise CannotImport(f"{error.filename}: {error.strerror}; make it readable, or import the other folders one by one") from error

    for inner, folders, names in os.walk(folder, onerror=unreadable):
        yield from (Path(inner) / name for name in names)
        yield from (link for name in folders if (link := Path(inner) / name).is_symlink())


def import_files(
    lake: Lake,
    blobs: Blobs,
    paths: Iterable[Path],
    *,
    to: str = "",
    message: str = "",
    actor: str = "",
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Stream the files to blobs and link them into raw as one commit. Files already there as they are change nothing.

    Raises UncommittedRaw when somebody staged objects on raw: they would otherwise stay behind unseen.
    """
    files = listed(paths, to)
    lake.ensure()
    Shelf(lake, blobs).refuse_uncommitted()
    names = sorted(files)
    stored: dict[str, Blob] = {}
    if progress:
        progress(0, len(names))
    for start in range(0, len(names), BATCH):
        part = names[start : start + BATCH]
        stored |= dict(zip(part, blobs.put_many([files[name] for name in part]), strict=True))
        if progress:
            progress(len(stored), len(names))
    said = message or f"import {len(names)} file{'s' * (len(names) > 1)}" + (f" to {to}" if to else "")
    written = lake.write(RAW, "", stored, message=said, metadata={"asset": "raw", "actor": actor, **(metadata or {})}, replace=False)
    # nothing new: raw as it is now holds the files, whichever commits brought them
    commit = written.commit if written.created else lake.head(RAW)
    return _made(lake, blobs, commit, len(names), sum(blob.size for blob in stored.values()), written.created)


def import_table(
    lake: Lake,
    blobs: Blobs,
    table: Table,
    *,
    to: str,
    message: str = "",
    actor: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Stream a table's data files to blobs and link them, with a `_window.json` that says where they come from, as all that is under `to`.

    Another version of the same table replaces the files of the one before, in the same commit. Raises CannotImport when `to` is not
    named or holds anything else, TableError for a file that is not what the table says, UncommittedRaw as `import_files` does.
    """
    prefix = to.strip("/")
    if not prefix:
        raise CannotImport("a table needs a folder of its own on raw: name it with --to, for example --to tables/tickets")
    try:
        for file in table.files:
            checked_path(f"{prefix}/{file.path}")
    except ValueError as error:
        raise CannotImport(f"{table.uri}: {error}") from None
    lake.ensure()
    Shelf(lake, blobs).refuse_uncommitted()
    _refuse_others(lake, table, prefix)
    stored: dict[str, Blob] = {}
    for file in table.files:
        if progress:
            progress(len(stored), len(table.files))
        stored[file.path] = _stored(blobs, table, file)
    if progress:
        progress(len(stored), len(table.files))
    window = blobs.put_bytes(table.window(stored))
    said = message or f"import {table.format} {table.name} to {prefix} ({len(stored)} file{'s' * (len(stored) > 1)})"
    metadata = {"asset": "raw", "actor": actor, "table": table.uri, "table_state": table.name}
    written = lake.write(RAW, prefix, {**stored, WINDOW: window}, message=said, metadata=metadata)
    commit = written.commit if written.created else lake.head(RAW)
    return _made(lake, blobs, commit, len(stored), sum(blob.size for blob in stored.values()), written.created)


def _refuse_others(lake: Lake, table: Table, prefix: str) -> None:
    """Raise CannotImport when the folder holds anything but an earlier import of this table: it would be removed."""
    head = lake.head(RAW)
    there = next(iter(lake.list(head, f"{prefix}/")), None)
    if there is None:
        return
    if not any(entry.path == f"{prefix}/{WINDOW}" for entry in lake.list(head, f"{prefix}/{WINDOW}")):
        raise CannotImport(f"{prefix!r} on raw holds {there.path!r}, which is no table's: import the table --to another folder")
    before = json.loads(lake.read(head, f"{prefix}/{WINDOW}"))
    # Each commit of an Iceberg table writes a metadata file of its own; the folder above them is the table's.
    if [before["format"], _place(before["table"])] != [table.format, _place(table.uri)]:
        raise CannotImport(f"{prefix!r} on raw holds the table {before['table']}: import {table.uri} --to another folder")


def _place(uri: str) -> str:
    return uri.rsplit("/metadata/", 1)[0].rstrip("/")


def _stored(blobs: Blobs, table: Table, file: DataFile) -> Blob:
    """One data file as a blob: copied to disk, so that it can be looked at and sent again, and gone from there afterwards."""
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryDirectory(prefix="repro-table-") as folder:
        copy = Path(folder) / "data.parquet"
        try:
            with table.open(file) as stream, copy.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
            if (size := copy.stat().st_size) != file.size:
                raise TableError(f"{table.uri}: {file.source} has {size:,} bytes, the table says {file.size:,}; it was changed or cut off")
            table.check(file, pyarrow.parquet.read_schema(copy))
        except (FileNotFoundError, pyarrow.ArrowInvalid) as error:
            raise TableError(
                f"{table.uri} {table.name}: {file.source} cannot be read: {in_one_line(error)}; it may have been vacuumed or expired, name a later state"
            ) from error
        return blobs.put_file(copy)


def commit_raw(lake: Lake, blobs: Blobs, message: str, actor: str = "") -> Imported:
    """Commit what other tools staged on raw. Raises NothingToCommit when nothing is staged."""
    lake.ensure()
    staged = list(lake.uncommitted(RAW))
    if not staged:
        raise NothingToCommit(
            "nothing is staged on the branch raw: write objects to it first (S3 gateway, lakectl fs upload), or use `repro import`"
        )
    commit = lake.commit_staged(RAW, message, {"asset": "raw", "actor": actor})
    return _made(lake, blobs, commit, len(staged), None, True)


def _made(lake: Lake, blobs: Blobs, commit: str, files: int, size: int | None, new: bool) -> Imported:
    """The snapshot of a raw commit, pinned and with a branch of its own."""
    key = key_of(commit, lake.commit_info(commit).created)
    Shelf(lake, blobs).snapshot(key)
    return Imported(key, commit, files, size, new)
