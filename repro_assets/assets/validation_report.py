"""The verdict on the shards: rules, drift, sample reproduction. The work is in `repro_assets/data/validation.py`."""

import dagster as dg

from repro_assets import expectations, promoting
from repro_assets.assets.records import records
from repro_assets.assets.shards import shards
from repro_assets.data import validation
from repro_assets.documents import BaseModel, DocumentError, EvalSuites, RawSnapshot, Records, Shards, ValidationReport
from repro_assets.partitions import snapshots
from repro_assets.stage import Stage, Stages, reproduces
from repro_assets.trust.closure import closure

LIBRARIES = ("tokenizers", "jinja2", "pandera", "polars", "pyarrow", "numpy", "scipy", "scikit-learn", "py3langid", "msgspec")
CODE = closure("repro_assets.data.validation", libraries=LIBRARIES)


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
    reference = stage.reference("drift_reference", lambda: promoting.released(stage, "validation_report"))
    suite = expectations.suite_of(stage.loaded)
    if suite is not None:
        stage.depends("expectations", expectations.identity(suite))
    if recalled := stage.recall():
        return stage.commit(recalled)
    before, why = compared_with(stage, reference)
    built = validation.build(
        snapshot=stage.input(RawSnapshot),
        open_raw=stage.open_raw,
        records=stage.input(Records),
        shards=stage.input(Shards),
        shards_observed=stage.observed(Shards),
        base_model=stage.input(BaseModel),
        recipe=stage.recipe,
        store=stage.blobs,
        reference=before,
        no_reference=why,
        suite=suite,
        progress=stage.progress,
    )
    return stage.commit(built)


def compared_with(stage: Stage[ValidationReport], reference: str | None) -> tuple[ValidationReport | None, str]:
    """The report of the reference, or None and why there is none. A release of an older version may have another form of report."""
    if reference is None:
        return None, validation.NO_REFERENCE
    try:
        return stage.shelf.by_digest(reference, ValidationReport)[1], ""
    except DocumentError as error:
        stage.log.warning(f"validation_report: drift is not judged: the report of the release in force cannot be compared with: {error}")
        return None, "no reference: the report of the release in force has another form; the next release has this one"
