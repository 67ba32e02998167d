"""From raw files to records: strict rows, duplicates and contamination taken out and listed, split by keyed hash, cut into leaves.

Rows are read by `readers.py`; what a record is says `lines.py`. Files are parsed one by one (a pure map), everything that needs
more than one file works on digests and positions only, so memory does not grow with the text.
"""

import hashlib
import os
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, BinaryIO, Self, cast

import msgspec

from repro_assets.data import Progress, readers
from repro_assets.data.chunking import boundaries
from repro_assets.data.errors import DataError, QuarantineError, SourceError
from repro_assets.data.lines import Record, encode, make, normal_text
from repro_assets.documents import RawFile, RawSnapshot, RecordLeaf, Records, RecordsObserved, SourceCount
from repro_assets.recipe import RecordsSection, Source
from repro_assets.trust.blob import Blob, BlobStore
from repro_assets.trust.canonical import sha256

SPLITS = ("train", "validation")
SLICE_VALUES = 1000
BATCH = 64

__all__ = ["Aside", "Place", "asides", "build", "contaminated", "normal_text", "places", "prompt_index", "record_of", "side"]

OpenRaw = Callable[[RawFile], BinaryIO]


class Aside(msgspec.Struct, frozen=True):
    """One line of the quarantine: a row that is not among the records, and why. Line 0 is the file itself."""

    detail: str
    file: str
    line: int
    reason: str


class Place(msgspec.Struct, frozen=True):
    """One line of a raw file's index: where the record `id` came from (`readers.Row` says what offset and length mean)."""

    id: str
    length: int
    line: int
    offset: int


# ---- items of the evaluation suites


class _Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the eval suites' prompts: an item's text after `normal_text`."""

    item: str
    suite: str
    text: str


def prompt_index(prompts: Iterable[bytes] | bytes) -> dict[bytes, str]:
    """Digest of each text in `prompts` (JSONL of {"item", "suite", "text"}, whole or line by line) to the first item's suite/item."""
    rows = prompts.split(b"\n") if isinstance(prompts, bytes) else prompts
    found: dict[bytes, str] = {}
    try:
        for line in rows:
            if line.strip():
                prompt = msgspec.json.decode(line, type=_Prompt)
                found.setdefault(hashlib.sha256(prompt.text.encode()).digest(), f"{prompt.suite}/{prompt.item}")
    except msgspec.DecodeError as error:
        raise DataError(f"the eval suites' prompts cannot be read: {error}; materialize eval_suites again") from error
    return found


def contaminated(record: Record, evaluated: Mapping[bytes, str]) -> str | None:
    """suite/item of the evaluation item that the record's user turns, joined or any one of them, equal after `normal_text`; else None."""
    if not evaluated:
        return None
    turns = [message.content for message in record.messages if message.role == "user"]
    texts = [normal_text(turn) for turn in turns] + ([normal_text("\n".join(turns))] if len(turns) > 1 else [])
    return next((evaluated[name] for text in texts if (name := hashlib.sha256(text.encode()).digest()) in evaluated), None)


# ---- one row, one record


def record_of(row: readers.Row, section: RecordsSection) -> Record:
    """The record of a raw row, cleaned as the recipe says."""
    return make(row.messages, row.key, row.slices, section.normalize)


def side(record: str, section: RecordsSection) -> str:
    """`train` or `validation`: drawn by keyed hash of the record id alone, so that a record never changes side."""
    drawn = int.from_bytes(hashlib.sha256(f"{section.split.key}|{record}".encode()).digest()[:8], "big")
    return SPLITS[drawn < _share(section.split.validation)]


@lru_cache
def _share(share: float) -> int:
    return int(Fraction(share) * (1 << 64))


# ---- the map over files


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


