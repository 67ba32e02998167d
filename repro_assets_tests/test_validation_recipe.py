"""The validation section of a recipe: limits that make no sense are refused with file, line and key."""

from pathlib import Path

import pytest

from repro_assets import recipe as recipes
from repro_assets.recipe import RANGED, Language, Range, RecipeError

GOOD = """\
name: small
base_model: {path: ../model, license: MIT}
records:
  sources: [{match: "*.jsonl", shape: messages}]
evaluation:
  suites: [{name: triage, path: suite}]
gates:
  gates: [{name: overall, suite: triage}]
validation:
  %s
"""


def load(folder: Path, line: str) -> recipes.Loaded:
    path = folder / "recipe.yaml"
    path.write_text(GOOD % line)
    return recipes.load(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ranges: {characters: {}}", "`validation.ranges.characters`: limits nothing; give min, max or both"),
        ("ranges: {character: {max: 4}}", "`validation.ranges.character`: no such column; did you mean `characters`?"),
        ("ranges: {turns: {min: 4, max: 3}}", "`validation.ranges.turns`: min 4 is above max 3"),
        ("ranges: {turns: {min: 4, allowed: 1.0}}", "`validation.ranges.turns.allowed`: a share of at least 0 and below 1"),
        ("language: {expected: []}", "`validation.language`: at least one expected language"),
        ("language: {expected: [en], minimum: 0}", "`validation.language`: at least one expected language"),
        ("roundtrip: -1", "`validation.roundtrip`: a count of at least 0"),
        ("drift: {auc_warn: 0.9, auc_fail: 0.8}", "`validation.drift`: 0.5 <= auc_warn <= auc_fail <= 1"),
        ("drift: {psi_warn: 0.3}", "`validation.drift`: 0 <= psi_warn <= psi_fail"),
        ("langauge: {expected: [en]}", "unknown key `validation.langauge`; did you mean `language`?"),
    ],
)
def test_limits_that_make_no_sense_are_refused(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, line)
    assert f"recipe.yaml:10: {said}" in str(caught.value)


def test_limits_that_make_sense_are_read_and_a_suite_is_no_identity_by_its_path(tmp_path: Path) -> None:
    section = load(
        tmp_path, "ranges: {turns: {max: 4, allowed: 0.1}}\n  language: {expected: [en, de]}\n  expectations: suite.json"
    ).recipe.validation
    assert (section.ranges, section.language) == ({"turns": Range(max=4, allowed=0.1)}, Language(("en", "de")))
    assert section.expectations == "suite.json"
    assert (
        section.identity()
        == load(tmp_path, "ranges: {turns: {max: 4, allowed: 0.1}}\n  language: {expected: [en, de]}").recipe.validation.identity()
    )


def test_every_column_that_can_be_limited_is_in_the_frame() -> None:
    from repro_assets.data.frame import COLUMNS

    assert set(RANGED) <= COLUMNS.keys()
