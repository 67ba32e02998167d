"""From record leaves to token leaves: what is unchanged is taken over, the rest tokenised and stored.

Leaves are made one by one, a pure map that may run anywhere (`workers.py`). Ids and spans come from `tokenizing.py`, the leaf's bytes from
`leaves.py`. Where leaves are cut is decided by `records.py`.
"""

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.data import Progress, leaves, lines
from repro_assets.data.engines import EngineMismatch
from repro_assets.data.errors import DataError, LeafError, WorkerLost
from repro_assets.data.leaves import Leaf
from repro_assets.data.lines import Head, Record
from repro_assets.data.tokenizing import FILES, Codec, Tokens, load
from repro_assets.data.workers import WORTHWHILE as READING_WORTHWHILE
from repro_assets.data.workers import Serial, Workers
from repro_assets.documents import BaseModel, Engine, RecordLeaf, Records, Shards, ShardsObserved, TokenLeaf
from repro_assets.recipe import ShardingSection
from repro_assets.trust.blob import Blob, BlobMissing, BlobStore

#: bytes of record leaves from which starting processes pays, by engine: the reference takes ten times as long for them
WORTHWHILE = {"tokenizers": 3 << 20, "fastokens": READING_WORTHWHILE}
#: leaves of the previous snapshot that a worker holds unpacked to take unchanged records from (about 300 kB each)
HELD_LEAVES = 32


class _Unit(msgspec.Struct, frozen=True):
    """A record leaf to tokenise, and leaves of the previous shards that hold some of its records."""

    source: RecordLeaf
    before: tuple[tuple[str, Blob], ...]


class _Made(msgspec.Struct, frozen=True):
    """The token leaf of a record leaf and where its stored form is; None when none of its records has a trained token. `engine`: what
    made it just now."""

    entry: TokenLeaf | None
    blob: Blob | None
    untrained: tuple[str, ...]
    records_new: int = 0
    tokens_new: int = 0
    engine: Engine | None = None


class Untrained(msgspec.Struct, frozen=True):
    """One line of the quarantine of the shards."""

    detail: str
    reason: str
    record: str


def build(
    records: Records,
    base_model: BaseModel,
    section: ShardingSection,
    store: BlobStore,
    previous: tuple[Shards, ShardsObserved] | None = None,
    progress: Progress | None = None,
    *,
    workers: Workers | None = None,
) -> tuple[Shards, ShardsObserved]:
    """One token leaf for each record leaf, in order; a leaf of which no record is trained is left out.

    `previous`: shards made under the same section by the same code, from other records. A leaf whose record leaf they know is taken
    over unread, and in a rewritten leaf the unchanged records keep their ids. `workers`: where leaves are tokenised.
    Records longer than max_tokens are cut and counted; records without a trained token are in the quarantine blob.
    """
    started = time.monotonic()
    workers = workers or Serial()
    task, refused = Tokenise(base_model, section, store), None
    try:
        totals = _mapped(task, records, previous, progress, workers)
    except EngineMismatch as mismatch:
        refused = mismatch.gate
    if refused is not None:
        # What stood in for the reference gave other ids to a record: nothing that it made is kept.
        task = Tokenise(base_model, section, store, refused)
        totals = _mapped(task, records, previous, progress, workers)
    if not totals.entries:
        raise DataError(
            f"none of {len(totals.untrained)} records has a trained token: "
            "look at the chat template, sharding.train_on and sharding.max_tokens"
        )
    shards = totals.document(task.codec.engine(), base_model, task.codec.width, store)
    observed = ShardsObserved(
        stored=dict(sorted(totals.stored.items())),
        leaves_reused=totals.reused,
        leaves_new=len(totals.entries) - totals.reused,
        records_new=totals.records_new,
        tokens_new=totals.tokens_new,
        seconds=time.monotonic() - started,
    )
    return shards, observed


