"""From raw files to records: duplicates taken out and listed, sources sampled, records split by keyed hash and cut into leaves.

Files are parsed one by one (`parts.py`, a pure map that may run anywhere); what needs more than one file works here on digests and
places only, so memory grows with the number of records (about 150 bytes each) and not with their text.
"""

import hashlib
import heapq
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.data import Progress, diff, near, parts, readers
from repro_assets.data.chunking import boundaries
from repro_assets.data.contamination import Evaluated
from repro_assets.data.errors import DataError, QuarantineError, SourceError
from repro_assets.data.lines import encode
from repro_assets.data.parts import SPLITS, OpenRaw, Parse, side, threshold
from repro_assets.data.places import ORIGINAL, PLACE, Place, places
from repro_assets.data.workers import Serial, Workers
from repro_assets.documents import FilePart, ParsedFile, RawFile, RawSnapshot, RecordLeaf, Records, RecordsObserved, Since, SourceCount
from repro_assets.recipe import RecordsSection, Source
from repro_assets.trust.blob import Blob, BlobStore
from repro_assets.trust.canonical import sha256

SLICE_VALUES = 1000
BATCH = 64
#: reason of a row that was set aside -> the field of SourceCount that counts it; every other reason is quarantine
COUNTED = {
    "duplicate": "duplicates",
    "near_duplicate": "near_duplicates",
    "contaminated": "contaminated",
    "sensitive": "sensitive",
    "unsampled": "unsampled",
}

__all__ = ["Aside", "Place", "asides", "build", "places", "side"]


class Aside(msgspec.Struct, frozen=True):
    """One line of the quarantine: a row that is not among the records, and why. Line 0 is the file itself."""

    detail: str
    file: str
    line: int
    reason: str


class _Flag(msgspec.Struct, frozen=True):
    """One line of `flagged`: a record and how many secrets and personal data of each kind were found in it."""

    id: str
    kinds: dict[str, int]


class _Beside(msgspec.Struct, frozen=True):
    """What a part says beside its columns."""

    labels: tuple[dict[str, str], ...]
    set_aside: tuple[parts.Set, ...]
    cleaned: dict[str, int]
    flagged: dict[int, dict[str, int]]
    read: int


class _Table:
    """Every row of all files in canonical order, as columns over the parts; about 110 bytes a row."""

    def __init__(self, files: list[RawFile], ranks: list[int], parsed: list[ParsedFile], store: BlobStore) -> None:
        self.files, self.store = files, store
        self.parts: list[tuple[int, FilePart]] = [(number, part) for number, file in enumerate(parsed) for part in file.parts]
        rows = [part.rows for _number, part in self.parts]
        self.starts = np.cumsum([0, *rows])
        self.beside: list[_Beside] = []
        columns: dict[str, list[NDArray[Any]]] = {name: [] for name in parts.COLUMNS}
        for data in store.get_many(part.columns.sha256 for _number, part in self.parts):
            held = parts.columns(data)
            self.beside.append(_Beside(held.labels, held.set_aside, held.cleaned, held.flagged, held.read))
            for name, arrays in columns.items():
                if held.side:
                    arrays.append(parts.column(held, name))

        def whole(name: str) -> NDArray[Any]:
            arrays, (kind, wide) = columns.pop(name), parts.COLUMNS[name]
            return np.concatenate(arrays) if arrays else np.zeros((0, 32) if wide else 0, kind)

        self.record, self.lines, self.key, self.signature = (whole(name) for name in ("record", "lines", "key", "signature"))
        self.line, self.offset, self.length, self.size = (whole(name) for name in ("line", "offset", "length", "size"))
        self.side, self.by, self.label = whole("side"), whole("by"), whole("label")
        self.part = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
        self._file = np.array([number for number, _part in self.parts], np.int32)
        self._rank = np.array([ranks[number] for number, _part in self.parts], np.int32)

    def __len__(self) -> int:
        return len(self.line)

    def file(self, position: int) -> int:
        return int(self._file[self.part[position]])

    def rank(self, position: int) -> int:
        return int(self._rank[self.part[position]])

    def ranks(self, positions: NDArray[np.int64]) -> NDArray[np.int32]:
        return self._rank[self.part[positions]]

    def rows_of(self, file: int) -> tuple[int, int]:
        """First position and end of a file's rows."""
        mine = np.flatnonzero(self._file == file)
        return (int(self.starts[mine[0]]), int(self.starts[mine[-1] + 1])) if len(mine) else (0, 0)

    def where(self, position: int) -> str:
        return f"{self.files[self.file(position)].path}:{self.line[position]}"

    def labels(self, position: int) -> dict[str, str]:
        return self.beside[self.part[position]].labels[self.label[position]]


