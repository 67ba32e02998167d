"""The schedule that retrains on the newest snapshot."""

from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from repro_assets.definitions import defs
from repro_assets.partitions import snapshots
from repro_assets.schedules import retrain_newest

MONDAY, NEXT = datetime(2026, 1, 5, 3, tzinfo=UTC), datetime(2026, 1, 12, 3, tzinfo=UTC)


def due(instance: dg.DagsterInstance, at: datetime) -> dg.RunRequest | dg.SkipReason:
    found = retrain_newest.evaluate_tick(
        dg.build_schedule_context(instance, scheduled_execution_time=at, repository_def=defs.get_repository_def())
    )
    return found.run_requests[0] if found.run_requests else dg.SkipReason(found.skip_message)


def test_without_a_snapshot_it_says_how_to_make_one(tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        found = due(instance, MONDAY)
        assert isinstance(found, dg.SkipReason)
        assert "repro import PATH" in str(found.skip_message)


def test_it_runs_the_newest_snapshot_once_a_time(tmp_path: Path) -> None:
    keys = ["20260101-000000-bbbbbbbbbbbb", "20260103-000000-aaaaaaaaaaaa", "20260102-000000-cccccccccccc"]
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        instance.add_dynamic_partitions(str(snapshots.name), keys)
        first, same, later = due(instance, MONDAY), due(instance, MONDAY), due(instance, NEXT)
    assert isinstance(first, dg.RunRequest)
    assert first.partition_key == keys[1]
    assert first.run_key == same.run_key  # type: ignore[union-attr]
    assert first.run_key != later.run_key  # type: ignore[union-attr]


def test_it_ships_stopped_and_starts_the_whole_graph() -> None:
    assert retrain_newest.default_status is dg.DefaultScheduleStatus.STOPPED
    assert retrain_newest.job_name == "snapshot_to_promotion"
