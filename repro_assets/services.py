"""The UI for people: webserver and daemon as children of their own process groups, and the address the UI is found at.

The lakeFS and S3 servers are `resources/servers`. `dagster dev` is not used: it left its children behind when it was stopped.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repro_assets.running import dagster_home
from resources.settings import home_folder

WORKSPACE = Path(__file__).parents[1] / "workspace.yaml"
FIRST_PORT = 3000
STOP_SECONDS = 20.0


class UiError(Exception):
    """The UI did not come up; the message has the end of its log."""


def ui_url(home: Path | None = None) -> str:
    """Where `repro dev` serves the UI: chosen once and kept, so that links in commits stay right."""
    place = home_folder(home) / "ui.json"
    if place.exists():
        return str(json.loads(place.read_text())["url"])
    place.parent.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{_free_port()}"
    place.write_text(json.dumps({"url": url}))
    return url


def _free_port() -> int:
    for port in (FIRST_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UiError("no free port on 127.0.0.1")


@contextmanager
def running(home: Path | None = None, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Webserver and daemon while the block runs; yields the UI's address. Their groups are ended afterwards, code servers included."""
    url = ui_url(home)
    logs = home_folder(home) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    values = {**os.environ, **(environment or {}), "DAGSTER_HOME": str(dagster_home(home)), "REPRO_UI_URL": url}
    where = ["-w", str(WORKSPACE)] if WORKSPACE.exists() else ["-m", "repro_assets.definitions"]
    port = url.rsplit(":", 1)[1]
    scripts = Path(sys.executable).parent
    commands = {
        "webserver": [str(scripts / "dagster-webserver"), *where, "-h", "127.0.0.1", "-p", port],
        "daemon": [str(scripts / "dagster-daemon"), "run", *where],
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in commands.items():
            with (logs / f"{name}.log").open("ab") as log:
                started.append(subprocess.Popen(command, env=values, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
        _wait(url, started[0], logs / "webserver.log")
        yield url
    finally:
        for process in started:
            _stop(process)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/server_info", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise UiError(f"the Dagster webserver did not answer at {url}; the end of {log}:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
