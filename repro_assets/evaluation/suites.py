"""Evaluation suites as data: what a suite folder may hold, its tasks and items, and how it becomes blobs and comes back from them.

A suite is lm-eval YAML and JSONL and nothing that runs: task code is never data from a bucket. Models are scored in `scoring.py`.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from repro_assets.documents import EvalSuites, SharedObserved, Suite
from repro_assets.evaluation.tasks import Task, TaskError, check_task
from repro_assets.recipe import SuiteSource
from repro_assets.trust.blob import Blob, BlobStore
from repro_assets.trust.canonical import canonical, digest

MAX_FILE = 256 * 1024 * 1024
MAX_FILES = 1000
MAX_NAME = 200
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED = {"id", "overall"}


class SuiteError(Exception):
    """A suite that cannot be used; the message names the file, the line where there is one, the reason and the remedy."""


class Item(msgspec.Struct, frozen=True):
    """One item of a task: its id, its labels' values, the cluster it shares a source with, the text that the contamination check reads."""

    id: str
    slices: dict[str, str]
    cluster: str | None
    prompt: str
    row: dict[str, Any]


class Loaded(msgspec.Struct, frozen=True):
    """A suite read and checked: its tasks by name, its items by JSONL file, and the rows of every JSONL file (few-shot ones too)."""

    tasks: dict[str, Task]
    items: dict[str, tuple[Item, ...]]
    rows: dict[str, tuple[dict[str, Any], ...]]


def intake(sources: Sequence[SuiteSource], folder_of: Callable[[str], Path], store: BlobStore) -> tuple[EvalSuites, SharedObserved]:
    """Read and check every suite folder, store its files and the items' prompts.

    `folder_of` turns a recipe's path into a folder. The prompts blob is JSONL, one canonical {"item", "suite", "text"} a line in the order
    of suite and item, with `text` as `repro_assets.data.lines.normal_text` gives it. Raises SuiteError.
    """
    from repro_assets.data.lines import normal_text

    begun = time.monotonic()
    if not sources:
        raise SuiteError("evaluation.suites: at least one suite is needed to decide anything; name a folder of lm-eval YAML and JSONL")
    names = [source.name for source in sources]
    for name in names:
        if not NAME.fullmatch(name) or "/" in name:
            raise SuiteError(f"evaluation.suites: {name!r} is a folder name in lakeFS: letters, digits, `_`, `-` and `.`")
        if names.count(name) > 1:
            raise SuiteError(f"evaluation.suites: two suites are called {name!r}; give each its own name")
    suites: list[Suite] = []
    prompts: list[dict[str, str]] = []
    origins: list[str] = []
    for source in sources:
        folder = Path(folder_of(source.path))
        files = read_folder(folder)
        loaded = load(files, source.labels, source.cluster, source.prompt, str(folder))
        blobs = dict(zip(files, store.put_many(files.values()), strict=True))
        suites.append(_suite(source, loaded, blobs))
        for item in _items(loaded):
            prompts.append({"item": item.id, "suite": source.name, "text": normal_text(item.prompt)})
        origins.append(f"{source.name}={folder}")
    prompts.sort(key=lambda line: (line["suite"], line["item"]))
    blob = store.put_bytes(b"".join(canonical(line) + b"\n" for line in prompts))
    result = EvalSuites(suites=tuple(sorted(suites, key=lambda suite: suite.name)), prompts=blob)
    return result, SharedObserved(origin="; ".join(origins), seconds=round(time.monotonic() - begun, 3))


def _items(loaded: Loaded) -> Iterator[Item]:
    for items in loaded.items.values():
        yield from items


def _suite(source: SuiteSource, loaded: Loaded, blobs: Mapping[str, Blob]) -> Suite:
    labels: dict[str, dict[str, int]] = {}
    for label in source.labels:
        counts: dict[str, int] = {}
        for item in _items(loaded):
            counts[item.slices[label]] = counts.get(item.slices[label], 0) + 1
        labels[label] = dict(sorted(counts.items()))
    return Suite(
        name=source.name,
        suite_files=dict(sorted(blobs.items())),
        tasks=tuple(sorted(loaded.tasks)),
        items=sum(len(items) for items in loaded.items.values()),
        labels=labels,
        digest=files_digest(blobs),
    )


