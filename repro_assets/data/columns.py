"""Rows of raw files as columns of digests and places: how a run of them is collected, stored, read back and taken over. No parsing here.

A part is a run of rows of one file. It is kept in the blob store beside the records and is no identity.
"""

import hashlib
import itertools
import os
import struct
import tempfile
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from repro_assets.data import readers
from repro_assets.data.cleaning import STEPS
from repro_assets.data.lines import Record
from repro_assets.data.places import ORIGINAL
from repro_assets.documents import FilePart, ParsedFile
from repro_assets.trust.blob import BlobStore

SPLITS = ("train", "validation")
NO_DIGEST = bytes(16)


class Spill(msgspec.Struct, frozen=True):
    """A local file with leaf lines of a part. `rows`: one byte a row, 1 where the row's line is in it."""

    path: str
    rows: bytes


class Set(msgspec.Struct, frozen=True):
    """A row of the file that is no record: its line (0 is the file itself), a reason, and what exactly is wrong."""

    line: int
    reason: str
    detail: str


class Columns(msgspec.Struct, frozen=True):
    """n records of one file in its order; every column little-endian.

    record, lines  uint8 (n, 32)   SHA-256 of the messages, and of the leaf line
    key            uint8 (n, 32)   SHA-256 of the user key, else of the record; only for the order `key_hash`
    line, offset, length  int64 (n,)   place of the row (`readers.Row`)
    size           int32 (n,)   bytes of its leaf line
    side           uint8 (n,)   index into SPLITS
    raw            uint8 (n, 16)   first half of the SHA-256 of the row's bytes; zeros where the format has no such bytes
    steps          uint8 (n,)   cleaning steps that changed the row, a bit each in the order of cleaning.STEPS
    label          int32 (n,)   index into `labels`, the slice labels that rows have
    by             int32 (n,)   ORIGINAL, or the index of the augmentation that made it out of the nearest original before it
    signature      uint32 (n, k), k = 0 without near duplicates
    `set_aside`: rows that are no records. `cleaned`: rows changed by each step. `flagged`: position to findings by kind.
    `read`: rows of the file in this part.
    """

    record: bytes
    lines: bytes
    key: bytes
    raw: bytes
    line: bytes
    offset: bytes
    length: bytes
    size: bytes
    side: bytes
    steps: bytes
    label: bytes
    by: bytes
    signature: bytes
    labels: tuple[dict[str, str], ...]
    set_aside: tuple[Set, ...]
    cleaned: dict[str, int]
    flagged: dict[int, dict[str, int]]
    read: int


#: column -> its little-endian type, and whether it has several values a row
COLUMNS: dict[str, tuple[str, bool]] = {
    "record": ("u1", True),
    "lines": ("u1", True),
    "key": ("u1", True),
    "raw": ("u1", True),
    "signature": ("<u4", True),
    "line": ("<i8", False),
    "offset": ("<i8", False),
    "length": ("<i8", False),
    "size": ("<i4", False),
    "side": ("u1", False),
    "steps": ("u1", False),
    "label": ("<i4", False),
    "by": ("<i4", False),
}


class Examined(msgspec.Struct, frozen=True, gc=False):
    """A record of the file with its row, leaf line, split, the augmentation that made it, what was found in it, the digest of its bytes and
    the cleaning steps that changed it."""

    row: readers.Row
    record: Record
    line: bytes
    split: str
    by: int
    counts: dict[str, int]
    raw: bytes
    steps: tuple[str, ...]


_PACKED = struct.Struct("<qqqiiiBB")
_ROW = np.dtype([(name, COLUMNS[name][0]) for name in ("line", "offset", "length", "size", "label", "by", "side", "steps")])


