"""The map over raw files: each file's rows as columns of digests and places, kept in the blob store, and their leaf lines as text.

A pure function of the file's bytes, the records section and the evaluation items, so that an unchanged file is not parsed again.
What needs more than one file is `records.py`; reading rows is `readers.py`; the cleaning steps have modules of their own.
"""

import hashlib
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, BinaryIO, Self, cast

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from repro_assets.data import near, readers
from repro_assets.data.augmenting import augmented
from repro_assets.data.cleaning import clean, untouched
from repro_assets.data.contamination import Evaluated
from repro_assets.data.errors import SourceError
from repro_assets.data.lines import Message, Record, encode, made, make, said_by
from repro_assets.data.places import ORIGINAL
from repro_assets.data.sensitive import Finder
from repro_assets.documents import FilePart, ParsedFile, RawFile
from repro_assets.recipe import RecordsSection
from repro_assets.trust.blob import BlobStore
from repro_assets.trust.canonical import digest

SPLITS = ("train", "validation")
BATCH_ROWS, BATCH_BYTES = 256, 4 << 20  # records that the steps that pay by call take at once
PART = 32 << 20  # bytes of leaf lines in one part: what a worker holds, and what is fetched when a leaf must be written

OpenRaw = Callable[[RawFile], BinaryIO]


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
    label          int32 (n,)   index into `labels`, the slice labels that rows have
    by             int32 (n,)   ORIGINAL, or the index of the augmentation that made it out of the nearest original before it
    signature      uint32 (n, k), k = 0 without near duplicates
    `set_aside`: rows that are no records. `cleaned`: rows changed by each step. `flagged`: position to findings by kind.
    `read`: rows of the file in this part.
    """

    record: bytes
    lines: bytes
    key: bytes
    line: bytes
    offset: bytes
    length: bytes
    size: bytes
    side: bytes
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
    "signature": ("<u4", True),
    "line": ("<i8", False),
    "offset": ("<i8", False),
    "length": ("<i8", False),
    "size": ("<i4", False),
    "side": ("u1", False),
    "label": ("<i4", False),
    "by": ("<i4", False),
}


# ---- one row, one record


@dataclass(frozen=True)
class Intake:
    """From a raw row to a record, as the section says. Pickles; what is slow to make is made on first use in each process."""

    section: RecordsSection

    @cached_property
    def finder(self) -> Finder | None:
        wanted = (self.section.secrets, self.section.personal)
        return None if wanted == ("off", "off") else Finder(*wanted)

    def record(self, row: readers.Row, by: int = ORIGINAL) -> Record:
        """The record of a row; with `by` the copy that this augmentation makes of it. Raises readers.Unfit for a row that is none."""
        record = self.examined(row)[0]
        if by == ORIGINAL:
            return record
        copies = dict(augmented(record.messages, record.id, self.section.augment))
        if by not in copies:
            raise readers.Unfit("augmentation", f"augmentation {by} makes nothing of this record")
        return self._copy(record, copies[by], by)

    def examined(self, row: readers.Row) -> tuple[Record, bytes, tuple[str, ...], dict[str, int]]:
        """(record, its leaf line, cleaning steps that changed it, secrets and personal data by kind). Raises readers.Unfit."""
        said, counts = said_by(row.messages), dict[str, int]()
        messages, steps = (row.messages, ()) if untouched(said, self.section) else clean(row.messages, self.section)
        if self.finder is not None:
            found = self.finder.find(messages)
            if found.drop:
                raise readers.Unfit("sensitive", ", ".join(f"{kind} ({count})" for kind, count in sorted(found.counts.items())))
            messages, counts = found.messages, found.counts
        same = said if messages is row.messages else b""
        return *made(messages, row.key, row.slices, self.section.normalize, same), steps, counts

    def copies(self, record: Record) -> list[tuple[int, Record]]:
        """Augmented copies of a record of the training split."""
        return [(by, self._copy(record, messages, by)) for by, messages in augmented(record.messages, record.id, self.section.augment)]

    def _copy(self, record: Record, messages: tuple[Message, ...], by: int) -> Record:
        kind = self.section.augment[by].kind
        key = None if record.key is None else f"{record.key}#{kind}{by}"
        return make(messages, key, {**record.slices, "augmented": kind}, self.section.normalize)


def side(record: str, section: RecordsSection) -> str:
    """`train` or `validation`: drawn by keyed hash of the record id alone, so that a record never changes side."""
    drawn = int.from_bytes(hashlib.sha256(f"{section.split.key}|{record}".encode()).digest()[:8], "big")
    return SPLITS[drawn < threshold(section.split.validation)]


@lru_cache
def threshold(share: float) -> int:
    """The number below which `share` of all 64-bit numbers lie, exactly."""
    from fractions import Fraction

    return int(Fraction(share) * (1 << 64))


# ---- the map


class _Verified:
    """A stream that is hashed while it is read; it cannot seek, so that every byte passes once and in order."""

    def __init__(self, stream: BinaryIO, file: RawFile) -> None:
        self.stream, self.file, self.hash = stream, file, hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        block = self.stream.read(count)
        self.hash.update(block)
        return block

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """The reader is done with it; `finish` closes the stream."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stream.close()

    def finish(self) -> None:
        while self.read(readers.BLOCK):
            pass
        if (found := self.hash.hexdigest()) != self.file.sha256:
            raise SourceError(
                f"{self.file.path}: the bytes read have SHA-256 {found}, the manifest says {self.file.sha256}: "
                "the raw object was changed after it was hashed; materialize raw_snapshot again, or restore the object"
            )


class Parsed(msgspec.Struct, frozen=True):
    """What became of a file. `spilled`: the local file of each part's text; empty where the text is in the store."""

    file: ParsedFile
    spilled: tuple[str, ...]


