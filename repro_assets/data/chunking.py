"""Where a run of records is cut into leaves: normalised content-defined chunking on record digests.

A pure function of the digests, so that an edit moves only the boundaries beside it. What a leaf holds is said elsewhere.
"""

from collections.abc import Sequence


def boundaries(hashes: Sequence[bytes | str], target: int = 256) -> list[int]:
    """End positions (exclusive) of the chunks of `hashes` (SHA-256, 32 bytes or 64 hexadecimal digits); the last one is len(hashes).

    A chunk has `target` records on average, at least target/4 and at most 4*target (the last chunk may be shorter). Below the target
    a cut needs four times more luck than 1/target, above it four times less, which halves the spread of plain chunking.
    Raises ValueError for a target below 4.
    """
    if target < 4:
        raise ValueError(f"a target of {target} records a leaf; at least 4")
    least, most = target // 4, target * 4
    strict, easy = (1 << 64) // (target * 4), (1 << 64) // max(1, target // 4)
    ends: list[int] = []
    start = 0
    for position, name in enumerate(hashes):
        size = position + 1 - start
        if size < least:
            continue
        limit = strict if size < target else easy
        if size >= most or _number(name) < limit:
            ends.append(position + 1)
            start = position + 1
    if start < len(hashes):
        ends.append(len(hashes))
    return ends


def _number(name: bytes | str) -> int:
    return int(name[-16:], 16) if isinstance(name, str) else int.from_bytes(name[-8:], "big")
