"""The promotion policy: which margins a suite can resolve, three-valued verdicts from paired samples, and the decision they add up to.

Pure and deterministic: the same samples in any order give the same bytes. Scoring is in `program.py`, releases are the orchestrator's.

How a row (one gate on one slice) gets its verdict, with d = candidate minus baseline and every bound one-sided at the gate's alpha:

- non_inferior: every item was scored, there are enough of them for the margin, the lower bound of d lies above -margin, and, where the
  gate has a `minimum`, the lower Wilson bound of the candidate's share reaches it.
- regressed: not non_inferior, and the row's p-value is at most alpha. The p-value tests "d >= 0" (exact McNemar, or Student's t on
  cluster-robust errors); with a `minimum` it is twice the smaller of that and the exact binomial p-value of "the share is at least the
  minimum". All hard rows form one family and are compared after Holm's adjustment; soft rows are compared as they are.
- inconclusive: everything else, missing data above all. Never a pass.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from repro_assets.documents import EvalSuites, GateVerdict, Suite
from repro_assets.evaluation import statistics
from repro_assets.recipe import Gate, GatesSection

OVERALL = "overall"
ALL = "all"
DIGITS = 8


class PolicyError(Exception):
    """Gates that cannot be used with these suites; the message lists each gate, the reason and the remedy."""


class PowerError(PolicyError):
    """A margin that the suite's items cannot resolve; the message gives the number needed."""


class SampleError(Exception):
    """A table of samples that no decision may be made from; the message names the row and the field."""


class Decision(msgspec.Struct, frozen=True):
    """`decision`: promote, hold, rollback or retrain. `reasons`: one sentence each, in the order of the gates."""

    decision: str
    reasons: tuple[str, ...]
    verdicts: tuple[GateVerdict, ...]


class Sample(NamedTuple):
    """One scored item: 0/1 of both models."""

    suite: str
    task: str
    item: str
    cluster: str | None
    slices: Mapping[str, str]
    candidate: int
    baseline: int

    @property
    def difference(self) -> int:
        return self.candidate - self.baseline


class _Row(NamedTuple):
    gate: Gate
    value: str
    suite: Suite | None


