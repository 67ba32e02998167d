"""The life of the embedded servers, on the real lakeFS and the real versitygw: start, crash, lost state, taken ports, full disk."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from resources.servers import ServerError, connect, down, embedded, process, s3, status, up
from resources.servers.state import Layout, Process, State, read_credentials, read_state, write_state
from resources.settings import Connections, SettingsError

LINES: list[str] = []


@pytest.fixture(autouse=True)
def told() -> list[str]:
    LINES.clear()
    return LINES


def processes_of(home: Path) -> list[str]:
    """The names of this home's servers among all processes of the machine."""
    found = []
    for item in psutil.process_iter(["cmdline", "status"]):
        arguments = item.info["cmdline"] or []
        found += [name for name in ("lakefs", "s3") if arguments and Layout(home).owns(name, arguments)]
    return sorted(found)


def kill(home: Path, *names: str) -> None:
    for name in names:
        pid = read_state(Layout(home)).processes[name].pid
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def listener(port: int) -> socket.socket:
    """Somebody else's server."""
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind(("127.0.0.1", port))
    taken.listen(1)
    return taken


def test_up_gives_working_servers_and_is_idempotent(home: Path, both: tuple) -> None:  # type: ignore[type-arg]
    """S0.12 lakeFS holds the versions, S0.13 an object store holds the bytes."""
    write, read = both
    connections = up(home, LINES.append)
    written = write(connections)
    assert read(connections, written) == (written.content, written.content)
    before = read_state(Layout(home))
    assert up(home, LINES.append) == connections == Connections.from_environment(home, {})
    assert read_state(Layout(home)) == before
    assert processes_of(home) == ["lakefs", "s3"]
    assert [(item.name, item.running, item.healthy) for item in status(home)] == [("s3", True, True), ("lakefs", True, True)]


def test_secrets_are_private_and_nothing_listens_or_calls_beyond_this_machine(home: Path) -> None:
    up(home)
    layout = Layout(home)
    credentials = read_credentials(layout)
    assert credentials is not None
    for path in (layout.credentials, layout.lakefs_config, layout.state, layout.log("s3"), layout.log("lakefs")):
        assert (path.name, oct(mode(path))) == (path.name, "0o600")
    assert oct(mode(layout.folder)) == "0o700"
    secrets = [
        credentials.lakefs_secret_key,
        credentials.s3_secret_key,
        credentials.lakefs_encrypt_secret,
        credentials.lakefs_signing_secret,
    ]
    for item in read_state(layout).processes.values():
        server = psutil.Process(item.pid)
        assert not [secret for secret in secrets if secret in " ".join(server.cmdline())]
        connections = server.net_connections("inet")
        assert {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN} == {("127.0.0.1", item.port)}
        assert {c.raddr.ip for c in connections if c.raddr} <= {"127.0.0.1"}
    assert not [secret for secret in secrets if secret in repr(credentials)]
    config = json.loads(layout.lakefs_config.read_text())
    assert (config["stats"], config["email_subscription"], config["actions"]) == ({"enabled": False},) * 3
    assert config["security"] == {"check_latest_version": False, "audit_check_url": ""}


def test_a_hook_in_the_data_is_never_run(home: Path) -> None:
    """The commit hook below refuses every commit: with actions on, the commit answers 412."""
    from lakefs_sdk.client import LakeFSClient
    from lakefs_sdk.configuration import Configuration
    from lakefs_sdk.models.commit_creation import CommitCreation

    c = up(home)
    lake = LakeFSClient(Configuration(host=c.lakefs_endpoint, username=c.lakefs_access_key, password=c.lakefs_secret_key))
    hook = b"name: no\non:\n  pre-commit:\nhooks:\n  - id: no\n    type: lua\n    properties:\n      script: |\n        error('hook ran')\n"
    lake.objects_api.upload_object(c.repository, "main", "_lakefs_actions/no.yaml", content=hook)
    assert lake.commits_api.commit(c.repository, "main", CommitCreation(message="with a hook")).id


