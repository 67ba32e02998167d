"""The packing plan of one epoch: which records share a row, a pure function of lengths, digests, seed and epoch.

Plans are never stored, their digest is. Building tensors from a plan is the training program's.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from repro_assets.data.errors import PackingError

WINDOW = 1024  # records in a window on average
MOST = 8 * WINDOW


@dataclass(frozen=True)
class Plan:
    """`rows`: indices into the given lengths, row by row in training order. `digest`: of the rows as record digests, and row_tokens.
    `padding`: share of all row tokens that hold no record, 0..1."""

    rows: list[list[int]]
    digest: str
    padding: float


def plan(lengths: Sequence[int], ids: Sequence[str], row_tokens: int, seed: int, epoch: int) -> Plan:
    """Pack records of `lengths` tokens and digests `ids` (hexadecimal SHA-256) into rows of at most `row_tokens`.

    Every record is in exactly one row. Records are shuffled by keyed hash of (seed, epoch, record), so that the order of `ids` does not
    matter; windows are cut by the same hash and packed by best-fit-decreasing, so that one record more or less changes one window.
    Raises PackingError for an empty record or one longer than a row.
    """
    if len(lengths) != len(ids):
        raise PackingError(f"{len(lengths)} lengths for {len(ids)} records")
    for index, length in enumerate(lengths):
        if not 0 < length <= row_tokens:
            raise PackingError(
                f"record {ids[index]} has {length} tokens, a row holds 1 to {row_tokens}: raise training.row_tokens to at least {length}, "
                "or lower sharding.max_tokens"
            )
    prefix = f"{seed}|{epoch}|".encode()
    names = [name.encode() for name in ids]
    keys = [hashlib.sha256(prefix + name).digest() for name in names]
    order = _sorted([], keys, ids)
    last = np.frombuffer(b"".join(keys), dtype=">u4").reshape(-1, 8)[order, 7]
    windows = _windows(last < (1 << 32) // WINDOW)
    # Within its window, each record from the longest to the shortest.
    place = np.empty(len(ids), dtype=np.int64)
    place[order] = np.arange(len(ids))
    window = np.repeat(np.arange(len(windows) - 1), np.diff(windows))[place]
    falling = _sorted([window, -np.asarray(lengths, dtype=np.int64)], names, ids)
    sizes = np.asarray(lengths, dtype=np.int64)[falling].tolist()
    places = place[falling].tolist()
    by_place = order.tolist()
    rows: list[list[int]] = []
    for start, end in pairwise(windows):
        packed = _best_fit(places[start:end], sizes[start:end], row_tokens)
        rows += [[by_place[number] for number in row] for row in packed]
    hashed = hashlib.sha256(f"{row_tokens}\n".encode())
    for row in rows:
        hashed.update(" ".join([ids[index] for index in row]).encode() + b"\n")
    used = sum(lengths)
    return Plan(rows=rows, digest=hashed.hexdigest(), padding=1 - used / (len(rows) * row_tokens) if rows else 0.0)


def _sorted(before: list[NDArray[np.int64]], keys: Sequence[bytes], ids: Sequence[str]) -> NDArray[np.int64]:
    """Indices in the order of (*before, key, id, index). Keys are compared whole, though only their first 8 bytes are where these differ."""
    heads = np.array(keys, dtype="S8").view(">u8")
    order = np.lexsort((heads, *reversed(before)))
    close = np.flatnonzero(np.logical_and.reduce([column[order][1:] == column[order][:-1] for column in (heads, *before)]))
    pairs = zip(order[close].tolist(), order[close + 1].tolist(), strict=True)
    if all(keys[one] == keys[other] and ids[one] == ids[other] for one, other in pairs):
        return order
    columns = [column.tolist() for column in before]
    return np.array(sorted(range(len(ids)), key=lambda index: (*(column[index] for column in columns), keys[index], ids[index], index)))


def _windows(cuts: NDArray[np.bool_]) -> list[int]:
    """Where windows begin in shuffled order, and the end: behind each record whose key says so, never by count alone (except far above
    the average)."""
    edges = [0]
    for end in [*(np.flatnonzero(cuts) + 1).tolist(), len(cuts)]:
        while end - edges[-1] > MOST:
            edges.append(edges[-1] + MOST)
        if end > edges[-1]:
            edges.append(end)
    return edges


def _best_fit(places: list[int], sizes: list[int], row_tokens: int) -> list[list[int]]:
    """Best-fit-decreasing: each record into the fullest row that has room. Rows and their records come back in shuffled order.

    `places`: of records in shuffled order, from the longest record to the shortest; `sizes`: their tokens.
    """
    rows: list[list[int]] = []
    room: list[int] = []  # free tokens << 32 | row, ascending
    for place, size in zip(places, sizes, strict=True):
        at = bisect.bisect_left(room, size << 32)
        if at == len(room):
            row, free = len(rows), row_tokens
            rows.append([place])
        else:
            found = room.pop(at)
            row, free = found & 0xFFFFFFFF, found >> 32
            rows[row].append(place)
        if free > size:
            bisect.insort(room, free - size << 32 | row)
    # Decreasing packing puts all long records first; the shuffled order comes back, within rows and among them.
    for held in rows:
        held.sort()
    rows.sort()
    return rows
