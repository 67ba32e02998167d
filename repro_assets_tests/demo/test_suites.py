"""The shipped suites: what the generator writes, loadable by lm-eval from any folder, scorable on the base model, without any code."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import repro_assets.demo
from repro_assets.demo import suites, tickets
from repro_assets.recipe import SuiteSource

DEMO = Path(repro_assets.demo.__file__).parent
FOLDERS = {"suite": ("intents", "traffic"), "unit_suite": ("unit",)}


def test_the_shipped_files_are_those_the_generator_writes(tmp_path: Path) -> None:
    written = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in suites.write(tmp_path)}
    shipped = {
        path.relative_to(DEMO).as_posix(): path.read_bytes() for folder in FOLDERS for path in (DEMO / folder).rglob("*") if path.is_file()
    }
    assert written == shipped == suites.files()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_suite_passes_the_projects_own_rules_for_suites(folder: str) -> None:
    from repro_assets.evaluation.suites import load, read_folder

    source = SuiteSource(folder, folder, labels=("intent", "product", "register"), cluster="cluster")
    loaded = load(read_folder(DEMO / folder), source.labels, source.cluster, source.prompt, folder)
    assert tuple(sorted(loaded.tasks)) == FOLDERS[folder]
    assert {len(rows) for rows in loaded.rows.values()} == ({1200, 600} if folder == "suite" else {40})


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every task, loaded by lm-eval itself from a copy of its folder elsewhere, data names made absolute as the YAML's head says."""
    import datasets
    from lm_eval.tasks import TaskManager

    root = tmp_path_factory.mktemp("elsewhere")
    datasets.config.HF_DATASETS_CACHE = str(root / "cache")
    found: dict[str, Any] = {}
    for folder, names in FOLDERS.items():
        copy = shutil.copytree(DEMO / folder, root / f"copy of {folder}")
        manager = TaskManager(include_path=str(copy), include_defaults=False)
        assert sorted(manager.all_subtasks) == list(names)
        for name in names:
            config = yaml.safe_load((copy / f"{name}.yaml").read_text())
            absolute = {split: str(copy / file) for split, file in config["dataset_kwargs"]["data_files"].items()}
            loaded = manager.load([{"task": name, **config, "dataset_kwargs": {"data_files": absolute}}])
            found[name] = loaded["tasks"][name]
    return found


def test_lm_eval_loads_every_task_offline_from_a_copy_in_another_folder(tasks: dict[str, Any]) -> None:
    made = tickets.suites()._asdict()
    for name, task in tasks.items():
        assert [doc["id"] for doc in task.eval_docs] == [item["id"] for item in made[name]]
        doc = task.eval_docs[3]
        assert task.doc_to_text(doc) == f"<|user|>{made[name][3]['prompt']}<|end|><|assistant|>"
        assert {"intent", "product", "register", "cluster"} <= set(doc)
    assert tasks["traffic"].doc_to_target(tasks["traffic"].eval_docs[3]) == made["traffic"][3]["target"]
    assert tasks["unit"].doc_to_choice(tasks["unit"].eval_docs[3]) == made["unit"][3]["choices"]


def test_the_untuned_base_model_answers_nothing_right_but_ranks(tasks: dict[str, Any]) -> None:
    """The baseline before the first release: 0 % in the answers' form, so that what fine-tuning adds is seen."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(DEMO / "base_model"),
        tokenizer=AutoTokenizer.from_pretrained(DEMO / "base_model"),
        batch_size=32,
        device="cpu",
    )
    results = simple_evaluate(model, tasks=list(tasks.values()), limit=32, bootstrap_iters=0, log_samples=True)
    assert results["results"]["traffic"]["exact_match,none"] == 0
    assert results["results"]["intents"]["exact_match,none"] == 0
    assert 0 <= results["results"]["unit"]["acc,none"] <= 1
    answers = [sample["filtered_resps"][0] for sample in results["samples"]["traffic"]]
    assert all(answers)
    assert not any("<|" in answer for answer in answers)


def test_an_answer_in_the_exact_words_scores_and_any_other_does_not(tasks: dict[str, Any]) -> None:
    task = tasks["traffic"]
    doc = task.eval_docs[0]
    assert task.process_results(doc, [doc["target"]])["exact_match"] == 1
    assert task.process_results(doc, [doc["target"] + "."])["exact_match"] == 0
    assert task.process_results(doc, [doc["target"].upper()])["exact_match"] == 0


def test_every_target_fits_into_the_tokens_an_answer_may_have() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "base_model" / "tokenizer.json"))
    assert max(len(tokenizer.encode(answer + "<|end|>").ids) for answer in tickets.ANSWERS) <= 16


def test_no_suite_holds_code() -> None:
    for folder in FOLDERS:
        for path in (DEMO / folder).rglob("*"):
            assert path.suffix in (".yaml", ".jsonl")
            assert "!function" not in path.read_text()
            assert "class:" not in path.read_text()
        for path in (DEMO / folder).glob("*.jsonl"):
            assert all(json.loads(line)["cluster"].startswith(json.loads(line)["intent"]) for line in path.read_text().splitlines())
