"""From record leaves to token leaves: what is unchanged is taken over, the rest tokenised and stored.

Ids and spans come from `tokenizing.py`, the leaf's bytes from `leaves.py`. Where leaves are cut is decided by `records.py`.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.data import Progress, leaves, lines
from repro_assets.data.errors import DataError, LeafError
from repro_assets.data.leaves import Leaf
from repro_assets.data.lines import Record
from repro_assets.data.tokenizing import Codec, Tokens, load
from repro_assets.documents import BaseModel, Engine, RecordLeaf, Records, Shards, ShardsObserved, TokenLeaf
from repro_assets.recipe import ShardingSection
from repro_assets.trust.blob import Blob, BlobMissing, BlobStore

#: leaves of the previous snapshot that may be held in memory to take unchanged records from (about 300 kB each)
HELD_LEAVES = 4096


class _Made(msgspec.Struct, frozen=True):
    """One token leaf with its facts, and where its stored form is. `entry` is None when no record had a trained token."""

    entry: TokenLeaf | None
    leaf: Leaf | None
    blob: Blob | None
    reused: bool
    tokens_new: int
    untrained: int


def build(
    records: Records,
    base_model: BaseModel,
    section: ShardingSection,
    store: BlobStore,
    previous: tuple[Shards, ShardsObserved] | None = None,
    progress: Progress | None = None,
) -> tuple[Shards, ShardsObserved]:
    """One token leaf for each record leaf, in order; a leaf of which no record is trained is left out.

    `previous`: shards made under the same section by the same code, from other records. A leaf whose record leaf they know is taken
    over as it is, and in a rewritten leaf the unchanged records keep their ids. Records longer than max_tokens are cut and counted;
    records without a trained token are counted and left out.
    """
    started = time.monotonic()
    codec = load(store, base_model)
    engine = codec.engine()
    known = _Known(previous, records.leaves, base_model, engine, codec.width, store)
    totals = _Totals()
    for number, made in enumerate(_map(records.leaves, codec, section, store, known), start=1):
        totals.add(made)
        if progress:
            progress("leaves", number, len(records.leaves))
    if not totals.entries:
        raise DataError(
            f"none of {totals.untrained} records has a trained token: look at the chat template, sharding.train_on and sharding.max_tokens"
        )
    shards = Shards(
        leaves=tuple(totals.entries),
        engine=engine,
        tokenizer=base_model.tokenizer,
        template=base_model.template,
        width=codec.width,
        tokens=totals.by_split("tokens"),
        trained=totals.by_split("trained"),
        records=totals.by_split("records"),
        lengths={str(edge): count for edge, count in sorted(totals.lengths.items())},
        slices={label: dict(sorted(values.items())) for label, values in sorted(totals.slices.items())},
        truncated_records=totals.truncated_records,
        truncated_tokens=totals.truncated_tokens,
        untrained_records=totals.untrained,
    )
    observed = ShardsObserved(
        stored=dict(sorted(totals.stored.items())),
        leaves_reused=totals.reused,
        leaves_new=len(totals.entries) - totals.reused,
        tokens_new=totals.tokens_new,
        seconds=time.monotonic() - started,
    )
    return shards, observed


class _Totals:
    """Sums over leaves, all in whole numbers, so that no order of leaves or workers can show in them."""

    def __init__(self) -> None:
        self.entries: list[TokenLeaf] = []
        self.stored: dict[str, Blob] = {}
        self.lengths: Counter[int] = Counter()
        self.slices: dict[str, Counter[str]] = {}
        self.reused = self.tokens_new = self.untrained = self.truncated_records = self.truncated_tokens = 0

    def add(self, made: _Made) -> None:
        self.untrained += made.untrained
        self.tokens_new += made.tokens_new
        if made.entry is None or made.leaf is None or made.blob is None:
            return
        self.entries.append(made.entry)
        self.stored[made.entry.sha256] = made.blob
        self.reused += made.reused
        self.lengths.update(edges(made.leaf.lengths))
        for labels in made.leaf.slices:
            for label, value in labels.items():
                self.slices.setdefault(label, Counter())[value] += 1
        self.truncated_records += int(np.count_nonzero(made.leaf.cut))
        self.truncated_tokens += int(made.leaf.cut.sum(dtype=np.int64))

    def by_split(self, field: str) -> dict[str, int]:
        return {split: sum(getattr(entry, field) for entry in self.entries if entry.split == split) for split in ("train", "validation")}


def edges(lengths: NDArray[np.int64]) -> list[int]:
    """The lower edge of the power of two that each length lies in: 1, 2, 4, ... (0 for 0)."""
    return [1 << (length.bit_length() - 1) if length else 0 for length in lengths.tolist()]


class _Known:
    """What the previous shards can give: whole leaves by their record leaf, and single records of the leaves that are gone."""

    def __init__(
        self,
        previous: tuple[Shards, ShardsObserved] | None,
        wanted: Sequence[RecordLeaf],
        model: BaseModel,
        engine: Engine,
        width: int,
        store: BlobStore,
    ) -> None:
        self.leaves: dict[tuple[str, str], tuple[TokenLeaf, Blob]] = {}
        self.records: dict[str, tuple[bytes, Tokens]] = {}
        if previous is None:
            return
        shards, observed = previous
        if (shards.engine, shards.tokenizer, shards.template, shards.width) != (engine, model.tokenizer, model.template, width):
            return
        there = {entry.sha256: observed.stored[entry.sha256] for entry in shards.leaves if entry.sha256 in observed.stored}
        missing = store.missing({blob.sha256 for blob in there.values()})
        usable = [entry for entry in shards.leaves if entry.sha256 in there and there[entry.sha256].sha256 not in missing]
        self.leaves = {(entry.split, entry.source): (entry, there[entry.sha256]) for entry in usable}
        now = {(leaf.split, leaf.blob.sha256) for leaf in wanted}
        gone = [entry for entry in usable if (entry.split, entry.source) not in now]
        if gone and len(gone) <= HELD_LEAVES and not now <= self.leaves.keys():
            stored = store.get_many(there[entry.sha256].sha256 for entry in gone)
            for entry, data in zip(gone, stored, strict=True):
                leaf = leaves.load(data, entry.sha256)
                for name, token, ids, spans, cut in zip(leaf.records, leaf.token, leaf.ids, leaf.spans, leaf.cut.tolist(), strict=True):
                    self.records[name] = (bytes(token), Tokens(ids=ids, spans=spans, cut=cut))

    def tokens(self, record: Record) -> Tokens | None:
        """Ids and spans that the record had before, checked by their token digest; None when it is new."""
        held = self.records.get(record.id)
        if held is None:
            return None
        token, tokens = held
        if leaves.token_digest(tokens.ids, tokens.spans) != token:
            raise LeafError(
                f"record {record.id}: its token digest in the previous shards does not fit its ids; "
                "materialize shards with the run tag repro/no-memo"
            )
        return tokens


def _map(wanted: Sequence[RecordLeaf], codec: Codec, section: ShardingSection, store: BlobStore, known: _Known) -> Iterator[_Made]:
    """Each record leaf's token leaf, in order; reads ahead through the store's own concurrency."""
    found = [known.leaves.get((leaf.split, leaf.blob.sha256)) for leaf in wanted]
    digests = [held[1].sha256 if held else leaf.blob.sha256 for held, leaf in zip(found, wanted, strict=True)]
    for source, held, data in zip(wanted, found, store.get_many(digests), strict=True):
        if held is not None:
            leaf = leaves.load(data, held[0].sha256)
            yield _Made(held[0], leaf, held[1], True, 0, source.records - len(leaf))
        else:
            yield _tokenise(source, list(lines.decode(data)), codec, section, store, known)


def _tokenise(source: RecordLeaf, records: list[Record], codec: Codec, section: ShardingSection, store: BlobStore, known: _Known) -> _Made:
    held = [known.tokens(record) for record in records]
    fresh = [record for record, tokens in zip(records, held, strict=True) if tokens is None]
    made = iter(codec.tokens(fresh, section.max_tokens, section.train_on))
    tokens = [next(made) if known is None else known for known in held]
    tokens_new = sum(len(now.ids) for now, before in zip(tokens, held, strict=True) if before is None)
    kept = [(record, now) for record, now in zip(records, tokens, strict=True) if now.trained]
    untrained = len(records) - len(kept)
    if not kept:
        return _Made(None, None, None, False, tokens_new, untrained)
    leaf = leaves.make(
        [bytes.fromhex(record.id) for record, _now in kept],
        [record.key for record, _now in kept],
        [record.slices for record, _now in kept],
        [now.ids for _record, now in kept],
        [now.spans for _record, now in kept],
        [now.cut for _record, now in kept],
        codec.width,
    )
    entry = TokenLeaf(
        split=source.split,
        source=source.blob.sha256,
        sha256=leaves.identity(leaf),
        records=len(leaf),
        tokens=len(leaf.flat_ids),
        trained=int(leaf.trained.sum()),
    )
    return _Made(entry, leaf, store.put_bytes(leaves.store_form(leaf)), False, tokens_new, untrained)


def stored_leaves(shards: Shards, observed: ShardsObserved, store: BlobStore) -> Iterator[tuple[TokenLeaf, Leaf]]:
    """Every leaf of the shards in order, verified against its identity. Raises LeafError or BlobMissing naming the leaf."""
    entries: Iterable[TokenLeaf] = shards.leaves
    if lost := [entry.sha256 for entry in shards.leaves if entry.sha256 not in observed.stored]:
        raise BlobMissing(f"token leaf {lost[0]}: the shards do not say where it is stored; materialize shards again")
    stored = store.get_many(observed.stored[entry.sha256].sha256 for entry in shards.leaves)
    for entry, data in zip(entries, stored, strict=True):
        yield entry, leaves.load(data, entry.sha256)
