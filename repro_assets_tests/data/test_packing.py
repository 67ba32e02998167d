"""The packing plan: every record once, a pure function of content, local under edits."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro_assets.data import packing
from repro_assets.data.errors import PackingError


def names(count: int) -> list[str]:
    return [hashlib.sha256(f"record {number}".encode()).hexdigest() for number in range(count)]


def lengths_of(ids: list[str], longest: int = 300) -> list[int]:
    return [1 + int(name[:8], 16) % longest for name in ids]


def as_records(plan: packing.Plan, ids: list[str]) -> list[list[str]]:
    return [[ids[index] for index in row] for row in plan.rows]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 64), max_size=80), st.integers(0, 3), st.integers(0, 3))
def test_every_record_is_in_exactly_one_row_that_has_room_for_it(lengths: list[int], seed: int, epoch: int) -> None:
    ids = names(len(lengths))
    plan = packing.plan(lengths, ids, 64, seed, epoch)
    assert sorted(index for row in plan.rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= 64 for row in plan.rows)
    if lengths:
        assert plan.padding == pytest.approx(1 - sum(lengths) / (64 * len(plan.rows)))


@given(st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_the_records(chance: random.Random) -> None:
    """S0.9: the shuffle is a keyed hash of the record, no state and no order of arrival."""
    ids = names(200)
    lengths = lengths_of(ids)
    order = chance.sample(range(200), 200)
    one = packing.plan(lengths, ids, 512, 7, 0)
    other = packing.plan([lengths[index] for index in order], [ids[index] for index in order], 512, 7, 0)
    assert one.digest == other.digest
    assert as_records(one, ids) == as_records(other, [ids[index] for index in order])


def test_seed_epoch_and_row_size_each_give_another_plan() -> None:
    """S0.19: the seed is a parameter."""
    ids = names(300)
    lengths = lengths_of(ids)
    plans = [packing.plan(lengths, ids, *how).digest for how in ((512, 7, 0), (512, 8, 0), (512, 7, 1), (640, 7, 0))]
    assert len(set(plans)) == 4
    assert packing.plan(lengths, ids, 512, 7, 0).digest == plans[0]


def test_one_record_more_or_less_changes_only_its_window() -> None:
    ids = names(20_000)
    before = packing.plan(lengths_of(ids), ids, 2048, 7, 0)
    after = packing.plan(lengths_of(ids[1:]), ids[1:], 2048, 7, 0)
    old = {tuple(row) for row in as_records(before, ids)}
    new = {tuple(row) for row in as_records(after, ids[1:])}
    assert len(old - new) / len(old) < 0.25
    assert len(old & new) > 0.75 * len(old)


def test_padding_is_small_where_lengths_are_mixed() -> None:
    ids = names(20_000)
    chance = np.random.Generator(np.random.PCG64(1)).lognormal(5.5, 0.8, 20_000)
    lengths = [int(min(2048, max(8, length))) for length in chance]
    assert packing.plan(lengths, ids, 2048, 7, 0).padding < 0.02


def test_long_records_are_spread_over_the_epoch() -> None:
    """Best-fit-decreasing alone would put all long records into the first rows of every window."""
    ids = names(5000)
    lengths = lengths_of(ids, 500)
    plan = packing.plan(lengths, ids, 512, 7, 0)
    half = len(plan.rows) // 2
    first, second = ([lengths[index] for row in rows for index in row] for rows in (plan.rows[:half], plan.rows[half:]))
    assert sum(first) / len(first) == pytest.approx(sum(second) / len(second), rel=0.1)


def test_duplicate_records_are_both_packed() -> None:
    ids = names(3) * 2
    plan = packing.plan([5] * 6, ids, 10, 7, 0)
    assert sorted(index for row in plan.rows for index in row) == list(range(6))


def test_the_plan_of_known_records_never_changes() -> None:
    """Golden: the digest is in every checkpoint's content."""
    ids = names(500)
    plan = packing.plan(lengths_of(ids), ids, 512, 7, 2)
    assert (len(plan.rows), plan.digest) == GOLDEN


GOLDEN = (149, "b25597f7af747992e420bac1d7b9a331450e972d3ce3e56f4a271b33beb05622")


