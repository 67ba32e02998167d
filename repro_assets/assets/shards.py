"""Tokenised records as content-addressed leaves. The work is in `repro_assets/data/sharding.py`."""

import dagster as dg

from repro_assets.assets.base_model import base_model
from repro_assets.assets.records import records
from repro_assets.data import sharding, workers
from repro_assets.documents import BaseModel, Records, Shards
from repro_assets.partitions import snapshots
from repro_assets.stage import Stages, reproduces
from repro_assets.trust.closure import closure

CODE = closure("repro_assets.data.sharding", libraries=("tokenizers", "fastokens", "jinja2", "pyarrow", "numpy", "msgspec"))


@dg.asset(
    deps=[records, base_model],
    partitions_def=snapshots,
    code_version=CODE.digest,
    check_specs=reproduces("shards"),
    kinds={"arrow", "lakefs"},
)
def shards(context: dg.AssetExecutionContext, stages: Stages) -> dg.MaterializeResult:
    """Token leaves with loss spans. Leaves that an earlier snapshot already tokenised are reused."""
    stage = stages.begin(context, Shards, needs=(Records,), shared=(BaseModel,), code=CODE)
    if recalled := stage.recall():
        return stage.commit(recalled)
    cleaned = stage.input(Records)
    built = sharding.build(
        cleaned,
        stage.input(BaseModel),
        stage.recipe.sharding,
        stage.blobs,
        previous=stage.relative(),
        progress=stage.progress,
        workers=workers.chosen(sum(leaf.blob.size for leaf in cleaned.leaves), sharding.WORTHWHILE[stage.recipe.sharding.engine]),
    )
    return stage.commit(built)
