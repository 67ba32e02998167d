"""The life of the embedded servers of one home: up, down, status. Each is idempotent and safe to run twice at once.

How one server is configured is in lakefs.py and s3.py; finding its binary is in binaries.py.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from resources.servers import binaries, lakefs, process, s3
from resources.servers.state import (
    NAMES,
    Credentials,
    Layout,
    Process,
    Progress,
    ServerError,
    State,
    addresses,
    can_listen,
    choose_port,
    is_running,
    locked,
    make_credentials,
    quiet,
    read_state,
    strays,
    write_state,
)
from resources.servers.storage import ensure_storage
from resources.settings import DEFAULT_REGION, Connections, home_folder, refuse_half_external

FREE_BYTES = 256 * 1024**2
PORT_TRIES = 5
HANG_SECONDS = 10.0  # a living server that is silent for longer is started again
HANG_STOP_SECONDS = 10.0
HEALTH = {"lakefs": lakefs.HEALTH, "s3": s3.HEALTH}


@dataclass(frozen=True)
class ServerStatus:
    """What is known of one embedded server. `running`: our process lives; `healthy`: it answers."""

    name: str
    running: bool
    healthy: bool
    pid: int | None
    endpoint: str | None
    binary: str | None
    log: Path


def up(home: Path | str | None = None, progress: Progress = quiet) -> Connections:
    """Start whichever embedded server of `home` is not running and make sure that buckets and repository exist.

    Raises ServerError: no binary, disk full, a server that does not start (with its log's last lines).
    """
    layout = Layout(home_folder(home))
    _check_disk(layout)
    # before the lock: building takes minutes, and has locks of its own
    found = {} if _all_healthy(layout) else binaries.find_all(progress)
    with locked(layout.lock, progress):
        if not _all_healthy(layout):
            _start(layout, found or binaries.find_all(progress), progress)
        credentials = make_credentials(layout)
        connections = Connections.embedded(layout.home, addresses(read_state(layout), credentials))
        ensure_storage(connections)
    return connections


def connect(home: Path | str | None = None, progress: Progress = quiet) -> Connections:
    """External servers when the environment names them (never started by us, storage made when missing), else `up`.

    A shell that took over `repro env` names this home's own servers: those are embedded, and started when they are down.
    """
    refuse_half_external(os.environ)
    endpoint = os.environ.get("LAKECTL_SERVER_ENDPOINT_URL")
    layout = Layout(home_folder(home))
    if not endpoint or endpoint.rstrip("/") == f"http://127.0.0.1:{read_state(layout).ports.get('lakefs')}":
        return up(home, progress)
    connections = Connections.from_environment(home)
    ensure_storage(connections)
    return connections


def down(home: Path | str | None = None, progress: Progress = quiet) -> list[str]:
    """Stop the embedded servers of `home`; the data, ports and credentials stay. Returns the names of those that were stopped."""
    layout = Layout(home_folder(home))
    if not layout.folder.exists():
        return []
    stopped = []
    with locked(layout.lock, progress):
        state = read_state(layout)
        for name in reversed(NAMES):
            known = state.processes.get(name)
            lost = strays(layout, name, known)
            if known is not None and is_running(known):
                process.stop(known)
                stopped.append(name)
            elif lost:
                stopped.append(name)
            process.end(lost)
            if name in stopped:
                progress(f"{name}: stopped")
        if state.ports:
            try:
                write_state(layout, State(state.ports, {}))
            except ServerError as error:  # stopping must work on a full disk; what the old state says is known to be stale
                progress(str(error))
    return stopped


def status(home: Path | str | None = None) -> list[ServerStatus]:
    """One entry per server, in the order of starting. Starts nothing and changes nothing."""
    layout = Layout(home_folder(home))
    state = read_state(layout)
    found = []
    for name in NAMES:
        known, port = state.processes.get(name), state.ports.get(name)
        running = is_running(known)
        found.append(
            ServerStatus(
                name=name,
                running=running,
                healthy=running and port is not None and process.is_healthy(port, HEALTH[name], timeout=5),
                pid=known.pid if running and known else None,
                endpoint=f"http://127.0.0.1:{port}" if port else None,
                binary=known.binary if known else None,
                log=layout.log(name),
            )
        )
    return found


def _all_healthy(layout: Layout) -> bool:
    state = read_state(layout)
    return (
        layout.credentials.exists()
        and set(NAMES) <= set(state.ports)
        and state.processes.get("lakefs", Process(0, "", 0, "")).depends == state.ports["s3"]
        and all(is_running(state.processes.get(name)) and process.is_healthy(state.ports[name], HEALTH[name]) for name in NAMES)
    )


def _check_disk(layout: Layout) -> None:
    try:
        layout.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(layout.folder).free
    except OSError as error:
        raise ServerError(f"{layout.folder} cannot be made ({error.strerror}): choose another place with REPRO_HOME") from error
    if free < FREE_BYTES:
        raise ServerError(
            f"the disk of {layout.home} has {free >> 20} MiB free and the servers need {FREE_BYTES >> 20} MiB: free some space, "
            "or choose another place with REPRO_HOME"
        )


def _start(layout: Layout, found: dict[str, Path], progress: Progress) -> None:
    """With the lock held: bring both servers up, keeping what runs well. The state is written after every step."""
    credentials = make_credentials(layout)
    state = read_state(layout)
    ports, processes = dict(state.ports), dict(state.processes)
    for name in NAMES:
        known = processes.get(name)
        process.end(strays(layout, name, known))
        stale = name == "lakefs" and known is not None and known.depends != ports["s3"]
        if known is not None and is_running(known):
            if not stale and process.is_healthy(known.port, HEALTH[name], timeout=HANG_SECONDS):
                ports[name] = known.port
                continue
            progress(f"{name}: process {known.pid} does not answer or has old settings, starting it again")
            process.stop(known, HANG_STOP_SECONDS)
        processes.pop(name, None)
        _start_one(layout, name, found[name], credentials, ports, processes, progress)


def _start_one(
    layout: Layout,
    name: str,
    binary: Path,
    credentials: Credentials,
    ports: dict[str, int],
    processes: dict[str, Process],
    progress: Progress,
) -> None:
    title, log = binaries.PROGRAMS[name].title, layout.log(name)
    for _ in range(PORT_TRIES):
        if name not in ports or not can_listen(ports[name]):
            before = ports.get(name)
            ports[name] = choose_port(set(ports.values()))
            if before is not None:
                progress(f"{name}: port {before} is used by another program, moving to {ports[name]}")
            write_state(layout, State(ports, processes))
        if name == "lakefs":
            arguments, environment = lakefs.prepare(layout, credentials, ports[name], ports["s3"], DEFAULT_REGION), {}
        else:
            arguments, environment = s3.prepare(layout, ports[name], DEFAULT_REGION), s3.environment(credentials)
        begun = log.stat().st_size if log.exists() else 0
        started = process.launch(
            binary, arguments, environment, layout.working(name), log, ports[name], ports["s3"] if name == "lakefs" else 0
        )
        try:
            # before it is ready: if we are killed now, the next `up` must know whose process this is
            processes[name] = started
            write_state(layout, State(ports, processes))
            process.wait_ready(started, HEALTH[name], title, log, begun)
        except process.PortTaken:
            processes.pop(name)
            continue
        except BaseException:
            process.stop(started)
            processes.pop(name)
            write_state(layout, State(ports, processes))
            raise
        progress(f"{name}: {title} answers on 127.0.0.1:{ports[name]} (process {started.pid})")
        return
    raise ServerError(f"{title} found its port taken {PORT_TRIES} times in a row: see {log}")
