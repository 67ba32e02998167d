"""The scoring program: one base, candidate and baseline as adapters on it, every suite scored on both in one process.

It needs the blob store and nothing else; what the scores mean is `policy.py`, which runs with the orchestrator.
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

# read by libraries when they are imported; progress goes through the job's events instead of bars
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1"
)

from repro_assets.documents import Score, SuiteScore
from repro_assets.evaluation import suites as suite_files
from repro_assets.evaluation.suites import Item, Loaded
from repro_assets.trust import artifact
from repro_assets.trust.blob import Blob, BlobStore
from repro_assets.trust.canonical import canonical, digest

CANDIDATE, BASELINE = "candidate", "baseline"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
PROGRESS_SECONDS = 2.0


class Events(Protocol):
    """The job's event log: `emit` appends (rank 0 only)."""

    def emit(self, kind: str, **facts: Any) -> None: ...


class JobError(Exception):
    """A scoring job that cannot run; the message names the field or file, the reason and the remedy."""


class SuiteJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One suite to score: its files by relative name, its tasks, the item fields that are slice labels, and the cluster's field."""

    name: str
    files: dict[str, Blob]
    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    cluster: str | None


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One scoring job. `models`: adapter files by name; `baseline` null is the base model itself."""

    purpose: Literal["score"]
    base_model: dict[str, Blob]
    suites: tuple[SuiteJob, ...]
    models: dict[str, dict[str, Blob] | None]
    batch_size: int
    seed: int
    compute_dtype: Literal["float32", "bfloat16"]
    quantization: Literal["nf4", "none"] = "nf4"
    double_quant: bool = True

    @property
    def base(self) -> str:
        """Digest of the base model's files, as adapters name their base."""
        return digest({name: blob.sha256 for name, blob in self.base_model.items()})


def parse(job: dict[str, Any]) -> Job:
    """The job in `job`. Raises JobError naming the field."""
    try:
        parsed = msgspec.convert(job, Job)
    except (msgspec.ValidationError, ValueError) as error:
        raise JobError(f"job.json: {error}; the orchestrator and the node run different versions of this project") from error
    if set(parsed.models) != {CANDIDATE, BASELINE} or parsed.models[CANDIDATE] is None:
        raise JobError(f"job.json: models are {sorted(parsed.models)}; a scoring job has a candidate, and a baseline that may be null")
    if parsed.batch_size < 1 or not parsed.suites:
        raise JobError("job.json: at least one suite and a batch_size of 1 or more are needed")
    return parsed


