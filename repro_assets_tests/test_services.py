"""The UI's processes: the address that is kept, a start and an end that leave nothing behind, and failures with the end of the log."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from repro_assets import services
from repro_assets.services import Child, Ui, UiError, running, ui_url
from repro_assets_tests.world import Prepared, prepared
from resources.settings import Connections

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with prepared(servers, tmp_path_factory.mktemp("services")) as found:
        yield found


def test_the_address_is_chosen_once_and_a_damaged_note_of_it_is_replaced(tmp_path: Path) -> None:
    url = ui_url(tmp_path)
    assert url.startswith("http://127.0.0.1:3")
    assert ui_url(tmp_path) == url
    (tmp_path / "ui.json").write_text("{")
    assert ui_url(tmp_path).startswith("http://127.0.0.1:3")
    assert json.loads((tmp_path / "ui.json").read_text())["url"] == ui_url(tmp_path)


def test_a_port_that_somebody_listens_on_is_not_chosen(tmp_path: Path) -> None:
    with socket.socket() as other:
        port = services._free_port(set())
        other.bind(("127.0.0.1", port))
        other.listen(1)
        assert services._free_port(set()) != port
    assert services._free_port({port}) != port


def test_dev_serves_the_graph_until_it_is_asked_to_stop_and_leaves_no_process(made: Prepared) -> None:
    """`dagster dev` left code servers behind; the groups end with us."""
    command = [sys.executable, "-m", "repro_assets", "dev", "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = "".join(process.stdout.readline() for _ in range(3))
        url = json.loads(said)["url"]
        family = psutil.Process(process.pid).children(recursive=True)
        assert {"dagster-webserver", "dagster-daemon"} <= {Path(part).name for child in family for part in child.cmdline()[:3]}
        query = json.dumps({"query": "{ assetNodes { assetKey { path } } }"}).encode()
        request = urllib.request.Request(f"{url}/graphql", query, {"Content-Type": "application/json"})
        answered = json.load(urllib.request.urlopen(request, timeout=60))
        assert ["promotion"] in [node["assetKey"]["path"] for node in answered["data"]["assetNodes"]]
        with pytest.raises(UiError, match=f"a Dagster UI answers at {url} already"), running(made.graph.folder / "home"):
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
    _gone, alive = psutil.wait_procs(family, timeout=10)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


def test_a_part_of_the_ui_that_ends_by_itself_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "daemon.log"
    with log.open("wb") as out:
        child = Child("daemon", subprocess.Popen(["sh", "-c", "echo the last words; exit 3"], stdout=out), log)
    with pytest.raises(UiError, match=r"the Dagster daemon ended with code 3; the end of .*daemon\.log:\nthe last words"):
        Ui("http://127.0.0.1:1", (child,)).wait()
    with pytest.raises(UiError, match="the last words"):
        services._wait("http://127.0.0.1:1", [child])


def test_groups_are_ended_whole(tmp_path: Path) -> None:
    """A child of a child that ignores TERM, as a code server may."""
    note = tmp_path / "pid"
    script = f"trap '' TERM; (trap '' TERM; echo $$ > {note}; sleep 60) & wait"
    process = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    until = time.monotonic() + 10
    while not note.exists() and time.monotonic() < until:
        time.sleep(0.02)
    group = os.getpgid(process.pid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "STOP_SECONDS", 0.5)
        services._stop([process])
    left = [found for found in psutil.process_iter(["pid", "status"]) if found.pid != os.getpid() and _group(found.pid) == group]
    assert [found.pid for found in left if found.info["status"] != psutil.STATUS_ZOMBIE] == []


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1
