"""An executor on the session's real S3 whose jobs are real processes that run the probe program."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from repro_assets_tests.resources.gpu.probing import LAUNCH, left_over
from resources.blobs import Objects
from resources.gpu import Executor, Leases, LocalBackend
from resources.settings import Connections


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
