"""Suites as data: what a folder becomes, and that nothing which could run, hide or mislead gets in."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from repro_assets.evaluation.suites import SuiteError, intake, load, read_folder
from repro_assets.recipe import SuiteSource
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import digest

YAML = """\
task: triage
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "<|user|>{{ prompt }}<|end|><|assistant|>"
doc_to_target: answer
generation_kwargs: {until: ["<|end|>"], do_sample: false, max_gen_toks: 16}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


def item(number: int, **changed: Any) -> dict[str, Any]:
    intent = ("refund", "cancel")[number % 2]
    row = {
        "id": f"i{number}",
        "prompt": f"Please  HELP {number}",
        "answer": f"route: {intent}",
        "intent": intent,
        "source": f"s{number % 3}",
    }
    return {**row, **changed}


def write(folder: Path, items: list[dict[str, Any]] | None = None, yaml: str = YAML, name: str = "triage.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml, encoding="utf-8")
    rows = [item(number) for number in range(6)] if items is None else items
    (folder / "items.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


SOURCE = SuiteSource(name="tickets", path="suite", labels=("intent",), cluster="source")


def take(tmp_path: Path, source: SuiteSource = SOURCE) -> Any:
    return intake([source], lambda relative: tmp_path / relative, FolderStore(tmp_path / "store"))


def test_a_suite_becomes_blobs_counts_and_one_digest(tmp_path: Path) -> None:
    """S1.1: test sets are ingested and pinned."""
    write(tmp_path / "suite")
    result, observed = take(tmp_path)
    (suite,) = result.suites
    assert (suite.name, suite.tasks, suite.items, suite.labels) == ("tickets", ("triage",), 6, {"intent": {"cancel": 3, "refund": 3}})
    assert list(suite.suite_files) == ["items.jsonl", "triage.yaml"]
    listed = [{"path": name, "sha256": blob.sha256, "size": blob.size} for name, blob in suite.suite_files.items()]
    assert suite.digest == digest(listed)
    store = FolderStore(tmp_path / "store")
    assert store.get_bytes(suite.suite_files["triage.yaml"].sha256).decode() == YAML
    lines = [json.loads(line) for line in store.get_bytes(result.prompts.sha256).splitlines()]
    assert lines[0] == {"item": "i0", "suite": "tickets", "text": "please help 0"}
    assert observed.origin == f"tickets={tmp_path / 'suite'}"


def test_the_same_files_elsewhere_give_the_same_content_and_another_item_does_not(tmp_path: Path) -> None:
    write(tmp_path / "one" / "suite")
    write(tmp_path / "two" / "suite")
    first, second = take(tmp_path / "one")[0], take(tmp_path / "two")[0]
    assert first == second
    write(tmp_path / "two" / "suite", [item(number) for number in range(5)])
    assert take(tmp_path / "two")[0].suites[0].digest != first.suites[0].digest


def test_two_suites_keep_their_prompts_apart(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    sources = [SuiteSource(name="z", path="a"), SuiteSource(name="y", path="b")]
    store = FolderStore(tmp_path / "store")
    result, _ = intake(sources, lambda relative: tmp_path / relative, store)
    assert [suite.name for suite in result.suites] == ["y", "z"]
    assert [json.loads(line)["suite"] for line in store.get_bytes(result.prompts.sha256).splitlines()] == ["y"] * 6 + ["z"] * 6
    with pytest.raises(SuiteError, match="two suites are called 'z'"):
        intake([sources[0], sources[0]], lambda relative: tmp_path / relative, store)
    with pytest.raises(SuiteError, match="at least one suite"):
        intake([], lambda relative: tmp_path / relative, store)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("utils.py", "may hold no code"),
        ("model.bin", r"only \.yaml and \.jsonl"),
        (".hidden.yaml", "hidden file"),
        (".git/config.yaml", "hidden or generated folder"),
        ("__pycache__/x.yaml", "hidden or generated folder"),
        ("other.jsonl", "no task reads this file"),
        ("a b.yaml", "characters outside"),
        ("task.yml", r"only \.yaml and \.jsonl"),
    ],
)
def test_files_that_do_not_belong_in_a_suite_are_refused_by_name(tmp_path: Path, name: str, said: str) -> None:
    path = write(tmp_path / "suite") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}\n")
    with pytest.raises(SuiteError, match=said) as caught:
        take(tmp_path)
    assert str(tmp_path / "suite") in str(caught.value)
    assert not (tmp_path / "store").exists(), "nothing of a refused suite is stored"