def test_up_by_three_processes_at_once_starts_one_pair(home: Path) -> None:
    program = (
        "import sys; from resources.servers import up; c = up(sys.argv[1]); print(c.lakefs_endpoint, c.s3_endpoint, c.lakefs_access_key)"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert processes_of(home) == ["lakefs", "s3"]


@pytest.mark.parametrize("victims", [("s3",), ("lakefs",), ("s3", "lakefs")], ids=lambda names: "+".join(names))
def test_kill_9_right_behind_a_commit_loses_nothing(home: Path, both: tuple, victims: tuple[str, ...]) -> None:  # type: ignore[type-arg]
    write, read = both
    connections = up(home)
    before = read_state(Layout(home))
    written = write(connections)
    kill(home, *victims)
    with pytest.raises(ServerError, match="`repro up`"):
        Connections.from_environment(home, {})
    assert [item.name for item in status(home) if not item.running] == [name for name in ("s3", "lakefs") if name in victims]

    assert up(home) == connections  # the same ports and keys
    assert read(connections, written) == (written.content, written.content)
    after = read_state(Layout(home))
    assert {name for name in ("s3", "lakefs") if after.processes[name].pid != before.processes[name].pid} == set(victims)


def test_down_and_up_keep_ports_credentials_and_data(home: Path, both: tuple) -> None:  # type: ignore[type-arg]
    write, read = both
    connections = up(home)
    written = write(connections)
    assert down(home) == ["lakefs", "s3"]
    assert processes_of(home) == []
    assert down(home) == []
    assert up(home) == connections
    assert read(connections, written) == (written.content, written.content)


def test_a_recycled_pid_is_neither_trusted_nor_stopped(home: Path) -> None:
    up(home)
    down(home)
    layout = Layout(home)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        ports = read_state(layout).ports
        stale = Process(stranger.pid, "a start long ago", ports["s3"], "/somewhere", 0)
        write_state(layout, State(ports, {"s3": stale, "lakefs": replace(stale, port=ports["lakefs"], depends=ports["s3"])}))
        with pytest.raises(ServerError, match="no servers run"):
            Connections.from_environment(home, {})
        up(home)
        assert stranger.pid not in {item.pid for item in read_state(layout).processes.values()}
        assert all(item.healthy for item in status(home))
        down(home)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("damage", ["", "{half a fi", '{"ports": [], "processes": {}}', None], ids=["empty", "half", "other shape", "gone"])
def test_a_lost_state_file_leaves_no_second_pair_behind(home: Path, both: tuple, damage: str | None) -> None:  # type: ignore[type-arg]
    write, read = both
    written = write(up(home))
    if damage is None:
        Layout(home).state.unlink()
    else:
        Layout(home).state.write_text(damage)
    connections = up(home, LINES.append)
    assert processes_of(home) == ["lakefs", "s3"]
    assert read(connections, written) == (written.content, written.content)


def test_an_editor_on_a_file_of_the_servers_is_not_taken_for_a_server(home: Path) -> None:
    up(home)
    layout = Layout(home)
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    editors = [subprocess.Popen([*program, str(path)]) for path in (layout.lakefs_config, layout.s3_objects)]
    try:
        layout.state.unlink()
        up(home)
        assert [editor.poll() for editor in editors] == [None, None]
    finally:
        for editor in editors:
            editor.kill()
            editor.wait()


def test_ports_taken_by_somebody_else_are_replaced_and_told(home: Path, both: tuple) -> None:  # type: ignore[type-arg]
    write, read = both
    first = up(home)
    written = write(first)
    down(home)
    ports = read_state(Layout(home)).ports
    with listener(ports["s3"]), listener(ports["lakefs"]):
        second = up(home, LINES.append)
    assert not {second.s3_endpoint, second.lakefs_endpoint} & {first.s3_endpoint, first.lakefs_endpoint}
    assert [line for line in LINES if line.startswith(f"s3: port {ports['s3']} is used by another program")]
    assert [line for line in LINES if line.startswith(f"lakefs: port {ports['lakefs']} is used by another program")]
    assert Connections.from_environment(home, {}) == second
    assert read(second, written) == (written.content, written.content)


def test_when_s3_must_move_lakefs_follows_it(home: Path, both: tuple) -> None:  # type: ignore[type-arg]
    write, read = both
    first = up(home)
    written = write(first)
    kill(home, "s3")
    with listener(read_state(Layout(home)).ports["s3"]):
        second = up(home)
        assert second.s3_endpoint != first.s3_endpoint
        assert second.lakefs_endpoint == first.lakefs_endpoint
        assert read(second, written) == (written.content, written.content)


def test_a_port_that_is_lost_between_choosing_and_listening_is_chosen_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = embedded.choose_port
    with listener(0) as other:
        busy = other.getsockname()[1]
        answers = [busy]
        monkeypatch.setattr(embedded, "choose_port", lambda taken: answers.pop() if answers else choose(taken))
        connections = up(home, LINES.append)
    assert connections.s3_endpoint != f"http://127.0.0.1:{busy}"
    assert [line for line in LINES if line.startswith(f"s3: port {busy} is used by another program")]
    assert all(item.healthy for item in status(home))


def test_a_server_that_hangs_is_started_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "HANG_SECONDS", 0.5)
    monkeypatch.setattr(embedded, "HANG_STOP_SECONDS", 0.5)
    up(home)
    pid = read_state(Layout(home)).processes["lakefs"].pid
    os.kill(pid, signal.SIGSTOP)
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    assert [(item.name, item.healthy) for item in status(home)] == [("s3", True), ("lakefs", False)]
    up(home, LINES.append)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert [line for line in LINES if "does not answer" in line]
    assert all(item.healthy for item in status(home))