class _Texts:
    """Leaf lines by position: from the files that this run's workers wrote, else from the part's text in the store, else from the raw file
    again, row by row and checked against the digest of the line."""

    HELD = 3

    def __init__(self, table: _Table, spilled: dict[int, str], task: Parse) -> None:
        self.table, self.task = table, task
        self.files = {number: open(path, "rb") for number, path in spilled.items()}  # noqa: SIM115  closed by `close`
        self.held: dict[int, bytes] = {}
        self.again: dict[int, bytes] = {}
        ends = np.cumsum(table.size, dtype=np.int64)
        first = np.concatenate([[0], ends])[table.starts[:-1]] if len(ends) else np.zeros(0, np.int64)
        self.starts = ends - table.size - np.repeat(first, np.diff(table.starts))

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def prepare(self, positions: NDArray[np.int64]) -> None:
        """Read those rows again that are to be had in no other way; each raw file is opened once."""
        table = self.table
        bare = [number for number, (_file, part) in enumerate(table.parts) if number not in self.files and part.text is None]
        wanted = positions[np.isin(table.part[positions], bare)]
        for number in sorted({table.file(at) for at in wanted.tolist()}):
            file = table.files[number]
            rows: dict[int, list[int]] = {}
            for at in wanted.tolist():
                if table.file(at) == number:
                    rows.setdefault(int(table.line[at]), []).append(at)
            source = readers.source_for(file.path, self.task.section.sources)
            places = [(line, int(table.offset[here[0]]), int(table.length[here[0]])) for line, here in rows.items()]
            for row in readers.again(file.path, file.format, lambda file=file: self.task.open_raw(file), source, places):  # type: ignore[misc]
                for at in rows[row.line]:
                    self.again[at] = self._checked(row, at)

    def _checked(self, row: readers.Row | readers.Bad, position: int) -> bytes:
        try:
            line = b"" if isinstance(row, readers.Bad) else encode(self.task.intake.record(row, int(self.table.by[position])))
        except readers.Unfit:
            line = b""
        if hashlib.sha256(line).digest() != bytes(self.table.lines[position]):
            raise SourceError(
                f"{self.table.where(position)}: the row is not the one that was parsed before from the same bytes: "
                "the raw object was changed; materialize raw_snapshot again, or restore the object"
            )
        return line

    def lines(self, positions: NDArray[np.int64]) -> bytes:
        """The lines of these rows, in this order; runs of neighbours are taken at once."""
        part = self.table.part[positions]
        breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(part) != 0)) + 1
        first, last = positions[np.concatenate([[0], breaks])], positions[np.concatenate([breaks - 1, [len(positions) - 1]])]
        return b"".join(self._run(*ends) for ends in zip(first.tolist(), last.tolist(), strict=True))

    def _run(self, first: int, last: int) -> bytes:
        number = int(self.table.part[first])
        begin, end = int(self.starts[first]), int(self.starts[last]) + int(self.table.size[last])
        if number in self.files:
            return os.pread(self.files[number].fileno(), end - begin, begin)
        if (stored := self.table.parts[number][1].text) is None:
            return b"".join(self.again[at] for at in range(first, last + 1))
        if number not in self.held:
            while len(self.held) >= self.HELD:
                self.held.pop(next(iter(self.held)))
            self.held[number] = parts.text(self.table.store.get_bytes(stored.sha256))
        return self.held[number][begin:end]


