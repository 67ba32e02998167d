"""`Blobs`: the blob store on S3. Bytes under the name of their SHA-256, written once, verified on every read.

Which blob means what is said by the documents; the path under which people see it is lakeFS's.
"""

import base64
import contextlib
import errno
import hashlib
import io
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol, cast

from botocore.exceptions import BotoCoreError, ClientError

from repro_assets.trust.blob import HEX, Blob, BlobDamaged, BlobMissing, ordered, put_all
from repro_assets.trust.canonical import sha256
from resources.blobs.cache import Cache, Part
from resources.blobs.s3 import BROKEN_BODY, CHUNK, RESUMES, Body, make_client, status_of, store_once, typed_errors, unavailable
from resources.errors import DiskFull, NotFound

if TYPE_CHECKING:
    from resources.settings import Connections

THREADS: Final = 16
AHEAD: Final = 2  # batch calls keep at most this many items per thread in memory
MULTIPART_FROM: Final = 64 << 20
PART_SIZE: Final = 16 << 20
PART_THREADS: Final = 4
MOST_PARTS: Final = 10_000  # S3's own limit
LOOK_FIRST: Final = 1 << 20  # from this size on asking whether the blob is there costs less than sending it


def key_of(digest: str) -> str:
    """The S3 key of a blob; ValueError when `digest` is none."""
    if not HEX.fullmatch(digest):
        raise ValueError(f"{digest!r} is not a lower-case hexadecimal SHA-256")
    return f"sha256/{digest[:2]}/{digest}"


def address(bucket: str, blob: Blob) -> str:
    """Where lakeFS finds the blob."""
    return f"s3://{bucket}/{key_of(blob.sha256)}"


