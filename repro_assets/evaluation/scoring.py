"""lm-eval on a loaded model: one task, one model in, one answer and score an item out. Imports torch; runs on GPU nodes only.

Jobs, adapters and the table of both models are `program.py`; what a task may say is `tasks.py`.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import lm_eval.utils
import msgspec
import numpy as np
import torch
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import set_torch_seed

from repro_assets.evaluation.tasks import Task
from repro_assets.trust.canonical import sha256

for _name in ("lm_eval", "lm-eval"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# lm-eval renders a task's templates in Jinja's open environment, where a template can reach any Python object. Suites come from a bucket.
_sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_sandbox.filters["regex_replace"] = lm_eval.utils.regex_replace
lm_eval.utils.env = _sandbox


class ScoringError(Exception):
    """Scoring that must not start or go on; the message names the suite, task or item, the reason and the remedy."""


class Answer(msgspec.Struct, frozen=True):
    """What one model made of one item. `prompt_sha256`: of the text that the model saw. `score`: 0 or 1."""

    item: str
    prompt_sha256: str
    target: str
    answer: str
    score: int


class Scorer(HFLM):
    """lm-eval's adapter for a loaded model, with a clock around every batch, and without silent truncation.

    `milliseconds`: wall time of each batch's forward passes. `progress` is called with the number of rows of a finished batch.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, batch_size: int, dtype: torch.dtype) -> None:
        super().__init__(
            pretrained=model,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            batch_size=batch_size,
            trust_remote_code=False,
            mixed_precision_dtype=torch.bfloat16 if dtype is torch.bfloat16 else None,
            softmax_dtype=torch.float32,
        )
        self.milliseconds: list[float] = []
        self.progress: Callable[[int], None] = lambda rows: None

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        # lm-eval does not end inference mode around generate; the adapter's parameters require gradients
        with torch.no_grad():
            return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len and ids.shape[1] > left_truncate_len:
            raise ScoringError(
                f"a prompt has {ids.shape[1]} tokens, the model has room for {left_truncate_len} beside the answer; lm-eval would cut its "
                f"beginning off and score another question. Shorten the item or max_gen_toks. It begins: {strings[0][:80]!r}"
            )
        return ids, mask

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for (context, _), prompt, choice in requests:
            if len(prompt) + len(choice) > self.max_length + 1:
                raise ScoringError(
                    f"a prompt and its choice have {len(prompt) + len(choice)} tokens, the model reads {self.max_length}; lm-eval would "
                    f"cut them. Shorten the item. It begins: {context[:80]!r}"
                )
        return super()._loglikelihood_tokens(requests, *args, **{**kwargs, "disable_tqdm": True})

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._timed(len(context), lambda: super(Scorer, self)._model_generate(context, *args, **kwargs))

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._timed(len(inps), lambda: super(Scorer, self)._model_call(inps, *args, **kwargs))

    def _timed(self, rows: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        begun = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        self.milliseconds.append((time.perf_counter() - begun) * 1000)
        self.progress(rows)
        return result


def score_task(scorer: Scorer, task: Task, rows: Mapping[str, Sequence[Mapping[str, Any]]], seed: int) -> list[Answer]:
    """Every item of `task` answered by the scorer's model, in the items' order. `rows`: rows of the suite's JSONL files by name.

    Uses no cache of lm-eval (its key leaves the model out, and it unpickles). Raises ScoringError when an item has no answer or a score
    that is not 0 or 1.
    """
    built = _build(task, rows)
    if built.get_config("num_fewshot") is None:
        built.set_config(key="num_fewshot", value=0)
    built.set_fewshot_seed(seed=seed)
    # what simple_evaluate does before evaluate(); its report of the machine starts ten subprocesses for each call
    np.random.seed(seed)
    set_torch_seed(seed)
    results = evaluate(
        lm=scorer,
        task_dict={"tasks": {task.name: built}},
        bootstrap_iters=0,
        log_samples=True,
        cache_requests=False,
        apply_chat_template=task.chat,
        fewshot_as_multiturn=True,
    )
    answers = [_answer(task, built, sample) for sample in results["samples"][task.name]]
    wanted = [str(row["id"]) for row in rows[task.items]]
    if [answer.item for answer in answers] != wanted:
        raise ScoringError(f"task {task.name}: {len(wanted)} items went in, {len(answers)} answers came out, or in another order")
    return answers


def _build(task: Task, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """lm-eval's task over rows in memory: no path, no dataset cache, no network between the verified blobs and the model."""
    fields = sorted(task.fields | {"id"})

    def data(**_: Any) -> dict[str, datasets.Dataset]:
        named = {task.split: task.items, task.config.get("fewshot_split"): task.shots}
        return {
            split: datasets.Dataset.from_list([{field: row.get(field) for field in fields} for row in rows[name]])
            for split, name in named.items()
            if split is not None and name is not None
        }

    config = {**task.config, "custom_dataset": data}
    try:
        return TaskManager(include_defaults=False).load([config])["tasks"][task.name]
    except (TemplateError, ValueError, KeyError, TypeError, IndexError, AttributeError, SyntaxError) as error:
        raise ScoringError(f"task {task.name}: lm-eval cannot build it: {type(error).__name__}: {error}") from error


def _answer(task: Task, built: Any, sample: Mapping[str, Any]) -> Answer:
    score = sample[task.metric]
    if float(score) not in (0.0, 1.0):
        raise ScoringError(f"task {task.name}, item {sample['doc']['id']}: {task.metric} is {score!r}, not 0 or 1")
    target, given = sample["target"], sample["filtered_resps"]
    if task.output_type == "generate_until":
        answer = given[0] if isinstance(given[0], str) else str(given[0])
    elif task.output_type == "multiple_choice":
        choices = built.doc_to_choice(sample["doc"])
        answer = choices[_chosen(task.metric, [likelihood for likelihood, _ in given], choices)]
        target = choices[target] if isinstance(target, int) else target
    else:
        answer = str(target) if given[0][1] else ""
    return Answer(
        item=str(sample["doc"]["id"]),
        prompt_sha256=sha256(sample["arguments"][0][0].encode("utf-8")),
        target=str(target),
        answer=answer,
        score=int(score),
    )


def _chosen(metric: str, likelihoods: list[float], choices: list[str]) -> int:
    """Index of the choice that `metric` compares with the target."""
    lengths = {"acc_norm": [len(choice) for choice in choices], "acc_bytes": [len(choice.encode("utf-8")) for choice in choices]}
    return int(np.argmax(np.array(likelihoods) / np.array(lengths.get(metric, [1] * len(choices)), dtype=float)))
