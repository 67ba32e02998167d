"""Starting, watching and stopping one server process. What the server is told is decided by its own module."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from resources.servers.state import Process, ServerError, start_time

READY_SECONDS = 60.0
STOP_SECONDS = 35.0  # lakeFS lets its last requests finish for up to 30 s
LOG_BYTES = 16 * 1024**2

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_children: list[subprocess.Popen[bytes]] = []


class PortTaken(ServerError):
    """Somebody took the port between choosing and listening."""


def launch(
    binary: Path, arguments: list[str], environment: dict[str, str], working: Path, log: Path, port: int, depends: int = 0
) -> Process:
    """Start a server in a session of its own, in an empty folder and a nearly empty environment, and say which process it is."""
    working.mkdir(mode=0o700, parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        os.replace(log, log.with_suffix(".old.log"))
    # LAKEFS_*, VGW_* and AWS_* of the user's shell would override the configuration
    clean = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        try:
            child = subprocess.Popen(
                [str(binary), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=working,
                env={**clean, "HOME": str(working), **environment},
                start_new_session=True,
            )
        except OSError as error:
            raise ServerError(f"{binary} cannot be started ({error.strerror}): is it a program for this machine?") from error
    _forget_finished()
    _children.append(child)  # kept, so that a child that dies is reaped by whoever is asked next and never looks alive
    return Process(child.pid, start_time(child.pid) or "gone", port, str(binary), depends)


def is_healthy(port: int, path: str, timeout: float = 2.0) -> bool:
    try:
        with _direct.open(f"http://127.0.0.1:{port}{path}", timeout=timeout) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def wait_ready(process: Process, path: str, title: str, log: Path, begun: int, seconds: float = READY_SECONDS) -> None:
    """Return when the server answers; ServerError with the log's last lines when it ends or stays silent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        _forget_finished()
        if start_time(process.pid) != process.started:
            text = tail(log, begun)
            if "address already in use" in text:
                raise PortTaken(f"port {process.port} was taken while {title} started")
            raise ServerError(f"{title} ended while it started. Last lines of {log}:\n{text or '(nothing was written)'}")
        if is_healthy(process.port, path):
            return
        time.sleep(0.05)
    stop(process)
    raise ServerError(f"{title} did not answer on port {process.port} for {seconds:.0f} s. Last lines of {log}:\n{tail(log, begun)}")


def stop(process: Process, seconds: float = STOP_SECONDS) -> None:
    """TERM, then KILL. A process that is not the one that was started is left alone."""
    if start_time(process.pid) == process.started:
        end([process.pid], seconds)


def end(pids: list[int], seconds: float = STOP_SECONDS) -> None:
    """End these processes of ours. A zombie counts as ended: where nobody reaps orphans (a container) it stays one for ever."""
    alive = {pid: begun for pid in pids if (begun := start_time(pid)) is not None}
    for order, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5.0)):
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, order)
        deadline = time.monotonic() + patience
        while alive and time.monotonic() < deadline:
            _forget_finished()
            alive = {pid: begun for pid, begun in alive.items() if start_time(pid) == begun}
            time.sleep(0.02)


def tail(log: Path, begun: int = 0, lines: int = 15) -> str:
    """The last lines that were written to `log` after its first `begun` bytes."""
    try:
        with open(log, "rb") as file:
            file.seek(max(begun, log.stat().st_size - 8192))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def _forget_finished() -> None:
    _children[:] = [child for child in _children if child.poll() is None]
