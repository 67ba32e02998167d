"""The token leaf: tokenised records in columns, its canonical bytes, their digest, and the Arrow form in which it is stored.

Identity is the SHA-256 of the canonical uncompressed bytes; the stored form is transport, since zstd's output moves with its version.
The training program reads leaves with this module: it imports numpy, and pyarrow when a leaf is stored or loaded.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.data.errors import LeafError

MAGIC = b"repro token leaf 1\n"


@dataclass(frozen=True, eq=False)
class Leaf:
    """Columns of n records with t tokens and s loss spans in all. A record's place in files is not here: it would move with every edit.

    record   uint8 (n, 32)   SHA-256 of the record
    token    uint8 (n, 32)   `token_digest` of its ids and spans
    cut      uint32 (n,)     tokens cut off at max_tokens
    flat_ids    uint16|uint32 (t,), id_ends int64 (n,): the ids of record i are flat_ids[id_ends[i-1]:id_ends[i]]
    flat_spans  uint32 (s, 2), span_ends int64 (n,): start and end of trained tokens, within the record
    keys     n user keys or None;  slices  n dicts of label to value

    `records`, `ids` and `spans` give the same by record.
    """

    record: NDArray[np.uint8]
    token: NDArray[np.uint8]
    cut: NDArray[np.uint32]
    flat_ids: NDArray[Any]
    id_ends: NDArray[np.int64]
    flat_spans: NDArray[np.uint32]
    span_ends: NDArray[np.int64]
    keys: tuple[str | None, ...]
    slices: tuple[dict[str, str], ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def width(self) -> int:
        """Bytes of one id: 2 or 4."""
        return int(self.flat_ids.dtype.itemsize)

    @property
    def records(self) -> list[str]:
        """Hexadecimal SHA-256 of each record."""
        return [bytes(row).hex() for row in self.record]

    @property
    def ids(self) -> list[NDArray[Any]]:
        """Token ids of each record, uint16 or uint32 (tokens,)."""
        return _rows(self.flat_ids, self.id_ends)

    @property
    def spans(self) -> list[NDArray[np.uint32]]:
        """Trained spans of each record, uint32 (k, 2): first token and one past the last, in order, apart."""
        return _rows(self.flat_spans, self.span_ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each record, int64 (n,)."""
        return np.diff(self.id_ends, prepend=0)

    @property
    def trained(self) -> NDArray[np.int64]:
        """Trained tokens of each record, int64 (n,)."""
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.flat_spans[:, 1].astype(np.int64) - self.flat_spans[:, 0])])
        return np.diff(total[self.span_ends], prepend=0)


def _rows(flat: NDArray[Any], ends: NDArray[np.int64]) -> list[NDArray[Any]]:
    # np.split does the same at five times the price a row
    return [flat[start:end] for start, end in pairwise([0, *ends.tolist()])]


def token_digest(ids: NDArray[Any], spans: NDArray[np.uint32]) -> bytes:
    """32 bytes: SHA-256 of the count of ids, the ids and the spans, each as little-endian uint32, so that the width does not matter."""
    return _token_digest(len(ids), np.asarray(ids, "<u4").tobytes(), np.asarray(spans, "<u4").tobytes())


def _token_digest(count: int, ids: bytes, spans: bytes) -> bytes:
    # One call on joined bytes: for a record of some kilobytes three calls cost more than the copy.
    return hashlib.sha256(struct.pack("<I", count) + ids + spans).digest()


def token_digests(leaf: Leaf) -> list[bytes]:
    """`token_digest` of every record, from its ids and spans and not from what the leaf says they are."""
    ids, spans = leaf.flat_ids.astype("<u4").tobytes(), leaf.flat_spans.astype("<u4").tobytes()
    places = zip(pairwise([0, *leaf.id_ends.tolist()]), pairwise([0, *leaf.span_ends.tolist()]), strict=True)
    return [_token_digest(end - start, ids[4 * start : 4 * end], spans[8 * first : 8 * last]) for (start, end), (first, last) in places]


