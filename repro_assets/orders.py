"""What is asked of the GPU nodes: the job specifications of training and scoring, as the programs read them.

The programs are `training/` and `evaluation/program.py`, which nothing here imports; running a job is `resources/gpu`.
"""

from typing import Any

import msgspec

from repro_assets.documents import BaseModel, EvalSuites, Shards, ShardsObserved
from repro_assets.recipe import EvaluationSection, TrainingSection
from repro_assets.trust.blob import Blob


def compute_dtype(section: TrainingSection, hardware: str) -> str:
    """The dtype of a training on this hardware class. bfloat16 on a CPU without AVX512-BF16 or AMX is 24 times slower than float32."""
    if section.compute_dtype != "auto":
        return section.compute_dtype
    slow = hardware.startswith("cpu") and not ("avx512" in hardware and ("bf16" in hardware or "amx" in hardware))
    return "float32" if slow else "bfloat16"


def training(
    *,
    envelope: Blob,
    section: TrainingSection,
    compute_dtype: str,
    shards: Shards,
    stored: ShardsObserved,
    base_model: BaseModel,
    special: dict[str, int],
    resume: str | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """The specification of one training. The program checks every part of it against the signed bundle in `envelope`.

    Whom to trust is not in it: that reaches the node by its environment, never through the store that it guards.
    """
    leaves = [
        {
            "sha256": leaf.sha256,
            "stored": msgspec.to_builtins(stored.stored[leaf.sha256]),
            "split": leaf.split,
            "records": leaf.records,
            "tokens": leaf.tokens,
        }
        for leaf in shards.leaves
    ]
    return {
        "purpose": "train",
        "bundle": envelope.sha256,
        "section": section.identity(),
        "compute_dtype": compute_dtype,
        "leaves": leaves,
        "base_model": msgspec.to_builtins(base_model.model_files),
        "special": special,
        "resume": resume,
        "stop_after": stop_after,
    }


def scoring(
    *,
    base_model: BaseModel,
    suites: EvalSuites,
    section: EvaluationSection,
    training_section: TrainingSection,
    candidate: dict[str, Blob],
    baseline: dict[str, Blob] | None,
    compute_dtype: str,
) -> dict[str, Any]:
    """The specification of one scoring: candidate and baseline in one process, on the base as it was quantised for training."""
    sources = {source.name: source for source in section.suites}
    return {
        "purpose": "score",
        "base_model": msgspec.to_builtins(base_model.model_files),
        "quantization": training_section.quantization,
        "double_quant": training_section.double_quant,
        "suites": [
            {
                "name": suite.name,
                "files": msgspec.to_builtins(suite.suite_files),
                "tasks": list(suite.tasks),
                "labels": list(sources[suite.name].labels),
                "cluster": sources[suite.name].cluster,
            }
            for suite in suites.suites
        ],
        "models": {"candidate": msgspec.to_builtins(candidate), "baseline": msgspec.to_builtins(baseline)},
        "batch_size": section.batch_size,
        "seed": section.seed,
        "compute_dtype": compute_dtype,
    }