def _mapped(
    task: "Tokenise",
    records: Records,
    previous: tuple[Shards, ShardsObserved] | None,
    progress: Progress | None,
    workers: Workers,
) -> "_Totals":
    known = _Known(previous, task)
    taken = [known.leaves.get((leaf.split, leaf.blob.sha256)) for leaf in records.leaves]
    wanted = [leaf for leaf, held in zip(records.leaves, taken, strict=True) if held is None]
    # Processes of this machine take fastokens untried and start while it passes the gate here; before that nothing of theirs is used.
    sent = task if isinstance(workers, Serial) else replace(task, tried=workers.local)
    made = workers.map(sent, known.units(wanted, {leaf.blob.sha256 for leaf in records.leaves}))
    totals = _Totals()
    try:
        engine = task.codec.engine()
        for number, held in enumerate(taken, start=1):
            if held is None:
                totals.add(_checked(next(made), engine), reused=False)
            else:
                totals.add(_Made(held[0], held[1], held[0].untrained), reused=True)
            if progress:
                progress("leaves", number, len(taken))
        assert next(made, None) is None, "the map gave more leaves than were asked for"
    finally:
        if isinstance(made, Generator):
            made.close()  # or workers go on as long as somebody looks at the error
    return totals


def _checked(made: "_Made", engine: Engine) -> "_Made":
    """What a worker made. Raises EngineMismatch when it used a fastokens that did not pass the gate, WorkerLost for other libraries."""
    theirs = made.engine
    if theirs is None or (theirs.name, theirs.version, theirs.canary) == (engine.name, engine.version, engine.canary):
        return made
    if (theirs.name, engine.name) == ("fastokens", "tokenizers"):
        raise EngineMismatch("fastokens did not pass the gate", engine.gate or "")
    raise WorkerLost(
        f"a worker tokenised with {theirs.name} {theirs.version} (canary {theirs.canary[:12]}), this process with {engine.name} "
        f"{engine.version} (canary {engine.canary[:12]}): install the same lock on every node"
    )


class _Totals:
    """Sums over leaves, all in whole numbers, so that no order of leaves or workers can show in them."""

    def __init__(self) -> None:
        self.entries: list[TokenLeaf] = []
        self.stored: dict[str, Blob] = {}
        self.untrained: list[str] = []
        self.reused = self.records_new = self.tokens_new = 0

    def add(self, made: _Made, *, reused: bool) -> None:
        self.untrained += made.untrained
        self.records_new += made.records_new
        self.tokens_new += made.tokens_new
        if made.entry is not None and made.blob is not None:
            self.entries.append(made.entry)
            self.stored[made.entry.sha256] = made.blob
            self.reused += reused

    def document(self, engine: Engine, model: BaseModel, width: int, store: BlobStore) -> Shards:
        lengths: Counter[int] = Counter()
        slices: dict[str, Counter[str]] = {}
        for entry in self.entries:
            lengths.update({int(edge): count for edge, count in entry.lengths.items()})
            for label, values in entry.slices.items():
                slices.setdefault(label, Counter()).update(values)
        rows = [
            Untrained("nothing of it is the assistant's within sharding.max_tokens", "no_trained_token", name) for name in self.untrained
        ]
        return Shards(
            leaves=tuple(self.entries),
            engine=engine,
            tokenizer=model.tokenizer,
            template=model.template,
            width=width,
            tokens=self._by_split("tokens"),
            trained=self._by_split("trained"),
            records=self._by_split("records"),
            lengths={str(edge): count for edge, count in sorted(lengths.items())},
            slices={label: dict(sorted(values.items())) for label, values in sorted(slices.items())},
            truncated_records=sum(entry.cut_records for entry in self.entries),
            truncated_tokens=sum(entry.cut_tokens for entry in self.entries),
            untrained_records=len(rows),
            quarantine=store.put_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows)),
        )

    def _by_split(self, field: str) -> dict[str, int]:
        return {split: sum(getattr(entry, field) for entry in self.entries if entry.split == split) for split in ("train", "validation")}


def edges(lengths: NDArray[np.int64]) -> list[int]:
    """The lower edge of the power of two that each length lies in: 1, 2, 4, ... (0 for 0)."""
    return [1 << (length.bit_length() - 1) if length else 0 for length in lengths.tolist()]


