"""The graph, one module a stage: thin shells that wire pure packages to Dagster. `graph` lists them in order."""

from repro_assets.assets.base_model import base_model
from repro_assets.assets.eval_results import eval_results
from repro_assets.assets.eval_suites import eval_suites
from repro_assets.assets.promotion import promotion
from repro_assets.assets.qlora_checkpoint import qlora_checkpoint
from repro_assets.assets.raw_snapshot import raw_snapshot
from repro_assets.assets.records import records
from repro_assets.assets.shards import shards
from repro_assets.assets.training_bundle import training_bundle
from repro_assets.assets.validation_report import validation_report

shared = (base_model, eval_suites)
partitioned = (raw_snapshot, records, shards, validation_report, training_bundle, qlora_checkpoint, eval_results, promotion)
graph = shared + partitioned

__all__ = [*(asset.key.to_user_string() for asset in graph), "graph", "partitioned", "shared"]
