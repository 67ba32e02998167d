"""Candidate and baseline on the suites. Scoring is `repro_assets/evaluation/program.py`; asking for it is `repro_assets/nodes.py`."""

import dagster as dg

from repro_assets import nodes, promoting
from repro_assets.assets.eval_suites import eval_suites
from repro_assets.assets.qlora_checkpoint import qlora_checkpoint
from repro_assets.documents import BaseModel, EvalResults, EvalSuites, QloraCheckpoint, TrainingBundle
from repro_assets.partitions import snapshots
from repro_assets.stage import Stages, reproduces
from repro_assets.trust.closure import closure

CODE = closure("repro_assets.evaluation.program", libraries=("torch", "transformers", "peft", "bitsandbytes", "lm-eval", "tokenizers"))


@dg.asset(
    deps=[qlora_checkpoint, eval_suites],
    partitions_def=snapshots,
    code_version=CODE.digest,
    check_specs=reproduces("eval_results"),
    kinds={"lmeval", "lakefs"},
)
def eval_results(context: dg.AssetExecutionContext, stages: Stages) -> dg.MaterializeResult:
    """Every item's answer by the candidate and by the baseline, re-scored in the same process, by slice."""
    stage = stages.begin(
        context,
        EvalResults,
        needs=(TrainingBundle, QloraCheckpoint),
        shared=(BaseModel, EvalSuites),
        code=CODE,
        key_on=(BaseModel, EvalSuites),
        on_hardware=True,
    )
    baseline = stage.reference("baseline", lambda: promoting.released(stage, "qlora_checkpoint"))
    stage.depends("adapter", stage.input(QloraCheckpoint).tensors)
    return stage.commit(stage.recall() or nodes.score(stage, baseline))