def test_links_are_refused_wherever_they_point(tmp_path: Path) -> None:
    folder = write(tmp_path / "suite")
    outside = tmp_path / "secret.jsonl"
    outside.write_text('{"id": "x"}\n')
    (folder / "linked.jsonl").symlink_to(outside)
    with pytest.raises(SuiteError, match=r"linked\.jsonl: a symbolic link"):
        take(tmp_path)
    (folder / "linked.jsonl").unlink()
    (folder / "deep").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(SuiteError, match="deep: a symbolic link"):
        take(tmp_path)
    (folder / "deep").unlink()
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(SuiteError, match="not a plain file"):
        take(tmp_path)


def test_names_from_a_job_file_cannot_leave_the_suite() -> None:
    for name in ("../x.yaml", "/etc/x.yaml", "a/../../x.yaml", "a\\x.yaml"):
        with pytest.raises(SuiteError, match="leaves the suite's folder"):
            load({name: YAML.encode()}, (), None, None, "suite tickets")


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("doc_to_target: answer", "doc_to_target: !function utils.target", 7, "`!function` runs Python"),
        ("doc_to_target: answer", "doc_to_target: !!python/name:os.system answer", 7, "makes objects"),
        ("doc_to_target: answer", "doc_to_target: answer\nprocess_docs: utils.f", 8, "names Python to run"),
        ("doc_to_target: answer", "doc_to_target: answer\nclass: Task", 8, "names Python to run"),
        ("doc_to_target: answer", "doc_to_target: answer\ninclude: ../base.yaml", 8, "write the task out"),
        ("doc_to_target: answer", "doc_to_target: answer\ndoc_to_txt: x", 8, "did you mean `doc_to_text`"),
        ("doc_to_target: answer", "doc_to_target: &a answer\ndescription: *a", 7, "anchors and aliases"),
        ("dataset_path: json", "dataset_path: gsm8k", 2, "lies beside its YAML"),
        ("items.jsonl", "/data/items.jsonl", 3, "not a relative name"),
        ("items.jsonl", "../items.jsonl", 3, "not a relative name"),
        ("items.jsonl", "https://host/items.jsonl", 3, "not a relative name"),
        ("items.jsonl", "nothing.jsonl", 3, "no file 'nothing.jsonl'"),
        ("{test: items.jsonl}", "{train: items.jsonl}", 3, "read by nothing"),
        ("{data_files: {test: items.jsonl}}", "{data_files: {test: items.jsonl}, trust_remote_code: true}", 3, "trust_remote_code"),
        ("do_sample: false", "do_sample: true", 8, "decoded greedily"),
        ("do_sample: false", "temperature: 0.7", 8, "decoded greedily"),
        (", max_gen_toks: 16", "", 8, "max_gen_toks"),
        ("metric: exact_match", "metric: bleu", 9, "does not give 0 or 1"),
        ("metric: exact_match", "metric: exact_match, hf_evaluate: true", 9, "`hf_evaluate` is not allowed"),
        ("aggregation: mean", "aggregation: median", 9, "aggregation: mean"),
        ("metadata: {version: 1.0}", "filter_list: [{name: f, filter: [{function: custom}]}]", 11, "filter 'custom'"),
        ("metadata: {version: 1.0}", "filter_list: [{name: f, filter: [{function: lowercase}]}]", 11, "last filter is `take_first`"),
        ("metadata: {version: 1.0}", "num_fewshot: 3", 11, "`fewshot_split` of their own"),
        ("metadata: {version: 1.0}", "num_fewshot: 1\nfewshot_split: test", 12, "same file"),
        ("metadata: {version: 1.0}", "metadata: {hook: 1}", 11, "metadata.hook"),
        ("metadata: {version: 1.0}", "repeats: 4", 11, "must be 1"),
        ("{{ prompt }}", "{{ prompt", 6, "not a Jinja template"),
        ("output_type: generate_until", "output_type: loglikelihood_rolling", 5, "suites use"),
        ("task: triage", "task: 'a/b'", 1, "a task name has"),
        ("task: triage\n", "", 1, "`task` is missing"),
        ("task: triage", "task: [", 3, "not YAML"),
    ],
)
def test_a_task_that_could_run_code_or_mislead_is_refused_by_line(tmp_path: Path, old: str, new: str, line: int, said: str) -> None:
    """lm-eval's own YAML runs Python by `!function`; a suite is data."""
    assert old in YAML
    write(tmp_path / "suite", yaml=YAML.replace(old, new, 1))
    with pytest.raises(SuiteError, match=said) as caught:
        take(tmp_path)
    assert f"triage.yaml:{line}:" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"id": "i1"}, r"items.jsonl:4: the id 'i1' is already at items.jsonl:2"),
        ({"id": 7}, "items.jsonl:4: 'id' is 7"),
        ({"intent": None}, "items.jsonl:4: 'intent' is None"),
        ({"intent": "re\nfund"}, "items.jsonl:4: 'intent' has control characters"),
        ({"prompt": " "}, "items.jsonl:4: 'prompt' is ' '"),
        ({"answer": 4}, "items.jsonl:4: 'answer' is a int, in line 1 it is a str"),
    ],
)
def test_items_are_strict_and_refused_by_line(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    rows = [item(number) for number in range(6)]
    rows[3] = item(3, **changed)
    write(tmp_path / "suite", rows)
    with pytest.raises(SuiteError, match=said):
        take(tmp_path)


@pytest.mark.parametrize("field", ["id", "prompt", "intent", "source", "answer"])
def test_a_missing_field_names_the_field_the_line_and_its_use(tmp_path: Path, field: str) -> None:
    rows = [item(number) for number in range(6)]
    del rows[2][field]
    write(tmp_path / "suite", rows)
    with pytest.raises(SuiteError, match=f"items.jsonl:3: no field '{field}', which"):
        take(tmp_path)


def test_broken_lines_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "suite")
    good = (folder / "items.jsonl").read_bytes()
    for data, said in [
        (b"", "the file is empty"),
        (good + b'{"id": "half', "items.jsonl:7: not a JSON object"),
        (good + b"[1]\n", "items.jsonl:7: a list"),
        (good + b"\n", "items.jsonl:7: not a JSON object"),
        (good + b'{"id": "\xff"}\n', "items.jsonl:7: not a JSON object"),
    ]:
        (folder / "items.jsonl").write_bytes(data)
        with pytest.raises(SuiteError, match=said):
            take(tmp_path)
    (folder / "triage.yaml").write_bytes(b"task: \xff")
    with pytest.raises(SuiteError, match="byte 6 is not UTF-8"):
        take(tmp_path)


