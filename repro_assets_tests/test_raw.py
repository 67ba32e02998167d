"""Raw objects at commits: true digests whoever wrote them, remembered by place, and which commit brought what."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from repro_assets import importing
from repro_assets.memo import Memo
from repro_assets.raw import Reader
from repro_assets.recipe import RawSection
from repro_assets.trust.canonical import sha256
from repro_assets_tests.test_shelf import gateway
from repro_assets_tests.world import Prepared, prepared
from resources.lake import Lake
from resources.settings import Connections

LINKED, UPLOADED = b"linked bytes\n", b"uploaded bytes\n"


@pytest.fixture(scope="module")
def made(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with prepared(servers, tmp_path_factory.mktemp("raw")) as found:
        yield found


@pytest.fixture(scope="module")
def commits(made: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two files of the recipe: one by our import, one by another tool; then the first one changed and changed back."""
    folder: Path = tmp_path_factory.mktemp("files") / "tickets"
    folder.mkdir()
    bench = made.graph.bench()

    def bring(data: bytes) -> str:
        (folder / "linked.txt").write_bytes(data)
        return importing.import_files(bench.lake.client, bench.blobs.store, [folder.parent]).commit

    found = {"linked": bring(LINKED)}
    gateway(made.graph.connections).put_object(Bucket=made.graph.connections.repository, Key="raw/tickets/uploaded.txt", Body=UPLOADED)
    found["uploaded"] = importing.commit_raw(bench.lake.client, bench.blobs.store, "by another tool").commit
    found["changed"], found["back"] = bring(b"other"), bring(LINKED)
    return found


def reader(made: Prepared, **options: bool) -> Reader:
    bench = made.graph.bench()
    return Reader(bench.lake.client, Memo(bench.objects, bench.blobs.store, bench.signing), **options)


def test_digests_are_of_the_bytes_whatever_lakefs_was_told(made: Prepared, commits: dict[str, str]) -> None:
    """S0.15, S0.17: SHA-256 and size of every raw file; lakeFS's own checksum of the uploaded one is another."""
    files = reader(made).files(commits["back"], RawSection(include=("tickets/*.txt",)))
    assert [(file.path, file.sha256, file.size, file.format) for file in files] == [
        ("tickets/linked.txt", sha256(LINKED), len(LINKED), "txt"),
        ("tickets/uploaded.txt", sha256(UPLOADED), len(UPLOADED), "txt"),
    ]
    assert made.graph.bench().lake.client.stat(commits["back"], "tickets/uploaded.txt").sha256 is None


def test_a_digest_is_remembered_by_place_and_read_again_when_asked(
    made: Prepared, commits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = RawSection(include=("tickets/*.txt",))
    first = reader(made).files(commits["back"], section)
    opened: list[str] = []
    real = Lake.open
    monkeypatch.setattr(Lake, "open", lambda lake, commit, path: (opened.append(path), real(lake, commit, path))[1])
    assert reader(made).files(commits["back"], section) == first
    assert opened == []
    assert reader(made, again=True).files(commits["back"], section) == first
    assert sorted(opened) == ["tickets/linked.txt", "tickets/uploaded.txt"]


def test_a_forged_memory_of_a_digest_is_not_believed(made: Prepared, commits: dict[str, str]) -> None:
    bench = made.graph.bench()
    reader(made).files(commits["back"], RawSection(include=("tickets/*.txt",)))
    names = bench.objects.list("memo/raw/")
    good = {name: bench.objects.get(name) for name in names}
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        bench.objects.put(name, good[other])  # truly signed, but for another place
    found = reader(made).files(commits["back"], RawSection(include=("tickets/*.txt",)))
    assert [file.sha256 for file in found] == [sha256(LINKED), sha256(UPLOADED)]


def test_history_names_the_commit_that_brought_each_object_as_it_is(made: Prepared, commits: dict[str, str]) -> None:
    """S0.43: traceable source windows."""
    paths = ["tickets/linked.txt", "tickets/uploaded.txt"]
    seen, window = reader(made).history(commits["back"], paths)
    assert seen == {"tickets/linked.txt": commits["back"], "tickets/uploaded.txt": commits["uploaded"]}
    assert window[0] <= window[1]
    assert all(moment.endswith("+00:00") for moment in window)
    assert reader(made).history(commits["linked"], paths[:1])[0] == {"tickets/linked.txt": commits["linked"]}