class _Tally:
    """What was read of each source and file, and every row that was set aside."""

    def __init__(self, sources: tuple[Source, ...]) -> None:
        self.sources = sources
        self.counts: list[Counter[str]] = [Counter() for _ in sources]
        self.asides: list[tuple[int, int, Aside]] = []
        self.bad: list[Aside] = []
        self.cleaned: Counter[str] = Counter()

    def aside(self, rank: int, number: int, aside: Aside) -> None:
        self.asides.append((number, aside.line, aside))
        kind = COUNTED.get(aside.reason, "quarantined")
        self.counts[rank][kind] += 1
        if kind == "quarantined":
            self.bad.append(aside)

    @property
    def read(self) -> int:
        return sum(count["read"] for count in self.counts)

    @property
    def reasons(self) -> dict[str, int]:
        return dict(sorted(Counter(aside.reason for _number, _line, aside in self.asides).items()))


# ---- the global steps, over digests and places


class _Kept:
    """Which positions of the table stay. A copy that an augmentation made goes, uncounted, when its original does."""

    def __init__(self, table: _Table, tally: _Tally) -> None:
        self.table, self.tally = table, tally
        self.mask = np.ones(len(table), bool)

    def drop(self, position: int, reason: str, detail: str) -> None:
        self.mask[position] = False
        if self.table.by[position] == ORIGINAL:
            number = self.table.file(position)
            aside = Aside(detail, self.table.files[number].path, int(self.table.line[position]), reason)
            self.tally.aside(self.table.rank(position), number, aside)

    def originals(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.mask & (self.table.by == ORIGINAL))

    def duplicates(self) -> None:
        """Equal messages are kept once. An original wins over a copy."""
        for group in _equal(self.table.record, np.flatnonzero(self.mask)):
            group.sort(key=lambda at: (self.table.by[at] != ORIGINAL, self.table.rank(at), bytes(self.table.lines[at]), at))
            for position in group[1:]:
                self.drop(position, "duplicate", f"the same messages as {self.table.where(group[0])}")

    def near_duplicates(self, section: RecordsSection) -> list[tuple[int, list[int]]]:
        """Of each cluster one record stays; the clusters as (kept, dropped) positions."""
        if (wanted := section.near_duplicates) is None:
            return []
        here = self.originals()
        clusters = []
        for cluster in near.clusters(self.table.signature[here], wanted):
            first, *rest = sorted((int(here[at]) for at in cluster), key=lambda at: (self.table.rank(at), bytes(self.table.lines[at])))
            clusters.append((first, rest))
            for position in rest:
                self.drop(position, "near_duplicate", f"nearly the same text as {self.table.where(first)}")
        return clusters

    def sample(self, sources: Sequence[Source]) -> None:
        """Weights and quotas: those records stay whose keyed hash is lowest, so that others come and go without moving them."""
        for rank, source in enumerate(sources):
            if source.weight >= 1 and source.quota is None:
                continue
            here = self.originals()
            drawn = [(_draw(self.table.record[at]), int(at)) for at in here[self.table.ranks(here) == rank]]
            limit = threshold(source.weight)
            for number, at in drawn:
                if number >= limit:
                    self.drop(at, "unsampled", f"outside the weight {source.weight} of the source")
            left = [pair for pair in drawn if pair[0] < limit]
            if source.quota is not None and len(left) > source.quota:
                stay = {at for _number, at in heapq.nsmallest(source.quota, left)}
                for _number, at in left:
                    if at not in stay:
                        self.drop(at, "unsampled", f"beyond the quota of {source.quota} records of the source")

    def copies(self) -> None:
        """Copies stand beside originals that stayed."""
        parent = np.maximum.accumulate(np.where(self.table.by == ORIGINAL, np.arange(len(self.table)), 0))
        self.mask &= self.mask[parent]

    def positions(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.mask)


def _equal(digests: NDArray[np.uint8], positions: NDArray[np.int64]) -> Iterator[list[int]]:
    """Groups of at least two positions with the same digest."""
    heads = np.ascontiguousarray(digests[positions, :8]).view(">u8").reshape(-1)
    order = np.argsort(heads, kind="stable")
    ranked = heads[order]
    edges = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]])) if len(ranked) else np.zeros(1, np.int64)
    for start in np.flatnonzero(np.diff(edges) > 1).tolist():
        groups: dict[bytes, list[int]] = {}
        for at in positions[order[edges[start] : edges[start + 1]]].tolist():
            groups.setdefault(bytes(digests[at]), []).append(at)
        yield from (group for group in groups.values() if len(group) > 1)


