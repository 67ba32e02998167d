"""Comparing a re-execution with its original, and that no grade is earned by what was not compared or did not come out the same."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner

from repro_assets.trust import statements
from repro_assets.trust.canonical import sha256
from repro_assets.trust.certificates import MEANING, Difference, Part, Run, certificate, compare, first_difference, grade, part
from repro_assets.trust.signing import sign
from repro_assets.trust.statements import CERTIFICATE
from repro_assets.trust.verification import Trust, verify

A, B, C = sha256(b"a"), sha256(b"b"), sha256(b"c")
HERE = Run("cpu-avx2", 1, "local")
NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
SAME = {"x": A, "y": B}

DIGESTS = st.dictionaries(st.text(min_size=1, max_size=4), st.sampled_from([A, B, C]), max_size=6)


@given(DIGESTS, DIGESTS)
def test_nothing_differs_exactly_when_both_sides_are_the_same(one: dict[str, str], two: dict[str, str]) -> None:
    """S0.46, S0.48"""
    found = compare(one, two)
    assert {difference.name for difference in found} == {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
    for difference in found:
        assert (difference.was, difference.now) == (one.get(difference.name), two.get(difference.name))
    assert {(d.name, d.now, d.was) for d in found} == {(d.name, d.was, d.now) for d in compare(two, one)}


def test_the_first_difference_is_the_earliest_in_the_originals_order() -> None:
    """S0.49: what comes after a differing record follows from it."""
    original = {"records": A, "leaf/1": A, "leaf/0": B, "adapter": C}
    again = {"adapter": A, "leaf/0": A, "leaf/1": C, "records": A, "extra": A}
    assert [difference.name for difference in compare(original, again)] == ["leaf/1", "leaf/0", "adapter", "extra"]
    parts = [part("data", SAME, SAME), part("training", original, again)]
    assert first_difference(parts) == Difference("leaf/1", A, C)
    assert first_difference(parts[:1]) is None
    assert [str(item) for item in compare({"x": A}, {"y": B})] == [
        f"x: missing from the re-execution (was {A})",
        f"y: only in the re-execution ({B})",
    ]
    assert str(Difference("x", A, B)) == f"x: was {A}, is {B}"


@pytest.mark.parametrize(
    ("scopes", "now", "earned"),
    [
        ([], HERE, "R0"),
        (["data"], HERE, "R1"),
        (["resume"], HERE, "R2"),
        (["data", "resume"], HERE, "R2"),
        (["data", "training"], HERE, "R3"),
        (["data", "training"], Run("cpu-avx2", 2, "local"), "R4"),
        (["training"], Run("cpu-avx2", 1, "slurm"), "R4"),
        (["training"], Run("cpu-avx512", 1, "local"), "R4"),
    ],
)
def test_the_grade_follows_from_what_was_executed_again_and_where(scopes: list[str], now: Run, earned: str) -> None:
    """S0.1"""
    parts = [part(scope, SAME, SAME) for scope in scopes]  # type: ignore[arg-type]
    assert grade(parts, HERE, now) == earned
    assert earned in MEANING


def test_one_differing_byte_or_nothing_compared_earns_no_grade() -> None:
    assert grade([part("data", SAME, SAME), part("training", SAME, {**SAME, "y": C})], HERE, HERE) is None
    assert grade([part("data", {}, {})], HERE, HERE) is None
    assert grade([part("data", SAME, {"x": A})], HERE, HERE) is None
    with pytest.raises(ValueError, match="where both ran"):
        grade([part("training", SAME, SAME)])


def test_a_certificate_is_signed_and_says_the_grade_the_counts_and_the_first_differences(
    keys: dict[str, CryptoSigner], trust: Trust
) -> None:
    """S0.6, S0.18"""
    many = {f"leaf/{n:03d}": A for n in range(150)}
    parts = [part("data", many, dict.fromkeys(many, B))]
    failed = certificate({"bundle": C}, parts, original=B, verifier="v", certified=NOW)
    assert failed["predicate"]["grade"] == "none"
    assert failed["predicate"]["result"] == "FAILED"
    said = failed["predicate"]["parts"][0]
    assert (said["compared"], said["differing"], len(said["differences"])) == (150, 150, 100)
    assert said["differences"][0] == {"name": "leaf/000", "was": A, "now": B}

    good = certificate({"bundle": C}, [Part("training", 2, ())], original=B, verifier="v", certified=NOW, was=HERE, now=HERE, environment=A)
    assert (good["predicate"]["grade"], good["predicate"]["result"]) == ("R3", "PASSED")
    envelope = sign(good, keys["evaluator"])
    opened = verify(envelope, trust=trust, role="evaluator", predicate_type=CERTIFICATE, subjects={"bundle": C})
    assert opened == good
    assert statements.referenced(opened) == {B: "original", A: "environment"}
