"""The failure bundle holds what a person needs, and no text in it can act in a page that renders it."""

import json
from typing import Any

import pytest

from repro_assets.evaluation.failure import bundle, escape, table
from repro_assets.evaluation.policy import decide
from repro_assets.trust.canonical import canonical
from repro_assets_tests.evaluation.test_policy import POLICY, flat, suites
from repro_assets_tests.evaluation.test_policy import table as samples_of

HOSTILE = "[click](javascript:alert(1)) <img src=x onerror=y> | `code` \n# head \u202egnp.exe\u202c \u200b & *x*"


def failed() -> tuple[Any, list[dict[str, Any]]]:
    rows = samples_of(flat(0.99, refund=0.80), flat(0.975))
    for row in rows:
        row["candidate"]["answer"] = HOSTILE
    return decide(rows, POLICY, suites()), rows


def test_the_bundle_names_flipped_items_verdicts_digests_and_one_command() -> None:
    """S1.43, S1.56: the ticket comes with its failure artifacts."""
    decision, rows = failed()
    made = bundle(decision, rows, {"candidate": "a" * 64, "baseline": "b" * 64}, "repro materialize --snapshot x --select eval_results")
    assert made["decision"] == "hold"
    assert len(made["verdicts"]) == 5
    assert made["flipped_total"] == len(made["flipped"])
    assert made["lost_total"] == 21
    assert [item["slices"] for item in made["flipped"][:21]] == [{"intent": "refund"}] * 21
    assert made["flipped"][0]["candidate"]["score"] == 0
    assert made["flipped"][0]["baseline"]["score"] == 1
    assert list(made["digests"]) == ["baseline", "candidate"]
    assert made["command"] in made["markdown"]
    assert "a" * 64 in made["markdown"]
    assert json.loads(canonical(made)) == json.loads(canonical(bundle(decision, rows[::-1], made["digests"], made["command"])))


def test_text_of_items_cannot_act_in_markdown_or_html() -> None:
    decision, rows = failed()
    made = bundle(decision, rows, {}, "repro show promotion")
    text = canonical(made).decode()
    assert "<img" not in text
    assert "](javascript" not in text
    assert "\u202e" not in text
    assert "U+202E" in text
    assert "U+200B" in text
    for line in made["markdown"].splitlines():
        if line.startswith("| tickets"):
            assert line.replace("\\|", "").count("|") == 6, "an answer broke out of its cell"
    assert escape("a\r\nb\tc") == "a b c"
    assert escape("\ud800") == "U+D800"
    assert escape("x" * 600).startswith("x" * 500 + "…")
    assert "600 characters" in escape("x" * 600)


def test_a_large_bundle_is_cut_and_says_so() -> None:
    decision, rows = failed()
    made = bundle(decision, rows, {}, "repro show promotion", limit=3)
    assert len(made["flipped"]) == 3
    assert made["flipped_total"] > 20


def test_a_command_is_one_line() -> None:
    decision, rows = failed()
    for command in ("", "a\nb", "  "):
        with pytest.raises(ValueError, match="one command"):
            bundle(decision, rows, {}, command)


def test_the_table_shows_the_worst_verdict_first() -> None:
    decision, _ = failed()
    lines = table(decision.verdicts).splitlines()
    assert "refund" in lines[2]
    assert "regressed" in lines[2]
    assert len(lines) == 7