def make(
    records: Sequence[bytes],
    keys: Sequence[str | None],
    slices: Sequence[dict[str, str]],
    ids: Sequence[NDArray[Any]],
    spans: Sequence[NDArray[np.uint32]],
    cut: Sequence[int],
    width: int,
    digests: Sequence[bytes | None] = (),
) -> Leaf:
    """A leaf of these records, in this order. `digests`: token digests of the records for which the caller just checked them, else None.

    Raises LeafError for an id that `width` bytes cannot hold."""
    kind = np.dtype(np.uint16 if width == 2 else np.uint32)
    flat = np.concatenate([np.zeros(0, kind), *ids])
    if len(flat) and int(flat.max()) >= 1 << 8 * width:
        raise LeafError(f"a token id does not fit {width} bytes")
    return Leaf(
        record=np.frombuffer(b"".join(records), np.uint8).reshape(-1, 32),
        token=np.frombuffer(
            b"".join(held or token_digest(row, span) for row, span, held in zip(ids, spans, digests or (None,) * len(ids), strict=True)),
            np.uint8,
        ).reshape(-1, 32),
        cut=np.asarray(cut, np.uint32),
        flat_ids=flat.astype(kind),
        id_ends=np.cumsum([len(row) for row in ids], dtype=np.int64),
        flat_spans=np.concatenate([np.zeros((0, 2), np.uint32), *spans]),
        span_ends=np.cumsum([len(span) for span in spans], dtype=np.int64),
        keys=tuple(keys),
        slices=tuple(slices),
    )


def canonical_bytes(leaf: Leaf) -> bytes:
    """The bytes that identify the leaf. Whole numbers are little-endian.

    MAGIC | uint8 width | uint32 n | record | token | uint32 cut[n] | uint32 length[n] | ids | uint32 span count[n] | spans
    | for each record one JSON line [key, {label: value}], labels as the record leaf orders them
    """
    width = leaf.width
    parts = [
        MAGIC,
        struct.pack("<BI", width, len(leaf)),
        leaf.record.tobytes(),
        leaf.token.tobytes(),
        leaf.cut.astype("<u4").tobytes(),
        leaf.lengths.astype("<u4").tobytes(),
        leaf.flat_ids.astype(f"<u{width}").tobytes(),
        np.diff(leaf.span_ends, prepend=0).astype("<u4").tobytes(),
        leaf.flat_spans.astype("<u4").tobytes(),
    ]
    parts += [msgspec.json.encode([key, slices]) + b"\n" for key, slices in zip(leaf.keys, leaf.slices, strict=True)]
    return b"".join(parts)


def identity(leaf: Leaf) -> str:
    """Hexadecimal SHA-256 of the canonical bytes."""
    return hashlib.sha256(canonical_bytes(leaf)).hexdigest()


