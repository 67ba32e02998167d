"""The sensor on raw commits: what it requests, how its cursor moves, and that a missing server is no error."""

import socket
from collections.abc import Iterator

import dagster as dg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lakefs_sdk.models.merge import Merge

from repro_assets.partitions import snapshots
from repro_assets.sensors import raw_commits, unseen
from repro_assets_tests.graph import jsonl, tickets
from repro_assets_tests.test_shelf import gateway, shelf_of
from repro_assets_tests.world import Prepared, prepared
from resources.settings import Connections


@pytest.fixture(scope="module")
def made(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with prepared(servers, tmp_path_factory.mktemp("sensor")) as found:
        yield found


def tick(made: Prepared, cursor: str | None) -> dg.SensorResult | dg.SkipReason:
    with dg.build_sensor_context(instance=made.graph.instance, cursor=cursor, resources={"bench": made.graph.bench()}) as context:
        found = raw_commits(context)
    assert isinstance(found, dg.SensorResult | dg.SkipReason)
    return found


@given(st.integers(0, 60), st.integers(1, 7))
def test_pages_together_give_every_commit_once_oldest_first(count: int, page: int) -> None:
    newest_first = [(f"key{index}", f"commit{index}") for index in reversed(range(count))]
    cursor, seen = None, []
    for _ in range(count // page + 1):
        found = unseen(newest_first, cursor, page)
        assert len(found) <= page
        seen += found
        cursor = found[-1][1] if found else cursor
    assert seen == newest_first[::-1]


def test_a_cursor_that_is_gone_starts_again_from_the_oldest() -> None:
    assert unseen([("b", "2"), ("a", "1")], "0" * 64, 1) == [("a", "1")]


def test_each_raw_commit_asks_for_one_run_under_its_own_key(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = made.graph
    keys = [made.key, graph.import_({"b.jsonl": jsonl(tickets(2, 100))}), graph.import_({"c.jsonl": jsonl(tickets(2, 200))})]
    commits = [commit for _key, commit in shelf_of(graph).raw_commits()][::-1]
    monkeypatch.setattr("repro_assets.sensors.unseen", lambda found, cursor: unseen(found, cursor, 2))
    first = tick(made, None)
    assert isinstance(first, dg.SensorResult)
    assert [(run.run_key, run.partition_key) for run in first.run_requests or []] == list(zip(commits, keys, strict=True))[:2]
    assert first.cursor == commits[1]
    (added,) = first.dynamic_partitions_requests or []
    assert (added.partitions_def_name, list(added.partition_keys)) == (snapshots.name, keys[:2])
    second = tick(made, first.cursor)
    assert isinstance(second, dg.SensorResult)
    assert [run.partition_key for run in second.run_requests or []] == keys[2:]
    third = tick(made, second.cursor)
    assert isinstance(third, dg.SkipReason)
    assert third.skip_message == "no new commit on raw"
    # what the sensor asked for stays readable whatever becomes of the branch
    assert {f"pin-{key}" for key in keys} <= {name for name, _commit in shelf_of(graph).lake.branches("pin-", hidden=True)}


def test_a_merge_into_raw_is_one_snapshot_and_its_side_commits_are_none(made: Prepared) -> None:
    graph = made.graph
    lake, client = graph.bench().lake.client, gateway(graph.connections)
    cursor = lake.head("raw")
    lake.ensure_branch("side", cursor)
    for name in ("one", "two"):
        client.put_object(Bucket=lake.repository, Key=f"side/tickets/{name}.jsonl", Body=jsonl(tickets(2)))
        lake.commit_staged("side", name, {})
    lake.client.call("merge", lake.client.refs.merge_into_branch, lake.repository, "side", "raw", Merge(message="a merge"))
    found = tick(made, cursor)
    assert isinstance(found, dg.SensorResult)
    assert [run.run_key for run in found.run_requests or []] == [lake.head("raw")]
    assert len(lake.commit_info("raw").parents) == 2


def test_servers_that_are_away_skip_the_tick_and_leave_the_cursor(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("LAKECTL_SERVER_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        away = tick(made, "somewhere")
    assert isinstance(away, dg.SkipReason)
    assert "is away, looking again at the next tick" in str(away.skip_message)
    for name in ("LAKECTL_SERVER_ENDPOINT_URL", "LAKECTL_CREDENTIALS_ACCESS_KEY_ID", "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    stopped = tick(made, "somewhere")  # the embedded servers of this home were never started
    assert isinstance(stopped, dg.SkipReason)
    assert "repro up" in str(stopped.skip_message)
