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
    assert all(target // 2 < len(chunk) <= 4 * target for chunk in cut[1:-1])
    assert all(1 <= len(chunk) <= 4 * target for chunk in cut)
    assert boundaries([name.hex() for name in hashes], target) == boundaries(hashes, target)


def test_the_average_chunk_is_the_target_and_no_chunk_far_from_it() -> None:
    sizes = [len(chunk) for chunk in chunks(digests(200_000), 256)]
    assert statistics.mean(sizes) == pytest.approx(257, rel=0.05)
    assert statistics.pstdev(sizes) / statistics.mean(sizes) < 0.45


@given(st.integers(0, 999), st.sampled_from(["insert", "delete", "edit"]), st.integers(0, 10**6), st.sampled_from([4, 8, 16, 64]))
def test_one_record_makes_at_most_three_new_chunks(position: int, kind: str, salt: int, target: int) -> None:
    """At the head and at the end too: no position is part of a cut."""
    before = digests(1000)
    new = hashlib.sha256(f"new{salt}".encode()).digest()
    head, tail = before[:position], before[position + 1 :]
    after = {"insert": [*head, new, before[position], *tail], "delete": [*head, *tail], "edit": [*head, new, *tail]}[kind]
    old, now = chunks(before, target), chunks(after, target)
    came = [number for number, chunk in enumerate(now) if chunk not in set(old)]
    lost = [number for number, chunk in enumerate(old) if chunk not in set(now)]
    assert max(len(came), len(lost)) <= 3
    holder = next(number for number, chunk in enumerate(old) if before[position] in chunk)
    assert all(abs(number - holder) <= 2 for number in lost)


def test_digests_without_a_minimum_are_cut_at_four_times_the_target() -> None:
    """Many copies of one record, or digests that an adversary sorted."""
    assert boundaries([bytes(32)] * 300, 32) == [1, 129, 257, 300]
    falling = [number.to_bytes(32, "big") for number in range(300, 0, -1)]
    assert boundaries(falling, 32) == [128, 256, 300]


def test_on_average_one_insert_rewrites_hardly_more_than_its_own_chunk() -> None:
    before = digests(20_000)
    rewritten = []
    for position in range(0, 20_000, 97):
        after = [*before[:position], hashlib.sha256(f"x{position}".encode()).digest(), *before[position:]]
        rewritten.append(len(set(chunks(after, 64)) - set(chunks(before, 64))))
        if len(rewritten) == 60:
            break
    assert statistics.mean(rewritten) < 1.2


def test_the_cut_of_known_digests_never_changes() -> None:
    """Golden: leaves of every snapshot ever made depend on these positions."""
    assert boundaries(digests(2000), 256) == GOLDEN


GOLDEN = [88, 223, 386, 563, 703, 995, 1329, 1574, 1999, 2000]


def test_a_target_too_small_for_its_minimum_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        boundaries([], 3)
