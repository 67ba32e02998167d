"""Bringing data to raw: what is refused, what a snapshot holds, other tools' writes, and a process killed in the middle."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repro_assets import importing
from repro_assets.importing import CannotImport, Imported, listed
from repro_assets.partitions import key_of
from repro_assets.shelf import UncommittedRaw
from repro_assets_tests.graph import Graph, jsonl, tickets
from repro_assets_tests.test_shelf import gateway
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