class _Known:
    """What the previous shards can give: whole leaves by their record leaf, and the leaves that are gone for single records."""

    def __init__(self, previous: tuple[Shards, ShardsObserved] | None, task: "Tokenise") -> None:
        self.store = task.store
        self.leaves: dict[tuple[str, str], tuple[TokenLeaf, Blob]] = {}
        if previous is None:
            return
        shards, observed = previous
        model, codec = task.base_model, task.codec
        now = (codec.engine(), model.tokenizer, model.template, codec.width)
        if (shards.engine, shards.tokenizer, shards.template, shards.width) != now:
            return
        there = {entry.sha256: observed.stored[entry.sha256] for entry in shards.leaves if entry.sha256 in observed.stored}
        missing = self.store.missing({blob.sha256 for blob in there.values()})
        usable = [entry for entry in shards.leaves if entry.sha256 in there and there[entry.sha256].sha256 not in missing]
        self.leaves = {(entry.split, entry.source): (entry, there[entry.sha256]) for entry in usable}

    def units(self, wanted: Sequence[RecordLeaf], now: set[str]) -> Iterator[_Unit]:
        """The leaves to tokenise, each with the gone leaves that hold records of it (64 bytes of memory for each of their records)."""
        gone = [(entry, blob) for (_split, source), (entry, blob) in self.leaves.items() if source not in now]
        places: dict[bytes, int] = {}
        if wanted and gone:
            for number, data in enumerate(self.store.get_many(blob.sha256 for _entry, blob in gone)):
                names = leaves.record_column(data)
                places.update((names[at : at + 32], number) for at in range(0, len(names), 32))
        if not places:
            yield from (_Unit(leaf, ()) for leaf in wanted)
            return
        for leaf, data in zip(wanted, self.store.get_many(leaf.blob.sha256 for leaf in wanted), strict=True):
            found = {places.get(bytes.fromhex(lines.head(line).id)) for line in lines.without_messages(data)}
            yield _Unit(leaf, tuple((gone[at][0].sha256, gone[at][1]) for at in sorted(at for at in found if at is not None)))


_kept: dict[Any, Codec] = {}


