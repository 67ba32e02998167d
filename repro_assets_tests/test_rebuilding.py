"""An empty Dagster instance gets its history back from lakeFS: the same data versions, and nothing twice."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from repro_assets.partitions import snapshots
from repro_assets.rebuilding import Rebuilt, rebuild
from repro_assets_tests.world import DATA, Prepared, prepared
from resources.settings import Connections


@pytest.fixture(scope="module")
def made(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with prepared(servers, tmp_path_factory.mktemp("rebuilt"), DATA) as found:
        other = found.graph.recipe("other", quarantine=0.2)
        assert found.graph.run(None, recipe=other).success
        assert found.graph.run(found.key, ("raw_snapshot", "records"), other).success
        yield found


def newest(instance: dg.DagsterInstance, asset: str, key: str | None) -> dg.AssetMaterialization | None:
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[key] if key else None)
    records = instance.fetch_materializations(wanted, limit=1).records
    return records[0].asset_materialization if records else None


def test_partitions_and_materializations_come_back_with_their_data_versions_and_pages(made: Prepared, tmp_path: Path) -> None:
    """Losing Dagster's database loses views, nothing else."""
    graph, original = made.graph, made.graph.instance
    told: list[tuple[int, int]] = []
    with dg.DagsterInstance.local_temp(str(tmp_path)) as empty:
        done = rebuild(empty, graph.bench(made.recipe), progress=lambda at, total: told.append((at, total)))
        assert done == Rebuilt(keys=1, materializations=2 + len(DATA) + 1)  # what `other` has in common is told once
        assert told == [(index, 4) for index in range(4)]
        assert empty.get_dynamic_partitions(str(snapshots.name)) == [made.key]
        for asset in DATA:
            was, now = graph.document(made.key, asset), newest(empty, asset, made.key)
            assert now is not None
            assert (now.tags or {})["dagster/data_version"] == was.digest
            assert was.made.run in str(now.description)
            there = newest(original, asset, made.key)
            assert there is not None
            assert there.metadata.keys() == now.metadata.keys()
            assert str(now.metadata["browse in lakeFS"].value).startswith(graph.connections.lakefs_endpoint)
        assert rebuild(empty, graph.bench(made.recipe)) == Rebuilt(0, 0)


def test_an_instance_that_knows_everything_is_left_alone(made: Prepared) -> None:
    assert rebuild(made.graph.instance, made.graph.bench(made.recipe)) == Rebuilt(0, 0)


def test_only_what_is_missing_is_reported(made: Prepared, tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as some:
        some.add_dynamic_partitions(str(snapshots.name), [made.key])
        tags = {"dagster/data_version": made.graph.document(made.key, "shards").digest}
        some.report_runless_asset_event(dg.AssetMaterialization(asset_key="shards", partition=made.key, tags=tags))
        assert rebuild(some, made.graph.bench(made.recipe)) == Rebuilt(0, 2 + len(DATA) + 1 - 1)


def test_the_benchs_own_recipe_is_what_the_page_shows(made: Prepared, tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as empty:
        rebuild(empty, made.graph.bench(made.graph.folder / "other.yaml"))
        shown = newest(empty, "eval_suites", None)
        assert shown is not None
        assert "shared/other/" in str(shown.metadata["browse in lakeFS"].value)
        records = newest(empty, "records", made.key)
        assert records is not None
        assert (records.tags or {})["dagster/data_version"] == made.graph.document(made.key, "records", "other").digest


def test_a_repository_with_no_work_in_it_gives_its_keys_back(servers: Connections, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with prepared(servers, tmp_path) as bare, dg.DagsterInstance.local_temp(str(tmp_path / "empty")) as empty:
        assert rebuild(empty, bare.graph.bench(bare.recipe)) == Rebuilt(1, 0)