def files_digest(blobs: Mapping[str, Blob]) -> str:
    """Identity of a suite's files: digest of their sorted list of path, SHA-256 and size."""
    return digest([{"path": name, "sha256": blob.sha256, "size": blob.size} for name, blob in sorted(blobs.items())])


def read_folder(folder: Path) -> dict[str, bytes]:
    """Bytes of every file under `folder` by relative POSIX name, sorted. Raises SuiteError for anything but plain YAML and JSONL files."""
    if not folder.is_dir():
        raise SuiteError(f"{folder}: no such suite folder; `path` of a suite is relative to the recipe")
    files: dict[str, bytes] = {}
    for path in sorted(_walk(folder)):
        name = path.relative_to(folder).as_posix()
        check_name(name, str(folder))
        size = path.stat().st_size
        if size > MAX_FILE:
            raise SuiteError(f"{path}: {size} bytes, a suite file has at most {MAX_FILE}; split the suite")
        files[name] = path.read_bytes()
        if len(files) > MAX_FILES:
            raise SuiteError(f"{folder}: more than {MAX_FILES} files; is `path` the suite's own folder?")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise SuiteError(f"{path}: a symbolic link may point outside the suite; copy the file itself")
        if path.is_dir():
            if path.name.startswith(".") or path.name == "__pycache__":
                raise SuiteError(f"{path}: a hidden or generated folder; remove it from the suite")
            yield from _walk(path)
        elif path.is_file():
            yield path
        else:
            raise SuiteError(f"{path}: not a plain file; a suite holds YAML and JSONL files")


def check_name(name: str, where: str) -> None:
    """Raise SuiteError unless `name` is a relative path of plain names that ends in .yaml or .jsonl. Names also come from job files."""
    last = name.rsplit("/", 1)[-1]
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise SuiteError(f"{where}: {name!r} leaves the suite's folder; use a relative name")
    if any(part.startswith(".") for part in name.split("/")):
        raise SuiteError(f"{where}/{name}: a hidden file; remove it from the suite")
    if last.endswith((".py", ".pyc", ".so", ".ipynb")):
        raise SuiteError(f"{where}/{name}: a suite is data and may hold no code; express the task in YAML, or add a metric to the project")
    if not last.endswith((".yaml", ".jsonl")):
        raise SuiteError(f"{where}/{name}: only .yaml and .jsonl files belong in a suite; rename or remove it")
    if not NAME.fullmatch(name):
        raise SuiteError(f"{where}: {name!r} has characters outside letters, digits, `_`, `-`, `.` and `/`; rename the file")


def load(files: Mapping[str, bytes], labels: Sequence[str], cluster: str | None, prompt: str | None, where: str) -> Loaded:
    """Parse and check a suite's files. `prompt` None skips the contamination text (the scoring program does not need it).

    Raises SuiteError naming the file, the line, the reason and the remedy.
    """
    for label in labels:
        if not LABEL.fullmatch(label) or label in RESERVED:
            raise SuiteError(
                f"{where}: the label {label!r} cannot be used; labels are item fields of letters, digits and `_`, not `id` or `overall`"
            )
    tasks: dict[str, Task] = {}
    for name, data in sorted(files.items()):
        check_name(name, where)
        if name.endswith(".yaml"):
            task = _task(name, data, files, where)
            if task.name in tasks:
                raise SuiteError(f"{where}/{name}: the task name {task.name!r} is used twice in this suite; rename one")
            tasks[task.name] = task
    if not tasks:
        raise SuiteError(f"{where}: no .yaml file, so no task; add an lm-eval task")
    used = {task.items for task in tasks.values()} | {task.shots for task in tasks.values() if task.shots}
    rows: dict[str, tuple[dict[str, Any], ...]] = {}
    for name, data in sorted(files.items()):
        if name.endswith(".jsonl"):
            if name not in used:
                raise SuiteError(f"{where}/{name}: no task reads this file; name it under dataset_kwargs.data_files or remove it")
            rows[name] = tuple(_rows(name, data, where))
    items: dict[str, tuple[Item, ...]] = {}
    seen: dict[str, str] = {}
    for name in sorted({task.items for task in tasks.values()}):
        items[name] = tuple(_item(name, line, row, labels, cluster, prompt, seen, where) for line, row in enumerate(rows[name], 1))
        for task in tasks.values():
            if task.items == name:
                _check_fields(task, rows[name], where)
    return Loaded(tasks=tasks, items=items, rows=rows)


