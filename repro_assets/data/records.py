"""From raw files to records: duplicates taken out and listed, sources sampled, records split by keyed hash and cut into leaves.

Files are parsed one by one (`parts.py`, a pure map that may run anywhere); what needs more than one file works here on digests and
places only, so memory grows with the number of records (about 150 bytes each) and not with their text.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import pairwise
from typing import cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.data import Progress, diff, readers
from repro_assets.data.chunking import boundaries
from repro_assets.data.columns import SPLITS, Spill
from repro_assets.data.contamination import Evaluated
from repro_assets.data.errors import DataError, QuarantineError
from repro_assets.data.keeping import Aside, Kept, Tally
from repro_assets.data.parts import OpenRaw, Parse, Unit, side
from repro_assets.data.places import ORIGINAL, PLACE, Place, places
from repro_assets.data.table import Table, Texts
from repro_assets.data.workers import Serial, Workers
from repro_assets.documents import ParsedFile, RawFile, RawSnapshot, RecordLeaf, Records, RecordsObserved, Since, SourceCount
from repro_assets.recipe import RecordsSection, Source
from repro_assets.trust.blob import Blob, BlobStore, ordered
from repro_assets.trust.canonical import sha256

SLICE_VALUES = 1000
BATCH = 32
THREADS = 2  # each holds the text of a batch
__all__ = ["Aside", "Place", "asides", "build", "places", "side"]


class _Flag(msgspec.Struct, frozen=True):
    """One line of `flagged`: a record and how many secrets and personal data of each kind were found in it."""

    id: str
    kinds: dict[str, int]


# ---- leaves and indices


def _cut(
    table: Table, kept: NDArray[np.int64], section: RecordsSection, known: dict[str, RecordLeaf], store: BlobStore, texts: Texts
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
        used = {leaf.lines for leaf in leaves}
        texts.prepare(np.concatenate([rows for _number, rows in wanted]), [leaf.blob for lines, leaf in known.items() if lines not in used])

    def written(batch: list[tuple[int, NDArray[np.int64]]]) -> tuple[list[Blob], int]:
        items = [texts.lines(positions) for _number, positions in batch]
        blobs = [Blob(sha256(item), len(item)) for item in items]
        missing = store.missing({blob.sha256 for blob in blobs})
        store.put_many([item for item, blob in zip(items, blobs, strict=True) if blob.sha256 in missing])
        return blobs, len(blobs) - len(missing)

    batches = [wanted[first : first + BATCH] for first in range(0, len(wanted), BATCH)]
    for batch, (blobs, found) in zip(batches, ordered(written, batches, THREADS, ahead=1), strict=True):
        reused += found
        for (number, _positions), blob in zip(batch, blobs, strict=True):
            leaves[number] = msgspec.structs.replace(leaves[number], blob=blob)
    return leaves, reused


def _words(digests: NDArray[np.uint8]) -> list[NDArray[np.uint64]]:
    """Digests as four numbers each, the last significant first, as lexsort takes its keys."""
    words = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)
    return [words[:, at] for at in (3, 2, 1, 0)]


def _index(table: Table, kept: NDArray[np.int64], store: BlobStore) -> dict[str, Blob]:
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


def _slices(table: Table, kept: NDArray[np.int64]) -> dict[str, dict[str, int]]:
    """Kept records by slice label and value. Raises DataError for a label that has a value for nearly every record."""
    counts: dict[str, Counter[str]] = {}
    # One number for part and label: numpy sorts pairs thirty times as slowly.
    pairs, numbers = np.unique(table.part[kept].astype(np.int64) << 32 | table.label[kept], return_counts=True)
    for (part, label), count in zip((divmod(pair, 1 << 32) for pair in pairs.tolist()), numbers.tolist(), strict=True):
        for name, value in table.beside[part].labels[label].items():
            counts.setdefault(name, Counter())[value] += count
    if wide := sorted(label for label, values in counts.items() if len(values) > SLICE_VALUES):
        where = next(table.files[table.file(at)].path for at in kept.tolist() if wide[0] in table.labels(at))
        raise DataError(
            f"{where}: slice label {wide[0]!r} has {len(counts[wide[0]])} values, more than {SLICE_VALUES}; "
            "map a field with few values in records.sources[].slices (an id belongs in fields.id)"
        )
    return {label: dict(sorted(values.items())) for label, values in sorted(counts.items())}


def _limit(tally: Tally, section: RecordsSection) -> None:
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
        table = Table(files, ranks, parsed, store)
        tally = Tally(section.sources)
        _told(table, ranks, tally)
        _limit(tally, section)
        positions, clusters = _chosen(table, tally, section)
        with closing(Texts(table, spilled, task)) as texts:
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


def _chosen(table: Table, tally: Tally, section: RecordsSection) -> tuple[NDArray[np.int64], list[tuple[int, list[int]]]]:
    """Positions of the records that stay, and the clusters of near duplicates as (kept, dropped) positions."""
    kept = Kept(table, tally)
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
) -> tuple[list[ParsedFile], dict[int, Spill], int]:
    """Every file's parts, the local files of texts by the number of the part, and how many files were parsed."""
    before = previous[1].parsed if previous else {}
    lost = task.store.missing({blob.sha256 for file in before.values() for blob in _blobs(file)})
    found: list[ParsedFile | None] = []
    for file in files:
        held = before.get(file.path)
        held = _unlost(held, lost)
        found.append(held if held is not None and held.made_from == task.made_from(file) else None)
    todo = [number for number, held in enumerate(found) if held is None]
    units = [Unit(files[number], _unlost(before.get(files[number].path), lost)) for number in todo]
    total = sum(file.size for file in files)
    done = total - sum(files[number].size for number in todo)
    spilled: dict[int, tuple[Spill | None, ...]] = {}
    for number, made in zip(todo, workers.map(task, units), strict=True):
        found[number], spilled[number] = made.file, made.spilled
        done += files[number].size
        if progress:
            progress("bytes read", done, total)
    parsed = cast(list[ParsedFile], found)
    spills = [spill for number, file in enumerate(parsed) for spill in spilled.get(number, (None,) * len(file.parts))]
    return parsed, {number: spill for number, spill in enumerate(spills) if spill is not None}, len(todo)


