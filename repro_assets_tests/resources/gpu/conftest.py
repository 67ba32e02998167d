"""An executor on the session's real S3 whose jobs are real processes that run the probe program."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from resources.blobs import Objects
from resources.gpu import Executor, Job, Leases, LocalBackend
from resources.gpu.processes import FOLDER
from resources.settings import Connections

LAUNCH = Path(__file__).with_name("launch.py")


def left_over(home: Path) -> list[int]:
    """Processes of any job under `home`."""
    found = []
    for process in psutil.process_iter():
        try:
            inside = process.environ().get(FOLDER, "").startswith(str(home))
            if inside and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def home(connections: Connections) -> Iterator[Path]:
    yield connections.home
    stray = left_over(connections.home)
    for pid in stray:
        psutil.Process(pid).kill()
    assert not stray, "a test left processes of its jobs behind"


@pytest.fixture
def make_executor(connections: Connections, home: Path) -> Callable[..., Executor]:
    def make(slots: int = 4, restarts: int = 2) -> Executor:
        backend = LocalBackend(home, Leases(home / "leases", (), slots), (str(LAUNCH),))
        return Executor(Objects.connect(connections), backend, connections.node_environment(), interval=0.1, restarts=restarts)

    return make


@pytest.fixture
def executor(make_executor: Callable[..., Executor]) -> Executor:
    return make_executor()


def probe(name: str, **spec: object) -> Job:
    """A job of the probe program; `name` is its identity, `ranks`, `nonce`, `time_limit` and `grace` are the job's own."""
    own = {field: spec.pop(field) for field in ("ranks", "nonce", "time_limit", "grace", "gpus") if field in spec}
    return Job(purpose="probe", identity={"name": name}, spec={"steps": 3, **spec}, **{"grace": 5.0, **own})  # type: ignore[arg-type]