def test_servers_outlive_the_group_of_the_process_that_started_them(home: Path) -> None:
    program = "import sys, time; from resources.servers import up; up(sys.argv[1]); print('up', flush=True); time.sleep(60)"
    starter = subprocess.Popen([sys.executable, "-c", program, str(home)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert starter.stdout is not None and starter.stdout.readline() == "up\n"
    os.killpg(starter.pid, signal.SIGKILL)
    starter.communicate()
    assert [(item.name, item.healthy) for item in status(home)] == [("s3", True), ("lakefs", True)]


def test_variables_of_the_shell_do_not_reach_the_servers(home: Path, monkeypatch: pytest.MonkeyPatch, both: tuple) -> None:  # type: ignore[type-arg]
    write, read = both
    for name, value in {
        "LAKEFS_LISTEN_ADDRESS": "0.0.0.0:1",
        "LAKEFS_BLOCKSTORE_TYPE": "mem",
        "LAKEFS_STATS_ENABLED": "true",
        "VGW_READ_ONLY": "true",
        "ROOT_ACCESS_KEY_ID": "other",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "other",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_SESSION_TOKEN": "other",
    }.items():
        monkeypatch.setenv(name, value)
    connections = up(home)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    written = write(connections)
    assert read(connections, written) == (written.content, written.content)


def test_a_file_system_without_attributes_gets_a_sidecar_for_good(home: Path, monkeypatch: pytest.MonkeyPatch, both: tuple) -> None:  # type: ignore[type-arg]
    write, read = both
    with monkeypatch.context() as patch:
        patch.setattr(s3, "has_attributes", lambda folder: False)
        connections = up(home)
    written = write(connections)
    down(home)
    assert up(home) == connections  # attributes work again, but the choice stays with the folder
    assert read(connections, written) == (written.content, written.content)
    server = psutil.Process(read_state(Layout(home)).processes["s3"].pid)
    assert str(Layout(home).s3_sidecar) in server.cmdline()
    assert any(path.is_file() for path in Layout(home).s3_sidecar.rglob("*"))


def test_credentials_that_are_lost_or_damaged_are_never_made_anew_over_data(home: Path) -> None:
    up(home)
    down(home)
    kept = Layout(home).credentials.read_text()
    Layout(home).credentials.unlink()
    with pytest.raises(ServerError, match=r"credentials.json is missing but .* restore the file"):
        up(home)
    Layout(home).credentials.write_text(kept[:40])
    with pytest.raises(ServerError, match=r"credentials.json is damaged"):
        up(home)
    assert processes_of(home) == []
    Layout(home).credentials.write_text(kept)
    up(home)
    assert oct(mode(Layout(home).credentials)) == "0o600"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
        down(folder / ".repro")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_refused_before_anything_starts(small_disk: Path) -> None:
    with pytest.raises(ServerError, match=r"has 4[78] MiB free and the servers need 256 MiB.*REPRO_HOME"):
        up(small_disk / ".repro")
    assert processes_of(small_disk / ".repro") == []


def test_a_disk_that_fills_up_under_the_servers_loses_nothing_committed(
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    both: tuple,  # type: ignore[type-arg]
) -> None:
    write, read = both
    monkeypatch.setattr(embedded, "FREE_BYTES", 1 << 20)
    home = small_disk / ".repro"
    connections = up(home)
    written = write(connections)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), open(filler, "wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    kill(home, "lakefs")
    with pytest.raises(ServerError, match="MiB free and the servers need"):
        up(home)
    assert down(home, LINES.append) == ["s3"]
    assert [line for line in LINES if "state.json cannot be written (No space left on device)" in line]
    filler.unlink()
    assert read(up(home), written) == (written.content, written.content)


def test_without_root_too_the_free_space_is_checked_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "FREE_BYTES", 1 << 60)
    with pytest.raises(ServerError, match=r"MiB free and the servers need \d+ MiB: free some space"):
        up(home)
    assert not Layout(home).credentials.exists()


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match=r"file/.repro/servers cannot be made \(Not a directory\).*REPRO_HOME"):
        up(tmp_path / "file" / ".repro")


