"""Where a run of records is cut into leaves: content-defined chunking by local minima of the record digests.

A pure function of the digests, so that an edit moves only the boundaries beside it. What a leaf holds is said elsewhere.
"""

from collections import deque
from collections.abc import Sequence


def boundaries(hashes: Sequence[bytes | str], target: int = 256) -> list[int]:
    """End positions (exclusive) of the chunks of `hashes` (SHA-256, 32 bytes or 64 hexadecimal digits); the last one is len(hashes).

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
    for position in _minima([_number(name) for name in hashes], target // 2):
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


def _minima(numbers: list[int], reach: int) -> list[int]:
    """Positions of the smallest number within `reach` on either side; of equal ones the first."""
    found: list[int] = []
    window: deque[int] = deque()
    ahead = 0
    for position in range(len(numbers)):
        while ahead < min(len(numbers), position + reach + 1):
            while window and numbers[window[-1]] > numbers[ahead]:
                window.pop()
            window.append(ahead)
            ahead += 1
        while window[0] < position - reach:
            window.popleft()
        if window[0] == position:
            found.append(position)
    return found


def _number(name: bytes | str) -> int:
    return int(name[-16:], 16) if isinstance(name, str) else int.from_bytes(name[-8:], "big")
