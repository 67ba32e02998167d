"""The UI for people: webserver and daemon as children of their own process groups, and the address the UI is found at.

The lakeFS and S3 servers are `resources/servers`. `dagster dev` is not used: it left its children behind when it was stopped.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from repro_assets.running import dagster_home
from resources.settings import home_folder

WORKSPACE = Path(__file__).parents[1] / "workspace.yaml"
FIRST_PORT = 3000
START_SECONDS = 180.0
STOP_SECONDS = 20.0
LOG_LINES = 20


class UiError(Exception):
    """The UI did not come up or did not stay up; the message has the end of its log."""


@dataclass(frozen=True)
class Child:
    """One process of the UI and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


@dataclass(frozen=True)
class Ui:
    """The running UI."""

    url: str
    children: tuple[Child, ...]

    def wait(self) -> None:
        """Return at SIGINT or SIGTERM. Raises UiError when a process of the UI ends by itself. Main thread only."""
        asked = threading.Event()

        def ask(_number: int, _frame: FrameType | None) -> None:
            asked.set()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not asked.wait(0.5):
                for child in self.children:
                    if (code := child.process.poll()) is not None:
                        raise UiError(f"the Dagster {child.name} ended with code {code}; the end of {child.log}:\n{child.tail()}")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def ui_url(home: Path | None = None) -> str:
    """Where `repro dev` serves the UI: chosen once and kept, so that links in commits stay right."""
    place = home_folder(home) / "ui.json"
    try:
        return str(json.loads(place.read_text())["url"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return _choose(place, set())


def _choose(place: Path, taken: set[int]) -> str:
    """Another address, written whole: two commands at once may both come here, and the last one's choice is then everybody's."""
    url = f"http://127.0.0.1:{_free_port(taken)}"
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.with_name(f".{place.name}.{os.getpid()}")
    scratch.write_text(json.dumps({"url": url}))
    os.replace(scratch, place)
    return url


def _free_port(taken: set[int]) -> int:
    for port in (FIRST_PORT, *range(FIRST_PORT + 1, FIRST_PORT + 50)):
        if port not in taken and _can_listen(port):
            return port
    raise UiError(f"no free port on 127.0.0.1 from {FIRST_PORT} to {FIRST_PORT + 49}: end what listens there")


def _can_listen(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def running(home: Path | None = None, environment: dict[str, str] | None = None) -> Iterator[Ui]:
    """Webserver and daemon while the block runs. Their groups are ended afterwards, code servers included.

    A port that somebody else took meanwhile is exchanged for another, which is kept. Raises UiError.
    """
    folder = home_folder(home)
    url = ui_url(home)
    port = int(url.rsplit(":", 1)[1])
    if not _can_listen(port):
        if _answers(url):
            raise UiError(f"a Dagster UI answers at {url} already: use it, or end it first")
        url = _choose(folder / "ui.json", {port})
        port = int(url.rsplit(":", 1)[1])
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    values = {**os.environ, **(environment or {}), "DAGSTER_HOME": str(dagster_home(home)), "REPRO_HOME": str(folder), "REPRO_UI_URL": url}
    where = ["-w", str(WORKSPACE)] if WORKSPACE.exists() else ["-m", "repro_assets.definitions"]
    scripts = Path(sys.executable).parent
    commands = {
        "webserver": [str(scripts / "dagster-webserver"), *where, "-h", "127.0.0.1", "-p", str(port)],
        "daemon": [str(scripts / "dagster-daemon"), "run", *where],
    }
    children: list[Child] = []
    try:
        for name, command in commands.items():
            place = logs / f"{name}.log"
            with place.open("wb") as log:
                process = subprocess.Popen(
                    command, env=values, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            children.append(Child(name, process, place))
        _wait(url, children)
        yield Ui(url, tuple(children))
    finally:
        _stop([child.process for child in children])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/server_info", timeout=2) as answer:
            return "dagster_webserver_version" in json.loads(answer.read())
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _wait(url: str, children: list[Child]) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        for child in children:
            if (code := child.process.poll()) is not None:
                raise UiError(f"the Dagster {child.name} ended with code {code}; the end of {child.log}:\n{child.tail()}")
        if _answers(url):
            return
        time.sleep(0.3)
    webserver = children[0]
    raise UiError(
        f"the Dagster webserver did not answer at {url} for {START_SECONDS:.0f} s; the end of {webserver.log}:\n{webserver.tail()}"
    )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """TERM to every group at once, then KILL: a code server that outlives its parent is in the same group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            try:
                os.killpg(process.pid, how)
            except ProcessLookupError:
                continue
        until = time.monotonic() + STOP_SECONDS
        for process in processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