def check_power(section: GatesSection, suites: EvalSuites) -> None:
    """Refuse a policy that these suites cannot answer.

    Raises PolicyError for an unknown suite, task, label or value and for a share outside 0..1, PowerError (naming every row and the
    number of items it needs) for a margin that the items of the suite or slice do not resolve with 80 % power.
    """
    wrong: list[str] = []
    weak: list[str] = []
    names = [gate.name for gate in section.gates]
    wrong += [
        f"gate {name!r}: the name is used twice; give every gate its own" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    for row in _rows(section, suites):
        gate, label = row.gate, row.gate.label
        if problem := _unusable(row):
            wrong.append(f"gate {gate.name!r}: {problem}")
            continue
        assert row.suite is not None
        have, need = _expected(row.suite, label, row.value), statistics.items_needed(gate.margin, gate.alpha)
        if have < need:
            where = f"suite {gate.suite}" if label == OVERALL else f"suite {gate.suite}, {label}={row.value}"
            weak.append(
                f"gate {gate.name!r}: margin {gate.margin:g} needs {need} items, {where} has {have}, which resolve "
                f"{statistics.detectable(have, gate.alpha):.3f}; add {need - have} items or widen the margin"
            )
    if wrong:
        raise PolicyError("gates: " + "; ".join(wrong))
    if weak:
        raise PowerError("gates: " + "; ".join(weak))


def decide(samples: Iterable[dict[str, Any]], gates: GatesSection, suites: EvalSuites) -> Decision:
    """The decision on one checkpoint from its samples (rows of the table that the scoring program writes).

    A hard row that regressed asks for `gates.on_regressed`; a hard row that is inconclusive, a soft row that is not non_inferior, and a
    policy without gates hold; only a policy whose every row is non_inferior promotes. Raises SampleError for a malformed table.
    """
    table = parse(samples)
    rows = list(_rows(gates, suites))
    drafts = [_draft(row, table) for row in rows]
    hard = [index for index, row in enumerate(rows) if row.gate.level == "hard"]
    for index, adjusted in zip(hard, statistics.holm([drafts[index].p_value for index in hard]), strict=True):
        note = f"p {drafts[index].p_value:.3g} before Holm over {len(hard)} hard rows"
        drafts[index] = drafts[index]._replace(p_value=adjusted, notes=(*drafts[index].notes, note))
    verdicts = tuple(_verdict(row, draft) for row, draft in zip(rows, drafts, strict=True))
    return Decision(*_outcome(gates, verdicts), verdicts)


def flipped(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose score differs between the models, worst first: lost before won, then by how much their worst slice lost, then by name."""
    rows = list(samples)
    table = parse(rows)
    by_slice: dict[tuple[str, str, str], list[int]] = {}
    for sample in table:
        for label, value in [(OVERALL, ALL), *sample.slices.items()]:
            by_slice.setdefault((sample.suite, label, value), []).append(sample.difference)
    mean = {key: sum(values) / len(values) for key, values in by_slice.items()}

    def rank(pair: tuple[Sample, dict[str, Any]]) -> tuple[Any, ...]:
        sample = pair[0]
        worst = min(mean[sample.suite, label, value] for label, value in [(OVERALL, ALL), *sample.slices.items()])
        return sample.difference, worst, sample.suite, sample.task, sample.item

    return [row for _, row in sorted(((s, r) for s, r in zip(table, rows, strict=True) if s.difference), key=rank)]


def parse(samples: Iterable[dict[str, Any]]) -> list[Sample]:
    """Samples checked field by field. Raises SampleError for a missing field, a score that is not 0 or 1, or an item scored twice."""
    table: list[Sample] = []
    seen: set[tuple[str, str, str]] = set()
    for number, row in enumerate(samples, 1):
        try:
            suite, task, item, cluster, slices = row["suite"], row["task"], row["item"], row["cluster"], row["slices"]
            scores = row["candidate"]["score"], row["baseline"]["score"]
        except KeyError as error:
            raise SampleError(f"samples row {number}: the field {error} is missing; score the checkpoint again") from None
        except TypeError:
            raise SampleError(f"samples row {number}: not an object with a score of each model; score the checkpoint again") from None
        for name, value in (("suite", suite), ("task", task), ("item", item)):
            if not isinstance(value, str):
                raise SampleError(f"samples row {number}: {name} is {value!r}, not a string; score the checkpoint again")
        if not isinstance(slices, dict) or not isinstance(cluster, str | None):
            raise SampleError(f"samples row {number} ({suite}/{task}/{item}): slices or cluster have the wrong type")
        if any(type(score) not in (int, float) or score not in (0, 1) for score in scores):
            raise SampleError(f"samples row {number} ({suite}/{task}/{item}): scores are {scores}, each must be 0 or 1")
        if (suite, task, item) in seen:
            raise SampleError(f"samples row {number}: {suite}/{task}/{item} was scored twice; a repeated row would count as more evidence")
        seen.add((suite, task, item))
        table.append(Sample(suite, task, item, cluster, slices, int(scores[0]), int(scores[1])))
    return table


class _Draft(NamedTuple):
    """A row before Holm: `missing` says why it cannot pass whatever the numbers say; `shown`: non-inferior by the numbers."""

    p_value: float
    shown: bool
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    estimate: statistics.Estimate | None
    candidate: float
    baseline: float


def _rows(section: GatesSection, suites: EvalSuites) -> Iterable[_Row]:
    """Every gate on every value it covers, gates in recipe order, values sorted."""
    known = {suite.name: suite for suite in suites.suites}
    for gate in section.gates:
        suite = known.get(gate.suite)
        if gate.label == OVERALL:
            values: tuple[str, ...] = (ALL,)
        elif gate.values is not None:
            values = tuple(sorted(set(gate.values)))
        else:
            values = tuple(sorted(suite.labels.get(gate.label, {}))) if suite else ()
        # a gate that covers nothing still leaves a row, so that it fails closed
        for value in values or ("",):
            yield _Row(gate, value, suite)


def _unusable(row: _Row) -> str | None:
    gate, suite = row.gate, row.suite
    if suite is None:
        return f"no suite {gate.suite!r} among those scored; add it under evaluation.suites"
    if gate.task is not None and gate.task not in suite.tasks:
        return f"suite {gate.suite} has no task {gate.task!r}; known: {', '.join(suite.tasks)}"
    if gate.label != OVERALL and not suite.labels.get(gate.label):
        return f"suite {gate.suite} has no label {gate.label!r}; known: {', '.join([OVERALL, *sorted(suite.labels)])}"
    if gate.label == OVERALL and gate.values is not None and set(gate.values) != {ALL}:
        return f"the label {OVERALL} has the one value {ALL!r}; leave `values` out"
    if gate.label != OVERALL and row.value not in suite.labels[gate.label]:
        return f"no item of suite {gate.suite} has {gate.label}={row.value!r}; known: {', '.join(sorted(suite.labels[gate.label]))}"
    if not 0 < gate.margin < 1:
        return f"margin {gate.margin!r} is not a share between 0 and 1"
    if not 0 < gate.alpha < 0.5:
        return f"alpha {gate.alpha!r} is not an error rate between 0 and 0.5"
    if gate.minimum is not None and not 0 <= gate.minimum <= 1:
        return f"minimum {gate.minimum!r} is not a share between 0 and 1"
    return None


def _expected(suite: Suite, label: str, value: str) -> int:
    return suite.items if label == OVERALL else suite.labels.get(label, {}).get(value, 0)


def _draft(row: _Row, table: list[Sample]) -> _Draft:
    gate = row.gate
    if problem := _unusable(row):
        return _Draft(1.0, False, (problem,), (), None, 0.0, 0.0)
    assert row.suite is not None
    whole = [sample for sample in table if sample.suite == gate.suite]
    missing = [f"task {name} has no samples" for name in sorted(set(row.suite.tasks) - {sample.task for sample in whole})]
    if gate.label != OVERALL:
        whole = [sample for sample in whole if sample.slices.get(gate.label) == row.value]
    # counted over the suite: a task whose hard items were left out would still have enough of them
    scored, expected = len({sample.item for sample in whole}), _expected(row.suite, gate.label, row.value)
    if scored != expected:
        missing.append(f"{scored} of {expected} items were scored")
    chosen = [sample for sample in whole if gate.task in (None, sample.task)]
    if not chosen:
        return _Draft(1.0, False, (*missing, "no item was scored"), (), None, 0.0, 0.0)
    # two tasks may ask the same item: it is one draw, so an item without a cluster is its own cluster
    clusters: list[Hashable] = [("cluster", sample.cluster) if sample.cluster is not None else ("item", sample.item) for sample in chosen]
    items = len({sample.item for sample in chosen})
    if items < (need := statistics.items_needed(gate.margin, gate.alpha)):
        missing.append(f"{items} items cannot resolve the margin {gate.margin:g}, {need} are needed")
    differences = [sample.difference for sample in chosen]
    estimate = statistics.paired_difference(differences, clusters, gate.alpha)
    if estimate.clusters < 2 or statistics.least_reach(estimate.items, estimate.clusters, gate.alpha) >= gate.margin:
        missing.append(f"{items} items in {estimate.clusters} clusters cannot show the margin {gate.margin:g} even if none differs")
    shown, p_value, notes = statistics.non_inferior(estimate, gate.margin), statistics.worse_p_value(differences, clusters), []
    if gate.minimum is not None:
        right = sum(sample.candidate for sample in chosen)
        low, high = statistics.wilson(right, len(chosen), 2 * gate.alpha)
        shown = shown and low >= gate.minimum
        p_value = min(1.0, 2 * min(p_value, statistics.below_p_value(right, len(chosen), gate.minimum)))
        notes.append(f"candidate's share {low:.3f} to {high:.3f} against the minimum {gate.minimum:g}")
    lost, won = differences.count(-1), differences.count(1)
    notes.insert(0, f"{lost} lost, {won} won, {estimate.clusters} independent")
    shares = [sum(getattr(sample, name) for sample in chosen) / len(chosen) for name in ("candidate", "baseline")]
    return _Draft(p_value, shown, tuple(missing), tuple(notes), estimate, *shares)


def _verdict(row: _Row, draft: _Draft) -> GateVerdict:
    gate, estimate = row.gate, draft.estimate
    if draft.shown and not draft.missing:
        verdict = "non_inferior"
    elif estimate is not None and not draft.shown and draft.p_value <= gate.alpha:
        verdict = "regressed"
    else:
        verdict = "inconclusive"
    items = estimate.items if estimate else 0
    return GateVerdict(
        gate=gate.name,
        suite=gate.suite,
        label=gate.label,
        value=row.value,
        level=gate.level,
        verdict=verdict,
        items=items,
        candidate=round(draft.candidate, DIGITS),
        baseline=round(draft.baseline, DIGITS),
        # without data nothing is excluded: the widest interval, never a narrow one around 0
        difference=round(estimate.mean, DIGITS) + 0.0 if estimate else 0.0,
        low=round(estimate.low, DIGITS) + 0.0 if estimate else -1.0,
        high=round(estimate.high, DIGITS) + 0.0 if estimate else 1.0,
        margin=gate.margin,
        detectable=round(statistics.detectable(items, gate.alpha), DIGITS) if 0 < gate.alpha < 0.5 else 1.0,
        p_value=round(draft.p_value, DIGITS),
        detail="; ".join((*draft.missing, *draft.notes)),
    )


def _outcome(gates: GatesSection, verdicts: tuple[GateVerdict, ...]) -> tuple[str, tuple[str, ...]]:
    if not verdicts:
        return "hold", ("the policy has no gates, so nothing was shown; add one under gates.gates",)
    reasons: list[str] = []
    hard_regressed = hard_open = soft_open = False
    for verdict in verdicts:
        if verdict.verdict == "non_inferior":
            continue
        hard = verdict.level == "hard"
        hard_regressed |= hard and verdict.verdict == "regressed"
        hard_open |= hard and verdict.verdict == "inconclusive"
        soft_open |= not hard
        where = "" if verdict.label == OVERALL else f" on {verdict.label}={verdict.value}"
        tail = "" if hard else "; a reviewer's key must sign before this is promoted"
        reasons.append(
            f"{verdict.level} gate {verdict.gate}{where}: {verdict.verdict}, {verdict.difference:+.3f} "
            f"({verdict.low:+.3f} to {verdict.high:+.3f}) against a margin of {verdict.margin:g}; {verdict.detail}{tail}"
        )
    if hard_regressed:
        return gates.on_regressed, tuple(reasons)
    if hard_open or soft_open:
        return "hold", tuple(reasons)
    return "promote", (f"all {len(verdicts)} gate rows are non_inferior",)