def store_form(leaf: Leaf) -> bytes:
    """The leaf as one Arrow IPC stream with one record batch, compressed with zstd."""
    import pyarrow as pa

    # From buffers, and back in `_from_batch`: pyarrow.array() and to_numpy() import pandas where it is installed, a second of every process.
    def plain(values: NDArray[Any], kind: Any) -> Any:
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values).tobytes())])

    def offsets(lengths: Any) -> Any:
        return pa.py_buffer(np.concatenate([np.zeros(1, "<i4"), np.cumsum(lengths, dtype="<i4")]).tobytes())

    def nested(flat: NDArray[Any], lengths: Any, kind: Any) -> Any:
        return pa.Array.from_buffers(pa.list_(kind), len(leaf), [None, offsets(lengths)], children=[plain(flat, kind)])

    def strings(values: Sequence[bytes | None]) -> Any:
        there = np.packbits(np.array([value is not None for value in values], bool), bitorder="little").tobytes()
        data = [value or b"" for value in values]
        buffers = [pa.py_buffer(there) if None in values else None, offsets([len(value) for value in data]), pa.py_buffer(b"".join(data))]
        return pa.Array.from_buffers(pa.string(), len(values), buffers)

    spans = np.diff(leaf.span_ends, prepend=0) * 2
    columns = {
        "record": plain(leaf.record, pa.binary(32)),
        "key": strings([None if key is None else key.encode() for key in leaf.keys]),
        "slices": strings([msgspec.json.encode(value) for value in leaf.slices]),
        "token": plain(leaf.token, pa.binary(32)),
        "cut": plain(leaf.cut, pa.uint32()),
        "ids": nested(leaf.flat_ids, leaf.lengths, pa.uint16() if leaf.width == 2 else pa.uint32()),
        "spans": nested(leaf.flat_spans.reshape(-1), spans, pa.uint32()),
    }
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def load(stored: bytes, expected: str) -> Leaf:
    """The leaf in its stored form. Raises LeafError when it is not a leaf or its identity is not `expected`."""
    import pyarrow as pa

    try:
        batch = pa.ipc.open_stream(pa.BufferReader(stored)).read_next_batch()
        leaf = _from_batch(batch)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError, StopIteration) as error:
        raise LeafError(f"token leaf {expected}: the stored bytes are not one: {error}; materialize shards again") from error
    if (found := identity(leaf)) != expected:
        raise LeafError(
            f"token leaf {expected}: the stored bytes hold the leaf {found}; they were changed: "
            "restore the blob, or materialize shards again"
        )
    return leaf


def record_column(stored: bytes) -> bytes:
    """The 32-byte record digests of a stored leaf, end to end, without looking at anything else of it: a hint where to look, not a fact.

    Raises LeafError when the bytes are no leaf."""
    import pyarrow as pa

    try:
        options = pa.ipc.IpcReadOptions(included_fields=[0], use_threads=False)
        batch = pa.ipc.open_stream(pa.BufferReader(stored), options=options).read_next_batch()
        return _plain(batch.column("record"), "u1", 32).tobytes()
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, StopIteration) as error:
        raise LeafError(f"a stored token leaf cannot be read: {error}; materialize shards again") from error


def _plain(array: Any, kind: str, per: int = 1) -> NDArray[Any]:
    """The values of an Arrow array of fixed width, `per` numbers of `kind` each. Raises TypeError for an array of another width."""
    if array.type.bit_width != 8 * per * np.dtype(kind).itemsize or array.null_count:
        raise TypeError(f"a column of {array.type} where {per} {kind} are expected")
    buffer = array.buffers()[1]
    return np.frombuffer(buffer, kind)[array.offset * per : (array.offset + len(array)) * per] if buffer else np.zeros(0, kind)


def _from_batch(batch: Any) -> Leaf:
    batch.validate(full=True)
    column = {name: batch.column(name) for name in ("record", "key", "slices", "token", "cut", "ids", "spans")}

    def flat(name: str, kind: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        offsets = _plain(column[name].offsets, "<i4").astype(np.int64)
        return _plain(column[name].values, kind)[offsets[0] : offsets[-1]], offsets[1:] - offsets[0]

    ids, ends = flat("ids", f"<u{column['ids'].type.value_type.bit_width // 8}")
    spans, span_ends = flat("spans", "<u4")
    slices = column["slices"].to_pylist()
    read = {value: msgspec.json.decode(value, type=dict[str, str]) for value in set(slices)}
    return Leaf(
        record=_plain(column["record"], "u1", 32).reshape(-1, 32),
        token=_plain(column["token"], "u1", 32).reshape(-1, 32),
        cut=_plain(column["cut"], "<u4"),
        flat_ids=ids,
        id_ends=ends,
        flat_spans=spans.reshape(-1, 2),
        span_ends=span_ends // 2,
        keys=tuple(column["key"].to_pylist()),
        slices=tuple(read[value] for value in slices),
    )