def _unlost(file: ParsedFile | None, lost: set[str]) -> ParsedFile | None:
    return None if file is None or any(blob.sha256 in lost for blob in _blobs(file)) else file


def _blobs(file: ParsedFile) -> list[Blob]:
    return [blob for part in file.parts for blob in (part.columns, part.text) if blob is not None]


def _told(table: Table, ranks: list[int], tally: Tally) -> None:
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
    before = {path: file.made_from for path, file in previous[1].parsed.items()}
    after = {file.path: held.made_from for file, held in zip(files, parsed, strict=True)}
    return diff.summary(previous[0], now, store, diff.change_of(before, after))


def _known_leaves(previous: tuple[Records, RecordsObserved] | None, store: BlobStore) -> dict[str, RecordLeaf]:
    """Leaves of the previous records that the store still holds, by their lines."""
    if previous is None:
        return {}
    leaves = previous[0].leaves
    lost = store.missing({leaf.blob.sha256 for leaf in leaves})
    return {leaf.lines: leaf for leaf in leaves if leaf.blob.sha256 not in lost}


def _document(
    table: Table,
    tally: Tally,
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
    said = {"match": source.match, "license": source.license, "date": source.date}
    return msgspec.convert({**{name: count[name] for name in SourceCount.__struct_fields__}, **said}, SourceCount)


def _flags(table: Table, kept: NDArray[np.int64]) -> Iterator[_Flag]:
    """Kept records with findings, in canonical order."""
    stays = set(kept.tolist()) if any(beside.flagged for beside in table.beside) else set()
    for start, beside in zip(table.starts.tolist(), table.beside, strict=False):
        for at, kinds in sorted(beside.flagged.items()):
            if start + at in stays:
                yield _Flag(table.record[start + at].tobytes().hex(), dict(sorted(kinds.items())))


def asides(store: BlobStore, records: Records) -> Iterator[Aside]:
    """The quarantine of `records`: every row that was set aside, in the order of files and lines."""
    return (msgspec.json.decode(line, type=Aside) for line in store.get_bytes(records.quarantine.sha256).split(b"\n") if line)