class _Parsed:
    """The good rows of all files in canonical order, as columns; their leaf lines lie in a temporary file."""

    def __init__(self, spill: BinaryIO) -> None:
        self.spill, self.end = spill, 0
        self.ids: list[bytes] = []
        self.file, self.line, self.offset, self.length = array("l"), array("q"), array("q"), array("q")
        self.at, self.size = array("q"), array("q")
        self.sides = bytearray()
        self.labels: dict[tuple[tuple[str, str], ...], int] = {}
        self.label = array("l")

    def add(self, file: int, row: readers.Row, record: Record, split: str) -> None:
        data = encode(record)
        self.spill.write(data)
        self.ids.append(bytes.fromhex(record.id))
        for column, value in zip((self.file, self.line, self.offset, self.length), (file, row.line, row.offset, row.length), strict=True):
            column.append(value)
        self.at.append(self.end)
        self.size.append(len(data))
        self.sides.append(SPLITS.index(split))
        self.label.append(self.labels.setdefault(tuple(record.slices.items()), len(self.labels)))
        self.end += len(data)

    def __len__(self) -> int:
        return len(self.ids)

    def data(self, position: int) -> bytes:
        return os.pread(self.spill.fileno(), self.size[position], self.at[position])


class _Tally:
    """What was read of each source and file, and every row that was set aside."""

    def __init__(self, sources: tuple[Source, ...]) -> None:
        self.sources = sources
        self.counts: list[Counter[str]] = [Counter() for _ in sources]
        self.asides: list[tuple[int, int, Aside]] = []
        self.bad: list[Aside] = []

    def aside(self, rank: int, number: int, aside: Aside) -> None:
        self.asides.append((number, aside.line, aside))
        kind = {"duplicate": "duplicates", "contaminated": "contaminated"}.get(aside.reason, "quarantined")
        self.counts[rank][kind] += 1
        if kind == "quarantined":
            self.bad.append(aside)

    @property
    def read(self) -> int:
        return sum(count["read"] for count in self.counts)


def _parse(
    file: RawFile,
    number: int,
    rank: int,
    stream: BinaryIO,
    section: RecordsSection,
    evaluated: Mapping[bytes, str],
    parsed: _Parsed,
    tally: _Tally,
) -> None:
    """Read one file to its end: good rows to `parsed`, the others to `tally`."""
    source = section.sources[rank]
    count = tally.counts[rank]
    count["files"] += 1
    with _Verified(stream, file) as verified:
        for row in readers.read(file.path, file.format, cast(BinaryIO, verified), source, section.row_limit):
            count["read"] += 1
            if isinstance(row, readers.Bad):
                tally.aside(rank, number, Aside(row.detail, file.path, row.line, row.reason))
                continue
            record = record_of(row, section)
            if item := contaminated(record, evaluated):
                tally.aside(rank, number, Aside(f"the prompt is the evaluation item {item}", file.path, row.line, "contaminated"))
                continue
            parsed.add(number, row, record, side(record.id, section))
        verified.finish()


# ---- the global steps, over digests and positions


def _keep(parsed: _Parsed, ranks: list[int], files: list[RawFile], tally: _Tally) -> list[int]:
    """Positions that stay when equal messages are kept once: the lowest (source rank, digest of the leaf line, position) of each."""
    best: dict[bytes, int] = {}
    losers: list[int] = []
    for position, name in enumerate(parsed.ids):
        held = best.setdefault(name, position)
        if held != position:
            wins = _precedes(parsed, ranks, position, held)
            best[name] = position if wins else held
            losers.append(held if wins else position)
    for position in losers:
        winner = best[parsed.ids[position]]
        number = parsed.file[position]
        where = f"{files[parsed.file[winner]].path}:{parsed.line[winner]}"
        tally.aside(ranks[number], number, Aside(f"the same messages as {where}", files[number].path, parsed.line[position], "duplicate"))
    lost = set(losers)
    return [position for position in range(len(parsed)) if position not in lost]


def _precedes(parsed: _Parsed, ranks: list[int], position: int, held: int) -> bool:
    mine, other = ranks[parsed.file[position]], ranks[parsed.file[held]]
    if mine != other:
        return mine < other
    line, kept = parsed.data(position), parsed.data(held)
    return line != kept and sha256(line) < sha256(kept)


