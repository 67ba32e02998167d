"""The gate policy as a table of stories: what promotes, what holds, what is refused, and that nothing missing ever passes."""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro_assets.documents import EvalSuites, Suite
from repro_assets.evaluation.policy import Decision, PolicyError, PowerError, SampleError, check_power, decide, flipped
from repro_assets.recipe import Gate, GatesSection
from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import canonical

INTENTS = ("refund", "cancel", "invoice", "login")
PER_INTENT = 120
BLOB = Blob("0" * 64, 0)


def suites(
    labels: dict[str, dict[str, int]] | None = None, items: int = PER_INTENT * len(INTENTS), tasks: tuple[str, ...] = ("triage",)
) -> EvalSuites:
    labels = {"intent": dict.fromkeys(INTENTS, PER_INTENT)} if labels is None else labels
    return EvalSuites(
        suites=(Suite(name="tickets", suite_files={}, tasks=tasks, items=items, labels=labels, digest="0" * 64),), prompts=BLOB
    )


def table(
    candidate: dict[str, float], baseline: dict[str, float], task: str = "triage", clusters: int | None = None
) -> list[dict[str, Any]]:
    """480 items; the share of each intent that each model gets right. The better model is right wherever the other one is."""
    rows = []
    for intent in INTENTS:
        order = list(range(PER_INTENT))
        random.Random(intent).shuffle(order)
        for number in range(PER_INTENT):
            rows.append(
                {
                    "suite": "tickets",
                    "task": task,
                    "item": f"{intent}-{number:03d}",
                    "cluster": None if clusters is None else f"{intent}-{number % clusters}",
                    "slices": {"intent": intent},
                    "prompt_sha256": "0" * 64,
                    "target": "t",
                    "candidate": {"answer": "a", "score": int(order[number] < round(candidate[intent] * PER_INTENT))},
                    "baseline": {"answer": "b", "score": int(order[number] < round(baseline[intent] * PER_INTENT))},
                }
            )
    return rows


def flat(share: float, **changed: float) -> dict[str, float]:
    return {**dict.fromkeys(INTENTS, share), **changed}


OVERALL = Gate(name="overall", suite="tickets", margin=0.05)
SLICES = Gate(name="slices", suite="tickets", label="intent", margin=0.10)
POLICY = GatesSection(gates=(OVERALL, SLICES))


def by_value(decision: Decision) -> dict[str, str]:
    return {f"{verdict.gate}/{verdict.value}": verdict.verdict for verdict in decision.verdicts}


def test_an_equal_candidate_is_promoted() -> None:
    """S1.42: gates pass, the artifact is promoted."""
    check_power(POLICY, suites())
    decision = decide(table(flat(0.97), flat(0.97)), POLICY, suites())
    assert decision.decision == "promote"
    assert decision.reasons == ("all 5 gate rows are non_inferior",)
    assert set(by_value(decision).values()) == {"non_inferior"}
    assert all(verdict.low < 0 < verdict.high for verdict in decision.verdicts), "no flipped item is no proof of no error"


def test_the_first_release_is_compared_with_an_untuned_base_that_knows_nothing() -> None:
    decision = decide(table(flat(0.98), flat(0.0)), POLICY, suites())
    assert decision.decision == "promote"
    assert decision.verdicts[0].difference == pytest.approx(0.98, abs=0.01)


def test_a_poisoned_slice_is_not_promoted_though_the_overall_score_is_within_its_margin() -> None:
    """S1.43, S1.44: one slice is flipped while every other and the whole look fine; only the slice's gate says so."""
    good, poisoned = flat(0.975), flat(0.99, refund=0.80)
    decision = decide(table(poisoned, good), POLICY, suites())
    verdicts = by_value(decision)
    assert verdicts.pop("overall/all") == "non_inferior"
    assert verdicts.pop("slices/refund") == "regressed"
    assert set(verdicts.values()) == {"non_inferior"}
    assert decision.decision == "hold"
    assert len(decision.reasons) == 1
    assert "slices on intent=refund: regressed, -0.175" in decision.reasons[0]
    only_overall = decide(table(poisoned, good), GatesSection(gates=(OVERALL,)), suites())
    assert only_overall.decision == "promote", "without the slice gate the poison passes: the story needs it"


@pytest.mark.parametrize("asked", ["hold", "rollback", "retrain"])
def test_a_hard_regression_asks_for_what_the_policy_says(asked: str) -> None:
    """S1.51: a hard gate fails fast; S1.54: rollback on request of the policy."""
    policy = msgspec.structs.replace(POLICY, on_regressed=asked)
    assert decide(table(flat(0.7), flat(0.97)), policy, suites()).decision == asked