@dataclass(frozen=True)
class Tokenise:
    """The task: one record leaf to its token leaf in the store. `refused`, `tried`: see `Codec`."""

    base_model: BaseModel
    section: ShardingSection
    store: BlobStore
    refused: str | None = None
    tried: bool = False

    @cached_property
    def codec(self) -> Codec:
        """One is kept by the process: the next snapshot finds the tokenizer loaded and tried, and the words of this one."""
        files = tuple(sorted((name, blob.sha256) for name, blob in self.base_model.model_files.items() if name in FILES))
        key = (files, self.base_model.vocabulary, self.section.engine, self.refused, self.tried)
        if key not in _kept:
            codec = load(self.store, self.base_model, self.section.engine, self.refused, self.tried)
            _kept.clear()
            _kept[key] = codec
        return _kept[key]

    @cached_property
    def _engine(self) -> Engine:
        return self.codec.engine()

    @cached_property
    def _held(self) -> dict[str, Leaf]:
        return {}

    def __getstate__(self) -> dict[str, object]:
        """Without the codec: a tokenizer is made in every process for itself."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __call__(self, unit: _Unit) -> _Made:
        records, held, fresh = self._taken(unit)
        made = iter(self.codec.tokens(fresh, self.section.max_tokens, self.section.train_on))
        tokens = [held[record.id][0] if record.id in held else next(made) for record in records]
        tokens_new = sum(len(now.ids) for record, now in zip(records, tokens, strict=True) if record.id not in held)
        trained = [bool(now.trained) for now in tokens]
        kept = [pair for pair, has in zip(zip(records, tokens, strict=True), trained, strict=True) if has]
        untrained = tuple(record.id for record, has in zip(records, trained, strict=True) if not has)
        if not kept:
            return _Made(None, None, untrained, len(fresh), tokens_new, self._engine)
        leaf = self._leaf(kept, [held[record.id][1] if record.id in held else None for record, _now in kept])
        blob = self.store.put_bytes(leaves.store_form(leaf))
        return _Made(_entry(unit.source, leaf, untrained), blob, untrained, len(fresh), tokens_new, self._engine)

    def _taken(self, unit: _Unit) -> tuple[Sequence[Head | Record], dict[str, tuple[Tokens, bytes]], list[Record]]:
        """The records of the unit, what they had before by id, and those that had nothing. Of the others the messages are not decoded."""
        data = self.store.get_bytes(unit.source.blob.sha256)
        if not unit.before:
            records = list(lines.decode(data))
            return records, {}, records
        heads = [lines.head(line) for line in lines.without_messages(data)]
        held = self._before(unit, {head.id for head in heads})
        rows = zip(heads, data.split(b"\n")[:-1], strict=True)
        return heads, held, [record for head, row in rows if head.id not in held for record in lines.decode(row)]

    def _leaf(self, kept: list[tuple[Head | Record, Tokens]], digests: list[bytes | None]) -> Leaf:
        return leaves.make(
            [bytes.fromhex(record.id) for record, _now in kept],
            [record.key for record, _now in kept],
            [record.slices for record, _now in kept],
            [now.ids for _record, now in kept],
            [now.spans for _record, now in kept],
            [now.cut for _record, now in kept],
            self.codec.width,
            digests,
        )

    def _before(self, unit: _Unit, names: set[str]) -> dict[str, tuple[Tokens, bytes]]:
        """Ids and spans that records of the unit had before, with the token digest that they were held against."""
        found: dict[str, tuple[Tokens, bytes]] = {}
        for identity, blob in unit.before:
            if identity not in self._held:
                while len(self._held) >= HELD_LEAVES:
                    self._held.pop(next(iter(self._held)))
                self._held[identity] = leaves.load(self.store.get_bytes(blob.sha256), identity)
            leaf = self._held[identity]
            digests = leaves.token_digests(leaf)
            said = leaf.token.tobytes()
            for at, row in enumerate(zip(leaf.records, digests, leaf.ids, leaf.spans, leaf.cut.tolist(), strict=True)):
                name, token, ids, spans, cut = row
                if name not in names:
                    continue
                if token != said[32 * at : 32 * at + 32]:
                    raise LeafError(
                        f"record {name}: its token digest in the previous shards does not fit its ids; "
                        "materialize shards with the run tag repro/no-memo"
                    )
                found[name] = (Tokens(ids=ids, spans=spans, cut=cut), token)
        return found


def _entry(source: RecordLeaf, leaf: Leaf, untrained: tuple[str, ...]) -> TokenLeaf:
    slices: dict[str, Counter[str]] = {}
    for labels in leaf.slices:
        for label, value in labels.items():
            slices.setdefault(label, Counter())[value] += 1
    return TokenLeaf(
        split=source.split,
        source=source.blob.sha256,
        sha256=leaves.identity(leaf),
        records=len(leaf),
        tokens=len(leaf.flat_ids),
        trained=int(leaf.trained.sum()),
        lengths={str(edge): count for edge, count in sorted(Counter(edges(leaf.lengths)).items())},
        slices={label: dict(sorted(values.items())) for label, values in sorted(slices.items())},
        cut_records=int(np.count_nonzero(leaf.cut)),
        cut_tokens=int(leaf.cut.sum(dtype=np.int64)),
        untrained=untrained,
    )


def stored_leaves(shards: Shards, observed: ShardsObserved, store: BlobStore) -> Iterator[tuple[TokenLeaf, Leaf]]:
    """Every leaf of the shards in order, verified against its identity. Raises LeafError or BlobMissing naming the leaf."""
    entries: Iterable[TokenLeaf] = shards.leaves
    if lost := [entry.sha256 for entry in shards.leaves if entry.sha256 not in observed.stored]:
        raise BlobMissing(f"token leaf {lost[0]}: the shards do not say where it is stored; materialize shards again")
    stored = store.get_many(observed.stored[entry.sha256].sha256 for entry in shards.leaves)
    for entry, data in zip(entries, stored, strict=True):
        yield entry, leaves.load(data, entry.sha256)
