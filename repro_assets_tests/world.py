"""A prepared graph that a whole test module shares, and the command line run in this process. One graph a test is `graph.py`."""

import contextlib
import io
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from repro_assets.cli import main
from repro_assets_tests.graph import Graph, jsonl, tickets
from resources.servers import ensure_storage
from resources.settings import Connections

DATA = ("raw_snapshot", "records", "shards", "validation_report")
SIGNED = (*DATA, "training_bundle")


def apart(servers: Connections, folder: Path) -> Connections:
    """A repository and buckets of their own on the session's servers."""
    name = f"t-{secrets.token_hex(5)}"
    fresh = replace(
        servers,
        repository=name,
        namespace="",
        lake_bucket=f"{name}-lake",
        blobs_bucket=f"{name}-blobs",
        jobs_bucket=f"{name}-jobs",
        home=folder / ".repro",
        cache=folder / ".repro" / "cache",
        external=True,
    )
    ensure_storage(fresh)
    return fresh


@dataclass(frozen=True)
class Prepared:
    """A graph whose recipe, snapshot and environment variables are set up; `key` is its snapshot of 60 tickets."""

    graph: Graph
    recipe: Path
    key: str


@contextlib.contextmanager
def prepared(servers: Connections, folder: Path, assets: tuple[str, ...] = ()) -> Iterator[Prepared]:
    """The shared assets and `assets` of one snapshot are made; the environment leads here while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        graph = Graph.make(apart(servers, folder), folder / "graph", patch)
        recipe = graph.recipe()
        patch.setenv("REPRO_RECIPE", str(recipe))
        patch.setenv("REPRO_ACTOR", "tester")
        patch.setenv("COLUMNS", "200")
        key = graph.import_({"a.jsonl": jsonl(tickets(60))})
        if assets:
            for ran in (graph.run(None, recipe=recipe), graph.run(key, assets, recipe)):
                assert ran.success, ran.failure
        yield Prepared(graph, recipe, key)
        graph.instance.dispose()


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def repro(*arguments: object) -> Answer:
    """`repro ...` in this process, with the environment as it is."""
    out, err = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Answer(int(ended.value.code or 0), out.getvalue(), err.getvalue())
