"""Jobs: selections of the graph that people, schedules and sensors launch. One run a partition, in-process: the graph is a chain."""

import dagster as dg

from repro_assets import assets

whole = dg.define_asset_job(
    "snapshot_to_promotion",
    selection=dg.AssetSelection.assets(*assets.partitioned),
    description="Everything on one snapshot: raw data to decision.",
)
data = dg.define_asset_job(
    "data",
    selection=dg.AssetSelection.assets(assets.raw_snapshot, assets.records, assets.shards, assets.validation_report),
    description="The data stages of one snapshot: raw data to validation report.",
)
shared = dg.define_asset_job(
    "shared_assets",
    selection=dg.AssetSelection.assets(*assets.shared),
    description="The base model and the evaluation suites of the recipe.",
)

jobs = (whole, data, shared)
