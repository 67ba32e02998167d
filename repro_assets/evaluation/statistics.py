"""Statistics of paired 0/1 scores: intervals, exact tests, power, Holm. Numbers in, numbers out; what they decide is in `policy.py`.

Sums go through `math.fsum`, so that the order of the items changes no bit of a result.
"""

import math
from collections.abc import Hashable, Sequence

import msgspec
from scipy import stats

#: Standard deviation of the paired difference of two models of equal accuracy (.70) whose items share their difficulty, as simulated
#: for the planning table: 438 items resolve 5 points, 110 resolve 10 (one-sided 5 %, power 80 %).
PAIRED_SD = 0.4208

#: Correlation inside a cluster that is assumed where the items themselves cannot show one (they do not vary).
CLUSTER_CORRELATION = 0.1


class Estimate(msgspec.Struct, frozen=True):
    """A mean with the two one-sided bounds at `alpha` each. `clusters` is the number of independent draws; `standard_error` may be 0."""

    mean: float
    low: float
    high: float
    standard_error: float
    items: int
    clusters: int


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable] | None) -> list[float]:
    """Sum of `values` in each cluster; without clusters every item is its own."""
    if clusters is None:
        return [float(value) for value in values]
    if len(clusters) != len(values):
        raise ValueError(f"{len(values)} values and {len(clusters)} clusters")
    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    return [math.fsum(group) for group in groups.values()]


def paired_difference(differences: Sequence[float], clusters: Sequence[Hashable] | None = None, alpha: float = 0.05) -> Estimate:
    """Mean of `differences` (candidate minus baseline, each in -1..1) with cluster-robust bounds.

    Variance is CR1 (equal to an intercept-only least squares with clustered covariance), quantile Student's t with G-1 degrees of
    freedom for G clusters. `low` and `high` are one-sided 1-`alpha` bounds, clipped to -1..1.

    Items that do not vary carry no variance to estimate an error from, yet n equal draws still do not prove the next one: each bound
    lies at least `least_reach` from the mean. A single cluster is a single draw and excludes nothing.
    """
    n = len(differences)
    if n == 0:
        raise ValueError("no differences to estimate from")
    _share("alpha", alpha)
    mean = math.fsum(differences) / n
    sums = cluster_sums([value - mean for value in differences], clusters)
    count = len(sums)
    error = math.sqrt(count / (count - 1) * math.fsum(value * value for value in sums)) / n if count > 1 else 0.0
    # differences that are all equal leave rounding of the mean behind, not variance
    if min(differences) == max(differences):
        error = 0.0
    reach = max(float(stats.t.ppf(1 - alpha, count - 1)) * error, least_reach(n, count, alpha)) if count > 1 else 2.0
    return Estimate(mean, max(-1.0, mean - reach), min(1.0, mean + reach), error, n, count)


def least_reach(items: int, clusters: int, alpha: float = 0.05) -> float:
    """Distance from the mean within which even items that never differ exclude nothing.

    The exact (Clopper-Pearson) bound on a rate of which n draws showed no case, 1 - alpha**(1/n), about 3/n at 5 %. Items in clusters count
    as n / (1 + (n/G - 1) * CLUSTER_CORRELATION) draws, the usual design effect.
    """
    draws = items / (1 + (items / clusters - 1) * CLUSTER_CORRELATION)
    return 1 - _share("alpha", alpha) ** (1 / draws)


def worse_p_value(differences: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float:
    """One-sided p-value of "the candidate is not worse" from 0/1 scores' differences (-1, 0, 1).

    Without clusters the exact McNemar test. With clusters Student's t on the CR1 error (G-1 degrees of freedom); where that error is
    zero, the exact sign test over clusters.
    """
    if clusters is None or len(set(clusters)) == len(differences):
        worse = sum(1 for value in differences if value < 0)
        better = sum(1 for value in differences if value > 0)
        return mcnemar(worse, better, alternative="worse")
    estimate = paired_difference(differences, clusters)
    if estimate.standard_error > 0:
        return float(stats.t.cdf(estimate.mean / estimate.standard_error, estimate.clusters - 1))
    sums = cluster_sums(differences, clusters)
    return mcnemar(sum(1 for value in sums if value < 0), sum(1 for value in sums if value > 0), alternative="worse")


def mcnemar(worse: int, better: int, alternative: str = "two-sided") -> float:
    """Exact McNemar p-value from the discordant pairs: items only the baseline got right, items only the candidate got right.

    `alternative`: `two-sided`, or `worse` for the one-sided test that the candidate loses more than it wins. 1.0 without discordant pairs.
    """
    if worse < 0 or better < 0:
        raise ValueError("counts of discordant pairs cannot be negative")
    if alternative not in ("two-sided", "worse"):
        raise ValueError(f"alternative {alternative!r} is neither two-sided nor worse")
    if worse + better == 0:
        return 1.0
    side = "greater" if alternative == "worse" else "two-sided"
    return float(stats.binomtest(worse, worse + better, 0.5, alternative=side).pvalue)


def wilson(successes: int, trials: int, alpha: float = 0.05) -> tuple[float, float]:
    """Wilson score interval (low, high) of a rate, 1-`alpha` two-sided."""
    _counts(successes, trials)
    z = float(stats.norm.ppf(1 - _share("alpha", alpha) / 2))
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # the bound of a rate of 0 or 1 is exact on its own side; rounding would leave 1e-18
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return max(0.0, low), min(1.0, high)


def clopper_pearson(successes: int, trials: int, alpha: float = 0.05) -> tuple[float, float]:
    """Exact interval (low, high) of a rate, 1-`alpha` two-sided."""
    _counts(successes, trials)
    tail = _share("alpha", alpha) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(stats.beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high


def below_p_value(successes: int, trials: int, minimum: float) -> float:
    """Exact one-sided p-value of "the rate is at least `minimum`"."""
    _counts(successes, trials)
    return float(stats.binom.cdf(successes, trials, minimum))


def non_inferior(estimate: Estimate, margin: float) -> bool:
    """Shown at the estimate's alpha that the loss is smaller than `margin`: the whole interval lies above -margin."""
    return estimate.low > -margin


def items_needed(margin: float, alpha: float = 0.05, power: float = 0.8, sd: float = PAIRED_SD) -> int:
    """Items with which an unchanged candidate is shown non-inferior at `margin` with probability `power`."""
    _share("margin", margin)
    return math.ceil((_reach(alpha, power) * sd / margin) ** 2)


def detectable(items: int, alpha: float = 0.05, power: float = 0.8, sd: float = PAIRED_SD) -> float:
    """Smallest margin that `items` resolve with `power`; at most 1, and 1 without items."""
    return min(1.0, _reach(alpha, power) * sd / math.sqrt(items)) if items > 0 else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values in the order given: reject those not above alpha and the family-wise error stays below it."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _reach(alpha: float, power: float) -> float:
    _share("alpha", alpha)
    _share("power", power)
    return float(stats.norm.ppf(1 - alpha) + stats.norm.ppf(power))


def _share(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} {value!r} is not a share between 0 and 1")
    return value


def _counts(successes: int, trials: int) -> None:
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
