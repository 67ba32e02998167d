"""Blobs kept on this machine's disk so that reading twice costs one transfer. Only a cache: losing it loses nothing.

Any number of processes may share one folder. What is read from it is verified like what is read from S3.
"""

import contextlib
import fcntl
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import BinaryIO, Final

log = logging.getLogger(__name__)

PART: Final = ".part-"
ABANDONED: Final = 3600.0  # seconds after which a part is taken for that of a dead process
FULL: Final = 0.9  # an eviction frees down to this share of the cap, so that not every put evicts
LOOK: Final = 0.05  # the folder is measured again after this share of the cap was added by this process


class Cache:
    """A folder of at most about `cap` bytes; the blobs read longest ago leave first."""

    def __init__(self, folder: Path, cap: int) -> None:
        self.folder, self.cap = Path(folder), cap
        self._lock = threading.Lock()
        self._unseen: int | None = None  # bytes added since the folder was last measured; None: never measured
        self._broken = False

    def path(self, digest: str) -> Path:
        """Where the blob lies when it is here."""
        return self.folder / "sha256" / digest[:2] / digest

    def open(self, digest: str) -> BinaryIO | None:
        """The cached file, now the youngest, or None."""
        try:
            file = self.path(digest).open("rb")
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a cache somebody else owns can still be read
            os.utime(file.fileno())  # by hand: most disks are mounted without access times
        return file

    def read(self, digest: str) -> bytes | None:
        """The cached bytes, unverified, or None."""
        file = self.open(digest)
        if file is None:
            return None
        with file:
            return file.read()

    def drop(self, digest: str) -> None:
        """Forget one blob."""
        self.path(digest).unlink(missing_ok=True)

    def begin(self, digest: str, size: int) -> "Part | None":
        """A file to be filled with the blob, or None when it would not fit or the folder cannot be written."""
        if self._broken or size > self.cap / 2:
            return None
        try:
            return Part(self, digest)
        except OSError as error:
            self.fail(error)
            return None

    def put(self, digest: str, data: bytes) -> None:
        """Keep verified bytes."""
        part = self.begin(digest, len(data))
        if part is not None:
            part.write(data)
            part.keep()

    def fail(self, error: OSError) -> None:
        """A cache that cannot be written is no reason to fail a read: say it once and go on without."""
        if not self._broken:
            log.warning("blob cache %s is off in this process: %s; free space there or set REPRO_CACHE", self.folder, error)
        self._broken = True

    def added(self, size: int) -> None:
        """Account for one new blob; measure and evict when it is time."""
        with self._lock:
            if self._unseen is not None:
                self._unseen += size
                if self._unseen <= self.cap * LOOK:
                    return
            if self.evict():
                self._unseen = 0

    def evict(self) -> bool:
        """Bring the folder below its cap. False when another process is at it: nobody waits for the cache."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            found = self._measure()
            total = sum(size for _, size, _ in found)
            if total > self.cap * (1 - LOOK):
                for _, size, path in sorted(found):
                    if total <= self.cap * FULL * (1 - LOOK):
                        break
                    path.unlink(missing_ok=True)
                    total -= size
            return True

    def _measure(self) -> list[tuple[float, int, Path]]:
        found = []
        for folder in (self.folder / "sha256").glob("*"):
            for entry in os.scandir(folder):
                try:
                    facts = entry.stat()
                except FileNotFoundError:
                    continue
                if not entry.name.startswith(PART):
                    found.append((facts.st_atime, facts.st_size, Path(entry.path)))
                elif time.time() - facts.st_mtime > ABANDONED:
                    Path(entry.path).unlink(missing_ok=True)
        return found


class Part:
    """A blob on its way into the cache, seen by nobody until `keep`."""

    def __init__(self, cache: Cache, digest: str) -> None:
        self._cache, self._digest, self._size = cache, digest, 0
        folder = cache.path(digest).parent
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=PART)
        self._file, self._name = os.fdopen(handle, "wb"), Path(name)
        self._good = True

    def write(self, data: bytes | memoryview) -> None:
        """Append; a full disk gives the part up, not the reader."""
        if not self._good:
            return
        try:
            self._file.write(data)
            self._size += len(data)
        except OSError as error:
            self._cache.fail(error)
            self.discard()

    def keep(self) -> None:
        """The bytes were verified: the blob is in the cache from here on."""
        if not self._good:
            return
        try:
            self._file.close()
            os.replace(self._name, self._cache.path(self._digest))
        except OSError as error:
            self._cache.fail(error)
            self.discard()
            return
        self._good = False
        self._cache.added(self._size)

    def discard(self) -> None:
        """Nothing of it stays."""
        if self._good:
            self._good = False
            self._name.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the buffered rest does not fit either; the file is gone already
                self._file.close()