def test_an_inconclusive_hard_gate_holds_whatever_on_regressed_says() -> None:
    policy = GatesSection(gates=(msgspec.structs.replace(OVERALL, margin=0.051),), on_regressed="rollback")
    decision = decide(noisy(flips=120), policy, suites())
    assert (decision.decision, decision.verdicts[0].verdict) == ("hold", "inconclusive")


def noisy(flips: int) -> list[dict[str, Any]]:
    """An overall table in which `flips` items change sides, six more lost than half: p = .16."""
    rows = table(flat(0.5), flat(0.5))
    lost = flips // 2 + 6
    for row in [row for row in rows if row["baseline"]["score"]][:lost]:
        row["candidate"]["score"] = 0
    for row in [row for row in rows if not row["baseline"]["score"]][: flips - lost]:
        row["candidate"]["score"] = 1
    return rows


def test_a_soft_gate_that_is_not_shown_waits_for_a_reviewer() -> None:
    """S1.52: a soft regression needs a sign-off."""
    policy = GatesSection(gates=(OVERALL, msgspec.structs.replace(SLICES, level="soft")), on_regressed="rollback")
    decision = decide(table(flat(0.99, refund=0.80), flat(0.975)), policy, suites())
    assert decision.decision == "hold"
    assert "soft gate slices on intent=refund: regressed" in decision.reasons[0]
    assert "a reviewer's key must sign" in decision.reasons[0]


def test_significantly_worse_but_shown_within_the_margin_is_non_inferior() -> None:
    policy = GatesSection(gates=(msgspec.structs.replace(OVERALL, margin=0.10),))
    verdict = decide(table(flat(0.95), flat(0.975)), policy, suites()).verdicts[0]
    assert verdict.p_value < 0.05
    assert verdict.high < 0
    assert verdict.verdict == "non_inferior"
    short = decide(table(flat(0.95), flat(0.975))[1:], policy, suites()).verdicts[0]
    assert short.verdict == "inconclusive", "within the margin as far as one can see is no regression"


def test_missing_data_is_inconclusive_and_never_a_pass() -> None:
    """S1.44: block_deploy on anything that was not shown."""
    rows = table(flat(0.97), flat(0.97))
    cases: dict[str, list[dict[str, Any]]] = {
        "nothing": [],
        "another suite": [{**row, "suite": "other"} for row in rows],
        "another task": [{**row, "task": "other"} for row in rows],
        "one item short": rows[1:],
        "one slice gone": [row for row in rows if row["slices"]["intent"] != "refund"],
        "no labels": [{**row, "slices": {}} for row in rows],
    }
    for name, samples in cases.items():
        decision = decide(samples, POLICY, suites())
        assert decision.decision == "hold", name
        assert "inconclusive" in by_value(decision).values(), name
    empty = decide([], POLICY, suites()).verdicts[0]
    assert (empty.items, empty.low, empty.high, empty.p_value) == (0, -1.0, 1.0, 1.0)
    assert "479 of 480 items were scored" in decide(rows[1:], POLICY, suites()).reasons[0]


def test_gates_on_what_the_suites_do_not_have_hold_and_are_refused_beforehand() -> None:
    rows = table(flat(0.97), flat(0.97))
    for gate, said in [
        (msgspec.structs.replace(OVERALL, suite="none"), "no suite 'none'"),
        (msgspec.structs.replace(OVERALL, task="none"), "no task 'none'"),
        (msgspec.structs.replace(SLICES, label="colour"), "no label 'colour'"),
        (msgspec.structs.replace(SLICES, values=("refund", "refnd")), "intent='refnd'"),
        (msgspec.structs.replace(OVERALL, values=("some",)), "leave `values` out"),
        (msgspec.structs.replace(OVERALL, alpha=0.0), "alpha 0.0"),
        (msgspec.structs.replace(OVERALL, alpha=0.5), "alpha 0.5"),
        (msgspec.structs.replace(OVERALL, margin=0.0), "margin 0.0"),
        (msgspec.structs.replace(OVERALL, minimum=1.5), "minimum 1.5"),
    ]:
        policy = GatesSection(gates=(gate,))
        with pytest.raises(PolicyError, match=said):
            check_power(policy, suites())
        decision = decide(rows, policy, suites())
        assert decision.decision == "hold", gate
        assert any(said in reason for reason in decision.reasons), gate