def _cut(parsed: _Parsed, kept: list[int], order: str, target: int, store: BlobStore) -> tuple[list[RecordLeaf], int]:
    """Leaves of each split, stored unless the store holds them; also how many it held."""
    leaves: list[RecordLeaf] = []
    known = 0
    for number, split in enumerate(SPLITS):
        here = [position for position in kept if parsed.sides[position] == number]
        if order == "key_hash":
            here.sort(key=lambda position: _order_key(parsed, position))
        starts, ends = [0], boundaries([parsed.ids[position] for position in here], target)
        starts += ends[:-1]
        cuts = list(zip(starts, ends, strict=False))
        for first in range(0, len(cuts), BATCH):
            items = [b"".join(parsed.data(position) for position in here[start:end]) for start, end in cuts[first : first + BATCH]]
            blobs, new = _put(store, items)
            known += len(items) - new
            leaves += [RecordLeaf(split, blob, end - start) for blob, (start, end) in zip(blobs, cuts[first : first + BATCH], strict=True)]
    return leaves, known


def _order_key(parsed: _Parsed, position: int) -> tuple[bytes, bytes]:
    key = msgspec.json.decode(parsed.data(position), type=dict[str, Any])["key"]
    name = parsed.ids[position]
    return hashlib.sha256(name if key is None else key.encode()).digest(), name


def _put(store: BlobStore, items: list[bytes]) -> tuple[list[Blob], int]:
    """The items as blobs, and how many had to be stored."""
    blobs = [Blob(sha256(item), len(item)) for item in items]
    missing = store.missing({blob.sha256 for blob in blobs})
    store.put_many([item for item, blob in zip(items, blobs, strict=True) if blob.sha256 in missing])
    return blobs, len(missing)


def _index(parsed: _Parsed, kept: list[int], files: list[RawFile], store: BlobStore) -> dict[str, Blob]:
    lines: list[list[bytes]] = [[] for _ in files]
    for position in kept:
        place = Place(parsed.ids[position].hex(), parsed.length[position], parsed.line[position], parsed.offset[position])
        lines[parsed.file[position]].append(msgspec.json.encode(place))
    blobs, _new = _put(store, [b"".join(line + b"\n" for line in rows) for rows in lines])
    return {file.path: blob for file, blob in zip(files, blobs, strict=True)}


def _slices(parsed: _Parsed, kept: list[int], files: list[RawFile]) -> dict[str, Counter[str]]:
    """Kept records by slice label and value. Raises DataError for a label that has a value for nearly every record."""
    names = list(parsed.labels)
    counts: dict[str, Counter[str]] = {}
    for number, count in Counter(parsed.label[position] for position in kept).items():
        for label, value in names[number]:
            counts.setdefault(label, Counter())[value] += count
    if wide := sorted(label for label, values in counts.items() if len(values) > SLICE_VALUES):
        where = next(files[parsed.file[position]].path for position in kept if wide[0] in dict(names[parsed.label[position]]))
        raise DataError(
            f"{where}: slice label {wide[0]!r} has {len(counts[wide[0]])} values, more than {SLICE_VALUES}; "
            "map a field with few values in records.sources[].slices (an id belongs in fields.id)"
        )
    return counts


def _limit(tally: _Tally, section: RecordsSection) -> None:
    bad, read = len(tally.bad), tally.read
    if bad <= section.quarantine_limit * read:
        return
    shown = "\n".join(f"  {aside.file}:{aside.line}: {aside.reason}: {aside.detail}" for aside in tally.bad[:10])
    more = f"\n  and {bad - 10} more" if bad > 10 else ""
    raise QuarantineError(
        f"{bad} of {read} rows are bad ({bad / read:.2%}), more than records.quarantine_limit ({section.quarantine_limit:.2%}):\n"
        f"{shown}{more}\n"
        "Mend the rows and import again, map the right fields in records.sources, or raise records.quarantine_limit"
    )


