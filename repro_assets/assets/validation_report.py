"""The verdict on the shards: rules, drift, sample reproduction. The work is in `repro_assets/data/validation.py`."""

import dagster as dg

from repro_assets import promoting
from repro_assets.assets.records import records
from repro_assets.assets.shards import shards
from repro_assets.data import validation
from repro_assets.documents import BaseModel, EvalSuites, RawSnapshot, Records, Shards, ValidationReport
from repro_assets.partitions import snapshots
from repro_assets.stage import Stages, reproduces
from repro_assets.trust.closure import closure

CODE = closure("repro_assets.data.validation", libraries=("tokenizers", "jinja2", "pandera", "polars", "pyarrow", "numpy", "scipy"))


@dg.asset(
    deps=[records, shards],
    partitions_def=snapshots,
    code_version=CODE.digest,
    check_specs=reproduces("validation_report"),
    kinds={"pandera", "lakefs"},
)
def validation_report(context: dg.AssetExecutionContext, stages: Stages) -> dg.MaterializeResult:
    """Every rule with its verdict; drift against the last promoted snapshot; drawn records rebuilt from raw and compared."""
    stage = stages.begin(context, ValidationReport, needs=(RawSnapshot, Records, Shards), shared=(BaseModel, EvalSuites), code=CODE)
    reference = stage.reference("drift_reference", lambda: promoting.released(stage, "shards"))
    if recalled := stage.recall():
        return stage.commit(recalled)
    built = validation.build(
        snapshot=stage.input(RawSnapshot),
        open_raw=stage.open_raw,
        records=stage.input(Records),
        shards=stage.input(Shards),
        shards_observed=stage.observed(Shards),
        base_model=stage.input(BaseModel),
        recipe=stage.recipe,
        store=stage.blobs,
        reference=stage.shelf.by_digest(reference, Shards)[1] if reference else None,
        progress=stage.progress,
    )
    return stage.commit(built)
