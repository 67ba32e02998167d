"""Schedules. All ship stopped: automation is the user's decision."""

import os
from collections.abc import Iterator

import dagster as dg

from repro_assets.jobs import whole
from repro_assets.partitions import snapshots


@dg.schedule(
    job=whole,
    cron_schedule=os.environ.get("REPRO_RETRAIN_CRON", "0 3 * * 1"),
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Retrain on the newest snapshot: Mondays at 03:00 UTC, or as REPRO_RETRAIN_CRON says. Mostly memo hits when nothing changed.",
)
def retrain_newest(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """One run on the newest snapshot; its key begins with its time, so the greatest is the newest."""
    keys = snapshots.get_partition_keys(dynamic_partitions_store=context.instance)
    if not keys:
        yield dg.SkipReason("there is no snapshot yet: import data (`repro import PATH`) or start the sensor raw_commits")
        return
    newest = max(keys)
    yield dg.RunRequest(run_key=f"{newest}@{context.scheduled_execution_time:%Y%m%dT%H%M}", partition_key=newest)


schedules = (retrain_newest,)