class Blobs:
    """A `repro_assets.trust.blob.BlobStore` on one bucket. Safe for many threads; make one per process."""

    def __init__(self, client: Any, bucket: str, cache: Cache | None = None, connections: "Connections | None" = None) -> None:
        self.bucket, self.cache, self._client, self._connections = bucket, cache, client, connections

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process connects for itself; a client made by hand does not travel."""
        if self._connections is None:
            raise TypeError("this store was made around a client; only one from Blobs.connect can be sent to another process")
        return Blobs.connect, (self._connections,)

    @classmethod
    def connect(cls, connections: "Connections", client: Any = None) -> "Blobs":
        """The blob bucket of `connections`, with the local cache unless its size is 0."""
        cache = Cache(connections.cache, connections.cache_bytes) if connections.cache_bytes else None
        return cls(client or make_client(connections), connections.blobs_bucket, cache, None if client else connections)

    def without_cache(self) -> "Blobs":
        """The same store, every read from the server: for verification."""
        return Blobs(self._client, self.bucket)

    def address(self, blob: Blob) -> str:
        """s3://bucket/key, which lakeFS links to."""
        return address(self.bucket, blob)

    # ---- put

    def put_bytes(self, data: bytes) -> Blob:
        """Store `data` unless the blob is there already; what is there is not read."""
        blob = Blob(sha256(data), len(data))
        if not self._there(blob):
            if blob.size > MULTIPART_FROM:
                self._put_parts(blob, io.BytesIO(data), "the bytes given")
            else:
                self._put_whole(blob, data)
        return blob

    def put_file(self, path: Path) -> Blob:
        """Store a file, streamed. Raises OSError when it changes meanwhile."""
        path = Path(path)
        with path.open("rb") as file:
            blob = Blob(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())
            if not self._there(blob):
                file.seek(0)
                if blob.size > MULTIPART_FROM:
                    self._put_parts(blob, file, str(path))
                elif blob.size >= LOOK_FIRST:
                    self._put_whole(blob, file)
                else:
                    self._put_whole(blob, file.read())
        return blob

    def put_many(self, items: Iterable[bytes | Path]) -> list[Blob]:
        """Concurrent put; the result is in the order of `items`, which may be a generator larger than memory."""
        return put_all(self, items, THREADS, AHEAD)

    def _there(self, blob: Blob) -> bool:
        return blob.size >= LOOK_FIRST and self.exists(blob.sha256)

    def _put_whole(self, blob: Blob, body: bytes | BinaryIO) -> None:
        # The server compares: damage on the way, or a file that changed after it was hashed, is refused.
        checksum = base64.b64encode(bytes.fromhex(blob.sha256)).decode()
        where = {"Bucket": self.bucket, "Key": key_of(blob.sha256), "IfNoneMatch": "*", "ChecksumSHA256": checksum}

        def send() -> None:
            if not isinstance(body, bytes):
                body.seek(0)
            self._client.put_object(**where, Body=body)

        with typed_errors(self._client, f"store blob {blob.sha256}"):
            store_once(send, lambda: self.exists(blob.sha256))

    def _put_parts(self, blob: Blob, file: BinaryIO, name: str) -> None:
        where = {"Bucket": self.bucket, "Key": key_of(blob.sha256)}
        with typed_errors(self._client, f"store blob {blob.sha256} in parts"):
            upload = {**where, "UploadId": self._client.create_multipart_upload(**where, ChecksumAlgorithm="SHA256")["UploadId"]}
            completed = False
            try:
                parts = self._send_parts(upload, blob, file, name)
                completed = store_once(
                    lambda: self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"),
                    lambda: self.exists(blob.sha256),
                )
            finally:
                if not completed:  # parts of an open upload are paid for without being seen
                    with contextlib.suppress(ClientError, BotoCoreError):
                        self._client.abort_multipart_upload(**upload)

    def _send_parts(self, upload: dict[str, str], blob: Blob, file: BinaryIO, name: str) -> list[dict[str, Any]]:
        whole = hashlib.sha256()
        size = max(PART_SIZE, -(-blob.size // MOST_PARTS))

        def read() -> Iterator[tuple[int, bytes]]:
            number = 0
            while data := file.read(size):
                whole.update(data)
                number += 1
                yield number, data

        def send(part: tuple[int, bytes]) -> dict[str, Any]:
            number, data = part
            checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
            answer = self._client.upload_part(**upload, PartNumber=number, Body=data, ChecksumSHA256=checksum)
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

        parts = list(ordered(send, read(), PART_THREADS, ahead=1))
        if whole.hexdigest() != blob.sha256:
            raise OSError(f"{name} changed while it was stored (SHA-256 {blob.sha256} before, {whole.hexdigest()} now): put it again")
        return parts

    # ---- get

    def get_bytes(self, digest: str) -> bytes:
        """The blob's bytes, verified. BlobMissing, BlobDamaged, Unavailable."""
        key = key_of(digest)
        if self.cache is not None and (cached := self.cache.read(digest)) is not None:
            if sha256(cached) == digest:
                return cached
            self.cache.drop(digest)
        data = self._fetch(digest, key)
        actual = sha256(data)
        if actual != digest:
            raise self._damaged(digest, actual, len(data))
        if self.cache is not None:
            self.cache.put(digest, data)
        return data

    def get_file(self, digest: str, path: Path) -> None:
        """Write the blob to `path`: verified, then renamed into place. DiskFull leaves nothing behind."""
        path = Path(path)
        scratch = path.with_name(f".{digest[:16]}-{secrets.token_hex(6)}.part")
        try:
            with self.open(digest) as blob, scratch.open("xb") as file:
                shutil.copyfileobj(blob, file, CHUNK)
            os.replace(scratch, path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(path.parent).free
            raise DiskFull(
                f"no space left for blob {digest} at {path}: {free:,} bytes are free in {path.parent}; free some, or choose another folder"
            ) from error
        finally:
            scratch.unlink(missing_ok=True)

    def get_many(self, digests: Iterable[str]) -> Iterator[bytes]:
        """Concurrent get with a bounded look-ahead; yields in the order of `digests`."""
        return ordered(self.get_bytes, digests, THREADS, AHEAD)

    def open(self, digest: str) -> BinaryIO:
        """A stream that raises BlobDamaged at its end when the bytes were not those of `digest`; trust nothing before that."""
        key = key_of(digest)
        if self.cache is not None and (cached := self.cache.open(digest)) is not None:
            if hashlib.file_digest(cast(io.BufferedReader, cached), "sha256").hexdigest() == digest:
                cached.seek(0)
                return cached
            cached.close()
            self.cache.drop(digest)
        body, size = self._body(digest, key)
        part = self.cache.begin(digest, size) if self.cache is not None else None
        return cast(BinaryIO, io.BufferedReader(Verified(body, digest, part, self._damaged), CHUNK))

    # ---- presence

    def exists(self, digest: str) -> bool:
        """Whether the server holds the blob, whatever the cache holds."""
        with typed_errors(self._client, f"look for blob {digest}"):
            try:
                self._client.head_object(Bucket=self.bucket, Key=key_of(digest))
            except ClientError as error:
                if status_of(error) == 404:
                    return False
                raise
        return True

    def missing(self, digests: Iterable[str]) -> set[str]:
        """Those of `digests` that the server does not hold."""
        wanted = sorted(set(digests))
        return {digest for digest, there in zip(wanted, ordered(self.exists, wanted, THREADS, AHEAD), strict=True) if not there}

    # ---- the server's side

    def _fetch(self, digest: str, key: str) -> bytes:
        try:
            with typed_errors(self._client, f"send blob {digest}"):
                for attempt in range(RESUMES + 1):
                    body = self._client.get_object(Bucket=self.bucket, Key=key)["Body"]
                    try:
                        data: bytes = body.read()
                        return data
                    except BROKEN_BODY as error:  # boto3 repeats a request, never a body that broke off
                        if attempt == RESUMES:
                            raise unavailable(self._client, f"send all of blob {digest}", error) from error
                        time.sleep(0.1 * 2**attempt)
        except NotFound as error:
            raise self._absent(digest, error) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _body(self, digest: str, key: str) -> tuple[Body, int]:
        try:
            with typed_errors(self._client, f"send blob {digest}"):
                body = Body(self._client, self.bucket, key)
                return body, body.size
        except NotFound as error:
            raise self._absent(digest, error) from error

    def _absent(self, digest: str, error: NotFound) -> Exception:
        if "NoSuchBucket" in str(error):
            return error
        return BlobMissing(
            f"blob {digest} is not at s3://{self.bucket}/{key_of(digest)}; materialize the asset that wrote it again with --no-memo, "
            "or restore the object from a copy of the bucket"
        )

    def _damaged(self, digest: str, actual: str, size: int) -> BlobDamaged:
        return BlobDamaged(
            f"blob {digest} at s3://{self.bucket}/{key_of(digest)} holds {size} bytes with SHA-256 {actual}: they were changed after they "
            "were stored. Restore the object from a copy of the bucket, or delete it and materialize its asset again with --no-memo"
        )


class Source(Protocol):
    """Bytes in order."""

    def read(self, size: int = -1) -> bytes: ...

    def close(self) -> None: ...


class Verified(io.RawIOBase):
    """A source whose bytes are hashed as they pass; the end is only reached when they were those of the digest."""

    def __init__(self, source: Source, digest: str, part: Part | None, damaged: Callable[[str, str, int], Exception]) -> None:
        self._source, self._digest, self._part, self._damaged = source, digest, part, damaged
        self._hash, self._size, self._verified = hashlib.sha256(), 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        if data:
            buffer[: len(data)] = data
            self._hash.update(data)
            self._size += len(data)
            if self._part is not None:
                self._part.write(data)
        elif not self._verified:
            actual = self._hash.hexdigest()
            if actual != self._digest:
                raise self._damaged(self._digest, actual, self._size)
            self._verified = True
            if self._part is not None:
                self._part.keep()
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
            if self._part is not None:
                self._part.discard()
        super().close()
