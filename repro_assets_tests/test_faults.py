"""Whole runs on servers of their own that die, fill their disk or lose the run's own process: what is said, what is left behind, and
that the same command then gives what an undisturbed run gives.

Faults of single calls and of one write are in `resources/`; servers behind a breaking connection are in `test_cli.py`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from repro_assets.data import records, sharding
from repro_assets.shelf import folder
from repro_assets.terminal import GOOD, UNREACHABLE
from repro_assets_tests.world import SIGNED, Answer, Prepared, prepared, repro
from resources.lake import Lake, Patience
from resources.lake.transaction import DEFAULT_AGE, NAME, Transaction
from resources.servers import down, embedded, up
from resources.servers.state import Layout, is_running, read_state
from resources.settings import Connections

ROOT = Path(__file__).parents[1]
SELECT = ("--select", ",".join(SIGNED), "--json")
SERVERS = {"lakefs": "lakeFS at http://127.0.0.1:{}", "s3": "S3 at http://127.0.0.1:{}"}

#: a run whose own process dies inside `shards`, after the first leaf was tokenised
DYING = """
import os, signal
from repro_assets.data import sharding
real = sharding.build
def build(*arguments, progress, **options):
    return real(*arguments, **options, progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
sharding.build = build
from repro_assets.cli import main
main(["materialize", "-s", "{key}", "--select", "{assets}"])
"""

#: a writer that dies between link and merge, so long ago that nobody waits for it
DEAD_WRITER = """
import os, signal, time
now = time.time
time.time = lambda: now() - {age}
from resources.lake import Lake
from resources.lake.transaction import Transaction
from resources.blobs import Blobs
from resources.settings import Connections
Transaction._merge = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
where = Connections.from_environment()
blob = Blobs.connect(where).put_bytes(b"half done")
Lake.connect(where).write("shared", "planted", {{"x": blob}}, message="x", metadata={{}})
"""


def versions(answer: Answer) -> dict[str, str]:
    return {row["asset"]: row["data_version"] for row in answer.json["assets"]}


@pytest.fixture(scope="module")
def undisturbed(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data versions of the same data under the same recipe where nothing went wrong, on other servers."""
    with prepared(servers, tmp_path_factory.mktemp("undisturbed")) as made:
        assert repro("materialize").code == GOOD
        answer = repro("materialize", "-s", made.key, *SELECT)
    assert list(versions(answer)) == list(SIGNED)
    return versions(answer)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Embedded servers that only this module uses, because it kills them."""
    found = tmp_path_factory.mktemp("own") / ".repro"
    up(found)
    try:
        yield found
    finally:
        down(found)


@contextlib.contextmanager
def snapshot_on(home: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prepared]:
    """An empty repository on the servers of `home` with the shared assets and one snapshot; commands find the servers by their home."""
    with prepared(up(home), place) as found:
        monkeypatch.setenv("REPRO_HOME", str(home))
        assert repro("materialize").code == GOOD
        yield found


@pytest.fixture
def made(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prepared]:
    with snapshot_on(home, tmp_path, monkeypatch) as found:
        yield found


def kill(home: Path, name: str) -> None:
    """SIGKILL one server."""
    process = read_state(Layout(home)).processes[name]
    os.kill(process.pid, signal.SIGKILL)
    while is_running(process):
        time.sleep(0.01)


@contextlib.contextmanager
def before(module: Any, name: str, event: Callable[[], None]) -> Iterator[None]:
    """`event` happens whenever `module.name` is called, first."""
    real = getattr(module, name)

    def call(*arguments: Any, **options: Any) -> Any:
        event()
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        yield


@contextlib.contextmanager
def linked(asset: str, event: Callable[[], None]) -> Iterator[None]:
    """`event` happens in the middle of the transaction that commits `asset`: everything linked, nothing committed."""
    real = Transaction._commit

    def commit(self: Transaction, name: str, base: str) -> None:
        if self.metadata.get("asset") == asset:
            event()
        real(self, name, base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transaction, "_commit", commit)
        yield


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """lakeFS itself tries a dead S3 five times in 14 s before it answers 500: one such answer must do here."""
    real = Lake.connect.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Lake, "connect", classmethod(lambda cls, *given, **options: real(cls, *given, **options, patience=Patience(total=5)))
    )


def stopped(made: Prepared, answer: Answer, done: tuple[str, ...]) -> str:
    """The message of a run that could not reach something. The branch holds `done` whole and nothing of any other asset."""
    assert answer.code == UNREACHABLE, answer
    assert "Traceback" not in answer.err
    (ran,) = answer.json["runs"]
    assert not ran["success"]
    assert tuple(versions(answer)) == done
    assert f"repro: {ran['failure']}" in answer.err
    return str(ran["failure"])


def holds(made: Prepared, done: tuple[str, ...]) -> None:
    """The branch holds the documents of `done` with every blob, readable and as signed, and nothing of any other asset."""
    lake = made.graph.bench().lake.client
    place = folder(made.key, "small", "")
    there = {entry.path.removeprefix(place).split("/")[0] for entry in lake.list(made.graph.head(made.key), place)}
    assert there == set(done)
    verified = repro("verify", "-s", made.key, "--json")
    assert verified.code == GOOD, verified
    assert {finding["what"] for finding in verified.json["findings"]} >= set(done)


def goes_on(made: Prepared, undisturbed: dict[str, str]) -> None:
    """The same command again ends as if nothing had happened."""
    again = repro("materialize", "-s", made.key, *SELECT)
    assert again.code == GOOD, again
    assert versions(again) == undisturbed
    assert repro("verify", "-s", made.key).code == GOOD


@pytest.mark.parametrize(
    ("name", "fault", "done"),
    [
        ("lakefs", lambda event: before(records, "build", event), ("raw_snapshot",)),
        ("lakefs", lambda event: linked("shards", event), ("raw_snapshot", "records")),
        ("s3", lambda event: before(sharding, "build", event), ("raw_snapshot", "records")),
    ],
    ids=["lakeFS while records works", "lakeFS while shards is committed", "S3 while shards works"],
)
def test_a_server_killed_inside_a_stage_is_named_with_the_remedy_and_the_same_command_goes_on(
    home: Path, made: Prepared, undisturbed: dict[str, str], name: str, fault: Callable[..., Any], done: tuple[str, ...]
) -> None:
    """S2.16, issue 3 section 7: lakeFS or S3 down in the middle of a run."""
    address = SERVERS[name].format(read_state(Layout(home)).ports[name])
    with fault(lambda: kill(home, name)):
        answer = repro("materialize", "-s", made.key, *SELECT)
    said = stopped(made, answer, done)
    assert said.startswith(f"{address} did not ")
    assert "`repro up` starts the embedded ones; then do the same again" in said
    status = repro("status", "--json")
    assert [row["name"] for row in status.json["servers"] if not row["healthy"]] == [name]
    assert repro("up").code == GOOD
    holds(made, done)
    goes_on(made, undisturbed)


@pytest.mark.usefixtures("hasty")
def test_lakefs_that_lost_its_object_store_says_so(home: Path, made: Prepared, undisturbed: dict[str, str]) -> None:
    """S3 killed between link and commit: it is lakeFS that fails, for want of the store behind it."""
    done = ("raw_snapshot", "records")
    with linked("shards", lambda: kill(home, "s3")):
        answer = repro("materialize", "-s", made.key, *SELECT)
    said = stopped(made, answer, done)
    ports = read_state(Layout(home)).ports
    assert said.startswith(f"lakeFS at http://127.0.0.1:{ports['lakefs']} did not commit to ")
    assert "because its object store failed" in said
    assert f"127.0.0.1:{ports['s3']}: connect: connection refused" in said
    assert "`repro up` starts the embedded ones" in said
    assert repro("up").code == GOOD
    holds(made, done)
    goes_on(made, undisturbed)


def test_a_run_whose_process_is_killed_inside_a_stage_is_settled_by_the_next_which_gives_the_same(
    made: Prepared, undisturbed: dict[str, str]
) -> None:
    """S2.16: kill -9 of the run itself."""
    code = DYING.replace("{key}", made.key).replace("{assets}", ",".join(SIGNED))
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL, died
    (lost,) = made.graph.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
    holds(made, ("raw_snapshot", "records"))
    again = repro("materialize", "-s", made.key, *SELECT)
    assert f"run {lost.run_id} was abandoned by its process: marked as failed" in again.err
    assert made.graph.instance.get_run_by_id(lost.run_id).status is dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]
    assert versions(again) == undisturbed


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB, where this user may mount one."""
    found = tmp_path / "small"
    found.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(found)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield found
        down(found / ".repro")
    finally:
        subprocess.run(["umount", "-l", str(found)], check=True)


@pytest.mark.parametrize("dagster", ["on the full disk", "elsewhere"])
def test_a_disk_that_fills_up_inside_a_stage_is_named_with_the_remedy_and_leaves_nothing_half_done(
    small_disk: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, dagster: str
) -> None:
    """Issue 3 section 7: disk full. Servers, cache, keys and, as by default, Dagster's event log share the disk of the home folder."""
    monkeypatch.setattr(embedded, "FREE_BYTES", 1 << 20)
    home, filler, done = small_disk / ".repro", small_disk / "filler", ("raw_snapshot", "records")

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    with snapshot_on(home, tmp_path, monkeypatch) as made:
        if dagster == "on the full disk":
            monkeypatch.delenv("DAGSTER_HOME")
        monkeypatch.setenv("REPRO_CACHE", str(home / "cache"))
        with before(sharding, "build", fill):
            answer = repro("materialize", "-s", made.key, *SELECT)
        assert answer.code == UNREACHABLE, answer
        assert "Traceback" not in answer.err
        assert str(home) in answer.err
        assert "free some space" in answer.err
        refused = repro("materialize", "-s", made.key, *SELECT)
        assert refused.code == UNREACHABLE
        assert f"the disk of {home} has 0 MiB free" in refused.json["error"]
        filler.unlink()
        assert repro("up").code == GOOD
        holds(made, done)
        goes_on(made, undisturbed)


# ---- what a dead writer left


def test_the_transaction_of_a_writer_that_died_long_ago_is_gone_after_the_next_run(made: Prepared) -> None:
    """S2.16: no tx- branch outlives its writer for ever; one of a writer that may still live is left alone."""
    lake = made.graph.bench().lake.client
    ages = {}
    for age in (DEFAULT_AGE + 60, DEFAULT_AGE - 600):
        died = subprocess.run([sys.executable, "-c", DEAD_WRITER.format(age=age)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert died.returncode == -signal.SIGKILL, died
        (ages[age],) = {name for name, _head in lake.branches("tx-", hidden=True)} - set(ages.values())
    old, young = ages.values()
    assert NAME.fullmatch(old)
    answer = repro("materialize", "-s", made.key, "--select", "raw_snapshot", "--json")
    assert answer.code == GOOD
    assert f"removed transaction {old}, which a dead writer left" in answer.err
    assert [name for name, _head in lake.branches("tx-", hidden=True)] == [young]
    lake.delete_branch(young)


def test_up_removes_it_too(home: Path, made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    where = up(home)  # the home's own repository, which `repro up` looks after
    for name, value in where.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DAGSTER_HOME", str(home / "dagster"))
    lake = Lake.connect(where)
    lake.ensure()
    died = subprocess.run(
        [sys.executable, "-c", DEAD_WRITER.format(age=DEFAULT_AGE + 60)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert died.returncode == -signal.SIGKILL, died
    (old,) = (name for name, _head in lake.branches("tx-", hidden=True))
    (home / "dagster").mkdir(exist_ok=True)
    (home / "dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    answer = repro("up")
    assert f"removed transaction {old}, which a dead writer left" in answer.out
    assert list(lake.branches("tx-", hidden=True)) == []


# ---- a warning is no finding


def test_a_validation_that_only_warns_is_printed_and_ends_well(home: Path, made: Prepared) -> None:
    """Only failed checks of severity ERROR are findings."""
    from repro_assets_tests.graph import RECIPE, jsonl, tickets

    text = RECIPE.replace("quarantine_limit", "duplicates: keep\n  quarantine_limit")
    recipe = made.graph.recipe("warned", text)
    key = made.graph.import_({"b.jsonl": jsonl(tickets(3))})
    assert repro("materialize", "-r", recipe).code == GOOD
    for form in ((), ("--json",)):
        answer = repro("materialize", "-s", key, "-r", recipe, "--select", ",".join(SIGNED), *form)
        assert answer.code == GOOD, answer
        assert "warning: validation_report: data_is_valid: unique_ids" in (answer.err if form else answer.out)
    (ran,) = answer.json["runs"]
    assert ran["failed_checks"] == []
    assert ran["warnings"][0].startswith("validation_report: data_is_valid: unique_ids")
    assert made.graph.document(key, "validation_report", "warned").result.verdict == "warn"
