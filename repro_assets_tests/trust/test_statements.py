"""The four statements: accepted by the published protobuf schemas, and an identity that neither clock nor signer moves."""

import copy
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from hypothesis import given
from hypothesis import strategies as st
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult as ResultMessage
from in_toto_attestation.predicates.vsa.v1.vsa_pb2 import VerificationSummary
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

from repro_assets.trust import statements
from repro_assets.trust.canonical import canonical, sha256
from repro_assets.trust.certificates import Run, certificate, part
from repro_assets.trust.statements import StatementError, descriptor, statement_digest

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
A, B, C = sha256(b"a"), sha256(b"b"), sha256(b"c")


def bundle(**changed: Any) -> dict[str, Any]:
    said: dict[str, Any] = {
        "parameters": {"recipe": {"training": {"seed": 7, "learning_rate": 2e-4}}, "seed": 7},
        "dependencies": [descriptor("raw/manifest", C), descriptor("git", uri="git+https://example.org/r", git_commit="0" * 40)],
        "builder": "urn:repro-assets:builder:0.1.0",
        "invocation": "run-1",
        "started": NOW,
        "finished": NOW + timedelta(seconds=3),
        "byproducts": [descriptor("validation_report.json", B)],
    }
    return statements.provenance(statements.BUNDLE, {"leaves/0": A, "recipe": B}, **{**said, **changed})


def evaluation(**changed: Any) -> dict[str, Any]:
    said: dict[str, Any] = {
        "result": "PASSED",
        "configuration": [descriptor("suite/triage", B), descriptor("baseline", C, annotations={"release": 1})],
        "evaluated": NOW,
        "passed": ["triage overall", "triage refund"],
        "failed": ["triage cancel"],
    }
    return statements.test_result({"adapter_model.safetensors": A}, **{**said, **changed})


def decision(**changed: Any) -> dict[str, Any]:
    said: dict[str, Any] = {
        "decision": "promote",
        "verifier": "urn:repro-assets:gates:0.1.0",
        "verified": NOW,
        "resource": "repro:releases/3",
        "policy": descriptor("gates", B),
        "inputs": [descriptor("evaluation", C)],
        "levels": ["REPRO_R3"],
    }
    return statements.vsa({"adapter_model.safetensors": A}, **{**said, **changed})


def proof(**changed: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"original": C, "verifier": "urn:repro-assets:reproduce:0.1.0", "certified": NOW}
    run = Run("cpu-avx2", 1, "local")
    return certificate({"bundle": A}, [part("training", {"x": A}, {"x": A})], was=run, now=run, environment=B, **{**said, **changed})


MAKERS = {"provenance": bundle, "test_result": evaluation, "vsa": decision, "certificate": proof}
SCHEMAS = {"provenance": Provenance, "test_result": ResultMessage, "vsa": VerificationSummary}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_published_schemas_accept_every_statement_and_lose_nothing(kind: str) -> None:
    """S0.6, S0.8: strict ParseDict refuses a field that the schema does not have, so nothing here is of our own making."""
    made = MAKERS[kind]()
    message = ParseDict(made, StatementMessage())
    back = MessageToDict(message)
    assert canonical({**back, "predicate": None}) == canonical({**made, "predicate": None})
    assert MessageToDict(message, preserving_proto_field_name=True).keys() != made.keys(), "that form would not be a statement"
    if kind in SCHEMAS:
        predicate = dict(made["predicate"])
        if kind == "vsa":
            # the specification says array, in-toto-attestation 0.9.3 says string (in-toto/attestation#425): ours is the array
            assert predicate["verifiedLevels"] == ["REPRO_DECISION_PROMOTE", "REPRO_R3"]
            predicate["verifiedLevels"] = " ".join(predicate["verifiedLevels"])
        assert canonical(MessageToDict(ParseDict(predicate, SCHEMAS[kind]()))) == canonical(predicate)


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (bundle, {"builder": "urn:other", "invocation": "run-2", "started": None, "finished": NOW + timedelta(days=3), "byproducts": []}),
        (evaluation, {"evaluated": NOW + timedelta(days=3)}),
        (decision, {"verified": NOW + timedelta(days=3), "verifier": "urn:other"}),
        (proof, {"certified": NOW + timedelta(days=3), "verifier": "urn:other"}),
    ],
)
def test_the_digest_ignores_who_made_the_statement_and_when(make: Callable[..., dict[str, Any]], changed: dict[str, Any]) -> None:
    """S0.4: signing again, elsewhere and later, retrains nothing."""
    first, second = make(), make(**changed)
    assert canonical(first) != canonical(second)
    assert statement_digest(first) == statement_digest(second)


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (bundle, {"parameters": {"recipe": {"training": {"seed": 8, "learning_rate": 2e-4}}, "seed": 8}}),
        (bundle, {"dependencies": [descriptor("raw/manifest", B)]}),
        (evaluation, {"result": "FAILED"}),
        (evaluation, {"configuration": [descriptor("suite/triage", A)]}),
        (evaluation, {"failed": []}),
        (decision, {"decision": "hold"}),
        (decision, {"policy": descriptor("gates", C)}),
        (decision, {"inputs": [descriptor("evaluation", B)]}),
        (decision, {"resource": "repro:releases/4"}),
        (proof, {"original": B}),
    ],
)
def test_the_digest_moves_with_everything_that_is_said(make: Callable[..., dict[str, Any]], changed: dict[str, Any]) -> None:
    assert statement_digest(make()) != statement_digest(make(**changed))