def _draw(record: NDArray[np.uint8]) -> int:
    return int.from_bytes(hashlib.sha256(b"sample|" + bytes(record)).digest()[:8], "big")


# ---- leaves and indices


def _cut(
    table: _Table, kept: NDArray[np.int64], section: RecordsSection, known: dict[str, RecordLeaf], store: BlobStore, texts: _Texts
) -> tuple[list[RecordLeaf], int]:
    """Leaves of each split, and how many were there before. The text of a known leaf is not fetched."""
    leaves: list[RecordLeaf] = []
    wanted: list[tuple[int, NDArray[np.int64]]] = []
    reused = 0
    for number, split in enumerate(SPLITS):
        here = kept[table.side[kept] == number]
        if section.order == "key_hash":
            here = here[np.lexsort([*_words(table.record[here]), *_words(table.key[here])])]
        ends = boundaries(table.record[here], section.target)
        for start, end in pairwise([0, *ends]):
            positions = here[start:end]
            lines = sha256(table.lines[positions].tobytes())
            if lines in known:
                reused += 1
            else:
                wanted.append((len(leaves), positions))
            blob = known[lines].blob if lines in known else Blob("0" * 64, 0)
            leaves.append(RecordLeaf(split, blob, len(positions), lines))
    # In the order of files whatever the split, so that each part is fetched about once.
    wanted.sort(key=lambda item: int(item[1][0]))
    if wanted:
        texts.prepare(np.concatenate([positions for _number, positions in wanted]))
    for first in range(0, len(wanted), BATCH):
        batch = wanted[first : first + BATCH]
        items = [texts.lines(positions) for _number, positions in batch]
        blobs = [Blob(sha256(item), len(item)) for item in items]
        missing = store.missing({blob.sha256 for blob in blobs})
        store.put_many([item for item, blob in zip(items, blobs, strict=True) if blob.sha256 in missing])
        reused += len(blobs) - len(missing)
        for (number, _positions), blob in zip(batch, blobs, strict=True):
            leaves[number] = msgspec.structs.replace(leaves[number], blob=blob)
    return leaves, reused


def _words(digests: NDArray[np.uint8]) -> list[NDArray[np.uint64]]:
    """Digests as four numbers each, the last significant first, as lexsort takes its keys."""
    words = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)
    return [words[:, at] for at in (3, 2, 1, 0)]


def _index(table: _Table, kept: NDArray[np.int64], store: BlobStore) -> dict[str, Blob]:
    index: dict[str, Blob] = {}
    for number, file in enumerate(table.files):
        here = kept[slice(*np.searchsorted(kept, table.rows_of(number)))]
        places = np.zeros(len(here), PLACE)
        for name, column in (
            ("id", table.record),
            ("length", table.length),
            ("line", table.line),
            ("offset", table.offset),
            ("by", table.by),
        ):
            places[name] = column[here]
        index[file.path] = store.put_bytes(places.tobytes())
    return index


