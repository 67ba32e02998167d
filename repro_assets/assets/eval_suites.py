"""The evaluation suites as a shared asset: lm-eval YAML and JSONL by digest. Reading them is `repro_assets/evaluation/suites.py`."""

import dagster as dg

from repro_assets.documents import EvalSuites
from repro_assets.evaluation import suites
from repro_assets.stage import Stages, reproduces
from repro_assets.trust.closure import closure

CODE = closure("repro_assets.evaluation.suites", libraries=("pyyaml", "lm-eval"))


@dg.asset(code_version=CODE.digest, check_specs=reproduces("eval_suites"), kinds={"yaml", "lakefs"})
def eval_suites(context: dg.AssetExecutionContext, stages: Stages) -> dg.MaterializeResult:
    """What models are scored on, by digest: tasks, golden answers, slices. Not partitioned: snapshots name them by digest."""
    stage = stages.begin(context, EvalSuites, code=CODE)
    return stage.commit(suites.intake(stage.recipe.evaluation.suites, stage.loaded.folder, stage.blobs))
