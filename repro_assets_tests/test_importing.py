"""Bringing data to raw: what is refused, what a snapshot holds, other tools' writes, and a process killed in the middle."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from repro_assets import importing, tables
from repro_assets.data import manifest
from repro_assets.data.errors import TableError
from repro_assets.importing import CannotImport, Imported, listed
from repro_assets.partitions import key_of
from repro_assets.recipe import RawSection
from repro_assets.shelf import UncommittedRaw
from repro_assets.trust.canonical import sha256
from repro_assets_tests.graph import Graph, jsonl, tickets
from repro_assets_tests.test_shelf import gateway
from repro_assets_tests.world import repro
from resources.errors import NothingToCommit, Refused

NAMES = ("plain.jsonl", "with space.jsonl", "ünïcödé-日本.jsonl", "deep/er/file.txt", ".hidden")


def bring(graph: Graph, *paths: Path, to: str = "", **options: object) -> Imported:
    bench = graph.bench()
    return importing.import_files(bench.lake.client, bench.blobs.store, paths, to=to, **options)  # type: ignore[arg-type]


def tree(graph: Graph, commit: str) -> dict[str, bytes]:
    lake = graph.bench().lake.client
    return {entry.path: lake.read(commit, entry.path) for entry in lake.list(commit)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "my data"
    for name in NAMES:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(name.encode())
    return made


def test_a_folder_keeps_its_structure_its_spaces_and_its_unicode(graph: Graph, folder: Path) -> None:
    done = bring(graph, folder, to="a/b c")
    assert tree(graph, done.commit) == {f"a/b c/{name}": name.encode() for name in NAMES}
    assert (done.files, done.size, done.new) == (len(NAMES), sum(len(name.encode()) for name in NAMES), True)
    lake = graph.bench().lake.client
    info = lake.commit_info(done.commit)
    assert done.key == key_of(info.id, info.created)
    assert lake.head(f"snapshot-{done.key}") == done.commit == lake.head("raw")
    assert lake.exists(f"pin-{done.key}")


def test_files_already_there_change_nothing_and_name_raw_as_it_is(graph: Graph, folder: Path, tmp_path: Path) -> None:
    first = bring(graph, folder)
    assert bring(graph, folder) == Imported(first.key, first.commit, first.files, first.size, False)
    (tmp_path / "other.txt").write_text("other")
    second = bring(graph, tmp_path / "other.txt")
    again = bring(graph, folder / "plain.jsonl")
    assert not again.new
    assert (again.key, again.commit) == (second.key, second.commit)


def test_an_import_adds_and_replaces_and_never_removes(graph: Graph, folder: Path) -> None:
    bring(graph, folder)
    (folder / "plain.jsonl").write_text("changed")
    (folder / "deep/er/file.txt").unlink()
    found = tree(graph, bring(graph, folder).commit)
    assert found["plain.jsonl"] == b"changed"
    assert found["deep/er/file.txt"] == b"deep/er/file.txt"


def test_progress_counts_every_file(graph: Graph, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "BATCH", 2)
    seen: list[tuple[int, int]] = []
    bring(graph, folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("_lakefs_actions", "hooks under _lakefs"),
        ("../up", "no path inside a branch"),
        ("/abs", "no path inside a branch"),
        ("a\nb", "control"),
    ],
)
def test_a_place_that_data_may_not_have_is_refused(folder: Path, to: str, said: str) -> None:
    with pytest.raises(CannotImport, match=said):
        listed([folder], to)


def test_what_is_no_plain_file_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotImport, match=r"nowhere: no such file or folder"):
        listed([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CannotImport, match="the folders hold no file"):
        listed([tmp_path / "empty"])
    for target in ("plain.jsonl", "deep"):
        link = folder / "link"
        link.symlink_to(folder / target)
        with pytest.raises(CannotImport, match=r"link: not a regular file"):
            listed([folder])
        link.unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(CannotImport, match=r"pipe: not a regular file"):
        listed([folder])
    (folder / "pipe").unlink()
    (folder / os.fsdecode(b"latin-\xe9")).write_bytes(b"")
    with pytest.raises(CannotImport, match="not valid Unicode"):
        listed([folder])


def test_two_files_of_one_raw_path_are_refused_and_one_file_named_twice_is_not(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.jsonl").write_text(name)
    with pytest.raises(CannotImport, match=r"would both become 'same.jsonl'"):
        listed([tmp_path / "one", tmp_path / "two"])
    assert list(listed([tmp_path / "one", tmp_path / "one" / "same.jsonl"])) == ["same.jsonl"]


def test_staged_objects_of_others_stop_an_import_and_stay_theirs(graph: Graph, folder: Path) -> None:
    lake = graph.bench().lake.client
    before = lake.head("raw")
    gateway(graph.connections).put_object(Bucket=graph.connections.repository, Key="raw/loose.jsonl", Body=b"{}\n")
    with pytest.raises(UncommittedRaw, match=r"'loose.jsonl'.*repro commit-raw"):
        bring(graph, folder)
    assert lake.head("raw") == before
    assert list(lake.uncommitted("raw")) == ["loose.jsonl"]


def test_what_another_tool_wrote_and_we_commit_is_a_snapshot_like_any_other(graph: Graph) -> None:
    """S0.12: data arrives by any tool; here boto3 through the lakeFS gateway."""
    bench = graph.bench()
    with pytest.raises(NothingToCommit, match="nothing is staged on the branch raw"):
        importing.commit_raw(bench.lake.client, bench.blobs.store, "nothing")
    rows = jsonl(tickets(40))
    gateway(graph.connections).put_object(Bucket=graph.connections.repository, Key="raw/tickets/ö b.jsonl", Body=rows)
    done = importing.commit_raw(bench.lake.client, bench.blobs.store, "by boto3", "somebody")
    assert (done.files, done.size, done.new) == (1, None, True)
    assert tree(graph, done.commit) == {"tickets/ö b.jsonl": rows}
    info = bench.lake.client.commit_info(done.commit)
    assert (info.message, info.metadata["actor"]) == ("by boto3", "somebody")
    assert graph.run(None).success
    assert graph.run(done.key, ("raw_snapshot", "records")).success
    assert graph.document(done.key, "records").result.sources[0].read == 40


def test_hooks_that_another_tool_staged_are_never_committed(graph: Graph) -> None:
    """Raw data must never become a hook."""
    bench = graph.bench()
    gateway(graph.connections).put_object(Bucket=graph.connections.repository, Key="raw/_lakefs_actions/x.yaml", Body=b"name: x\n")
    with pytest.raises(Refused, match=r"_lakefs_actions/x.yaml"):
        importing.commit_raw(bench.lake.client, bench.blobs.store, "a hook")


KILLED = """
import os, signal, sys
from pathlib import Path
from repro_assets import importing
from resources.blobs import Blobs
from resources.lake import Lake
from resources.lake.transaction import Transaction
from resources.settings import Connections

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def before(name):
    setattr(Transaction, name, kill)