def test_a_server_that_ends_while_starting_shows_its_last_lines(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'panic: disk quota exceeded' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("REPRO_LAKEFS_BINARY", str(broken))
    with pytest.raises(ServerError) as caught:
        up(home)
    assert "lakeFS ended while it started" in str(caught.value)
    assert "panic: disk quota exceeded" in str(caught.value)
    assert str(Layout(home).log("lakefs")) in str(caught.value)
    assert processes_of(home) == ["s3"]
    monkeypatch.undo()
    up(home)
    assert processes_of(home) == ["lakefs", "s3"]


def test_a_server_that_stays_silent_is_stopped_and_told(tmp_path: Path) -> None:
    started = process.launch(Path("/bin/sleep"), ["60"], {}, tmp_path / "w", tmp_path / "log", embedded.choose_port(set()))
    with pytest.raises(ServerError, match="did not answer on port"):
        process.wait_ready(started, "/_health", "sleep", tmp_path / "log", 0, seconds=0.3)
    assert not embedded.is_running(started)


def test_a_binary_for_another_machine_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"\x7fELF not really")
    foreign.chmod(0o755)
    monkeypatch.setenv("REPRO_S3_BINARY", str(foreign))
    with pytest.raises(ServerError, match=r"foreign cannot be started \(Exec format error\)"):
        up(home)


def test_connect_starts_the_homes_own_servers_even_when_the_shell_took_over_its_environment(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = connect(home)
    for name, value in first.environment().items():
        monkeypatch.setenv(name, value)
    down(home)
    assert connect(home) == first
    assert all(item.healthy for item in status(home))


def test_a_kill_in_the_middle_of_making_the_repository_does_not_block_its_namespace(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    both: tuple,  # type: ignore[type-arg]
) -> None:
    """lakeFS writes <namespace>/_lakefs/dummy before the repository exists, and refuses a namespace that has it."""
    write, read = both
    up(home)
    monkeypatch.setenv("REPRO_REPOSITORY", "second")
    objects = Layout(home).s3_objects / "repro-lake" / "second" / "_lakefs"
    objects.mkdir(parents=True)
    (objects / "dummy").write_text("this is dummy data - created by lakeFS to check accessibility")
    connections = up(home)
    assert connections.namespace == "s3://repro-lake/second"
    written = write(connections)
    assert read(connections, written) == (written.content, written.content)

    monkeypatch.setenv("REPRO_REPOSITORY", "third")  # a namespace with more than the mark is somebody's: never touched
    other = Layout(home).s3_objects / "repro-lake" / "third"
    (other / "_lakefs").mkdir(parents=True)
    (other / "_lakefs" / "dummy").write_text("")
    (other / "data").write_text("precious")
    with pytest.raises(ServerError, match="storage namespace already in use.*REPRO_NAMESPACE"):
        up(home)
    assert (other / "_lakefs" / "dummy").exists() and (other / "data").read_text() == "precious"


def test_connect_refuses_half_of_the_external_variables_and_starts_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(SettingsError, match="LAKECTL_SERVER_ENDPOINT_URL is not"):
        connect(home)
    assert not home.exists()


def test_up_on_running_servers_is_quick(home: Path) -> None:
    up(home)
    start = time.monotonic()
    up(home)
    assert time.monotonic() - start < 2.0
