"""Shards read elsewhere: as a map-style PyTorch dataset and as a polars frame, every leaf verified when it is read.

Works from a folder that `repro checkout KEY DIR --what shards` wrote, or from a store and the document; needs no server of its own.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.data import leaves
from repro_assets.data.errors import LeafError
from repro_assets.data.leaves import Leaf
from repro_assets.documents import Shards, TokenLeaf, parse_content
from repro_assets.trust.blob import BlobMissing, BlobStore
from repro_assets.trust.canonical import sha256

#: label of a token that is not trained on, as PyTorch's cross entropy and transformers ignore it
IGNORED = -100
#: leaves that a dataset keeps in memory for random access (about 300 kB each)
HELD = 64

DOCUMENT = "document.json"


class _Folder(msgspec.Struct, frozen=True):
    """Leaves as files of a checkout, named by identity."""

    root: Path

    def read(self, entry: TokenLeaf) -> bytes:
        path = self.root / "leaves" / f"{entry.sha256}.arrow"
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise LeafError(f"{path}: token leaf {entry.sha256} is not there; check the shards out again") from None


class _Stored(msgspec.Struct, frozen=True):
    """Leaves as blobs of a store. `places`: leaf identity to blob digest."""

    store: BlobStore
    places: dict[str, str]

    def read(self, entry: TokenLeaf) -> bytes:
        if entry.sha256 not in self.places:
            raise BlobMissing(f"token leaf {entry.sha256}: the shards do not say where it is stored; materialize shards again")
        return self.store.get_bytes(self.places[entry.sha256])


class OpenShards:
    """The records of shards in canonical order, as a map-style dataset: `len(shards)`, `shards[7]`, and `frame()`.

    An item is {"input_ids": int64 tensor (tokens,), "labels": the same with IGNORED outside the loss spans (a model shifts them itself),
    "record": hexadecimal SHA-256 of the record}. Give it to `torch.utils.data.DataLoader` with a collate function that pads. Pickles, so
    that spawned workers can have it. Reading raises LeafError or BlobDamaged for bytes that are not the leaf that the document names.
    """

    def __init__(self, entries: Sequence[TokenLeaf], leaves_of: _Folder | _Stored, held: int = HELD) -> None:
        self.entries = tuple(entries)
        self._source, self._most = leaves_of, held
        self._ends = np.cumsum([entry.records for entry in self.entries], dtype=np.int64).tolist()
        self._held: OrderedDict[int, Leaf] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict()}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        record, ids, spans = self.at(index)
        input_ids = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": input_ids, "labels": torch.from_numpy(labels(ids, spans)), "record": record}

    def at(self, index: int) -> tuple[str, NDArray[Any], NDArray[np.uint32]]:
        """(record, ids, spans) of one record without torch. Raises IndexError past the end."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"record {index} of {size}")
        index %= size
        number = bisect_right(self._ends, index)
        leaf = self._leaf(number)
        row = index - (self._ends[number - 1] if number else 0)
        first, start = (int(ends[row - 1]) if row else 0 for ends in (leaf.id_ends, leaf.span_ends))
        return (
            bytes(leaf.record[row]).hex(),
            leaf.flat_ids[first : int(leaf.id_ends[row])],
            leaf.flat_spans[start : int(leaf.span_ends[row])],
        )

    def _leaf(self, number: int) -> Leaf:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        leaf = self.verified(self.entries[number])
        self._held[number] = leaf
        while len(self._held) > self._most:
            self._held.popitem(last=False)
        return leaf

    def verified(self, entry: TokenLeaf) -> Leaf:
        """One leaf, read now and held against its identity."""
        leaf = leaves.load(self._source.read(entry), entry.sha256)
        if len(leaf) != entry.records:
            raise LeafError(f"token leaf {entry.sha256}: {len(leaf)} records, the document says {entry.records}; materialize shards again")
        return leaf

    def leaves(self) -> Iterator[tuple[TokenLeaf, Leaf]]:
        """Every leaf in order, read and verified one at a time."""
        return ((entry, self.verified(entry)) for entry in self.entries)

    def frame(self) -> Any:
        """A polars DataFrame, one row a record: record, split, key, slices (JSON), tokens, trained, cut, input_ids and labels (lists)."""
        import polars as pl

        parts = [pl.DataFrame(pl.from_arrow(batch_of(leaf, entry.split))) for entry, leaf in self.leaves()]
        return pl.concat(parts) if parts else pl.DataFrame()


def labels(ids: NDArray[Any], spans: NDArray[np.uint32]) -> NDArray[np.int64]:
    """The ids as int64 (tokens,), IGNORED outside the spans."""
    out = np.full(len(ids), IGNORED, dtype=np.int64)
    for start, end in spans.tolist():
        out[start:end] = ids[start:end]
    return out


def batch_of(leaf: Leaf, split: str) -> Any:
    """A leaf as a pyarrow Table with the columns of `OpenShards.frame`."""
    import pyarrow as pa

    offsets = pa.array(np.concatenate([np.zeros(1, np.int32), leaf.id_ends.astype(np.int32)]), pa.int32())
    trained = [labels(ids, spans) for ids, spans in zip(leaf.ids, leaf.spans, strict=True)]
    flat = np.concatenate([np.zeros(0, np.int64), *trained]).astype(np.int32)
    return pa.table(
        {
            "record": pa.array(leaf.records, pa.string()),
            "split": pa.array([split] * len(leaf), pa.string()),
            "key": pa.array(leaf.keys, pa.string()),
            "slices": pa.array([msgspec.json.encode(value).decode() for value in leaf.slices], pa.string()),
            "tokens": pa.array(leaf.lengths, pa.int64()),
            "trained": pa.array(leaf.trained, pa.int64()),
            "cut": pa.array(leaf.cut, pa.uint32()),
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(leaf.flat_ids.astype(np.int32), pa.int32())),
            "labels": pa.ListArray.from_arrays(offsets, pa.array(flat, pa.int32())),
        }
    )


def open_shards(
    source: str | os.PathLike[str] | BlobStore,
    shards: Shards | None = None,
    stored: dict[str, Any] | None = None,
    *,
    split: str | None = "train",
    document: str | None = None,
) -> OpenShards:
    """Shards from a checkout folder, or from a store with its document and `stored` (ShardsObserved.stored: leaf identity to blob).

    `split`: train or validation; None gives both, train first. `document`: data version that the shards must have, so that a folder from
    elsewhere is held against what you expect. Raises LeafError when the folder is no checkout of shards, is another one, or has no such
    split.
    """
    origin: _Folder | _Stored
    if isinstance(source, str | os.PathLike):
        root = Path(source)
        shards, origin = _document(root, document), _Folder(root)
    else:
        if shards is None or stored is None:
            raise TypeError("from a store, open_shards also needs the shards' document and where its leaves are stored")
        origin = _Stored(source, {identity: blob.sha256 for identity, blob in stored.items()})
    entries = [entry for entry in shards.leaves if split in (None, entry.split)]
    if not entries:
        known = ", ".join(sorted({entry.split for entry in shards.leaves}))
        raise LeafError(f"the shards have no split {split!r}; there are: {known}")
    return OpenShards(entries, origin)


def _document(root: Path, expected: str | None) -> Shards:
    path = root / DOCUMENT
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise LeafError(
            f"{root} is no checkout of shards: there is no {DOCUMENT}; `repro checkout KEY DIR --what shards` makes one"
        ) from None
    if expected is not None and (found := sha256(data)) != expected:
        raise LeafError(f"{path}: the document is {found}, not {expected}; check out the snapshot that you mean")
    return parse_content(Shards, data)[2]