def test_a_policy_without_gates_promotes_nothing() -> None:
    assert decide(table(flat(1), flat(0)), GatesSection(gates=()), suites()).decision == "hold"
    empty_label = suites(labels={"intent": {}})
    assert decide(table(flat(1), flat(0)), GatesSection(gates=(SLICES,)), empty_label).decision == "hold"


def test_a_margin_that_the_items_cannot_resolve_is_refused_with_the_number_needed() -> None:
    """S1.34: few gating metrics, each of which can be decided."""
    with pytest.raises(PowerError, match=r"margin 0\.05 needs 438 items, suite tickets has 437.*add 1 items"):
        check_power(GatesSection(gates=(OVERALL,)), suites(items=437))
    check_power(GatesSection(gates=(OVERALL,)), suites(items=438))
    small = suites(labels={"intent": {"refund": 24, "cancel": 110}})
    with pytest.raises(PowerError, match=r"margin 0\.1 needs 110 items, suite tickets, intent=refund has 24") as caught:
        check_power(GatesSection(gates=(SLICES,)), small)
    assert "cancel" not in str(caught.value)
    check_power(GatesSection(gates=(msgspec.structs.replace(SLICES, values=("cancel",)),)), small)


def test_an_underpowered_row_cannot_pass_even_when_nobody_asked_beforehand() -> None:
    gate = GatesSection(gates=(msgspec.structs.replace(SLICES, values=("refund",), margin=0.05),))
    decision = decide(table(flat(0.97), flat(0.97)), gate, suites())
    assert (decision.decision, decision.verdicts[0].verdict) == ("hold", "inconclusive")
    assert "120 items cannot resolve the margin 0.05, 438 are needed" in decision.verdicts[0].detail
    assert decide(table(flat(0.5), flat(0.97)), gate, suites()).verdicts[0].verdict == "regressed", "a loss that is plain is still named"


def test_a_minimum_is_reached_only_by_the_lower_bound() -> None:
    """444 of 480 is .925: its one-sided 95 % bound is .903, a two-sided one would be .898."""
    policy = GatesSection(gates=(msgspec.structs.replace(OVERALL, minimum=0.90),))
    verdicts = {share: decide(table(flat(share), flat(share)), policy, suites()).verdicts[0].verdict for share in (0.925, 0.91, 0.80)}
    assert verdicts == {0.925: "non_inferior", 0.91: "inconclusive", 0.80: "regressed"}


def test_hard_rows_share_their_error_rate_by_holm_and_soft_rows_do_not() -> None:
    """S0.73. Nine items lost of ten that flipped: p = .0107 alone, .043 among four rows, .053 among five."""
    rows = table(flat(0.5), flat(0.5))
    refund = [row for row in rows if row["slices"]["intent"] == "refund"]
    for row in [row for row in refund if row["baseline"]["score"]][:9]:
        row["candidate"]["score"] = 0
    next(row for row in refund if not row["baseline"]["score"])["candidate"]["score"] = 1
    alone = msgspec.structs.replace(SLICES, values=("refund",), margin=0.1001)
    verdict = decide(rows, GatesSection(gates=(alone,)), suites()).verdicts[0]
    assert (verdict.verdict, verdict.p_value) == ("regressed", pytest.approx(11 / 1024))
    four = decide(rows, GatesSection(gates=(SLICES,)), suites())
    assert by_value(four)["slices/refund"] == "regressed"
    assert next(v for v in four.verdicts if v.value == "refund").p_value == pytest.approx(44 / 1024)
    five = decide(rows, GatesSection(gates=(SLICES, msgspec.structs.replace(OVERALL, task="triage"))), suites())
    adjusted = next(v for v in five.verdicts if v.value == "refund")
    assert adjusted.p_value == pytest.approx(55 / 1024)
    assert adjusted.verdict == "inconclusive"
    soft = decide(rows, GatesSection(gates=(msgspec.structs.replace(SLICES, level="soft"), OVERALL)), suites())
    assert by_value(soft)["slices/refund"] == "regressed"


