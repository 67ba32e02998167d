"""Raw data at one commit, as a hash manifest. Nothing is copied: raw objects stay where they are, pinned by a branch."""

import time

import dagster as dg

from repro_assets import raw
from repro_assets.data import manifest
from repro_assets.documents import RawObserved, RawSnapshot
from repro_assets.partitions import snapshots
from repro_assets.stage import Stages, reproduces
from repro_assets.trust.closure import closure

CODE = closure("repro_assets.data.manifest")


@dg.asset(partitions_def=snapshots, code_version=CODE.digest, check_specs=reproduces("raw_snapshot"), kinds={"lakefs"})
def raw_snapshot(context: dg.AssetExecutionContext, stages: Stages) -> dg.MaterializeResult:
    """Path, SHA-256 and size of every raw file of the recipe at the snapshot's commit."""
    stage = stages.begin(context, RawSnapshot, code=CODE)
    stage.depends("raw_commit", stage.snapshot.commit)
    stage.shelf.refuse_uncommitted()
    if recalled := stage.recall():
        return stage.commit(recalled)
    started = time.monotonic()
    reader = raw.Reader(stage.bench.lake.client, stage.memo, again=stage.unmemoed, progress=stage.log.info)
    files = reader.files(stage.snapshot.commit, stage.recipe.raw)
    result = manifest.build(files, stage.blobs, stage.recipe.raw)
    first_seen, window = reader.history(stage.snapshot.commit, [file.path for file in files])
    seconds = round(time.monotonic() - started, 3)
    return stage.commit((result, RawObserved(commit=stage.snapshot.commit, first_seen=first_seen, window=window, seconds=seconds)))
