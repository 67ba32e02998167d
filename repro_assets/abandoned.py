"""Runs whose process is gone: killed terminals and code servers leave them as started for ever, and Dagster's default launcher never looks.

Only this machine's processes are judged. What such a run left half done is nobody's trouble: every write is one transaction.
"""

import os
import socket
from collections.abc import Mapping

import dagster as dg
import msgspec

from repro_assets.stage import TERMINAL
from resources.servers.state import start_time

GRPC = ".dagster/grpc_info"  # the code server that Dagster's default launcher started the run in
CONNECT_SECONDS = 2.0
OPEN = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def mark() -> str:
    """Which process this is: host, pid and start, so that a recycled pid on the same host never matches."""
    return f"{socket.gethostname()} {os.getpid()} {start_time(os.getpid())}"


def settle(instance: dg.DagsterInstance) -> list[str]:
    """Mark the abandoned runs of `instance` as failed; their ids. Runs of other hosts, and of other launchers, are left alone."""
    ended = []
    for run in instance.get_runs(dg.RunsFilter(statuses=OPEN)):
        if why := _gone(run.tags):
            instance.report_run_failed(run, f"{why}; nothing half done is left: launch it again, finished work is recalled from the memo")
            ended.append(run.run_id)
    return ended


def _gone(tags: Mapping[str, str]) -> str:
    """Why the run's process is certainly gone; empty when it lives or nobody here can tell."""
    if place := tags.get(TERMINAL):
        host, _, rest = place.partition(" ")
        pid, _, started = rest.partition(" ")
        gone = host == socket.gethostname() and pid.isdecimal() and start_time(int(pid)) != started
        return f"process {pid}, which executed this run in a terminal, is gone" if gone else ""
    if (found := tags.get(GRPC)) and not _listens(msgspec.json.decode(found, type=dict)):
        return "the code server that executed this run is gone"
    return ""


def _listens(where: dict[str, object]) -> bool:
    """Whether the code server still takes connections; one on another host counts as living."""
    if where.get("host") not in ("localhost", "127.0.0.1"):
        return True
    family, address = (socket.AF_UNIX, where["socket"]) if where.get("socket") else (socket.AF_INET, ("127.0.0.1", where.get("port")))
    with socket.socket(family) as probe:
        probe.settimeout(CONNECT_SECONDS)
        try:
            probe.connect(address)  # type: ignore[arg-type]
        except TimeoutError:
            return True
        except OSError:
            return False
    return True