def _slices(table: _Table, kept: NDArray[np.int64]) -> dict[str, dict[str, int]]:
    """Kept records by slice label and value. Raises DataError for a label that has a value for nearly every record."""
    counts: dict[str, Counter[str]] = {}
    pairs, numbers = np.unique(np.stack([table.part[kept], table.label[kept]]), axis=1, return_counts=True)
    for (part, label), count in zip(pairs.T.tolist(), numbers.tolist(), strict=True):
        for name, value in table.beside[part].labels[label].items():
            counts.setdefault(name, Counter())[value] += count
    if wide := sorted(label for label, values in counts.items() if len(values) > SLICE_VALUES):
        where = next(table.files[table.file(at)].path for at in kept.tolist() if wide[0] in table.labels(at))
        raise DataError(
            f"{where}: slice label {wide[0]!r} has {len(counts[wide[0]])} values, more than {SLICE_VALUES}; "
            "map a field with few values in records.sources[].slices (an id belongs in fields.id)"
        )
    return {label: dict(sorted(values.items())) for label, values in sorted(counts.items())}


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
    previous: tuple[Records, RecordsObserved] | None = None,
    workers: Workers | None = None,
) -> tuple[Records, RecordsObserved]:
    """Records of the snapshot. `prompts`: the eval suites' JSONL (`contamination.py`).

    `previous`: records made under the same section by the same code; files that it parsed from the same bytes are not parsed again, and
    leaves that it has are not written again. `workers`: where files are parsed; `open_raw` must pickle unless that is this process.
    Every row that is read is kept or in the quarantine blob with its reason.
    Raises SourceError for a file that cannot be read, QuarantineError for too many bad rows, DataError when nothing is left.
    """
    started = time.monotonic()
    files = list(snapshot.files_listed)
    ranks = [section.sources.index(readers.checked(readers.source_for(file.path, section.sources))) for file in files]
    workers = workers or Serial()
    with tempfile.TemporaryDirectory(prefix="repro-records-") as spill:
        task = Parse(section, Evaluated.build(prompts, section), open_raw, store, spill if workers.local else "")
        parsed, spilled, fresh = _parsed(files, task, previous, workers, progress)
        table = _Table(files, ranks, parsed, store)
        tally = _Tally(section.sources)
        _told(table, ranks, tally)
        _limit(tally, section)
        positions, clusters = _chosen(table, tally, section)
        with closing(_Texts(table, spilled, task)) as texts:
            leaves, reused = _cut(table, positions, section, _known_leaves(previous, store), store, texts)
    result = _document(table, tally, positions, clusters, leaves, store)
    since = _since(previous, result, parsed, files, store)
    seconds = time.monotonic() - started
    observed = RecordsObserved(
        seconds=seconds,
        megabytes_per_second=snapshot.size / 1e6 / seconds,
        leaves_known=reused,
        leaves_new=len(leaves) - reused,
        files_parsed=fresh,
        files_known=len(files) - fresh,
        parsed={file.path: held for file, held in zip(files, parsed, strict=True)},
        since=since,
    )
    return result, observed


def _chosen(table: _Table, tally: _Tally, section: RecordsSection) -> tuple[NDArray[np.int64], list[tuple[int, list[int]]]]:
    """Positions of the records that stay, and the clusters of near duplicates as (kept, dropped) positions."""
    kept = _Kept(table, tally)
    if section.duplicates == "drop":
        kept.duplicates()
    clusters = kept.near_duplicates(section)
    kept.sample(section.sources)
    kept.copies()
    positions = kept.positions()
    if not len(positions):
        raise DataError(f"no records are left of {tally.read} rows: {tally.reasons}; see records.sources and the raw files")
    original = table.by[positions] == ORIGINAL
    for rank, count in enumerate(tally.counts):
        here = table.ranks(positions) == rank
        count.update(kept=int((here & original).sum()), augmented=int((here & ~original).sum()))
    return positions, clusters


def _parsed(
    files: list[RawFile], task: Parse, previous: tuple[Records, RecordsObserved] | None, workers: Workers, progress: Progress | None
) -> tuple[list[ParsedFile], dict[int, str], int]:
    """Every file's parts, the local files of texts by the number of the part, and how many files were parsed."""
    before = previous[1].parsed if previous else {}
    lost = task.store.missing({blob.sha256 for file in before.values() for blob in _blobs(file)})
    found: list[ParsedFile | None] = []
    for file in files:
        held = before.get(file.path)
        whole = held is not None and held.made_from == task.made_from(file) and not any(blob.sha256 in lost for blob in _blobs(held))
        found.append(held if whole else None)
    todo = [number for number, held in enumerate(found) if held is None]
    total = sum(file.size for file in files)
    done = total - sum(files[number].size for number in todo)
    spilled: dict[int, tuple[str, ...]] = {}
    for number, made in zip(todo, workers.map(task, [files[number] for number in todo]), strict=True):
        found[number], spilled[number] = made.file, made.spilled
        done += files[number].size
        if progress:
            progress("bytes read", done, total)
    parsed = cast(list[ParsedFile], found)
    paths = [path for number, file in enumerate(parsed) for path in spilled.get(number, ("",) * len(file.parts))]
    return parsed, {number: path for number, path in enumerate(paths) if path}, len(todo)


def _blobs(file: ParsedFile) -> list[Blob]:
    return [blob for part in file.parts for blob in (part.columns, part.text) if blob is not None]