HEXES = st.binary(min_size=32, max_size=32).map(bytes.hex)
NAMED = st.dictionaries(st.text(min_size=1, max_size=8), HEXES, min_size=1, max_size=6)


@given(NAMED, NAMED, st.randoms(use_true_random=False))
def test_the_order_in_which_things_are_named_changes_nothing(subjects: dict[str, str], used: dict[str, str], random: Any) -> None:
    """S0.4"""
    shuffled = list(subjects.items())
    random.shuffle(shuffled)
    dependencies = statements.descriptors(used)
    random.shuffle(dependencies)
    common: dict[str, Any] = {"parameters": {}, "builder": "b", "invocation": "i"}
    one = statements.provenance("t", subjects, dependencies=statements.descriptors(used), **common)
    two = statements.provenance("t", dict(shuffled), dependencies=dependencies, **common)
    assert canonical(one) == canonical(two)
    assert statements.subject_digests(one) == subjects
    assert statements.referenced(one).keys() == set(used.values())


@given(NAMED, st.data())
def test_another_digest_of_any_subject_is_another_statement(subjects: dict[str, str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(subjects)))
    other = data.draw(HEXES.filter(lambda value: value != subjects[name]))
    common: dict[str, Any] = {"parameters": {}, "dependencies": [], "builder": "b", "invocation": "i"}
    one = statements.provenance("t", subjects, **common)
    two = statements.provenance("t", {**subjects, name: other}, **common)
    assert statement_digest(one) != statement_digest(two)


def test_the_time_is_found_in_every_kind() -> None:
    assert statements.signed_at(bundle()) == NOW + timedelta(seconds=3)
    assert [statements.signed_at(make()) for make in (evaluation, decision, proof)] == [NOW] * 3
    assert statements.signed_at(bundle(finished=None)) is None


def test_times_are_written_in_utc() -> None:
    assert statements.timestamp(datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=2)))) == "2025-12-31T23:00:00Z"
    with pytest.raises(StatementError, match="no time zone"):
        statements.timestamp(datetime(2026, 1, 1))


@pytest.mark.parametrize("verdict", ["promote", "hold", "rollback", "retrain"])
def test_only_promote_passes_and_the_decision_can_be_read_back(verdict: str) -> None:
    """S1.4: promote, rollback or retrain."""
    made = decision(decision=verdict)
    assert statements.decision_of(made) == verdict
    assert made["predicate"]["verificationResult"] == ("PASSED" if verdict == "promote" else "FAILED")


def test_a_statement_with_two_decisions_says_none() -> None:
    made = copy.deepcopy(decision())
    made["predicate"]["verifiedLevels"].append("REPRO_DECISION_HOLD")
    with pytest.raises(StatementError, match="one REPRO_DECISION_ level"):
        statements.decision_of(made)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: descriptor("shard"), "pins nothing"),
        (lambda: descriptor("shard", "ABC"), "not a lower-case hexadecimal SHA-256"),
        (lambda: descriptor("git", git_commit="main"), "not a full Git commit hash"),
        (lambda: descriptor("", A), "without a name"),
        (lambda: bundle(dependencies=[descriptor("x", A), descriptor("x", B)]), "'x' is named twice"),
        (lambda: statements.provenance("t", {}, parameters={}, dependencies=[], builder="b", invocation="i"), "about nothing"),
        (lambda: decision(levels=["SLSA_BUILD_LEVEL_3"]), "reserved"),
    ],
)
def test_a_statement_that_would_pin_nothing_is_not_made(make: Callable[[], Any], said: str) -> None:
    """S0.59: what matters to results is pinned."""
    with pytest.raises(StatementError, match=said):
        make()


def test_a_subject_named_twice_is_refused_when_read() -> None:
    made = bundle()
    made["subject"].append({"name": "recipe", "digest": {"sha256": C}})
    with pytest.raises(StatementError, match="'recipe' is named twice"):
        statements.subject_digests(made)