def test_clustered_items_count_by_their_clusters() -> None:
    few, many = table(flat(0.97), flat(0.97), clusters=2), table(flat(0.97), flat(0.97), clusters=60)
    held = decide(few, POLICY, suites())
    assert held.decision == "hold"
    assert "120 items in 2 clusters cannot show the margin 0.1 even if none differs" in "".join(held.reasons)
    assert decide(many, POLICY, suites()).decision == "promote"
    # seven items lost: within the margin when they are of many sources, not when one source lost them all
    rows = table(flat(1.0), flat(1.0))
    for number, row in enumerate(row for row in rows if row["slices"]["intent"] == "refund"):
        row["candidate"]["score"] = int(number >= 7)
        row["cluster"] = f"refund-{number // 8}"
    together = by_value(decide(rows, GatesSection(gates=(SLICES,)), suites()))
    apart = by_value(decide([{**row, "cluster": None} for row in rows], GatesSection(gates=(SLICES,)), suites()))
    assert (together["slices/refund"], apart["slices/refund"]) == ("inconclusive", "non_inferior")


def test_a_gate_on_one_task_holds_when_that_task_lost_items() -> None:
    """Two tasks of their own items: enough are left for the margin, but the five that were lost may be the five that failed."""
    rows = table(flat(0.97), flat(0.97))
    rows += [{**row, "task": "more", "item": f"more-{row['item']}"} for row in rows]
    both = suites(labels={"intent": dict.fromkeys(INTENTS, 2 * PER_INTENT)}, items=960, tasks=("more", "triage"))
    gate = GatesSection(gates=(msgspec.structs.replace(SLICES, task="triage"),))
    assert decide(rows, gate, both).decision == "promote"
    lost = decide(rows[5:], gate, both)
    assert lost.decision == "hold"
    assert "235 of 240 items were scored" in lost.reasons[0]


def test_one_item_asked_by_two_tasks_is_one_draw() -> None:
    rows = table(flat(0.96), flat(0.98)) + table(flat(0.96), flat(0.98), task="again")
    both = decide(rows, GatesSection(gates=(OVERALL,)), suites(tasks=("again", "triage"))).verdicts[0]
    once = decide(rows, GatesSection(gates=(msgspec.structs.replace(OVERALL, task="triage"),)), suites(tasks=("again", "triage"))).verdicts[
        0
    ]
    assert both.items == 960
    assert (both.low, both.high) == pytest.approx((once.low, once.high), abs=1e-8)
    missing = decide(rows[:480], GatesSection(gates=(OVERALL,)), suites(tasks=("again", "triage")))
    assert missing.decision == "hold"
    assert "task again has no samples" in missing.reasons[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"candidate": {"answer": "a"}}, "'score' is missing"),
        ({"candidate": {"answer": "a", "score": None}}, "each must be 0 or 1"),
        ({"baseline": {"answer": "a", "score": float("nan")}}, "each must be 0 or 1"),
        ({"baseline": {"answer": "a", "score": True}}, "each must be 0 or 1"),
        ({"baseline": None}, "not an object"),
        ({"item": 7}, "item is 7"),
        ({"slices": None}, "wrong type"),
        ({"item": "refund-001"}, "scored twice"),
    ],
)
def test_a_malformed_table_decides_nothing(change: dict[str, Any], said: str) -> None:
    rows = table(flat(0.97), flat(0.97))
    rows[0] = {**rows[0], **change}
    with pytest.raises(SampleError, match=said):
        decide(rows, POLICY, suites())


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_the_samples_changes_no_byte_of_the_decision(rng: random.Random) -> None:
    rows = list(table(flat(0.9, refund=0.8), flat(0.95), clusters=40))
    before = canonical(msgspec.to_builtins(decide(rows, POLICY, suites())))
    rng.shuffle(rows)
    assert canonical(msgspec.to_builtins(decide(rows, POLICY, suites()))) == before


def test_verdicts_are_rounded_and_canonical() -> None:
    verdict = decide(table(flat(0.9), flat(0.95)), POLICY, suites()).verdicts[0]
    for name in ("candidate", "baseline", "difference", "low", "high", "detectable", "p_value"):
        assert getattr(verdict, name) == round(getattr(verdict, name), 8)
    assert verdict.detectable == pytest.approx(0.0478, abs=1e-4)


def test_flipped_items_come_worst_first() -> None:
    rows = table(flat(0.975), flat(0.975))
    refund = [row for row in rows if row["slices"]["intent"] == "refund" and row["baseline"]["score"]][:5]
    login = next(row for row in rows if row["slices"]["intent"] == "login" and row["baseline"]["score"])
    won = next(row for row in rows if row["slices"]["intent"] == "login" and not row["baseline"]["score"])
    for row in (*refund, login):
        row["candidate"]["score"] = 0
    won["candidate"]["score"] = 1
    listed = [row["item"] for row in flipped(random.Random(1).sample(rows, len(rows)))]
    assert listed == [*sorted(row["item"] for row in refund), login["item"], won["item"]]