def run(job: dict[str, Any], store: BlobStore, events: Events) -> dict[str, Any]:
    """Score the job's suites on candidate and baseline; the outcome as a dict (rank 0; other ranks do nothing).

    Raises JobError, SuiteError, ArtifactRefused, BlobError or ScoringError; nothing is stored then but blobs nobody names.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return {"status": "succeeded", "reason": "scored by rank 0", "result": {}, "observed": {}}
    begun = time.monotonic()
    parsed = parse(job)
    # files are refused before the ten seconds that importing torch and lm-eval cost
    loaded = {suite.name: _load_suite(suite, store) for suite in parsed.suites}
    adapters = {name: _fetch_adapter(name, files, parsed.base, store) for name, files in parsed.models.items() if files is not None}

    import torch

    from repro_assets.training import determinism
    from repro_assets.training import model as training_model

    with training_model.uncompiled():  # before PEFT imports it with the whole compiler behind it
        import bitsandbytes  # noqa: F401
    determinism.prepare()
    determinism.settle()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = determinism.compute_dtype(parsed.compute_dtype, device)
    hardware = determinism.hardware(device)
    total = 2 * sum(len(items.items[task.items]) for items in loaded.values() for task in items.tasks.values())
    events.emit("started", world_size=1, device=str(device), compute_dtype=parsed.compute_dtype, hardware=hardware, steps=total)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory(prefix="score-") as folder:
        model, tokenizer = _load_model(parsed, adapters, store, Path(folder), dtype, device)
    rows, latency = _score(parsed, loaded, model, tokenizer, dtype, events, total)
    samples = store.put_bytes(b"".join(canonical(row) + b"\n" for row in rows))
    seconds = time.monotonic() - begun
    events.emit("finished", step=total, steps=total, seconds=round(seconds, 3))
    return {
        "status": "succeeded",
        "reason": f"{len(rows)} items scored on both models",
        "result": {
            "scores": [msgspec.to_builtins(score) for score in summarise(rows, loaded)],
            "samples": msgspec.to_builtins(samples),
            "hardware": hardware,
            "compute_dtype": parsed.compute_dtype,
        },
        "observed": {"seconds": round(seconds, 3), "peak_memory": _peak_memory(device), "latency": latency},
    }


def _load_suite(suite: SuiteJob, store: BlobStore) -> Loaded:
    data = dict(zip(suite.files, store.get_many(blob.sha256 for blob in suite.files.values()), strict=True))
    loaded = suite_files.load(data, suite.labels, suite.cluster, None, f"suite {suite.name}")
    if sorted(suite.tasks) != sorted(loaded.tasks):
        raise JobError(
            f"job.json: suite {suite.name} lists the tasks {sorted(suite.tasks)}, its files hold {sorted(loaded.tasks)}; "
            "materialize eval_suites again"
        )
    return loaded


class _Adapter(msgspec.Struct, frozen=True):
    config: dict[str, Any]
    weights: bytes


def _fetch_adapter(name: str, files: Mapping[str, Blob], base: str, store: BlobStore) -> _Adapter:
    """An adapter's files, verified by digest and by the allow-list. Raises ArtifactRefused, or JobError for another base model."""
    artifact.check_names(files)
    data = dict(zip(files, store.get_many(blob.sha256 for blob in files.values()), strict=True))
    config = artifact.check(data)
    weights = [key for key in sorted(data) if key.endswith(".safetensors")]
    if len(weights) != 1:
        raise JobError(f"{name}: {len(weights)} safetensors files; an adapter has one, adapter_model.safetensors")
    said = str(config["base_model_name_or_path"])
    if said.startswith("sha256:") and said != f"sha256:{base}":
        raise JobError(
            f"{name}: the adapter was trained on base model {said}, this job loads sha256:{base}; score it on its own base model"
        )
    return _Adapter(config, data[weights[0]])


def _load_model(job: Job, adapters: Mapping[str, _Adapter], store: BlobStore, folder: Path, dtype: Any, device: Any) -> tuple[Any, Any]:
    """The quantised base with every adapter attached, in eval mode, and its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    from repro_assets.recipe import TrainingSection
    from repro_assets.training import model as training_model

    training_model.fetch(store, job.base_model, folder)
    for name in TOKENIZER:
        if name in job.base_model:
            store.get_file(job.base_model[name].sha256, folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise JobError(f"base model: transformers cannot load its tokenizer: {error}") from error
    section = TrainingSection(quantization=job.quantization, double_quant=job.double_quant)
    model: Any = training_model.load_base(folder, section, dtype, device)
    wrapped: Any = None
    for name, adapter in adapters.items():
        # PEFT warns when it puts the temporary folder in the place of the base model's digest
        config = LoraConfig(**{**adapter.config, "inference_mode": True, "base_model_name_or_path": None})
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        _restore(wrapped, name, adapter.weights)
    wrapped.requires_grad_(False)
    return wrapped.eval(), tokenizer


def _restore(model: Any, name: str, weights: bytes) -> None:
    """Copy an adapter's tensors into the model. Strict, and read back: PEFT only warns about keys that find no place."""
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load

    tensors = load(weights)
    have = get_peft_model_state_dict(model, adapter_name=name)
    for key in sorted(have.keys() | tensors.keys()):
        if key not in tensors or key not in have:
            raise JobError(
                f"{name}: adapter tensor {key!r} is {'missing' if key not in tensors else 'unknown to this base model'}; "
                "train it on this base"
            )
        if have[key].shape != tensors[key].shape:
            raise JobError(
                f"{name}: adapter tensor {key!r} has shape {tuple(tensors[key].shape)}, this base model needs {tuple(have[key].shape)}"
            )
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    loaded = get_peft_model_state_dict(model, adapter_name=name)
    for key, tensor in tensors.items():
        if not torch.equal(loaded[key].cpu(), tensor.to(loaded[key].dtype)):
            raise JobError(f"{name}: adapter tensor {key!r} did not arrive in the model; its name or layout is not the one PEFT reads")


