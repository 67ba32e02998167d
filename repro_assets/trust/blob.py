"""What pure code knows of storage: a blob's name, the store as a Protocol, and a store that is a folder.

The store on S3 is `resources/blobs.py`; which blob means what is said by the documents.
"""

import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import msgspec

from repro_assets.trust.canonical import sha256

#: threads of a folder's batch calls: hashing and files give way to other threads, so that the reader works meanwhile
THREADS, AHEAD = 2, 2
Item = TypeVar("Item")
Result = TypeVar("Result")
HEX = re.compile(r"[0-9a-f]{64}")


class Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """Bytes addressed by their SHA-256 (lower-case hexadecimal) and their size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not HEX.fullmatch(self.sha256):
            raise ValueError(f"{self.sha256!r} is not a lower-case hexadecimal SHA-256")
        if self.size < 0:
            raise ValueError(f"a blob of {self.size} bytes")


class BlobError(Exception):
    """A blob that cannot be used; the message names it, the reason and the remedy."""


class BlobMissing(BlobError):
    """No such blob in the store."""


class BlobDamaged(BlobError):
    """The stored bytes are not the bytes that the digest names."""


class BlobStore(Protocol):
    """Content-addressed bytes. Writes never replace anything; reads verify every byte before handing back the last one."""

    def put_bytes(self, data: bytes) -> Blob: ...

    def put_file(self, path: Path) -> Blob: ...

    def put_many(self, items: Iterable[bytes | Path]) -> list[Blob]:
        """Concurrent put; the result is in the order of `items`."""
        ...

    def get_bytes(self, digest: str) -> bytes: ...

    def get_file(self, digest: str, path: Path) -> None:
        """Write the blob to `path`: verified, then renamed into place."""
        ...

    def get_many(self, digests: Iterable[str]) -> Iterator[bytes]:
        """Concurrent get with a bounded look-ahead; yields in the order of `digests`."""
        ...

    def open(self, digest: str) -> BinaryIO:
        """A stream that raises BlobDamaged at its end when the bytes were not those of `digest`."""
        ...

    def missing(self, digests: Iterable[str]) -> set[str]:
        """Those of `digests` that the store does not hold."""
        ...


class FolderStore:
    """Blobs in a local folder: an exported bundle, a checkout, a run without servers. Same layout as on S3."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def _path(self, digest: str) -> Path:
        if not HEX.fullmatch(digest):
            raise ValueError(f"{digest!r} is not a lower-case hexadecimal SHA-256")
        return self.root / "sha256" / digest[:2] / digest

    def put_bytes(self, data: bytes) -> Blob:
        blob = Blob(sha256(data), len(data))
        path = self._path(blob.sha256)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        return blob

    def put_file(self, path: Path) -> Blob:
        return self.put_bytes(Path(path).read_bytes())

    def put_many(self, items: Iterable[bytes | Path]) -> list[Blob]:
        return put_all(self, items, THREADS, AHEAD)

    def get_bytes(self, digest: str) -> bytes:
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError:
            raise BlobMissing(f"blob {digest} is not under {self.root}; export or check out again") from None
        if sha256(data) != digest:
            raise BlobDamaged(
                f"blob {digest} under {self.root} holds bytes with SHA-256 {sha256(data)}: it was changed after it was written; restore it from another copy"
            )
        return data

    def get_file(self, digest: str, path: Path) -> None:
        data = self.get_bytes(digest)
        scratch = Path(path).with_name(f".{Path(path).name}.part")
        scratch.write_bytes(data)
        os.replace(scratch, path)

    def get_many(self, digests: Iterable[str]) -> Iterator[bytes]:
        return ordered(self.get_bytes, digests, THREADS, AHEAD)

    def open(self, digest: str) -> BinaryIO:
        import io

        return io.BytesIO(self.get_bytes(digest))

    def missing(self, digests: Iterable[str]) -> set[str]:
        return {digest for digest in digests if not self._path(digest).exists()}


def ordered(function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Result]:
    """`map` in threads: results in the order of `items`, at most `threads * ahead` of them in memory; an error leaves nothing running."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ordered")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= threads * ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def put_all(store: BlobStore, items: Iterable[bytes | Path], threads: int, ahead: int) -> list[Blob]:
    """What `put_many` of a store does: each item by its kind, in threads."""
    return list(ordered(lambda item: store.put_bytes(item) if isinstance(item, bytes) else store.put_file(item), items, threads, ahead))


def named(files: Mapping[str, Blob]) -> dict[str, Blob]:
    """`files` in the order of their names, so that every document lists them alike."""
    return dict(sorted(files.items()))