class Rows:
    """The rows of one part while it is read. `keyed`: whether the order `key_hash` is wanted."""

    def __init__(self, keyed: bool) -> None:
        self.keyed = keyed
        self.clear()

    def clear(self) -> None:
        self.text: list[bytes] = []
        self.bytes = self.read = 0
        self.held = bytearray()
        self.rows = bytearray()
        self.digests: dict[str, list[bytes]] = {name: [] for name in ("record", "lines", "key", "raw", "signature")}
        self.labels: dict[tuple[tuple[str, str], ...], int] = {}
        self.set_aside: list[Set] = []
        self.cleaned: Counter[str] = Counter()
        self.flagged: dict[int, dict[str, int]] = {}

    def __len__(self) -> int:
        return len(self.held)

    def add(self, one: Examined, signature: bytes) -> None:
        """A row that was parsed."""
        row, record, line = one.row, one.record, one.line
        if one.counts:
            self.flagged[len(self)] = one.counts
        if one.steps:
            self.cleaned.update(one.steps)
        name = bytes.fromhex(record.id)
        self.text.append(line)
        self.bytes += len(line)
        self.held.append(1)
        digests = self.digests
        digests["record"].append(name)
        digests["lines"].append(hashlib.sha256(line).digest())
        digests["raw"].append(one.raw)
        if self.keyed:
            digests["key"].append(hashlib.sha256(name if record.key is None else record.key.encode()).digest())
        if signature:
            digests["signature"].append(signature)
        label = self.labels.setdefault(tuple(record.slices.items()), len(self.labels))
        steps = sum(1 << STEPS.index(step) for step in one.steps)
        self.rows += _PACKED.pack(row.line, row.offset, row.length, len(line), label, one.by, SPLITS.index(one.split), steps)

    def take(self, seen: readers.Seen, known: "Earlier") -> None:
        """The records that a row of the same bytes gave before, at its place now; their text stays in the raw file."""
        number, first, end = seen.known
        part, packed = known.parts[number]
        for at in range(first, end):
            if found := part.flagged.get(at):
                self.flagged[len(self)] = found
            self.held.append(0)
            for name, width in known.widths:
                self.digests[name].append(getattr(part, name)[width * at : width * at + width])
            _line, _offset, _length, size, label, by, side, steps = packed[at]
            if steps:
                self.cleaned.update(step for bit, step in enumerate(STEPS) if steps >> bit & 1)
            mine = self.labels.setdefault(tuple(part.labels[label].items()), len(self.labels))
            self.rows += _PACKED.pack(seen.line, seen.offset, seen.length, size, mine, by, side, steps)

    def store(self, store: BlobStore, spill: str) -> tuple[FilePart, Spill | None]:
        """The part, and the local file of its text if that is not in the store."""
        rows = np.frombuffer(self.rows, _ROW)
        columns = Columns(
            **{name: b"".join(values) for name, values in self.digests.items()},
            **{name: np.ascontiguousarray(rows[name]).tobytes() for name in _ROW.names or ()},
            labels=tuple(dict(label) for label in self.labels),
            set_aside=tuple(self.set_aside),
            cleaned=dict(self.cleaned),
            flagged=self.flagged,
            read=self.read,
        )
        pressed = zstandard.ZstdCompressor(level=1)
        blob = store.put_bytes(pressed.compress(msgspec.msgpack.encode(columns)))
        if not spill:
            return FilePart(len(self), blob, store.put_bytes(pressed.compress(b"".join(self.text)))), None
        handle, path = tempfile.mkstemp(dir=spill, suffix=".text")
        with os.fdopen(handle, "wb") as file:
            file.writelines(self.text)
        return FilePart(len(self), blob, None), Spill(path, bytes(self.held))


class Earlier:
    """Rows of a file as it was before, by the digest of their bytes. `digest`: of the bytes that were asked for last."""

    def __init__(self, file: ParsedFile | None, store: BlobStore) -> None:
        self.digest = NO_DIGEST
        self.parts: list[tuple[Columns, list[Any]]] = []
        self._rows: dict[bytes, tuple[int, int, int]] = {}
        self.widths: list[tuple[str, int]] = []
        for number, data in enumerate(store.get_many(part.columns.sha256 for part in file.parts) if file else ()):
            part = columns(data)
            count = len(part.side)
            rows = np.zeros(count, _ROW)
            for name in _ROW.names or ():
                rows[name] = column(part, name)
            self.parts.append((part, rows.tolist()))
            if count:
                sizes = [(name, len(getattr(part, name)) // count) for name in ("record", "lines", "key", "raw", "signature")]
                self.widths = [(name, size) for name, size in sizes if size]
            starts = [*np.flatnonzero(rows["by"] == ORIGINAL).tolist(), count]
            for first, end in itertools.pairwise(starts):
                self._rows.setdefault(part.raw[16 * first : 16 * first + 16], (number, first, end))
        self._rows.pop(NO_DIGEST, None)

    def find(self, data: bytes) -> tuple[int, int, int] | None:
        """Where these bytes were a row before: part, first and end of its records."""
        self.digest = hashlib.sha256(data).digest()[:16]
        return self._rows.get(self.digest)


# ---- reading parts back


def columns(data: bytes) -> Columns:
    """The columns in a stored part."""
    return msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(data), type=Columns)


def text(data: bytes) -> bytes:
    """The leaf lines of a stored part, one after the other."""
    return zstandard.ZstdDecompressor().decompress(data)


def column(part: Columns, name: str) -> NDArray[Any]:
    """One column of a part that has rows, (n,) or (n, width); see `Columns`."""
    kind, wide = COLUMNS[name]
    flat = np.frombuffer(getattr(part, name), kind)
    return flat.reshape(len(part.side), -1) if wide else flat
