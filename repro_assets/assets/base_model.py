"""The frozen base model as a shared asset: files by digest, from a folder or a hub commit. Reading them is `repro_assets/basemodel.py`."""

import dagster as dg

from repro_assets import basemodel
from repro_assets.documents import BaseModel, SharedObserved
from repro_assets.stage import Stages, reproduces
from repro_assets.trust.closure import closure

CODE = closure("repro_assets.basemodel", libraries=("safetensors", "huggingface-hub"))


@dg.asset(code_version=CODE.digest, check_specs=reproduces("base_model"), kinds={"huggingface", "lakefs"})
def base_model(context: dg.AssetExecutionContext, stages: Stages) -> dg.MaterializeResult:
    """The base model's safetensors, tokenizer and chat template, by digest. Not partitioned: snapshots name it by digest."""
    stage = stages.begin(context, BaseModel, code=CODE)
    section = stage.recipe.base_model
    folder = stage.loaded.folder(section.path) if section.path else None
    result, facts = basemodel.intake(section, folder, stage.blobs, progress=stage.log.info)
    return stage.commit((result, SharedObserved(origin=facts["origin"], seconds=facts["seconds"])))