def _told(table: _Table, ranks: list[int], tally: _Tally) -> None:
    """What the parts say of the rows that they hold no record of."""
    for rank in ranks:
        tally.counts[rank]["files"] += 1
    for (number, _part), beside in zip(table.parts, table.beside, strict=True):
        tally.counts[ranks[number]]["read"] += beside.read
        tally.cleaned.update(beside.cleaned)
        for row in beside.set_aside:
            tally.aside(ranks[number], number, Aside(row.detail, table.files[number].path, row.line, row.reason))


def _since(
    previous: tuple[Records, RecordsObserved] | None, now: Records, parsed: list[ParsedFile], files: list[RawFile], store: BlobStore
) -> Since | None:
    if previous is None:
        return None
    moved = diff.records(previous[0], now, store)
    before = {path: file.made_from for path, file in previous[1].parsed.items()}
    after = {file.path: held.made_from for file, held in zip(files, parsed, strict=True)}
    changed = sum(before[path] != after[path] for path in before.keys() & after.keys())
    return Since(
        files=(len(after.keys() - before.keys()), len(before.keys() - after.keys()), changed),
        leaves=(moved.leaves_added, moved.leaves_removed),
        records=(len(moved.records.added), len(moved.records.removed), len(moved.records.changed)),
        slices=moved.slices,
    )


def _known_leaves(previous: tuple[Records, RecordsObserved] | None, store: BlobStore) -> dict[str, RecordLeaf]:
    """Leaves of the previous records that the store still holds, by their lines."""
    if previous is None:
        return {}
    leaves = previous[0].leaves
    lost = store.missing({leaf.blob.sha256 for leaf in leaves})
    return {leaf.lines: leaf for leaf in leaves if leaf.blob.sha256 not in lost}


def _document(
    table: _Table,
    tally: _Tally,
    kept: NDArray[np.int64],
    clusters: list[tuple[int, list[int]]],
    leaves: list[RecordLeaf],
    store: BlobStore,
) -> Records:
    asides = sorted(tally.asides, key=lambda item: (item[0], item[1], item[2].reason))
    flags = list(_flags(table, kept))
    grouped = [
        {"kept": table.record[first].tobytes().hex(), "dropped": [table.record[at].tobytes().hex() for at in rest]}
        for first, rest in clusters
    ]
    grouped.sort(key=lambda cluster: cast(str, cluster["kept"]))
    quarantine, flagged, near_blob = store.put_many(
        [
            b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
            for lines in ([aside for _number, _line, aside in asides], flags, grouped)
        ]
    )
    return Records(
        sources=tuple(_count(source, count) for source, count in zip(tally.sources, tally.counts, strict=True)),
        reasons=tally.reasons,
        cleaned=dict(sorted(tally.cleaned.items())),
        sensitive=dict(sorted(Counter(kind for flag in flags for kind in flag.kinds).items())),
        leaves=tuple(leaves),
        index=_index(table, kept, store),
        quarantine=quarantine,
        flagged=flagged,
        clusters=near_blob,
        splits={split: sum(leaf.records for leaf in leaves if leaf.split == split) for split in SPLITS},
        slices=_slices(table, kept),
    )


def _count(source: Source, count: Counter[str]) -> SourceCount:
    fields = (
        "files",
        "read",
        "kept",
        "quarantined",
        "duplicates",
        "near_duplicates",
        "contaminated",
        "sensitive",
        "unsampled",
        "augmented",
    )
    return SourceCount(match=source.match, license=source.license, date=source.date, **{name: count[name] for name in fields})


def _flags(table: _Table, kept: NDArray[np.int64]) -> Iterator[_Flag]:
    """Kept records with findings, in canonical order."""
    stays = set(kept.tolist()) if any(beside.flagged for beside in table.beside) else set()
    for start, beside in zip(table.starts.tolist(), table.beside, strict=False):
        for at, kinds in sorted(beside.flagged.items()):
            if start + at in stays:
                yield _Flag(table.record[start + at].tobytes().hex(), dict(sorted(kinds.items())))


def asides(store: BlobStore, records: Records) -> Iterator[Aside]:
    """The quarantine of `records`: every row that was set aside, in the order of files and lines."""
    return (msgspec.json.decode(line, type=Aside) for line in store.get_bytes(records.quarantine.sha256).split(b"\n") if line)
