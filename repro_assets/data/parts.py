"""The map over raw files: each file's rows as columns of digests and places, kept in the blob store, and their leaf lines as text.

A pure function of the file's bytes, the records section and the evaluation items, so that an unchanged file is not parsed again.
What needs more than one file is `records.py`; reading rows is `readers.py`; the cleaning steps have modules of their own.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import BinaryIO, Self, cast

import msgspec

from repro_assets.data import near, readers
from repro_assets.data.augmenting import augmented
from repro_assets.data.cleaning import clean, untouched
from repro_assets.data.columns import SPLITS, Earlier, Examined, Rows, Set, Spill
from repro_assets.data.contamination import Evaluated
from repro_assets.data.errors import SourceError
from repro_assets.data.lines import Message, Record, encode, made, make, said_by
from repro_assets.data.places import ORIGINAL
from repro_assets.data.sensitive import Finder
from repro_assets.documents import FilePart, ParsedFile, RawFile
from repro_assets.recipe import RecordsSection
from repro_assets.trust.blob import BlobStore
from repro_assets.trust.canonical import digest

BATCH_ROWS, BATCH_BYTES = 256, 4 << 20  # records that the steps that pay by call take at once
PART = 32 << 20  # bytes of leaf lines in one part: what a worker holds, and what is fetched when a leaf must be written

OpenRaw = Callable[[RawFile], BinaryIO]


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
        messages, steps = (row.messages, ()) if untouched(said, row.messages, self.section) else clean(row.messages, self.section)
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
    return int(Fraction(share) * (1 << 64))


# ---- the map


class _Verified:
    """A stream that is hashed while it is read; it cannot seek, so that every byte passes once and in order.

    A thread hashes each block while the reader looks at it, and is waited for before the next."""

    def __init__(self, stream: BinaryIO, file: RawFile) -> None:
        self.stream, self.file, self.hash = stream, file, hashlib.sha256()
        self.thread = ThreadPoolExecutor(1)
        self.hashing: Future[None] | None = None

    def read(self, count: int = -1) -> bytes:
        block = self.stream.read(count)
        if self.hashing is not None:
            self.hashing.result()
        self.hashing = self.thread.submit(self.hash.update, block) if block else None
        return block

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """The reader is done with it; `finish` closes the stream."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.thread.shutdown()
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
    """What became of a file. `spilled`: for each part the local file of its text; None where the text is in the store."""

    file: ParsedFile
    spilled: tuple[Spill | None, ...]


class Unit(msgspec.Struct, frozen=True):
    """A raw file, and what parsing gave when it had other bytes."""

    file: RawFile
    before: ParsedFile | None = None


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

    def __call__(self, unit: Unit) -> Parsed:
        file = unit.file
        usable = unit.before is not None and unit.before.items == self.evaluated.digest and self.spill
        known = Earlier(unit.before if usable else None, self.store)
        made: list[tuple[FilePart, Spill | None]] = []
        rows = Rows(self.section.order == "key_hash")
        with _Verified(self.open_raw(file), file) as verified:
            for batch in self._batches(file, cast(BinaryIO, verified), rows, known):
                self._add(rows, batch, known)
                if rows.bytes >= PART:
                    made.append(rows.store(self.store, self.spill))
                    rows.clear()
            verified.finish()
        if rows.read or not made:
            made.append(rows.store(self.store, self.spill))
        parsed = ParsedFile(self.made_from(file), self.evaluated.digest, tuple(part for part, _spill in made))
        return Parsed(parsed, tuple(spill for _part, spill in made))

    def _batches(self, file: RawFile, stream: BinaryIO, rows: Rows, known: Earlier) -> Iterator[list[Examined | readers.Seen]]:
        """The file's records as they are before other records and evaluation items are looked at; what is none goes to `rows` at once."""
        source = readers.source_for(file.path, self.section.sources)
        section = self.section
        batch: list[Examined | readers.Seen] = []
        size = 0
        for row in readers.read(
            file.path, file.format, stream, source, section.row_limit, row_group_limit=section.row_group_limit, known_by=known.find
        ):
            rows.read += 1
            if isinstance(row, readers.Seen):
                batch.append(row)
            elif isinstance(row, readers.Bad):
                rows.set_aside.append(Set(row.line, row.reason, row.detail))
            else:
                try:
                    record, line, steps, counts = self.intake.examined(row)
                except readers.Unfit as unfit:
                    rows.set_aside.append(Set(row.line, unfit.reason, unfit.detail))
                    continue
                split = side(record.id, section)
                batch.append(Examined(row, record, line, split, ORIGINAL, counts, known.digest, steps))
                if section.augment and split == SPLITS[0]:
                    batch += [Examined(row, copy, encode(copy), split, by, {}, known.digest, ()) for by, copy in self.intake.copies(record)]
                size += len(line)
            if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        yield batch

    def _add(self, rows: Rows, batch: list[Examined | readers.Seen], known: Earlier) -> None:
        fresh = [one for one in batch if isinstance(one, Examined)]
        items = dict(zip(map(id, fresh), self.evaluated.find_all([one.record.messages for one in fresh]), strict=True))
        clean = [one for one in fresh if items[id(one)] is None]
        signatures: dict[int, bytes] = {}
        if clean and (wanted := self.section.near_duplicates) is not None:
            texts = ["\n".join(message.content for message in one.record.messages) for one in clean]
            signatures = {id(one): row.tobytes() for one, row in zip(clean, near.signatures(texts, wanted), strict=True)}
        gone = None
        for one in batch:
            if isinstance(one, readers.Seen):
                rows.take(one, known)
                continue
            if (item := items[id(one)]) is None:
                if one.row is not gone:  # a copy goes with its original
                    rows.add(one, signatures.get(id(one), b""))
            elif one.by == ORIGINAL:
                gone = one.row
                rows.cleaned.update(one.steps)
                rows.set_aside.append(Set(one.row.line, "contaminated", item))