def test_a_record_longer_than_a_row_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        PackingError, match=r"has 65 tokens, a row holds 1 to 64: raise training.row_tokens to at least 65, or lower sharding.max_tokens"
    ):
        packing.plan([65], names(1), 64, 7, 0)
    with pytest.raises(PackingError, match="0 tokens"):
        packing.plan([0], names(1), 64, 7, 0)
    with pytest.raises(PackingError, match="2 lengths for 1 records"):
        packing.plan([1, 2], names(1), 64, 7, 0)


def by_definition(lengths: list[int], ids: list[str], row_tokens: int, seed: int, epoch: int) -> list[list[str]]:
    """The plan as its definition says it, without a thought for speed."""
    keys = [hashlib.sha256(f"{seed}|{epoch}|{name}".encode()).digest() for name in ids]
    windows: list[list[int]] = [[]]
    for index in sorted(range(len(ids)), key=lambda index: (keys[index], ids[index], index)):
        windows[-1].append(index)
        if int.from_bytes(keys[index][-4:], "big") < (1 << 32) // packing.WINDOW or len(windows[-1]) >= packing.MOST:
            windows.append([])
    out: list[list[str]] = []
    for window in windows:
        rows: list[list[int]] = []
        for index in sorted(window, key=lambda index: (-lengths[index], ids[index], index)):
            free = [(row_tokens - sum(lengths[one] for one in row), number) for number, row in enumerate(rows)]
            fits = sorted((left, number) for left, number in free if left >= lengths[index])
            rows[fits[0][1]].append(index) if fits else rows.append([index])
        shuffled = [sorted(row, key=lambda index: (keys[index], index)) for row in rows]
        out += [[ids[index] for index in row] for row in sorted(shuffled, key=lambda row: (keys[row[0]], row[0]))]
    return out


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), max_size=90), st.integers(0, 3), st.sampled_from([3, 20, 1024]))
def test_the_plan_is_best_fit_decreasing_in_windows_cut_by_the_keyed_hash(pairs: list[tuple[int, int]], seed: int, window: int) -> None:
    """Duplicates, which tie in everything, included."""
    known = names(41)
    ids, lengths = [known[number] for number, _length in pairs], [length for _number, length in pairs]
    kept = packing.WINDOW, packing.MOST
    packing.WINDOW, packing.MOST = window, 2 * window
    try:
        plan = packing.plan(lengths, ids, 32, seed, 1)
        assert as_records(plan, ids) == by_definition(lengths, ids, 32, seed, 1)
    finally:
        packing.WINDOW, packing.MOST = kept


def test_records_whose_digests_begin_alike_are_ordered_by_the_whole_digest() -> None:
    ids = [f"{'0' * 16}{number:048x}" for number in range(300)]
    assert as_records(packing.plan([7] * 300, ids, 32, 0, 0), ids) == by_definition([7] * 300, ids, 32, 0, 0)
    assert packing.plan([7] * 300, ids, 32, 0, 0).digest == packing.plan([7] * 300, ids[::-1], 32, 0, 0).digest


def test_a_plan_of_no_records_has_no_rows() -> None:
    assert packing.plan([], [], 32, 0, 0).rows == []


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2)), max_size=40))
def test_keys_that_differ_only_behind_their_first_eight_bytes_are_told_apart(rows: list[tuple[int, int, int]]) -> None:
    """Of SHA-256 keys nobody has seen such a pair; an order that is an identity holds for them all the same."""
    heads = (b"\x00" * 8, b"\x00" * 7 + b"\x01", b"AAAAAAAA")
    keys = [heads[head] + bytes([tail]) for head, tail, _id in rows]
    ids = [f"{name:064x}" for _head, _tail, name in rows]
    expected = sorted(range(len(rows)), key=lambda index: (keys[index], ids[index], index))
    assert packing._sorted([], keys, ids).tolist() == expected
    before = np.array([head for head, _tail, _id in rows], np.int64)
    within = sorted(range(len(rows)), key=lambda index: (-before[index], keys[index], ids[index], index))
    assert packing._sorted([-before], keys, ids).tolist() == within
