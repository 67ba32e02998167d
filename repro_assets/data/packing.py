"""The packing plan of one epoch: which records share a row, a pure function of lengths, digests, seed and epoch.

Plans are never stored, their digest is. Building tensors from a plan is the training program's.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

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
    keys = [hashlib.sha256(f"{seed}|{epoch}|{name}".encode()).digest() for name in ids]
    order = sorted(range(len(ids)), key=lambda index: (keys[index], ids[index], index))
    rows: list[list[int]] = []
    for window in _windows(order, keys):
        rows += _best_fit(window, lengths, ids, keys, row_tokens)
    hashed = hashlib.sha256(f"{row_tokens}\n".encode())
    for row in rows:
        hashed.update(" ".join(ids[index] for index in row).encode() + b"\n")
    used = sum(lengths)
    return Plan(rows=rows, digest=hashed.hexdigest(), padding=1 - used / (len(rows) * row_tokens) if rows else 0.0)


def _windows(order: list[int], keys: list[bytes]) -> list[list[int]]:
    """Runs of `order` that end where the key's last bytes say so, never by count alone (except far above the average)."""
    windows: list[list[int]] = [[]]
    limit = (1 << 32) // WINDOW
    for index in order:
        windows[-1].append(index)
        if int.from_bytes(keys[index][-4:], "big") < limit or len(windows[-1]) >= MOST:
            windows.append([])
    return [window for window in windows if window]


def _best_fit(window: list[int], lengths: Sequence[int], ids: Sequence[str], keys: list[bytes], row_tokens: int) -> list[list[int]]:
    """Best-fit-decreasing: each record into the fullest row that has room. Rows and their records come back in shuffled order."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(window, key=lambda index: (-lengths[index], ids[index], index)):
        at = bisect.bisect_left(room, (lengths[index], -1))
        if at == len(room):
            row, free = len(rows), row_tokens
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(index)
        if free > lengths[index]:
            bisect.insort(room, (free - lengths[index], row))
    # Decreasing packing puts all long records first; the keyed hash brings back the shuffle, within rows and among them.
    ordered = [sorted(row, key=lambda index: (keys[index], index)) for row in rows]
    return sorted(ordered, key=lambda row: (keys[row[0]], row[0]))
