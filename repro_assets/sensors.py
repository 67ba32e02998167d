"""Sensors. All ship stopped. The walk over raw commits is a pure function, tested without a daemon."""

from collections.abc import Iterable
from itertools import islice

import dagster as dg

from repro_assets.bench import Bench
from repro_assets.jobs import data
from repro_assets.partitions import snapshots
from repro_assets.shelf import Shelf
from resources.errors import StorageError
from resources.lake import Lake, Patience
from resources.servers import ServerError
from resources.settings import SettingsError

PAGE = 20  # new snapshots a tick; the rest follow on the next ones
PATIENCE = Patience(read=10.0, total=20.0)  # Dagster gives a tick one minute


def unseen(newest_first: Iterable[tuple[str, str]], cursor: str | None, page: int = PAGE) -> list[tuple[str, str]]:
    """(key, commit) of the oldest `page` raw commits that came after the commit `cursor`, oldest first.

    A cursor that is no longer there (somebody reset raw) is as good as none: run keys keep a commit from being run twice.
    """
    fresh: list[tuple[str, str]] = []
    for key, commit in newest_first:
        if commit == cursor:
            break
        fresh.append((key, commit))
    return list(islice(reversed(fresh), page))


@dg.sensor(
    job=data,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="A snapshot and its data stages for every new commit on the branch raw.",
)
def raw_commits(context: dg.SensorEvaluationContext, bench: Bench) -> dg.SensorResult | dg.SkipReason:
    """First-parent walk from the raw head back to the cursor; one run key a commit, so that a commit is never run twice."""
    try:
        lake = Lake.connect(bench.lake.connections, patience=PATIENCE)
        lake.ensure()
        found = unseen(Shelf(lake, bench.blobs.store).raw_commits(), context.cursor)
        for key, commit in found:
            lake.pin(key, commit)
    except (StorageError, ServerError, SettingsError, OSError) as error:
        return dg.SkipReason(f"lakeFS or S3 is away, looking again at the next tick: {error}")
    if not found:
        return dg.SkipReason("no new commit on raw")
    return dg.SensorResult(
        run_requests=[dg.RunRequest(run_key=commit, partition_key=key) for key, commit in found],
        dynamic_partitions_requests=[snapshots.build_add_request([key for key, _commit in found])],
        cursor=found[-1][1],
    )


sensors = (raw_commits,)
