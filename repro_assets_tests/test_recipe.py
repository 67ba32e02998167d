"""The recipe's loader: strict, and every refusal names file, line, key and remedy."""

from pathlib import Path

import pytest

from repro_assets import recipe as recipes
from repro_assets.bench import DEMO
from repro_assets.recipe import RecipeError

GOOD = """\
name: small
base_model: {path: ../model, license: MIT}
records:
  sources:
    - match: "*.jsonl"
      shape: messages
training:
  seed: 3
evaluation:
  suites: [{name: triage, path: suite}]
gates:
  gates: [{name: overall, suite: triage}]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, old: str, new: str) -> str:
    assert old in GOOD
    with pytest.raises(RecipeError) as caught:
        recipes.load(written(folder, GOOD.replace(old, new)))
    return str(caught.value)


def test_an_unknown_key_names_its_line_and_the_nearest_known_one(tmp_path: Path) -> None:
    said = refusal(tmp_path, "seed: 3", "sead: 3")
    assert "recipe.yaml:8: unknown key `training.sead`; did you mean `seed`?" in said


def test_an_unknown_key_deep_inside_a_list_is_named_with_its_index(tmp_path: Path) -> None:
    said = refusal(tmp_path, "      shape: messages", "      shape: messages\n      licence: MIT")
    assert "recipe.yaml:7: unknown key `records.sources[0].licence`; did you mean `license`?" in said


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ("seed: 3", "seed: three", 8, "training.seed"),
        ("seed: 3", "seed: true", 8, "training.seed"),
        ("seed: 3", "lora: {rank: 1.5}", 8, "training.lora.rank"),
        ("shape: messages", "shape: chat", 6, "records.sources[0].shape"),
        ("name: small", "name: 7", 1, "name"),
    ],
)
def test_a_wrong_type_names_the_line_and_the_key(tmp_path: Path, old: str, new: str, line: int, key: str) -> None:
    said = refusal(tmp_path, old, new)
    assert f"recipe.yaml:{line}: `{key}`" in said


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("suite: triage}", "suite: other}", "no suite 'other'"),
        ("suite: triage}", "suite: triage, margin: 5}", "share of items between 0 and 1"),
        ("{path: ../model, license: MIT}", "{license: MIT}", "either `path`"),
        ("{path: ../model, license: MIT}", "{repo: org/model, revision: main}", "full 40-digit commit hash"),
        ("seed: 3", "micro_batches: 0", "at least 1"),
        ("name: small", "name: Small Recipe", "folder name in lakeFS"),
    ],
)
def test_a_value_that_no_type_can_refuse_is_refused_with_the_reason(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert words in refusal(tmp_path, old, new)


def test_a_file_that_is_not_yaml_not_utf8_or_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: not YAML"):
        recipes.load(written(tmp_path, "name: small\n  records: [}\n"))
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        recipes.load(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match=r"none\.yaml: no such recipe"):
        recipes.load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        recipes.load(written(tmp_path, "- a\n- b\n"))


def test_the_name_and_local_paths_are_no_part_of_any_identity(tmp_path: Path) -> None:
    """S0.26, S0.27: an identity holds what was chosen, not what it is called or where it lies."""
    first = recipes.load(written(tmp_path, GOOD)).recipe
    moved = GOOD.replace("name: small", "name: other").replace("../model", "/elsewhere/model").replace("path: suite", "path: moved/suite")
    assert recipes.load(written(tmp_path, moved)).recipe.digest() == first.digest()


def test_a_default_written_out_is_the_same_identity_and_a_changed_value_is_another(tmp_path: Path) -> None:
    first = recipes.load(written(tmp_path, GOOD)).recipe
    assert recipes.load(written(tmp_path, GOOD.replace("seed: 3", "seed: 3\n  epochs: 1"))).recipe.digest() == first.digest()
    assert recipes.load(written(tmp_path, GOOD.replace("seed: 3", "seed: 4"))).recipe.training.digest() != first.training.digest()


def test_every_shipped_recipe_loads_and_names_files_that_are_there() -> None:
    shipped = sorted(DEMO.parent.glob("*.yaml"))
    assert [path.name for path in shipped][:2] == ["demo.yaml", "gsm8k.yaml"]
    for path in shipped:
        loaded = recipes.load(path)
        assert loaded.recipe.name == path.stem
        for suite in loaded.recipe.evaluation.suites:
            assert loaded.folder(suite.path).is_dir(), suite