def after(name):
    real = getattr(Transaction, name)
    setattr(Transaction, name, lambda *arguments: (real(*arguments), kill()))

importing.BATCH = 8
moment, folder = sys.argv[1:]
progress = None
if moment == "half the blobs":
    progress = lambda done, total: done >= total // 2 and kill()
elif moment != "never":
    {"before": before, "after": after}[moment.split()[0]](moment.split()[1])
where = Connections.from_environment()
importing.import_files(Lake.connect(where), Blobs.connect(where), [Path(folder)], progress=progress)
"""


@pytest.mark.parametrize(("moment", "there"), [("half the blobs", False), ("before _merge", False), ("after _merge", True)])
def test_a_killed_import_leaves_raw_at_the_old_or_the_new_state_and_can_be_repeated(
    graph: Graph, tmp_path: Path, moment: str, there: bool
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for index in range(30):
        (many / f"{index}.txt").write_text(str(index))
    lake = graph.bench().lake.client
    old = lake.head("raw")
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, str(many)], cwd=Path(__file__).parents[1], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    head = lake.head("raw")
    assert (head != old) is there
    assert len(tree(graph, head)) == (30 if there else 0)
    assert list(lake.uncommitted("raw")) == []
    done = bring(graph, many)
    assert done.new is not there
    assert tree(graph, done.commit) == {f"{index}.txt": str(index).encode() for index in range(30)}
    assert done.commit == lake.head("raw")


# ---- tables


def lakehouse(folder: Path) -> Path:
    for number, mode in enumerate(("error", "append", "overwrite")):
        write_deltalake(folder, pa.table({"prompt": [f"q{number}"], "completion": [f"a{number}"]}), mode=mode)  # type: ignore[call-overload]
    return folder


def bring_table(graph: Graph, table: tables.Table, to: str = "tables/t", **options: object) -> Imported:
    bench = graph.bench()
    return importing.import_table(bench.lake.client, bench.blobs.store, table, to=to, **options)  # type: ignore[arg-type]


def test_a_version_of_a_table_is_a_folder_of_raw_and_another_version_takes_its_place(graph: Graph, tmp_path: Path) -> None:
    """S0.39, S0.43: an older version although a newer one is there; the window says which, and every file's digest."""
    folder = lakehouse(tmp_path / "delta")
    one = tables.delta(str(folder), 1)
    seen: list[tuple[int, int]] = []
    done = bring_table(graph, one, progress=lambda at, total: seen.append((at, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    found = tree(graph, done.commit)
    assert set(found) == {f"tables/t/{file.path}" for file in one.files} | {"tables/t/_window.json"}
    window = json.loads(found["tables/t/_window.json"])
    assert (window["format"], window["version"], window["timestamp"][:2]) == ("delta", 1, "20")
    for file in window["files"]:
        data = found[f"tables/t/{file['path']}"]
        assert (file["sha256"], file["size"]) == (sha256(data), len(data))
        assert data == (folder / file["source"]).read_bytes()
    info = graph.bench().lake.client.commit_info(done.commit)
    assert (info.metadata["table_state"], done.files, done.new) == ("version 1", 2, True)
    assert manifest.selected(found, RawSection()) == sorted(f"tables/t/{file.path}" for file in one.files)

    assert not bring_table(graph, tables.delta(str(folder), 1)).new
    bring(graph, folder / "_delta_log", to="beside")
    newer = tables.delta(str(folder), 2)
    after = tree(graph, bring_table(graph, newer).commit)
    assert {path for path in after if path.startswith("tables/")} == {f"tables/t/{newer.files[0].path}", "tables/t/_window.json"}
    assert any(path.startswith("beside/") for path in after)


def test_a_table_never_takes_the_place_of_other_data(graph: Graph, folder: Path, tmp_path: Path) -> None:
    table = tables.delta(str(lakehouse(tmp_path / "delta")), 0)
    bring(graph, folder, to="mine")
    with pytest.raises(CannotImport, match="needs a folder of its own on raw"):
        bring_table(graph, table, to="/")
    with pytest.raises(CannotImport, match=r"'mine' on raw holds 'mine/.*', which is no table's"):
        bring_table(graph, table, to="mine")
    bring_table(graph, table)
    with pytest.raises(CannotImport, match=r"'tables/t' on raw holds the table .*delta/?: import .*other.*--to another folder"):
        bring_table(graph, tables.delta(str(lakehouse(tmp_path / "other")), 0))


def test_a_data_file_that_is_gone_or_was_changed_stops_the_import(graph: Graph, tmp_path: Path) -> None:
    folder = lakehouse(tmp_path / "delta")
    table = tables.delta(str(folder), 0)
    file = folder / table.files[0].path
    data = file.read_bytes()
    file.write_bytes(data + b"x")
    with pytest.raises(TableError, match=r"has [\d,]+ bytes, the table says"):
        bring_table(graph, table)
    file.unlink()
    with pytest.raises(TableError, match=r"version 0: part-.* cannot be read.*vacuumed"):
        bring_table(graph, table)


def test_the_command_imports_one_state_of_a_table(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_RECIPE", str(graph.recipe()))
    folder = lakehouse(tmp_path / "delta")
    answer = repro("import", "--delta", folder, "--version", 0, "--to", "tables/t", "--json")
    assert answer.code == 0, answer
    found = tree(graph, answer.json["commit"])
    assert json.loads(found["tables/t/_window.json"])["version"] == 0
    assert (answer.json["files"], len(found)) == (1, 2)
