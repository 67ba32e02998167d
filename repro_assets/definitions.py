"""Assembly only: `build_defs` puts assets, checks, jobs, automation and resources together. What Dagster loads is `defs`."""

import warnings
from collections.abc import Mapping
from typing import Any

import dagster as dg

# Checks that know partitions are a preview of Dagster 1.13; without them a check's history mixes all snapshots.
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

from repro_assets import assets
from repro_assets.bench import (
    Bench,
    BlobsResource,
    ExecutorResource,
    JobsResource,
    KeysResource,
    LakeResource,
    NotifierResource,
    RecipeResource,
)
from repro_assets.checks import checks
from repro_assets.jobs import jobs
from repro_assets.schedules import schedules
from repro_assets.sensors import sensors
from repro_assets.stage import Stages


def build_defs(
    *, resource_overrides: Mapping[str, Any] | None = None, loggers: Mapping[str, dg.LoggerDefinition] | None = None
) -> dg.Definitions:
    """The whole graph. `resource_overrides`: resources by name that replace the default ones; `loggers`: further ones that a run may name."""
    # Top level, so that a recipe or a number of ranks can be given in the launchpad.
    recipe = RecipeResource.configure_at_launch()
    gpu = ExecutorResource.configure_at_launch()
    bench = Bench(
        lake=LakeResource(),
        blobs=BlobsResource(),
        jobs=JobsResource(),
        gpu=gpu,
        trust=KeysResource(),
        notices=NotifierResource(),
        recipe=recipe,
    )
    resources: dict[str, Any] = {"recipe": recipe, "gpu": gpu, "bench": bench, "stages": Stages(bench=bench)}
    return dg.Definitions(
        assets=assets.graph,
        asset_checks=checks,
        jobs=jobs,
        schedules=schedules,
        sensors=sensors,
        resources={**resources, **(resource_overrides or {})},
        loggers=dict(loggers or {}),
        executor=dg.in_process_executor,
    )


defs = build_defs()
