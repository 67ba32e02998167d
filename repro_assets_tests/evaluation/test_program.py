"""The scoring program on a tiny random model: real lm-eval, real PEFT, both models in one process, and the traps of both libraries."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.numpy import load, save

from repro_assets.documents import SuiteScore
from repro_assets.evaluation import program
from repro_assets.evaluation.suites import SuiteError
from repro_assets.trust.artifact import ArtifactRefused
from repro_assets.trust.blob import BlobDamaged
from repro_assets.trust.canonical import canonical, sha256
from repro_assets_tests.evaluation import lab as made


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> made.Lab:
    return made.Lab(tmp_path_factory.mktemp("scoring"))


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """The program settles torch for its whole process; the next test file must not inherit that."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def score(lab: made.Lab, *models: Any, **changed: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    outcome = program.run(lab.job(*models, **changed), lab.store, made.Events())
    lines = lab.store.get_bytes(outcome["result"]["samples"]["sha256"]).splitlines()
    return outcome, [json.loads(line) for line in lines]


def side(rows: list[dict[str, Any]], name: str) -> list[tuple[str, str, Any]]:
    return [(row["task"], row["item"], row[name]) for row in rows]


def test_both_models_answer_every_item_and_the_table_says_so(lab: made.Lab) -> None:
    """S1.3, S1.16, S1.21: metrics beside the baseline's, latency percentiles and memory."""
    events = made.Events()
    outcome = program.run(lab.job("one", "two"), lab.store, events)
    assert (outcome["status"], set(outcome["result"])) == ("succeeded", {"scores", "samples", "hardware", "compute_dtype"})
    data = lab.store.get_bytes(outcome["result"]["samples"]["sha256"])
    rows = [json.loads(line) for line in data.splitlines()]
    assert data == b"".join(canonical(row) + b"\n" for row in rows)
    assert [(row["suite"], row["task"], row["item"]) for row in rows] == [
        ("tiny", task, f"i{n:03d}") for task in ("letters", "words") for n in range(40)
    ]
    items = {item["id"]: item for item in made.items(40)}
    for row in rows:
        item = items[row["item"]]
        assert (row["cluster"], row["slices"], row["target"]) == (item["source"], {"colour": item["colour"]}, item["letter"])
        assert row["prompt_sha256"] == sha256(f"<|user|>{item['prompt']}<|end|><|assistant|>".encode())
        for name in ("candidate", "baseline"):
            assert row[name]["score"] == int(row[name]["answer"] == row["target"])
    letters = [row for row in rows if row["task"] == "letters"]
    assert {row["candidate"]["answer"] for row in letters} <= set(made.LETTERS)
    assert side(letters, "candidate") != side(letters, "baseline"), "two random adapters answer alike: one of them was not loaded"
    scores = [msgspec.convert(score, SuiteScore) for score in outcome["result"]["scores"]]
    assert [(score.task, score.metric) for score in scores] == [("letters", "acc"), ("words", "exact_match")]
    overall, colours = scores[0].slices["overall"]["all"], scores[0].slices["colour"]
    assert overall.items == 40 == sum(score.items for score in colours.values())
    assert overall.correct == sum(row["candidate"]["score"] for row in letters) == sum(score.correct for score in colours.values())
    assert overall.baseline_correct == sum(row["baseline"]["score"] for row in letters)
    assert outcome["observed"]["peak_memory"] > 10_000_000
    assert 0 < outcome["observed"]["latency"]["p50"] <= outcome["observed"]["latency"]["p95"] <= outcome["observed"]["latency"]["p99"]
    assert events.written[0]["kind"] == "started"
    assert events.written[0]["steps"] == 160
    assert events.written[-1]["kind"] == "finished"


def test_scoring_twice_gives_the_same_bytes(lab: made.Lab) -> None:
    """S1.13: deterministic small-input scoring."""
    first, second = score(lab, "one", "two")[0], score(lab, "one", "two")[0]
    assert first["result"] == second["result"]


def test_each_model_keeps_its_own_answers_when_the_sides_are_swapped(lab: made.Lab) -> None:
    """lm-eval's response cache leaves the model out of its key, and its results do not name the adapter: a mix-up would show here."""
    rows, swapped = score(lab, "one", "two")[1], score(lab, "two", "one")[1]
    assert side(rows, "candidate") == side(swapped, "baseline")
    assert side(rows, "baseline") == side(swapped, "candidate")
    assert side(rows, "candidate") != side(rows, "baseline")


def test_without_a_release_the_baseline_is_the_base_model_itself(lab: made.Lab) -> None:
    idle, tuned = score(lab, "idle")[1], score(lab, "one")[1]
    assert side(idle, "candidate") == side(idle, "baseline"), "an adapter that does nothing is the base model"
    assert side(tuned, "baseline") == side(idle, "baseline")
    assert side(tuned, "candidate") == side(score(lab, "one", "two")[1], "candidate")
    assert side(tuned, "candidate") != side(tuned, "baseline")


