"""Giving an empty Dagster instance its partitions and materializations back. lakeFS is the truth; Dagster's event log is a view of it."""

from collections.abc import Iterator
from dataclasses import dataclass

import dagster as dg

from repro_assets import story
from repro_assets.documents import KINDS
from repro_assets.partitions import snapshots
from repro_assets.shelf import SHARED_ASSETS, Shelf, folder
from resources.lake import SHARED, Lake

BATCH = 200  # SQLite fails on tens of thousands of keys in one call


@dataclass(frozen=True)
class Rebuilt:
    """Partition keys added, and materializations reported anew."""

    keys: int
    materializations: int


def rebuild(instance: dg.DagsterInstance, shelf: Shelf) -> Rebuilt:
    """Report every document in lakeFS that the instance does not know as newest. Running it twice adds nothing."""
    lake = shelf.lake
    lake.ensure()
    keys = [key for key, _commit in shelf.raw_commits()]
    known = set(instance.get_dynamic_partitions(str(snapshots.name)))
    missing = [key for key in reversed(keys) if key not in known]
    for start in range(0, len(missing), BATCH):
        instance.add_dynamic_partitions(str(snapshots.name), missing[start : start + BATCH])
    reported = 0
    for key, recipe, commit in _places(shelf, lake, keys):
        for asset in KINDS:
            if (asset in SHARED_ASSETS) == bool(key):
                continue
            reported += _report(instance, shelf, commit, key, recipe, asset)
    return Rebuilt(len(missing), reported)


def _places(shelf: Shelf, lake: Lake, keys: list[str]) -> Iterator[tuple[str, str, str]]:
    """(snapshot key or empty for shared, recipe, commit)."""
    shared = lake.head(SHARED)
    for recipe in sorted({entry.path.split("/")[1] for entry in lake.list(shared, "shared/")}):
        yield "", recipe, shared
    for key in reversed(keys):
        branch = f"snapshot-{key}"
        if lake.exists(branch):
            head = lake.head(branch)
            for recipe in shelf.recipes(head, key):
                yield key, recipe, head


def _report(instance: dg.DagsterInstance, shelf: Shelf, commit: str, key: str, recipe: str, asset: str) -> int:
    document = shelf.read(commit, key, recipe, asset)
    if document is None:
        return 0
    partitions = [key] if key else None
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=partitions), limit=1
    ).records
    event = records[0].asset_materialization if records else None
    if event is not None and (event.tags or {}).get("dagster/data_version") == document.digest:
        return 0
    branch = f"snapshot-{key}" if key else SHARED
    instance.report_runless_asset_event(
        dg.AssetMaterialization(
            asset_key=asset,
            partition=key or None,
            description="restored from lakeFS by `repro rebuild`",
            metadata={**story.of(asset, document), **story.anchors(document, commit, branch, folder(key, recipe, asset))},
            tags={"dagster/data_version": document.digest, "dagster/data_version_is_user_provided": "true"},
        )
    )
    return 1
