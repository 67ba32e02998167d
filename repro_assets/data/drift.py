"""How far two distributions of counts lie apart: population stability index, Jensen-Shannon distance, and a p-value to print.

Pure functions of whole counts. Which distributions are compared and what is too far is `validation.py`'s.
"""

import math
from collections.abc import Mapping

DIGITS = 8
# Half a record in every bin: an empty bin would make the index infinite, and a new value must still show.
PRIOR = 0.5


def _shares(counts: Mapping[str, int], bins: list[str], prior: float) -> list[float]:
    total = math.fsum(counts.get(name, 0) + prior for name in bins)
    return [(counts.get(name, 0) + prior) / total for name in bins]


def _bins(now: Mapping[str, int], before: Mapping[str, int]) -> list[str]:
    return sorted(name for name in now.keys() | before.keys() if now.get(name, 0) or before.get(name, 0))


def psi(now: Mapping[str, int], before: Mapping[str, int]) -> float:
    """Population stability index of two counts by bin, >= 0, with half a record added to each bin; 8 digits."""
    bins = _bins(now, before)
    if len(bins) < 2:
        return 0.0
    pairs = zip(_shares(now, bins, PRIOR), _shares(before, bins, PRIOR), strict=True)
    return round(math.fsum((p - q) * math.log(p / q) for p, q in pairs), DIGITS)


def js(now: Mapping[str, int], before: Mapping[str, int]) -> float:
    """Jensen-Shannon distance (square root of the divergence, base 2) of two counts by bin, 0..1; 8 digits. 0 when both are empty."""
    bins = _bins(now, before)
    if not sum(now.values()) or not sum(before.values()):
        return 0.0 if not bins else 1.0
    terms = []
    for p, q in zip(_shares(now, bins, 0), _shares(before, bins, 0), strict=True):
        middle = (p + q) / 2
        terms += [share * math.log2(share / middle) / 2 for share in (p, q) if share]
    return round(math.sqrt(max(0.0, math.fsum(terms))), DIGITS)


def p_value(now: Mapping[str, int], before: Mapping[str, int]) -> float:
    """Chi-squared test that both counts come from one distribution. To print, never to gate on: many records make any shift significant."""
    bins = _bins(now, before)
    if len(bins) < 2 or not sum(now.values()) or not sum(before.values()):
        return 1.0
    from scipy.stats import chi2_contingency

    return float(chi2_contingency([[now.get(name, 0) for name in bins], [before.get(name, 0) for name in bins]]).pvalue)