@contextmanager
def _as(model: Any, name: str) -> Iterator[None]:
    """The model as candidate or baseline: the adapter of that name, or none where the job has none."""
    if name in model.peft_config:
        model.set_adapter(name)
        model.requires_grad_(False)
        yield
    else:
        with model.disable_adapter():
            yield


def _score(
    job: Job, loaded: Mapping[str, Loaded], model: Any, tokenizer: Any, dtype: Any, events: Events, total: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of the samples table, sorted by suite, task and item, and latency percentiles of the candidate's batches in milliseconds."""
    from repro_assets.evaluation.scoring import Answer, Scorer, score_task

    scorer = Scorer(model, tokenizer, job.batch_size, dtype)
    scorer.progress = _progress(events, total)
    times: list[float] = []
    rows: list[dict[str, Any]] = []
    for suite, content in sorted(loaded.items()):
        for task in content.tasks.values():
            answers: dict[str, list[Answer]] = {}
            for name in (CANDIDATE, BASELINE):
                scorer.milliseconds.clear()
                with _as(model, name):
                    answers[name] = score_task(scorer, task, content.rows, job.seed)
                if name == CANDIDATE:
                    times += scorer.milliseconds
            for item, candidate, baseline in zip(content.items[task.items], answers[CANDIDATE], answers[BASELINE], strict=True):
                rows.append(_row(suite, task.name, item, candidate, baseline))
    rows.sort(key=lambda row: (row["suite"], row["task"], row["item"]))
    return rows, _percentiles(times)


def _progress(events: Events, total: int) -> Callable[[int], None]:
    """A function that counts rows and says so in the job's events, at most every PROGRESS_SECONDS."""
    begun = last = time.monotonic()
    done = 0

    def advance(rows: int) -> None:
        nonlocal last, done
        done += rows
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            # a ranked item is one row a choice, so rows can outnumber items
            step = min(done, total)
            events.emit(
                "step",
                step=step,
                steps=total,
                items_per_second=round(done / (now - begun), 1),
                eta_seconds=round((total - step) * (now - begun) / done, 1),
            )

    return advance


def _row(suite: str, task: str, item: Item, candidate: Any, baseline: Any) -> dict[str, Any]:
    if not item.id == candidate.item == baseline.item or candidate.prompt_sha256 != baseline.prompt_sha256:
        raise JobError(f"suite {suite}, task {task}: candidate and baseline did not see the same prompt for item {item.id}")
    return {
        "suite": suite,
        "task": task,
        "item": item.id,
        "cluster": item.cluster,
        "slices": item.slices,
        "prompt_sha256": candidate.prompt_sha256,
        "target": candidate.target,
        CANDIDATE: {"answer": candidate.answer, "score": candidate.score},
        BASELINE: {"answer": baseline.answer, "score": baseline.score},
    }


def summarise(rows: list[dict[str, Any]], loaded: Mapping[str, Loaded]) -> list[SuiteScore]:
    """Items and right answers of each task, overall and by slice, in the order of suite and task."""
    scores: list[SuiteScore] = []
    for suite, content in sorted(loaded.items()):
        for task in content.tasks.values():
            counts: dict[str, dict[str, list[int]]] = {}
            for row in rows:
                if (row["suite"], row["task"]) == (suite, task.name):
                    for label, value in [("overall", "all"), *row["slices"].items()]:
                        count = counts.setdefault(label, {}).setdefault(value, [0, 0, 0])
                        for place, add in enumerate((1, row[CANDIDATE]["score"], row[BASELINE]["score"])):
                            count[place] += add
            slices = {label: {value: Score(*count) for value, count in sorted(values.items())} for label, values in sorted(counts.items())}
            scores.append(SuiteScore(suite=suite, task=task.name, metric=task.metric, slices=slices))
    return scores


def _percentiles(milliseconds: list[float]) -> dict[str, float]:
    import numpy as np

    return {f"p{share}": round(float(np.percentile(milliseconds, share)), 3) for share in (50, 95, 99)} if milliseconds else {}


def _peak_memory(device: Any) -> int:
    """Bytes: what CUDA allocated at most, or the process's largest resident set."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes on Linux, bytes on macOS
    return peak if sys.platform == "darwin" else peak * 1024
