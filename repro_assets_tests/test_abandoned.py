"""Runs that a killed process left as started are marked failed; those of living processes and other hosts are not."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import DagsterEvent, DagsterEventType

from repro_assets.abandoned import GRPC, mark, settle
from repro_assets.stage import TERMINAL
from repro_assets_tests.world import Prepared, prepared, repro
from resources.settings import Connections

ROOT = Path(__file__).parents[1]
HANGING = """
import time
from repro_assets import raw
raw.Reader.files = lambda *_: (print("in the middle", flush=True), time.sleep(60))
from repro_assets.cli import main
main(["materialize", "-s", "newest", "--select", "raw_snapshot"])
"""


@pytest.fixture
def made(servers: Connections, tmp_path: Path) -> Iterator[Prepared]:
    with prepared(servers, tmp_path) as found:
        yield found


@dg.job
def _empty() -> None:
    pass


def started(instance: dg.DagsterInstance, tags: dict[str, str]) -> str:
    """The id of a run that Dagster believes to be under way."""
    run = instance.create_run_for_job(_empty, tags=tags)
    instance.report_dagster_event(DagsterEvent(event_type_value=DagsterEventType.RUN_START.value, job_name=run.job_name), run_id=run.run_id)
    return run.run_id


def test_only_runs_whose_process_is_certainly_gone_are_marked(tmp_path: Path) -> None:
    host, pid, began = mark().split(" ", 2)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance, socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        port = server.getsockname()[1]
        living = [
            started(instance, {TERMINAL: mark()}),
            started(instance, {TERMINAL: f"another-host {pid} some other start"}),
            started(instance, {TERMINAL: "true"}),  # written by an older version
            started(instance, {GRPC: json.dumps({"host": "localhost", "port": port})}),
            started(instance, {GRPC: json.dumps({"host": "code-server.example", "port": 1})}),
            started(instance, {}),
        ]
        gone = [
            started(instance, {TERMINAL: f"{host} {pid} a boot before"}),
            started(instance, {TERMINAL: f"{host} 4194304 {began}"}),
            started(instance, {GRPC: json.dumps({"host": "localhost", "port": 9})}),
            started(instance, {GRPC: json.dumps({"host": "localhost", "socket": str(tmp_path / "no-socket")})}),
        ]
        assert set(settle(instance)) == set(gone)
        for run_id in living:
            assert instance.get_run_by_id(run_id).status is dg.DagsterRunStatus.STARTED  # type: ignore[union-attr]
        for run_id in gone:
            assert instance.get_run_by_id(run_id).status is dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]
        assert settle(instance) == []


def test_a_killed_terminal_run_is_found_and_an_interrupted_one_needs_no_finding(made: Prepared) -> None:
    assert repro("materialize").code == 0
    statuses = {}
    for how in (signal.SIGINT, signal.SIGKILL):  # the next command would settle a killed one
        process = subprocess.Popen([sys.executable, "-c", HANGING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while "in the middle" not in process.stdout.readline():
            assert process.poll() is None, process.communicate()
        process.send_signal(how)
        _out, err = process.communicate(timeout=60)
        statuses[how] = (process.returncode, made.graph.instance.get_runs(limit=1)[0].status)
        assert "Traceback" not in err
        assert ("interrupted; the same command continues" in err) is (how is signal.SIGINT)
    assert statuses == {signal.SIGKILL: (-9, dg.DagsterRunStatus.STARTED), signal.SIGINT: (1, dg.DagsterRunStatus.FAILURE)}
    (ended,) = settle(made.graph.instance)
    assert made.graph.instance.get_run_by_id(ended).status is dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]
    assert repro("materialize", "-s", "newest", "--select", "raw_snapshot").code == 0
