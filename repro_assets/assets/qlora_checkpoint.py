"""The trained adapter. The loop is `repro_assets/training/`, run by the GPU executor; asking for it is `repro_assets/nodes.py`."""

import dagster as dg

from repro_assets import nodes
from repro_assets.assets.training_bundle import training_bundle
from repro_assets.documents import BaseModel, QloraCheckpoint, Shards, TrainingBundle
from repro_assets.partitions import snapshots
from repro_assets.stage import Stages, reproduces
from repro_assets.trust.closure import closure

CODE = closure("repro_assets.training.program", libraries=("torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy"))


@dg.asset(
    deps=[training_bundle],
    partitions_def=snapshots,
    code_version=CODE.digest,
    check_specs=reproduces("qlora_checkpoint"),
    kinds={"pytorch", "lakefs"},
)
def qlora_checkpoint(context: dg.AssetExecutionContext, stages: Stages) -> dg.MaterializeResult:
    """NF4 QLoRA from the verified bundle. Every checkpoint is a lakeFS commit; the best one is the result."""
    stage = stages.begin(
        context,
        QloraCheckpoint,
        needs=(Shards, TrainingBundle),
        shared=(BaseModel,),
        code=CODE,
        key_on=(Shards, BaseModel),
        on_hardware=True,
    )
    nodes.verify_bundle(stage)
    return stage.commit(stage.recall() or nodes.train(stage), keep=("checkpoints",))
