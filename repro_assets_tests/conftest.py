"""Fixtures and guards shared by every test: the environment that keeps tests offline, and the real servers, started once a session.

Anything that only one folder of tests needs belongs in that folder's own conftest.
"""

import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "DAGSTER_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ[_name] = _value
# A developer's shell may point at real servers: tests must never write there.
for _name in list(os.environ):
    if _name.startswith(("LAKECTL_", "AWS_")) or (_name.startswith("REPRO_") and not _name.endswith("_BINARY")):
        del os.environ[_name]
# As the Makefile does: the suite starts about two hundred Python processes, and each would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # the guards above must hold before anything else is imported

from resources.servers import down, ensure_storage, up
from resources.settings import Connections


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connections]:
    """The embedded lakeFS and S3 servers, one pair for the whole session, in a home of their own."""
    home: Path = tmp_path_factory.mktemp("servers") / ".repro"
    try:
        yield up(home, progress=lambda line: print(line, flush=True))
    finally:
        down(home)


@pytest.fixture
def connections(servers: Connections, tmp_path: Path) -> Connections:
    """A repository and three buckets nobody else uses, and an empty cache, on the session's servers."""
    unique = secrets.token_hex(5)
    fresh = replace(
        servers,
        repository=f"t-{unique}",
        namespace="",
        lake_bucket=f"t-{unique}-lake",
        blobs_bucket=f"t-{unique}-blobs",
        jobs_bucket=f"t-{unique}-jobs",
        home=tmp_path / ".repro",
        cache=tmp_path / ".repro" / "cache",
        external=True,
    )
    ensure_storage(fresh)
    return fresh


@pytest.fixture
def graph(connections: Connections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A repository, a Dagster instance and keys of its own; see graph.py."""
    from repro_assets_tests.graph import Graph

    made = Graph.make(connections, tmp_path / "graph", monkeypatch)
    yield made
    made.instance.dispose()
