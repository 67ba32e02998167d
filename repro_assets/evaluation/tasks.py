"""The part of lm-eval's task YAML that suites may use, as an allow-list. Files and items around it are `suites.py`.

lm-eval itself reads far more (Python by `!function`, `class` and `process_docs`, metrics and data fetched from a hub); what is not named
here is refused, so that a suite from a bucket cannot run code or reach a network.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import msgspec

#: metrics that give 0 or 1 an item, by output type: what paired statistics need
METRICS = {
    "generate_until": ("exact_match",),
    "multiple_choice": ("acc", "acc_norm", "acc_bytes", "exact_match"),
    "loglikelihood": ("acc",),
}
METRIC_OPTIONS = {"metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore"}
FILTERS = {"regex", "multi_choice_regex", "remove_whitespace", "take_first", "lowercase", "uppercase", "map"}
GENERATION = {"until", "do_sample", "temperature", "max_gen_toks"}
KEYS = (
    "task", "task_alias", "metadata", "dataset_path", "dataset_kwargs", "test_split", "fewshot_split", "num_fewshot", "fewshot_delimiter",
    "fewshot_config", "output_type", "description", "gen_prefix", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter",
    "generation_kwargs", "filter_list", "metric_list", "repeats",
)  # fmt: skip
METADATA = {"version", "chat_template"}
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

#: keys of lm-eval that are refused, and why
CODE = {
    "class": "it names Python to run",
    "custom_dataset": "it names Python to run",
    "process_docs": "it names Python to run",
    "process_results": "it names Python to run",
    "unsafe_code": "answers are never executed",
    "include": "what it includes may change under another name; write the task out",
    "group": "list the tasks themselves; gates pool a suite's tasks",
    "use_prompt": "it fetches a prompt collection; write the prompt out",
    "dataset_name": "local JSONL has no configurations",
}


class TaskError(Exception):
    """A task that suites may not hold. `key` is the top-level key that is wrong."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Task(msgspec.Struct, frozen=True):
    """A checked task. `config`: lm-eval's task dictionary without the data; `items`, `shots`: names of its JSONL files in the suite.

    `fields`: item fields that its templates name. `chat`: prompts go through the model's chat template.
    """

    name: str
    config: dict[str, Any]
    output_type: str
    metric: str
    items: str
    shots: str | None
    split: str
    fields: frozenset[str]
    chat: bool


def check_task(config: dict[str, Any], folder: str, files: Sequence[str]) -> Task:
    """The task in one YAML mapping. `folder` is the YAML's own ("" or "sub/"), `files` the suite's JSONL names. Raises TaskError."""
    for key in config:
        if key in CODE:
            raise TaskError(key, f"`{key}` is not allowed in a suite: {CODE[key]}")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1, 0.6)
            raise TaskError(key, f"unknown key `{key}`{f'; did you mean `{near[0]}`?' if near else ''}. Known: {', '.join(KEYS)}")
    for key in ("task", "dataset_path", "dataset_kwargs", "test_split", "output_type", "doc_to_text", "doc_to_target"):
        if key not in config:
            raise TaskError(key, f"`{key}` is missing; a task needs it")
    name = config["task"]
    if not isinstance(name, str) or not TASK_NAME.fullmatch(name):
        raise TaskError("task", f"`task` is {name!r}; a task name has letters, digits, `_`, `-` and `.`")
    kind = config["output_type"]
    if kind not in METRICS:
        raise TaskError("output_type", f"`output_type` is {kind!r}; suites use {', '.join(METRICS)}")
    items, shots = _data(config, folder, files)
    metadata = _mapping(config, "metadata", METADATA)
    if not isinstance(metadata.get("chat_template", False), bool):
        raise TaskError("metadata", "`metadata.chat_template` is true or false")
    _texts(config)
    if kind == "multiple_choice" and "doc_to_choice" not in config:
        raise TaskError("output_type", "`doc_to_choice` is missing; multiple_choice ranks its values")
    if kind != "generate_until" and "generation_kwargs" in config:
        raise TaskError("generation_kwargs", "`generation_kwargs` belongs to output_type generate_until")
    if kind == "generate_until":
        _generation(config)
    if config.get("repeats", 1) != 1:
        raise TaskError("repeats", "`repeats` must be 1: one answer an item is what pairs with the baseline's")
    _filters(config)
    return Task(
        name=name,
        config={key: value for key, value in config.items() if key not in ("dataset_path", "dataset_kwargs", "metadata", "repeats")},
        output_type=kind,
        metric=_metric(config, kind),
        items=items,
        shots=shots,
        split=config["test_split"],
        fields=_fields(config),
        chat=metadata.get("chat_template", False),
    )