# ---- the whole


def build(
    snapshot: RawSnapshot,
    open_raw: OpenRaw,
    prompts: Iterable[bytes] | bytes,
    section: RecordsSection,
    store: BlobStore,
    progress: Progress | None = None,
    *,
    order: str = "path",
    target: int = 256,
) -> tuple[Records, RecordsObserved]:
    """Records of the snapshot. `prompts`: the eval suites' JSONL (`prompt_index`). `order`, `target`: how leaves are cut.

    Every row that is read is kept, quarantined, a duplicate or contaminated; all but the kept are in the quarantine blob.
    Raises SourceError for a file that cannot be read, QuarantineError for too many bad rows, DataError when nothing is left.
    """
    started = time.monotonic()
    files = list(snapshot.files_listed)
    ranks = [section.sources.index(readers.checked(readers.source_for(file.path, section.sources))) for file in files]
    evaluated = prompt_index(prompts) if section.contamination == "exact" else {}
    tally = _Tally(section.sources)
    with tempfile.TemporaryFile(buffering=1 << 20) as spill:
        parsed = _Parsed(cast(BinaryIO, spill))
        done = 0
        for number, (file, rank) in enumerate(zip(files, ranks, strict=True)):
            _parse(file, number, rank, open_raw(file), section, evaluated, parsed, tally)
            done += file.size
            if progress:
                progress("bytes read", done, snapshot.size)
        spill.flush()
        _limit(tally, section)
        kept = _keep(parsed, ranks, files, tally) if section.duplicates == "drop" else list(range(len(parsed)))
        if not kept:
            raise DataError(f"no records are left of {tally.read} rows: {_reasons(tally)}; see records.sources and the raw files")
        for position in kept:
            tally.counts[ranks[parsed.file[position]]]["kept"] += 1
        slices = _slices(parsed, kept, files)
        leaves, known = _cut(parsed, kept, order, target, store)
        index = _index(parsed, kept, files, store)
    result = _document(tally, slices, leaves, index, store)
    seconds = time.monotonic() - started
    observed = RecordsObserved(seconds, snapshot.size / 1e6 / seconds, known, len(leaves) - known)
    return result, observed


def _reasons(tally: _Tally) -> dict[str, int]:
    return dict(sorted(Counter(aside.reason for _number, _line, aside in tally.asides).items()))


def _document(
    tally: _Tally, slices: dict[str, Counter[str]], leaves: list[RecordLeaf], index: dict[str, Blob], store: BlobStore
) -> Records:
    asides = sorted(tally.asides, key=lambda item: item[:2])
    quarantine = store.put_bytes(b"".join(msgspec.json.encode(aside) + b"\n" for _number, _line, aside in asides))
    sources = tuple(
        SourceCount(
            source.match, source.license, *(count[name] for name in ("files", "read", "kept", "quarantined", "duplicates", "contaminated"))
        )
        for source, count in zip(tally.sources, tally.counts, strict=True)
    )
    return Records(
        sources=sources,
        reasons=_reasons(tally),
        leaves=tuple(leaves),
        index=index,
        quarantine=quarantine,
        splits={split: sum(leaf.records for leaf in leaves if leaf.split == split) for split in SPLITS},
        slices={label: dict(sorted(values.items())) for label, values in sorted(slices.items())},
    )


def asides(store: BlobStore, records: Records) -> Iterator[Aside]:
    """The quarantine of `records`: every row that was set aside, in the order of files and lines."""
    return (msgspec.json.decode(line, type=Aside) for line in store.get_bytes(records.quarantine.sha256).split(b"\n") if line)


def places(store: BlobStore, records: Records, path: str) -> Iterator[Place]:
    """Where the records of one raw file came from, in the order of the file."""
    return (msgspec.json.decode(line, type=Place) for line in store.get_bytes(records.index[path].sha256).split(b"\n") if line)