def test_a_field_name_that_no_item_has_is_not_taken_for_a_constant_prompt(tmp_path: Path) -> None:
    write(tmp_path / "suite", yaml=YAML.replace('"<|user|>{{ prompt }}<|end|><|assistant|>"', "promt"))
    with pytest.raises(SuiteError, match="no field 'promt'"):
        take(tmp_path)


def test_a_line_separator_inside_a_string_is_not_the_end_of_a_line(tmp_path: Path) -> None:
    write(tmp_path / "suite", [item(0, prompt="one\u2028two"), item(1)])
    assert take(tmp_path)[0].suites[0].items == 2


def test_a_folder_that_is_not_there_and_a_suite_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="no such suite folder"):
        take(tmp_path)
    (tmp_path / "suite").mkdir()
    with pytest.raises(SuiteError, match="no task"):
        take(tmp_path)
    assert read_folder(tmp_path / "suite") == {}


def test_yaml_is_read_as_lm_eval_reads_it(tmp_path: Path) -> None:
    """YAML 1.1, where `no` is false: the same text must not mean two things to the check and to lm-eval."""
    write(tmp_path / "suite", yaml=YAML.replace("do_sample: false", "do_sample: no"))
    assert take(tmp_path)[0].suites[0].tasks == ("triage",)
    write(tmp_path / "suite", yaml=YAML.replace("do_sample: false", "do_sample: yes"))
    with pytest.raises(SuiteError, match="decoded greedily"):
        take(tmp_path)