def _mapping(config: dict[str, Any], key: str, known: set[str]) -> dict[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise TaskError(key, f"`{key}` is a mapping, not {value!r}")
    if unknown := sorted(set(value) - known):
        raise TaskError(key, f"`{key}.{unknown[0]}` is not allowed in a suite; known: {', '.join(sorted(known))}")
    return value


def _data(config: dict[str, Any], folder: str, files: Sequence[str]) -> tuple[str, str | None]:
    if config["dataset_path"] != "json":
        raise TaskError(
            "dataset_path", f"`dataset_path` is {config['dataset_path']!r}; a suite's data lies beside its YAML: use `json` and JSONL files"
        )
    named = _mapping(config, "dataset_kwargs", {"data_files"}).get("data_files")
    if not isinstance(named, dict) or not named:
        raise TaskError("dataset_kwargs", "`dataset_kwargs.data_files` maps a split to a JSONL file, for example {test: items.jsonl}")
    split, shots = config["test_split"], config.get("fewshot_split")
    found: dict[str, str] = {}
    for key, value in named.items():
        if key not in (split, shots):
            raise TaskError("dataset_kwargs", f"split {key!r} is read by nothing; it is neither test_split nor fewshot_split")
        if not isinstance(value, str) or value.startswith("/") or "://" in value or ".." in value.split("/") or "\\" in value:
            raise TaskError("dataset_kwargs", f"data file {value!r} is not a relative name inside the suite's folder")
        if folder + value not in files:
            raise TaskError("dataset_kwargs", f"no file {folder + value!r} in the suite; it has {', '.join(files) or 'no JSONL file'}")
        found[key] = folder + value
    for key, wanted in (("test_split", split), ("fewshot_split", shots)):
        if wanted is not None and wanted not in found:
            raise TaskError(key, f"`{key}` is {wanted!r}, which dataset_kwargs.data_files does not name")
    number = config.get("num_fewshot", 0)
    if type(number) is not int or number < 0:
        raise TaskError("num_fewshot", f"`num_fewshot` is {number!r}; it is a count")
    if number and not shots:
        raise TaskError(
            "num_fewshot", "few-shot examples need a `fewshot_split` of their own; drawn from the test items they would give answers away"
        )
    if shots and found[shots] == found[split]:
        raise TaskError("fewshot_split", "few-shot examples and test items are the same file, which gives answers away; use another file")
    sampler = _mapping(config, "fewshot_config", {"sampler"}).get("sampler", "default")
    if sampler not in ("default", "first_n"):
        raise TaskError("fewshot_config", f"`fewshot_config.sampler` is {sampler!r}; use default or first_n")
    return found[split], found.get(shots) if shots else None


def _texts(config: dict[str, Any]) -> None:
    for key in ("doc_to_text", "description", "gen_prefix", "fewshot_delimiter", "target_delimiter", "task_alias"):
        if key in config and not isinstance(config[key], str):
            raise TaskError(key, f"`{key}` is {config[key]!r}; it is a text or template")
    if type(config["doc_to_target"]) not in (str, int):
        raise TaskError(
            "doc_to_target", f"`doc_to_target` is {config['doc_to_target']!r}; it is a field, a template or a number of a choice"
        )
    choice = config.get("doc_to_choice", "")
    listed = list(choice.values()) if isinstance(choice, dict) else choice
    if not isinstance(listed, str) and not (isinstance(listed, list) and listed and all(isinstance(one, str) and one for one in listed)):
        raise TaskError("doc_to_choice", "`doc_to_choice` is a field, a template or a list of texts")


def _generation(config: dict[str, Any]) -> None:
    options = _mapping(config, "generation_kwargs", GENERATION)
    if options.get("do_sample", False) is not False or options.get("temperature", 0) not in (0, 0.0):
        raise TaskError(
            "generation_kwargs",
            "answers are decoded greedily: `do_sample: false` and no temperature; sampled answers depend on their neighbours",
        )
    if type(options.get("max_gen_toks")) is not int or options["max_gen_toks"] < 1:
        raise TaskError("generation_kwargs", "`generation_kwargs.max_gen_toks` is needed: the longest answer in tokens")
    until = options.get("until")
    if not (isinstance(until, list) and all(isinstance(stop, str) and stop for stop in until)) and not (isinstance(until, str) and until):
        raise TaskError("generation_kwargs", "`generation_kwargs.until` is needed: texts that end an answer (a list, which may be empty)")


def _filters(config: dict[str, Any]) -> None:
    pipelines = config.get("filter_list", [])
    if "filter_list" in config and (not isinstance(pipelines, list) or len(pipelines) != 1):
        raise TaskError("filter_list", "`filter_list` has exactly one pipeline: an item has one answer")
    for pipeline in pipelines:
        if not isinstance(pipeline, dict) or set(pipeline) != {"name", "filter"} or not isinstance(pipeline["filter"], list):
            raise TaskError("filter_list", "a pipeline has a `name` and a list `filter`")
        for step in pipeline["filter"]:
            name = step.get("function") if isinstance(step, dict) else None
            if name not in FILTERS:
                raise TaskError("filter_list", f"filter {name!r} is not allowed in a suite; known: {', '.join(sorted(FILTERS))}")
        if not pipeline["filter"] or pipeline["filter"][-1]["function"] != "take_first":
            raise TaskError("filter_list", "the last filter is `take_first`: an item has one answer")


def _metric(config: dict[str, Any], kind: str) -> str:
    listed = config.get("metric_list")
    if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
        raise TaskError("metric_list", "`metric_list` has exactly one metric: it is the item's score")
    options = listed[0]
    if unknown := sorted(set(options) - METRIC_OPTIONS):
        raise TaskError("metric_list", f"`{unknown[0]}` is not allowed in a metric; known: {', '.join(sorted(METRIC_OPTIONS))}")
    if options.get("metric") not in METRICS[kind]:
        raise TaskError(
            "metric_list", f"metric {options.get('metric')!r} does not give 0 or 1 an item of {kind}; use {', '.join(METRICS[kind])}"
        )
    if options.get("aggregation", "mean") != "mean" or options.get("higher_is_better", True) is not True:
        raise TaskError("metric_list", "gates compare means where higher is better: `aggregation: mean`, `higher_is_better: true`")
    return str(options["metric"])


def _fields(config: dict[str, Any]) -> frozenset[str]:
    """Item fields that the templates name. A bare name is a field, as lm-eval reads it where the items have one."""
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment()
    environment.filters["regex_replace"] = re.sub
    fields: set[str] = set()
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix"):
        value = config.get(key)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "{" in text:
                try:
                    fields |= meta.find_undeclared_variables(environment.parse(text))
                except TemplateSyntaxError as error:
                    raise TaskError(key, f"`{key}` is not a Jinja template: {error}") from None
            # without braces lm-eval reads a field's name, and silently a constant where no item has it
            elif isinstance(text, str) and key in ("doc_to_text", "doc_to_target", "doc_to_choice") and not isinstance(value, list):
                fields.add(text)
    return frozenset(fields)
