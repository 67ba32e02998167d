"""Bringing data to the branch raw: importing local files as one commit, and committing what other tools staged."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from repro_assets.partitions import key_of
from repro_assets.shelf import Shelf
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
