"""Statistics against statsmodels, textbook values, simulation and algebraic properties."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar as oracle_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from repro_assets.evaluation import statistics as s

differences = st.lists(st.sampled_from([-1, 0, 1]), min_size=2, max_size=120)


def test_the_clustered_error_and_bound_equal_statsmodels() -> None:
    rng = np.random.default_rng(5)
    clusters = rng.integers(0, 40, 300)
    values = np.clip(rng.normal(0.1, 0.4, 300) + rng.normal(0, 0.5, 40)[clusters], -1, 1)
    oracle = OLS(values, np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": True}, use_t=True)
    ours = s.paired_difference(values.tolist(), clusters.tolist(), alpha=0.05)
    assert ours.standard_error == pytest.approx(oracle.bse[0], rel=1e-12)
    assert ours.clusters == len(set(clusters.tolist()))
    # two-sided 90 % is one-sided 5 % at each end; errors this large keep the floor of equal draws out of the comparison
    low, high = oracle.conf_int(alpha=0.10)[0]
    assert (high - low) / 2 > s.least_reach(300, ours.clusters)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-12)
    oracle = OLS(values, np.ones(300)).fit()
    single = s.paired_difference(values.tolist())
    assert (single.low, single.high) == pytest.approx(tuple(oracle.conf_int(alpha=0.10)[0]), rel=1e-12)


def test_clusters_that_are_items_change_nothing() -> None:
    values = [1, 0, -1, -1, 0, 0, 0, 1, -1, 0] * 9
    assert s.paired_difference(values) == s.paired_difference(values, list(range(90)))


def test_exact_mcnemar_equals_statsmodels() -> None:
    for worse in range(12):
        for better in range(12):
            expected = oracle_mcnemar([[3, worse], [better, 4]], exact=True).pvalue if worse + better else 1.0
            assert s.mcnemar(worse, better) == pytest.approx(expected, abs=1e-12)
    # by hand: P(X >= 8 of 9 at one half) = (9 + 1) / 512
    assert s.mcnemar(8, 1, "worse") == pytest.approx(10 / 512)
    assert s.mcnemar(0, 9, "worse") == 1.0


def test_rate_intervals_equal_statsmodels() -> None:
    for successes, trials in [(0, 30), (1, 30), (15, 30), (29, 30), (30, 30), (97, 110), (431, 438)]:
        for ours, method in ((s.wilson, "wilson"), (s.clopper_pearson, "beta")):
            low, high = proportion_confint(successes, trials, alpha=0.05, method=method)
            assert ours(successes, trials, alpha=0.05) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize(("trials", "bound"), [(30, 0.095), (100, 0.0295), (300, 0.0099), (1000, 0.0030)])
def test_no_failure_in_n_supports_only_the_rule_of_three(trials: int, bound: float) -> None:
    assert s.clopper_pearson(0, trials, alpha=0.10)[1] == pytest.approx(bound, rel=0.02)


def test_holm_equals_statsmodels_in_any_order() -> None:
    rng = random.Random(2)
    for size in range(1, 12):
        p_values = [rng.choice([rng.random() ** 3, 0.02]) for _ in range(size)]
        expected = multipletests(p_values, method="holm")[1]
        assert s.holm(p_values) == pytest.approx(list(expected), abs=1e-15)
    assert s.holm([]) == []


def test_the_planning_table_says_438_items_for_5_points_and_110_for_10() -> None:
    """S0.73: the number that a refused recipe is told."""
    assert {margin: s.items_needed(margin) for margin in (0.02, 0.03, 0.05, 0.10)} == {0.02: 2737, 0.03: 1217, 0.05: 438, 0.10: 110}
    for margin in (0.02, 0.05, 0.1):
        need = s.items_needed(margin)
        assert s.detectable(need) <= margin < s.detectable(need - 1)
    assert s.detectable(0) == 1.0


def test_the_planned_power_is_the_power_in_simulation() -> None:
    rng = np.random.default_rng(11)
    chance = s.PAIRED_SD**2 / 2
    shown = [
        s.non_inferior(s.paired_difference(rng.choice([-1, 0, 1], 110, p=[chance, 1 - 2 * chance, chance]).tolist()), 0.10)
        for _ in range(600)
    ]
    assert 0.74 < np.mean(shown) < 0.86


def test_bounds_cover_the_truth_with_few_clusters_where_naive_ones_do_not() -> None:
    rng = np.random.default_rng(3)
    below = naive = 0
    rounds = 500
    for _ in range(rounds):
        shift = rng.choice([-1, 0, 1], 60, p=[0.1, 0.8, 0.1])
        values = [int(shift[cluster]) if rng.random() < 0.8 else 0 for cluster in range(60) for _ in range(8)]
        clusters = [cluster for cluster in range(60) for _ in range(8)]
        below += s.paired_difference(values, clusters).low > 0
        naive += s.paired_difference(values).low > 0
    assert below / rounds < 0.08
    assert naive / rounds > 0.15


def test_a_loss_of_the_whole_margin_is_called_non_inferior_at_most_at_alpha() -> None:
    rng = np.random.default_rng(17)
    passed = [s.non_inferior(s.paired_difference(rng.choice([-1, 0], 110, p=[0.1, 0.9]).tolist()), 0.10) for _ in range(1000)]
    assert np.mean(passed) < 0.085


def test_items_that_never_differ_still_leave_an_interval() -> None:
    estimate = s.paired_difference([0] * 110)
    assert estimate.standard_error == 0
    assert estimate.low == -estimate.high == pytest.approx(-s.clopper_pearson(0, 110, alpha=0.10)[1])
    assert s.paired_difference([1] * 50).low == pytest.approx(0.05 ** (1 / 50))
    assert s.paired_difference([0.1] * 3).standard_error == 0, "rounding of a mean is not variance"
    # one item, or one cluster of many equal items, is one draw and excludes nothing
    for alone in (s.paired_difference([1]), s.paired_difference([0] * 500, ["one"] * 500)):
        assert (alone.low, alone.high) == (-1.0, 1.0)


def test_equal_items_of_one_source_exclude_less_than_as_many_of_different_sources() -> None:
    reaches = [s.least_reach(120, clusters) for clusters in (120, 60, 20, 5, 2)]
    assert reaches == sorted(reaches)
    assert reaches[0] < 0.025
    assert reaches[-1] > 0.15
    assert s.least_reach(120, 120) == 1 - 0.05 ** (1 / 120)
    estimate = s.paired_difference([0] * 120, [n % 20 for n in range(120)])
    assert estimate.high == -estimate.low == s.least_reach(120, 20)
    # three items of one source count as 3 / (1 + 2 * .1) draws
    assert s.least_reach(30, 10) == pytest.approx(1 - 0.05 ** (1 / 25))


def test_a_clustered_loss_is_judged_by_its_clusters() -> None:
    values = [-1] * 40 + [0] * 160
    spread, together = [f"c{n % 20}" for n in range(200)], [f"c{n // 10}" for n in range(200)]
    assert s.worse_p_value(values, spread) < 0.001 < s.worse_p_value(values, together)
    # without variance between clusters the sign test over clusters remains: 1 of 2**8
    assert s.worse_p_value([-1] * 16, [n // 2 for n in range(16)]) == pytest.approx(2**-8)


@given(differences)
def test_swapping_the_models_mirrors_the_interval(values: list[int]) -> None:
    one, other = s.paired_difference(values), s.paired_difference([-value for value in values])
    assert (one.mean, one.low, one.high) == (-other.mean, -other.high, -other.low)


@given(
    st.one_of(differences, st.lists(st.floats(-1, 1), min_size=2, max_size=120)),
    st.lists(st.sampled_from("abcdefgh"), min_size=120, max_size=120),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_items_changes_no_bit(values: list[float], names: list[str], rng: random.Random) -> None:
    clusters = names[: len(values)]
    order = list(range(len(values)))
    rng.shuffle(order)
    shuffled, moved = [values[i] for i in order], [clusters[i] for i in order]
    assert s.paired_difference(values, clusters) == s.paired_difference(shuffled, moved)
    assert s.worse_p_value(values, clusters) == s.worse_p_value(shuffled, moved)


@given(differences, st.integers(2, 4))
def test_more_of_the_same_items_narrow_the_interval(values: list[int], times: int) -> None:
    one, more = s.paired_difference(values), s.paired_difference(values * times)
    assert more.mean == pytest.approx(one.mean, abs=1e-12)
    assert more.high - more.low <= one.high - one.low + 1e-12


@given(differences)
def test_the_interval_holds_the_mean_and_stays_in_range(values: list[int]) -> None:
    estimate = s.paired_difference(values)
    assert -1 <= estimate.low <= estimate.mean <= estimate.high <= 1
    assert estimate.low < estimate.high


@settings(max_examples=50)
@given(st.integers(1, 400), st.data())
def test_rate_bounds_mirror_and_exact_ones_are_wider_at_the_ends(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    for bounds in (s.wilson, s.clopper_pearson):
        low, high = bounds(successes, trials)
        other_low, other_high = bounds(trials - successes, trials)
        assert low == pytest.approx(1 - other_high, abs=1e-9)
        assert 0 <= low <= successes / trials <= high <= 1
        assert other_low <= other_high


def test_nonsense_is_refused() -> None:
    for call in (
        lambda: s.paired_difference([]),
        lambda: s.paired_difference([0, 1], ["a"]),
        lambda: s.paired_difference([0, 1], alpha=0.0),
        lambda: s.wilson(3, 2),
        lambda: s.wilson(0, 0),
        lambda: s.mcnemar(-1, 2),
        lambda: s.mcnemar(1, 2, "better"),
        lambda: s.items_needed(0.0),
        lambda: s.least_reach(10, 10, 0.0),
        lambda: s.detectable(10, power=1.0),
    ):
        with pytest.raises(ValueError, match=r"share|trials|items|clusters|discordant|differences|alternative"):
            call()
    assert math.isclose(s.below_p_value(0, 10, 0.5), 2**-10)
