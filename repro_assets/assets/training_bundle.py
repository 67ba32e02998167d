"""The signed statement that a training needs. What it says is `repro_assets/trust/bundle.py`; signing is `repro_assets/bundling.py`."""

import dagster as dg

from repro_assets import bundling
from repro_assets.assets.validation_report import validation_report
from repro_assets.documents import BaseModel, EvalSuites, RawSnapshot, Records, Shards, TrainingBundle, ValidationReport
from repro_assets.partitions import snapshots
from repro_assets.stage import Stages, reproduces
from repro_assets.trust.closure import closure

CODE = closure("repro_assets.trust.bundle", libraries=("securesystemslib",))


@dg.asset(
    deps=[validation_report],
    partitions_def=snapshots,
    code_version=CODE.digest,
    check_specs=reproduces("training_bundle"),
    kinds={"intoto", "lakefs"},
)
def training_bundle(context: dg.AssetExecutionContext, stages: Stages) -> dg.MaterializeResult:
    """Snapshot, shards, recipe, seed, code and environment under one signature. Refused when the report at its pinned commit failed."""
    stage = stages.begin(
        context, TrainingBundle, needs=(RawSnapshot, Records, Shards, ValidationReport), shared=(BaseModel, EvalSuites), code=CODE
    )
    environment = bundling.environment(stage)
    recalled = stage.recall()
    if recalled and bundling.stands(stage, recalled):
        return stage.commit(recalled)
    return stage.commit(bundling.build(stage, environment), renew=True)