@dataclass(frozen=True)
class Parse:
    """The task: one raw file to its parts. Columns go to the store; text to the folder `spill`, which this run alone reads, or to the store
    too when there is none, for workers on other machines."""

    section: RecordsSection
    evaluated: Evaluated
    open_raw: OpenRaw
    store: BlobStore
    spill: str = ""

    @cached_property
    def intake(self) -> Intake:
        return Intake(self.section)

    def made_from(self, file: RawFile) -> str:
        """What the parts of a file depend on beside the section and the code."""
        return digest([file.path, file.sha256, file.format, self.evaluated.digest])

    def __call__(self, file: RawFile) -> Parsed:
        made: list[tuple[FilePart, str]] = []
        keyed = self.section.order == "key_hash"
        rows = _Rows(keyed)
        with _Verified(self.open_raw(file), file) as verified:
            for batch in self._batches(file, cast(BinaryIO, verified), rows):
                self._add(rows, batch)
                if rows.bytes >= PART:
                    made.append(rows.store(self.store, self.spill))
                    rows.clear()
            verified.finish()
        if rows.read or not made:
            made.append(rows.store(self.store, self.spill))
        return Parsed(ParsedFile(self.made_from(file), tuple(part for part, _path in made)), tuple(path for _part, path in made))

    def _batches(self, file: RawFile, stream: BinaryIO, rows: "_Rows") -> Iterator[list["_Examined"]]:
        """The file's records as they are before other records and evaluation items are looked at; what is none goes to `rows` at once."""
        source = readers.source_for(file.path, self.section.sources)
        section = self.section
        batch: list[_Examined] = []
        size = 0
        for row in readers.read(file.path, file.format, stream, source, section.row_limit, row_group_limit=section.row_group_limit):
            rows.read += 1
            if isinstance(row, readers.Bad):
                rows.set_aside.append(Set(row.line, row.reason, row.detail))
                continue
            try:
                record, line, steps, counts = self.intake.examined(row)
            except readers.Unfit as unfit:
                rows.set_aside.append(Set(row.line, unfit.reason, unfit.detail))
                continue
            rows.cleaned.update(steps)
            split = side(record.id, section)
            batch.append(_Examined(row, record, line, split, ORIGINAL, counts))
            if section.augment and split == SPLITS[0]:
                batch += [_Examined(row, copy, encode(copy), split, by, {}) for by, copy in self.intake.copies(record)]
            size += len(line)
            if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        yield batch

    def _add(self, rows: "_Rows", batch: list["_Examined"]) -> None:
        items = self.evaluated.find_all([one.record.messages for one in batch])
        clean = [one for one, item in zip(batch, items, strict=True) if item is None]
        rows.set_aside += [
            Set(one.row.line, "contaminated", item)
            for one, item in zip(batch, items, strict=True)
            if item is not None and one.by == ORIGINAL
        ]
        signatures = [b""] * len(clean)
        if clean and (wanted := self.section.near_duplicates) is not None:
            texts = ["\n".join(message.content for message in one.record.messages) for one in clean]
            signatures = [row.tobytes() for row in near.signatures(texts, wanted)]
        gone = {id(one.row) for one, item in zip(batch, items, strict=True) if item is not None and one.by == ORIGINAL}
        for one, signature in zip(clean, signatures, strict=True):
            if id(one.row) not in gone:
                rows.add(one, signature)


class _Examined(msgspec.Struct, frozen=True):
    """A record of the file with its row, leaf line, split, the augmentation that made it, and what was found in it."""

    row: readers.Row
    record: Record
    line: bytes
    split: str
    by: int
    counts: dict[str, int]


class _Rows:
    """The rows of one part while it is read."""

    def __init__(self, keyed: bool) -> None:
        self.keyed = keyed
        self.clear()

    def clear(self) -> None:
        self.text: list[bytes] = []
        self.bytes = self.read = 0
        self.rows = bytearray()
        self.digests: dict[str, list[bytes]] = {name: [] for name in ("record", "lines", "key", "signature")}
        self.labels: dict[tuple[tuple[str, str], ...], int] = {}
        self.set_aside: list[Set] = []
        self.cleaned: Counter[str] = Counter()
        self.flagged: dict[int, dict[str, int]] = {}

    def __len__(self) -> int:
        return len(self.text)

    def add(self, one: _Examined, signature: bytes) -> None:
        row, record, line = one.row, one.record, one.line
        if one.counts:
            self.flagged[len(self)] = one.counts
        name = bytes.fromhex(record.id)
        self.text.append(line)
        self.bytes += len(line)
        digests = self.digests
        digests["record"].append(name)
        digests["lines"].append(hashlib.sha256(line).digest())
        if self.keyed:
            digests["key"].append(hashlib.sha256(name if record.key is None else record.key.encode()).digest())
        if signature:
            digests["signature"].append(signature)
        label = self.labels.setdefault(tuple(record.slices.items()), len(self.labels))
        self.rows += _PACKED.pack(row.line, row.offset, row.length, len(line), label, one.by, SPLITS.index(one.split))

    def store(self, store: BlobStore, spill: str) -> tuple[FilePart, str]:
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
            return FilePart(len(self), blob, store.put_bytes(pressed.compress(b"".join(self.text)))), ""
        handle, path = tempfile.mkstemp(dir=spill, suffix=".text")
        with os.fdopen(handle, "wb") as file:
            file.writelines(self.text)
        return FilePart(len(self), blob, None), path


_PACKED = struct.Struct("<qqqiiiB")
_ROW = np.dtype([(name, COLUMNS[name][0]) for name in ("line", "offset", "length", "size", "label", "by", "side")])


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
