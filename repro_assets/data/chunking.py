"""Where a run of records is cut into leaves: content-defined chunking by local minima of the record digests.

A pure function of the digests, so that an edit moves only the boundaries beside it. What a leaf holds is said elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FAR = np.uint64(2**64 - 1)


def boundaries(hashes: Sequence[bytes | str] | NDArray[np.uint8], target: int = 256) -> list[int]:
    """End positions (exclusive) of the chunks of `hashes` (SHA-256: 32 bytes or 64 hexadecimal digits each, or uint8 (n, 32)); the last one
    is len(hashes).

    A chunk ends after each record whose digest is the smallest within target/2 records on either side. So chunks have `target` records
    on average and more than target/2 (the first and the last may be shorter), and one record that comes, goes or changes makes at most
    three new chunks: minima further than target/2 away do not see it. A run of 4*target records without a minimum is cut there.
    Raises ValueError for a target below 4.
    """
    if target < 4:
        raise ValueError(f"a target of {target} records a leaf; at least 4")
    most = target * 4
    ends: list[int] = []
    start = 0
    for position in _minima(_numbers(hashes), target // 2):
        while position + 1 - start > most:
            start += most
            ends.append(start)
        start = position + 1
        ends.append(start)
    while len(hashes) - start > most:
        start += most
        ends.append(start)
    if start < len(hashes):
        ends.append(len(hashes))
    return ends


def _minima(numbers: NDArray[np.uint64], reach: int) -> list[int]:
    """Positions of the smallest number within `reach` on either side; of equal ones the first."""
    if not len(numbers):
        return []
    padded = np.concatenate([np.full(reach, _FAR), numbers, np.full(reach, _FAR)])
    least = _sliding_minimum(padded, reach)
    before, after = least[: len(numbers)], least[reach + 1 :]
    # At the edges the padding stands for nothing: a number as large as it must still win against it.
    ties = (numbers == _FAR) & (before == _FAR)
    found = ((numbers < before) | ties) & (numbers <= after)
    positions: list[int] = np.flatnonzero(found).tolist()
    return positions if not ties.any() else _first_of_equals(positions, numbers, reach)


def _first_of_equals(positions: list[int], numbers: NDArray[np.uint64], reach: int) -> list[int]:
    return [at for at in positions if not (numbers[max(0, at - reach) : at] <= numbers[at]).any()]


def _sliding_minimum(values: NDArray[np.uint64], width: int) -> NDArray[np.uint64]:
    """The least of every `width` neighbours: doubling windows, so the cost is n log(width) whatever the values."""
    span, least = 1, values
    while span * 2 <= width:
        least = np.minimum(least[:-span], least[span:])
        span *= 2
    rest = width - span
    return np.minimum(least[: len(least) - rest], least[rest:]) if rest else least


def _numbers(hashes: Sequence[bytes | str] | NDArray[Any]) -> NDArray[np.uint64]:
    """The last eight bytes of each digest, big-endian."""
    if isinstance(hashes, np.ndarray):
        return np.ascontiguousarray(hashes[:, -8:]).view(">u8").reshape(-1).astype(np.uint64)
    tails = b"".join(bytes.fromhex(name[-16:]) if isinstance(name, str) else name[-8:] for name in hashes)
    return np.frombuffer(tails, ">u8").astype(np.uint64)
