"""Cleaned, deduplicated, split records with their quarantine. The work is in `repro_assets/data/records.py`."""

import dagster as dg

from repro_assets.assets.eval_suites import eval_suites
from repro_assets.assets.raw_snapshot import raw_snapshot
from repro_assets.data import records as build
from repro_assets.data import workers
from repro_assets.documents import EvalSuites, RawSnapshot, Records
from repro_assets.partitions import snapshots
from repro_assets.stage import Stages, reproduces
from repro_assets.trust.closure import closure

CODE = closure("repro_assets.data.records", libraries=("msgspec", "pyarrow", "numpy", "detect-secrets"))


@dg.asset(
    deps=[raw_snapshot, eval_suites],
    partitions_def=snapshots,
    code_version=CODE.digest,
    check_specs=reproduces("records"),
    kinds={"json", "lakefs"},
)
def records(context: dg.AssetExecutionContext, stages: Stages) -> dg.MaterializeResult:
    """Rows as records: strict reading, cleaning, quarantine, duplicates, contamination, sampling, keyed split, content-defined leaves."""
    stage = stages.begin(context, Records, needs=(RawSnapshot,), shared=(EvalSuites,), code=CODE)
    if recalled := stage.recall():
        return stage.commit(recalled)
    snapshot = stage.input(RawSnapshot)
    built = build.build(
        snapshot,
        stage.open_raw,
        stage.blobs.get_bytes(stage.input(EvalSuites).prompts.sha256),
        stage.recipe.records,
        stage.blobs,
        stage.progress,
        previous=stage.relative(),
        workers=workers.chosen(snapshot.size),
    )
    return stage.commit(built)
