"""Giving an empty Dagster instance its partitions and materializations back. lakeFS is the truth; Dagster's event log is a view of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import dagster as dg

from repro_assets import story
from repro_assets.bench import Bench
from repro_assets.documents import KINDS
from repro_assets.partitions import snapshots
from repro_assets.shelf import SHARED_ASSETS, Shelf, folder
from resources.lake import SHARED, Lake

BATCH = 200  # SQLite fails on tens of thousands of keys in one call
VERSION = "dagster/data_version"


@dataclass(frozen=True)
class Rebuilt:
    """Partition keys added, and materializations reported anew."""

    keys: int
    materializations: int


@dataclass(frozen=True)
class _Place:
    """Where documents of one recipe lie: a snapshot's branch, or the shared one when `key` is empty."""

    key: str
    recipe: str
    branch: str
    commit: str

    @property
    def assets(self) -> list[str]:
        return [asset for asset in KINDS if (asset in SHARED_ASSETS) != bool(self.key)]


def rebuild(instance: dg.DagsterInstance, bench: Bench, progress: Callable[[int, int], None] | None = None) -> Rebuilt:
    """Report every document in lakeFS that the instance does not know as newest. Running it twice adds nothing.

    An asset page has room for one recipe's state: of several, the bench's own is reported last and so is the newest.
    """
    lake = bench.lake.client
    lake.ensure()
    shelf = Shelf(lake, bench.blobs.store)
    keys = [key for key, _commit in shelf.raw_commits()]
    keys.reverse()
    known = set(instance.get_dynamic_partitions(str(snapshots.name)))
    missing = [key for key in keys if key not in known]
    for start in range(0, len(missing), BATCH):
        instance.add_dynamic_partitions(str(snapshots.name), missing[start : start + BATCH])
    own = bench.recipe.load().recipe.name
    places = _places(shelf, lake, keys, own)
    reported = 0
    for done, place in enumerate(places):
        if progress:
            progress(done, len(places))
        for asset in place.assets:
            reported += _report(instance, bench, shelf, place, asset, own)
    return Rebuilt(len(missing), reported)


def _places(shelf: Shelf, lake: Lake, keys: list[str], own: str) -> list[_Place]:
    """Oldest snapshot first, the bench's own recipe after the others."""
    shared = lake.head(SHARED)
    heads = dict(lake.branches("snapshot-"))

    def ordered(names: set[str]) -> list[str]:
        return sorted(names, key=lambda name: (name == own, name))

    found = [_Place("", recipe, SHARED, shared) for recipe in ordered({entry.path.split("/")[1] for entry in lake.list(shared, "shared/")})]
    for key in keys:
        if head := heads.get(branch := f"snapshot-{key}"):
            found += [_Place(key, recipe, branch, head) for recipe in ordered(set(shelf.recipes(head, key)))]
    return found


def _report(instance: dg.DagsterInstance, bench: Bench, shelf: Shelf, place: _Place, asset: str, own: str) -> int:
    document = shelf.read(place.commit, place.key, place.recipe, asset)
    if document is None:
        return 0
    if document.digest in _known(instance, place, asset):
        return 0
    if place.recipe != own and document.digest == shelf.digest_at(place.commit, place.key, own, asset):
        return 0  # the same content: told once, from the bench's own recipe
    at = folder(place.key, place.recipe, asset)
    instance.report_runless_asset_event(
        dg.AssetMaterialization(
            asset_key=asset,
            partition=place.key or None,
            description=f"restored from lakeFS by `repro rebuild`; made {document.made.at} by run {document.made.run}",
            metadata={
                **story.page(asset, document, place.commit, place.branch, partial(bench.lake.link, place.commit, at)),
                "executed": "restored from lakeFS",
            },
            tags={VERSION: document.digest, "dagster/data_version_is_user_provided": "true"},
        )
    )
    return 1


def _known(instance: dg.DagsterInstance, place: _Place, asset: str) -> set[str]:
    """Data versions of this asset (and snapshot) that the instance has."""
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[place.key] if place.key else None)
    versions: set[str] = set()
    cursor = None
    while True:
        page = instance.fetch_materializations(wanted, limit=100, cursor=cursor)
        events = [record.asset_materialization for record in page.records]
        versions |= {str((event.tags or {}).get(VERSION)) for event in events if event}
        if not page.has_more:
            return versions
        cursor = page.cursor