def _task(name: str, data: bytes, files: Mapping[str, bytes], where: str) -> Task:
    """One task YAML, parsed as lm-eval would (YAML 1.1) but without tags, anchors and includes."""
    path = f"{where}/{name}"
    try:
        text = data.decode("utf-8")
        reader = YAML(typ="rt", pure=True)
        reader.version = (1, 1)
        for event in YAML(typ="rt", pure=True).parse(text):
            line = event.start_mark.line + 1
            if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
                raise SuiteError(f"{path}:{line}: anchors and aliases are not used in suites; write the value out")
            if tag := getattr(event, "tag", None):
                said = "`!function` runs Python" if "function" in str(tag) else f"the tag {str(tag)!r} makes objects"
                raise SuiteError(f"{path}:{line}: {said}; a suite is data and may hold no code: express the task in plain YAML")
        tree = reader.load(text)
    except UnicodeDecodeError as error:
        raise SuiteError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise SuiteError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise SuiteError(f"{path}:1: a task is a mapping; start with `task: <name>`")
    folder = name.rsplit("/", 1)[0] + "/" if "/" in name else ""
    try:
        return check_task(_plain(tree), folder, [other for other in files if other.endswith(".jsonl")])
    except TaskError as error:
        raise SuiteError(f"{path}:{_line(tree, error.key)}: {error}") from None


def _plain(value: Any) -> Any:
    """ruamel's marked containers and scalars as builtins."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _line(tree: Any, key: str) -> int:
    try:
        return int(tree.lc.key(key)[0]) + 1
    except (KeyError, AttributeError):
        return 1


def _rows(name: str, data: bytes, where: str) -> Iterator[dict[str, Any]]:
    path = f"{where}/{name}"
    if not data.strip():
        raise SuiteError(f"{path}: the file is empty; a suite needs items")
    # split at newlines only: str.splitlines also cuts at U+2028, which JSON strings may hold
    lines = data.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SuiteError(f"{path}:{number}: not a JSON object: {error}; every line is one item") from None
        if not isinstance(row, dict):
            raise SuiteError(f"{path}:{number}: a {type(row).__name__}, not a JSON object; every line is one item")
        yield row


def _item(
    name: str,
    line: int,
    row: dict[str, Any],
    labels: Sequence[str],
    cluster: str | None,
    prompt: str | None,
    seen: dict[str, str],
    where: str,
) -> Item:
    path = f"{where}/{name}:{line}"

    def text(field: str, purpose: str) -> str:
        if field not in row:
            raise SuiteError(f"{path}: no field {field!r}, {purpose}; add it to every item or change evaluation.suites in the recipe")
        value = row[field]
        if not isinstance(value, str) or not value.strip():
            raise SuiteError(f"{path}: {field!r} is {value!r}, {purpose} and must be a string that is not empty")
        if field != prompt and not (value.isprintable() and len(value) <= MAX_NAME):
            raise SuiteError(f"{path}: {field!r} has control characters or more than {MAX_NAME}, {purpose}; it is shown in every report")
        return value

    identity = text("id", "which names the item in every table")
    if identity in seen:
        raise SuiteError(f"{path}: the id {identity!r} is already at {seen[identity]}; ids are unique in a suite")
    seen[identity] = f"{name}:{line}"
    slices = {label: text(label, "which the recipe makes a slice label") for label in labels}
    group = text(cluster, "which the recipe makes the cluster") if cluster else None
    return Item(identity, slices, group, text(prompt, "which the contamination check compares") if prompt else "", row)


def _check_fields(task: Task, rows: Sequence[dict[str, Any]], where: str) -> None:
    """Every field that a template of the task names must be in every item, else lm-eval fails in the middle of a run."""
    kinds = {field: type(rows[0].get(field)) for field in task.fields}
    for number, row in enumerate(rows, 1):
        if absent := sorted(task.fields - row.keys()):
            raise SuiteError(f"{where}/{task.items}:{number}: no field {absent[0]!r}, which task {task.name!r} uses; add it")
        for field, kind in kinds.items():
            if type(row[field]) is not kind:
                raise SuiteError(
                    f"{where}/{task.items}:{number}: {field!r} is a {type(row[field]).__name__}, in line 1 it is a "
                    f"{kind.__name__}; give it one type"
                )
