"""A Great Expectations suite beside our own rules: counted, never shown, and a clear word when it cannot be run."""

import builtins
import json
import socket
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from repro_assets import expectations
from repro_assets.data.judged import Judged
from repro_assets.expectations import ExpectationsError
from repro_assets.recipe import Loaded, RecordsSection, ValidationSection
from repro_assets_tests.data.material import CHAT, recipe_of

FRAME = pl.DataFrame(
    {"record": ["aa", "bb", "cc", "dd"], "tokens": [3, 4, 5, 90], "slice intent": ["login", "login", "secret value", None]}
)


def suite(*expected: dict[str, Any]) -> bytes:
    return json.dumps({"name": "ours", "expectations": list(expected)}).encode()


def between(low: int, high: int, **more: Any) -> dict[str, Any]:
    return {"type": "expect_column_values_to_be_between", "kwargs": {"column": "tokens", "min_value": low, "max_value": high}, **more}


def judged(*expected: dict[str, Any]) -> Judged:
    found = Judged()
    expectations.judge(suite(*expected), FRAME, found)
    return found


def test_each_expectation_is_a_rule_with_the_number_of_records_that_fail() -> None:
    found = judged(
        between(1, 10),
        between(1, 100),
        between(1, 4, severity="warning"),
        {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 1}},
    )
    name = "expectation column_values_to_be_between tokens"
    assert [(rule.group, rule.name, rule.verdict, rule.effect) for rule in found.rules] == [
        ("expectations", name, "fail", 1),
        ("expectations", f"{name} (1)", "pass", 0),
        ("expectations", f"{name} (2)", "warn", 2),
        ("expectations", "expectation table_row_count_to_be_between", "pass", None),
    ]
    assert found.rules[0].detail == "1 of 4 records fail: max_value 10, min_value 1"
    assert found.rules[3].detail == "observed 4: min_value 1"
    assert found.failing == {name: ["dd"], f"{name} (2)": ["cc", "dd"]}


def test_values_of_records_are_not_shown() -> None:
    found = judged(
        {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "slice intent", "value_set": ["login"]}},
        {"type": "expect_column_most_common_value_to_be_in_set", "kwargs": {"column": "slice intent", "value_set": ["zz"]}},
    )
    assert [rule.verdict for rule in found.rules] == ["fail", "fail"]
    assert "secret" not in repr(found.rules)
    assert found.rules[1].detail == "observed as the result says: value_set ['zz']"


def test_nothing_calls_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_a: object, **_k: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert [rule.verdict for rule in judged(between(1, 100)).rules] == ["pass"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "not a Great Expectations suite"),
        (b'{"name": "x"}', "missing required field `expectations`"),
        (suite(), "the suite has no expectation"),
        (suite({"type": "expect_the_moon"}), "has no 'expect_the_moon'; correct its name"),
        (suite({"type": "expect_column_values_to_be_between", "kwargs": {}}), "correct its kwargs"),
        (
            suite({"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "token"}}),
            r"\"token\" in BatchData does not exist.*The frame's columns are record, tokens, slice intent",
        ),
    ],
)
def test_a_suite_that_cannot_be_run_says_what_is_wrong(text: bytes, said: str) -> None:
    with pytest.raises(ExpectationsError, match=said):
        expectations.judge(text, FRAME, Judged())


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("great_expectations"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExpectationsError, match=r"not installed .*pip install 'repro-assets\[expectations\]', or take the key out"):
        judged(between(1, 10))


def test_the_suite_lies_beside_the_recipe_and_its_bytes_are_its_identity(tmp_path: Path) -> None:
    section = RecordsSection(sources=(CHAT,))
    named = Loaded(recipe_of(section, validation=ValidationSection(expectations="suite.json")), tmp_path / "recipe.yaml")
    with pytest.raises(ExpectationsError, match=r"recipe.yaml: `validation.expectations`: .*suite.json: No such file"):
        expectations.suite_of(named)
    (tmp_path / "suite.json").write_bytes(suite(between(1, 2)))
    assert expectations.suite_of(named) == suite(between(1, 2))
    assert expectations.suite_of(Loaded(recipe_of(section), tmp_path / "recipe.yaml")) is None
    assert "expectations" not in named.recipe.validation.identity()
    assert expectations.identity(suite(between(1, 2))) != expectations.identity(suite(between(1, 3)))
