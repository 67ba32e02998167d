"""The gates' decision on one checkpoint, and acting on it. The policy is `repro_assets/evaluation/policy.py`, acting `repro_assets/promoting.py`."""

import dagster as dg

from repro_assets import promoting
from repro_assets.assets.eval_results import eval_results
from repro_assets.documents import EvalResults, EvalSuites, Promotion, QloraCheckpoint, TrainingBundle
from repro_assets.partitions import snapshots
from repro_assets.stage import Stages, reproduces
from repro_assets.trust.closure import closure

CODE = closure("repro_assets.evaluation.policy", libraries=("numpy", "scipy"))


@dg.asset(
    deps=[eval_results],
    partitions_def=snapshots,
    code_version=CODE.digest,
    check_specs=reproduces("promotion"),
    kinds={"intoto", "lakefs"},
)
def promotion(context: dg.AssetExecutionContext, stages: Stages) -> dg.MaterializeResult:
    """Three-valued verdicts of the gates. Promote writes `releases/<n>/` to main; hold writes a failure bundle and a notice."""
    stage = stages.begin(context, Promotion, needs=(TrainingBundle, QloraCheckpoint, EvalResults), shared=(EvalSuites,), code=CODE)
    result, samples = promoting.decide(stage)
    return stage.commit((result, promoting.act(stage, result, samples)), renew=True)
