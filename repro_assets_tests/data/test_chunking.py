"""Content-defined cuts: sizes, and that an edit moves only the boundaries beside it."""

import hashlib
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro_assets.data.chunking import boundaries


def digests(count: int, salt: str = "") -> list[bytes]:
    return [hashlib.sha256(f"{salt}{number}".encode()).digest() for number in range(count)]


def chunks(hashes: list[bytes], target: int) -> list[tuple[bytes, ...]]:
    ends = boundaries(hashes, target)
    return [tuple(hashes[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


NAMES = st.lists(st.integers(0, 300), max_size=300).map(
    lambda numbers: [hashlib.sha256(str(number).encode()).digest() for number in numbers]
)


@given(NAMES, st.sampled_from([4, 16, 64]))
def test_chunks_hold_every_record_once_and_keep_their_size_limits(hashes: list[bytes], target: int) -> None:
    cut = chunks(hashes, target)
    assert [name for chunk in cut for name in chunk] == hashes
    assert all(target // 4 <= len(chunk) <= 4 * target for chunk in cut[:-1])
    assert all(1 <= len(chunk) <= 4 * target for chunk in cut)
    assert boundaries([name.hex() for name in hashes], target) == boundaries(hashes, target)


def test_the_average_chunk_is_near_the_target_and_the_spread_below_that_of_plain_chunking() -> None:
    sizes = [len(chunk) for chunk in chunks(digests(200_000), 256)]
    assert 230 <= statistics.mean(sizes) <= 300
    assert statistics.pstdev(sizes) / statistics.mean(sizes) < 0.45


@given(st.integers(0, 3999), st.sampled_from(["insert", "delete", "edit"]), st.integers(0, 10**6))
def test_one_edit_changes_only_the_chunks_beside_it(position: int, kind: str, salt: int) -> None:
    """An insert at the head included: no position may be part of a cut."""
    before = digests(4000)
    new = hashlib.sha256(f"new{salt}".encode()).digest()
    after = {
        "insert": [*before[:position], new, *before[position:]],
        "delete": before[:position] + before[position + 1 :],
        "edit": [*before[:position], new, *before[position + 1 :]],
    }[kind]
    old, now = chunks(before, 16), chunks(after, 16)
    lost = [number for number, chunk in enumerate(old) if chunk not in set(now)]
    came = [number for number, chunk in enumerate(now) if chunk not in set(old)]
    assert old[: lost[0]] == now[: lost[0]]
    # Cutting falls back into step within a few chunks: the minimum size can only swallow boundaries for a while.
    assert lost[-1] - lost[0] < 12
    assert came[-1] - came[0] < 12
    assert lost[0] - 1 <= next(number for number, chunk in enumerate(old) if before[min(position, 3999)] in chunk) <= lost[-1] + 1


def test_on_average_one_edit_rewrites_fewer_than_two_chunks() -> None:
    before = digests(20_000)
    rewritten = []
    for position in range(0, 20_000, 97):
        after = [*before[:position], hashlib.sha256(f"x{position}".encode()).digest(), *before[position:]]
        rewritten.append(len(set(chunks(after, 64)) - set(chunks(before, 64))))
        if len(rewritten) == 60:
            break
    assert statistics.mean(rewritten) < 2


def test_the_cut_of_known_digests_never_changes() -> None:
    """Golden: leaves of every snapshot ever made depend on these positions."""
    assert boundaries(digests(2000), 256) == GOLDEN


GOLDEN = [304, 386, 660, 995, 1329, 1645, 1975, 2000]


def test_a_target_too_small_for_its_minimum_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        boundaries([], 3)
