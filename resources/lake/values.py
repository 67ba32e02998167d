"""What lake hands out and takes in: frozen values, the rules for names and paths, the fixed content types. No calls to a server."""

import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal

import msgspec

from repro_assets.trust.blob import Blob

COMMIT: Final = re.compile(r"[0-9a-f]{64}")
BRANCH: Final = re.compile(r"\w[-\w]*", re.ASCII)
TAG: Final = re.compile(r"[A-Za-z0-9_][-.\w]*", re.ASCII)
CHECKSUM: Final = "sha256:"
LONGEST_PATH: Final = 1024  # bytes; lakeFS refuses more
DAGSTER_LINK: Final = "::lakefs::Dagster::url[url:ui]"  # metadata key that lakeFS's UI shows as a button "Dagster"

# Part of an entry's identity in lakeFS, so never asked of the machine: `mimetypes` reads /etc/mime.types.
CONTENT_TYPES: Final = {
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
    ".txt": "text/plain; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".parquet": "application/vnd.apache.parquet",
    ".arrow": "application/vnd.apache.arrow.file",
}


class Entry(msgspec.Struct, frozen=True):
    """One object of one commit. `size` in bytes; `checksum` is "sha256:<hex>" for linked blobs, what the uploader sent for others."""

    path: str
    size: int
    checksum: str
    address: str
    content_type: str = ""

    @property
    def sha256(self) -> str | None:
        """Hexadecimal SHA-256 as the writer stated it, None for objects that other tools uploaded."""
        return self.checksum.removeprefix(CHECKSUM) if self.checksum.startswith(CHECKSUM) else None

    def holds(self, blob: Blob) -> bool:
        """Whether lakeFS would call `blob` under this path no change: address and time are no part of an entry's identity."""
        return (self.checksum, self.size, self.content_type) == (CHECKSUM + blob.sha256, blob.size, content_type(self.path))


class Change(msgspec.Struct, frozen=True):
    """One line of a diff."""

    path: str
    kind: Literal["added", "removed", "changed"]


class CommitInfo(msgspec.Struct, frozen=True):
    """`created` in seconds since 1970 by the server's clock. `parents` lists the branch's own line first."""

    id: str
    message: str
    metadata: dict[str, str]
    created: int
    parents: tuple[str, ...]


class Written(msgspec.Struct, frozen=True):
    """The commit of the branch that holds what was written; `created` is False when an earlier commit already did."""

    commit: str
    created: bool


class Placement(msgspec.Struct, frozen=True):
    """What a write puts under `prefix`: `files` by their path relative to it.

    With `replace` the prefix holds exactly `files` afterwards, except what lies under a relative sub-prefix in `keep`;
    without it nothing is removed. Two writers of one prefix are told apart by any file that both write differently, so a
    replaced prefix should hold one that names all the others (the asset's document.json).
    """

    prefix: str
    files: Mapping[str, Blob]
    keep: tuple[str, ...] = ()
    replace: bool = True

    def __post_init__(self) -> None:
        if self.replace and not self.prefix.strip("/"):
            raise ValueError("replacing the whole branch is not a write: name the prefix, or write with replace=False")

    @property
    def root(self) -> str:
        """The prefix with one slash at its end, or "" for the branch's root."""
        return self.prefix.strip("/") + "/" if self.prefix.strip("/") else ""

    def wanted(self) -> dict[str, Blob]:
        """Full path -> blob, every path checked."""
        return {checked_path(self.root + name): blob for name, blob in sorted(self.files.items())}

    def owns(self, path: str) -> bool:
        """Whether a write of this placement removes `path` when it is not among its files."""
        kept = tuple(self.root + part.strip("/") + "/" for part in self.keep)
        return self.replace and path.startswith(self.root) and not path.startswith(kept)


def checked_path(path: str) -> str:
    """`path`, or ValueError saying what is wrong with it."""
    if path.startswith("_lakefs"):
        raise ValueError(f"{path!r}: lakeFS keeps its own settings and hooks under _lakefs*, data may not go there; rename it")
    if posixpath.normpath(path) != path or path.startswith(("/", "../")) or path in ("", ".", ".."):
        raise ValueError(f"{path!r} is no path inside a branch: no empty parts, no '.', no '..', no '/' at either end")
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise ValueError(f"{path!r} holds a control character; rename the file")
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{path!r} is not valid Unicode (a file name in another encoding?); rename the file") from None
    if length > LONGEST_PATH:
        raise ValueError(f"{path[:80]!r}… has {length} bytes; lakeFS takes at most {LONGEST_PATH}")
    return path


def checked_branch(name: str) -> str:
    """`name`, or ValueError: a branch name has no '/' and no '.' in lakeFS."""
    if not BRANCH.fullmatch(name):
        raise ValueError(f"{name!r} is no branch name: letters, digits, '_' and '-' only, and no '-' first")
    return name


def checked_tag(name: str) -> str:
    """`name`, or ValueError: stricter than lakeFS so that every tag is also a safe file and partition name."""
    if not TAG.fullmatch(name) or ".." in name:
        raise ValueError(f"{name!r} is no tag name: letters, digits, '_', '-' and single dots only")
    return name


def checked_commit(commit: str) -> str:
    """`commit`, or ValueError: reads are pinned, a branch name would read whatever is there by then."""
    if not COMMIT.fullmatch(commit):
        raise ValueError(f"{commit!r} is no commit id (64 hexadecimal digits): resolve the branch once with lake.head() and read by that")
    return commit


def checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Sorted copy of `metadata`, or TypeError: lakeFS stores text only."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"commit metadata {key!r}: {value!r} is not text to text; convert it where it is made")
    return dict(sorted(metadata.items()))


def common_start(paths: Iterable[str]) -> str:
    """The longest text that every path starts with: to lakeFS a prefix is text, not a folder."""
    return posixpath.commonprefix(list(paths))


def content_type(path: str) -> str:
    """The content type every writer gives to a path with this suffix."""
    return CONTENT_TYPES.get(posixpath.splitext(path)[1].lower(), "application/octet-stream")


def separate(placements: Iterable[Placement]) -> tuple[Placement, ...]:
    """`placements`, or ValueError when one would write or remove what belongs to another."""
    checked = tuple(placements)
    for one in checked:
        for other in checked:
            if one is not other and any(one.owns(path) for path in other.wanted()):
                raise ValueError(f"the write of {one.root!r} would replace what the same write puts under {other.root!r}: name it in keep")
    paths = [path for placement in checked for path in placement.wanted()]
    if len(paths) != len(set(paths)):
        raise ValueError(f"one write names {next(path for path in paths if paths.count(path) > 1)!r} twice")
    return checked