def test_lm_eval_leaves_no_cache_behind(lab: made.Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both of its caches unpickle what they find."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    from lm_eval.caching import cache

    folder = Path(cache.PATH)
    before = sorted(folder.iterdir()) if folder.exists() else []
    score(lab, "one")
    assert (sorted(folder.iterdir()) if folder.exists() else []) == before
    assert list(tmp_path.rglob("*")) == []


def test_adapters_that_are_not_exactly_this_models_are_refused(lab: made.Lab) -> None:
    good = made.adapter(1, lab.base_digest)
    name = "adapter_model.safetensors"
    tensors = load(good[name])
    first = sorted(tensors)[0]
    other = {**tensors, first.replace("layers.0", "layers.7"): tensors[first]}
    small = {**tensors, first: tensors[first][:, :8].copy()}
    cases: list[tuple[dict[str, bytes], type[Exception], str]] = [
        ({**good, name: save({key: value for key, value in tensors.items() if key != first})}, program.JobError, f"'{first}' is missing"),
        ({**good, name: save(other)}, program.JobError, "is unknown to this base model"),
        ({**good, name: save(small)}, program.JobError, "this base model needs"),
        (made.adapter(1, "0" * 64), program.JobError, "was trained on base model sha256:0000"),
        ({**good, "adapter_model.bin": b"\x80\x04."}, ArtifactRefused, "a pickle runs code"),
        ({**good, "more.safetensors": good[name]}, program.JobError, "2 safetensors files"),
        ({name: good[name]}, ArtifactRefused, "adapter_config.json is missing"),
    ]
    for files, kind, said in cases:
        for models in ((lab.put(files), None), ("one", lab.put(files))):
            with pytest.raises(kind, match=said):
                program.run(lab.job(*models), lab.store, made.Events())


def test_a_flipped_byte_in_an_adapter_or_suite_is_found(lab: made.Lab) -> None:
    """S0.4: nothing from storage is trusted unread."""
    job = lab.job("idle")
    for blob in (job["models"]["candidate"]["adapter_model.safetensors"], job["suites"][0]["files"]["items.jsonl"]):
        path = lab.store._path(blob["sha256"])
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(BlobDamaged, match=blob["sha256"]):
            program.run(job, lab.store, made.Events())
        path.write_bytes(whole)


def test_a_prompt_that_does_not_fit_is_refused_instead_of_cut(tmp_path: Path) -> None:
    for name, text in (("letters.yaml", made.RANKING), ("words.yaml", made.WRITING)):
        (tmp_path / name).mkdir()
        long = made.Lab(tmp_path / name, 4, {name: text})
        path = long.root / "suite" / "items.jsonl"
        path.write_text(path.read_text().replace('"prompt": "', '"prompt": "' + "long " * 40, 1))
        long.suites, _ = made.intake([long.source], lambda relative, root=long.root: root / relative, long.store)
        with pytest.raises(Exception, match="lm-eval would cut") as caught:
            program.run(long.job(), long.store, made.Events())
        assert type(caught.value).__name__ == "ScoringError"


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    """lm-eval renders templates in an open Jinja environment; ours is sandboxed."""
    reach = made.WRITING.replace("doc_to_text: prompt", 'doc_to_text: "{{ prompt.__class__.__mro__[1].__subclasses__() }}"')
    hostile = made.Lab(tmp_path, 4, {"words.yaml": reach})
    with pytest.raises(Exception, match=r"unsafe|__class__") as caught:
        program.run(hostile.job(), hostile.store, made.Events())
    assert type(caught.value).__name__ == "ScoringError"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 0}, "batch_size of 1"),
        ({"suites": []}, "at least one suite"),
        ({"extra": 1}, "unknown field `extra`"),
        ({"models": {"candidate": None, "baseline": None}}, "has a candidate"),
        ({"compute_dtype": "float16"}, "float16"),
    ],
)
def test_a_job_that_says_something_else_is_refused(lab: made.Lab, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(program.JobError, match=said):
        program.run(lab.job(**changed), lab.store, made.Events())


def test_a_suite_other_than_the_one_described_is_refused(lab: made.Lab) -> None:
    job = lab.job()
    job["suites"][0]["tasks"] = ["letters"]
    with pytest.raises(program.JobError, match="materialize eval_suites again"):
        program.run(job, lab.store, made.Events())
    job = lab.job()
    job["suites"][0]["labels"] = ["shape"]
    with pytest.raises(SuiteError, match="no field 'shape'"):
        program.run(job, lab.store, made.Events())


def test_only_rank_zero_scores(lab: made.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    events = made.Events()
    assert program.run(lab.job(), lab.store, events)["result"] == {}
    assert events.written == []
