"""Effect sizes between distributions of counts, against scipy and by their properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from repro_assets.data import drift, validation
from repro_assets.data.judged import Judged
from repro_assets.recipe import Drift

COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10_000), min_size=1)


@given(COUNTS, COUNTS)
def test_both_distances_are_symmetric_and_zero_only_for_equal_shares(now: dict[str, int], before: dict[str, int]) -> None:
    """S0.31: drift of classes."""
    for distance in (drift.psi, drift.js):
        assert distance(now, before) == pytest.approx(distance(before, now), abs=1e-7)
        assert distance(now, before) >= 0
        assert distance(now, now) == 0


@given(COUNTS.filter(lambda counts: any(counts.values())), COUNTS.filter(lambda counts: any(counts.values())))
def test_jensen_shannon_is_that_of_scipy(now: dict[str, int], before: dict[str, int]) -> None:
    bins = sorted(now.keys() | before.keys())
    expected = float(jensenshannon([now.get(name, 0) for name in bins], [before.get(name, 0) for name in bins], base=2))
    assert drift.js(now, before) == pytest.approx(expected, abs=1e-7)


def test_the_stability_index_of_a_known_shift_is_the_textbook_value() -> None:
    now, before = {"a": 60_000_000, "b": 40_000_000}, {"a": 50_000_000, "b": 50_000_000}
    assert drift.psi(now, before) == pytest.approx(0.1 * 0.18232156 + -0.1 * -0.22314355, abs=1e-6)
    assert drift.psi({"a": 1}, {"b": 1}) == 1.09861229  # half a record a bin: shares 3/4 and 1/4, so ln 3
    assert drift.psi({"a": 100}, {"a": 7}) == 0.0


def test_the_order_of_bins_does_not_move_a_digit() -> None:
    now, before = {str(n): n * n + 1 for n in range(30)}, {str(n): 31 - n for n in range(30)}
    turned = [dict(reversed(list(counts.items()))) for counts in (now, before)]
    assert drift.psi(now, before) == drift.psi(*turned)
    assert drift.js(now, before) == drift.js(*turned)


def test_a_value_that_is_new_shows() -> None:
    assert drift.psi({"a": 900, "b": 100}, {"a": 1000}) > 0.25
    assert drift.js({"a": 900, "b": 100}, {"a": 1000}) > 0.2
    assert drift.js({}, {"a": 1}) == 1.0
    assert drift.js({}, {}) == 0.0


def test_a_small_shift_of_many_records_is_significant_and_no_effect() -> None:
    """Why gates read effect sizes: a shift of 1 % in a million records has p near zero and a stability index near zero."""
    now, before = {"a": 505_000, "b": 495_000}, {"a": 500_000, "b": 500_000}
    assert drift.p_value(now, before) < 1e-10
    assert drift.psi(now, before) < 0.001
    assert drift.p_value(now, now) == pytest.approx(1.0)
    assert drift.p_value({"a": 3}, {"a": 4}) == 1.0


@pytest.mark.parametrize(("records", "verdict"), [(99, "warn"), (100, "fail")])
def test_distributions_of_few_records_warn_and_never_refuse(records: int, verdict: str) -> None:
    """One record more in a bin of few moves the measures past any limit."""
    judged = Judged()
    validation._judge_counts("lengths", {"64": records}, {"128": 1000}, Drift(), judged)
    assert [(rule.verdict, f"only {records} on one side" in rule.detail) for rule in judged.rules] == [(verdict, records < 100)] * 2
