"""Finding the two server programs: named by a variable, on PATH, in the user's cache, as a pinned release, else built (build.py).

Nothing here starts a server. `python3 -m resources.servers.binaries` needs the standard library only.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from resources.servers import build
from resources.servers.state import Progress, ServerError, locked, quiet

SOURCES = Path(__file__).resolve().parents[2] / "deploy" / "servers"
RELEASE_SECONDS = 180.0  # a whole release in this time, else building is as fast
BUILD_LOCK_SECONDS = 1800.0


@dataclass(frozen=True)
class Program:
    """One pinned server: its version, its Go package, and where a ready binary may come from."""

    name: str
    title: str
    program: str
    version: str
    package: str
    stamp: str  # the Go variable that holds the version
    variable: str
    releases: str = ""
    archives: dict[str, str] = field(default_factory=dict)  # archive name -> SHA-256

    @property
    def sources(self) -> Path:
        return SOURCES / self.name


LAKEFS = Program(
    name="lakefs",
    title="lakeFS",
    program="lakefs",
    version="1.86.0",
    package="github.com/treeverse/lakefs/cmd/lakefs",
    stamp="github.com/treeverse/lakefs/pkg/version.Version=1.86.0",
    variable="REPRO_LAKEFS_BINARY",
    releases="https://github.com/treeverse/lakeFS/releases/download/v1.86.0",
    archives={
        "lakeFS_1.86.0_Linux_x86_64.tar.gz": "dc02b075ddcbb0984f96f6be2e0e08d74bd0967920ec89dd00a97b5d400ad8eb",
        "lakeFS_1.86.0_Linux_arm64.tar.gz": "a214e8713775e604f9e7ea3726fc808ccc9770ebb75a3b60ed362f1406312547",
        "lakeFS_1.86.0_Darwin_x86_64.tar.gz": "acfa4968f7b11d2c67196e990ac883800cacc33dee251e4740228925dabfea93",
        "lakeFS_1.86.0_Darwin_arm64.tar.gz": "e99c9c783c3766e92509f196c2470d72e629582821480b1f31dbb3468ab459bf",
    },
)
S3 = Program(
    name="s3",
    title="the S3 server (versitygw)",
    program="versitygw",
    version="1.8.0",
    package="github.com/versity/versitygw/cmd/versitygw",
    stamp="main.Version=v1.8.0",
    variable="REPRO_S3_BINARY",
)
PROGRAMS = {"lakefs": LAKEFS, "s3": S3}


def find_all(progress: Progress = quiet) -> dict[str, Path]:
    """Both binaries, made side by side when they must be made. A wrong variable is told before anything is made."""
    for program in PROGRAMS.values():
        if named := os.environ.get(program.variable):
            _named(program, Path(named).expanduser())
    with ThreadPoolExecutor(len(PROGRAMS)) as pool:
        futures = {name: pool.submit(find, program, progress) for name, program in PROGRAMS.items()}
        return {name: future.result() for name, future in futures.items()}


def find(program: Program, progress: Progress = quiet) -> Path:
    """The binary of one program by the first route that has it. ServerError names every route tried."""
    named = os.environ.get(program.variable)
    if named:
        return _named(program, Path(named).expanduser())
    notes: list[str] = []
    found = _on_path(program, notes)
    if found:
        return found
    cached = cached_binary(program)
    if cached.exists():
        return cached
    notes.append(f"cache: {cached} does not exist")
    routes: tuple[Callable[[Program, Path, list[str], Progress], bool], ...] = (_release, _build)
    with locked(cached.parent.with_name(f"{cached.parent.name}.lock"), progress, program.title, BUILD_LOCK_SECONDS):
        if cached.exists():
            return cached
        for left in cached.parent.parent.glob(f".{cached.parent.name}-*"):  # of a killed build: we hold its lock, so nobody uses it
            shutil.rmtree(left, ignore_errors=True)
        for route in routes:
            # a scratch folder beside the target, so that the last step is one atomic rename
            with _scratch(cached.parent) as scratch:
                made = scratch / cached.name
                if route(program, made, notes, progress):
                    made.chmod(0o755)
                    os.rename(scratch, cached.parent)
                    return cached
    raise ServerError(
        f"{program.title} {program.version} was not found and could not be made. Tried in this order:\n"
        + "\n".join(f"  - {note}" for note in [f"{program.variable} is not set", *notes])
        + f"\nInstall Go {build.needed_version(program.sources)} or newer, or set {program.variable} to a binary of version "
        + program.version
    )


def cache_folder() -> Path:
    """Where binaries are kept for every checkout of this user."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "repro-assets" / "servers"
    home = Path.home()
    return (home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache") / "repro-assets" / "servers"


def cached_binary(program: Program) -> Path:
    """The key names everything the binary is made of: the pinned modules with their hashes, the flags, the platform."""
    parts = [program.version, program.stamp, sys.platform, platform.machine(), *build.FLAGS]
    with contextlib.suppress(FileNotFoundError):
        parts += [hashlib.sha256((program.sources / name).read_bytes()).hexdigest() for name in ("go.mod", "go.sum")]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return cache_folder() / f"{program.program}-{program.version}-{key}" / program.program


def _named(program: Program, path: Path) -> Path:
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise ServerError(
            f"{program.variable} is {path}: that is no executable file. Correct it, or unset it to have the binary found or built"
        )
    return path.absolute()


def _on_path(program: Program, notes: list[str]) -> Path | None:
    found = shutil.which(program.program)
    if not found:
        notes.append(f"PATH: no {program.program}")
        return None
    version = reported_version(Path(found))
    if version != program.version:
        notes.append(f"PATH: {found} is version {version or 'unknown'}, {program.version} is needed")
        return None
    return Path(found).absolute()


def reported_version(binary: Path) -> str | None:
    """What `--version` says, asked in an empty folder because lakeFS reads a config.yaml from the working directory."""
    with tempfile.TemporaryDirectory() as empty:
        try:
            answer = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=20, cwd=empty, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
    match = re.search(r"\bv?(\d+\.\d+\.\d+)\b", answer.stdout)
    return match.group(1) if match and answer.returncode == 0 else None


def _release(program: Program, target: Path, notes: list[str], progress: Progress) -> bool:
    """The official archive, when this platform has one, the network lets us, and its SHA-256 is the pinned one."""
    base = os.environ.get("REPRO_LAKEFS_RELEASES", program.releases)
    machine = {"aarch64": "arm64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine())
    archive = f"lakeFS_{program.version}_{platform.system()}_{machine}.tar.gz"
    expected = program.archives.get(archive)
    if not program.releases:
        return False
    if not base or not expected:
        notes.append("release: turned off by an empty REPRO_LAKEFS_RELEASES" if expected else f"release: none is pinned for {archive}")
        return False
    url = f"{base.rstrip('/')}/{archive}"
    progress(f"{program.title}: fetching the official release {program.version}")
    with tempfile.TemporaryFile() as file:
        digest = hashlib.sha256()
        deadline = time.monotonic() + RELEASE_SECONDS
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                while chunk := answer.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"not complete after {RELEASE_SECONDS:.0f} s")
        except OSError as error:
            return _refuse(notes, progress, f"release: {url} could not be fetched ({getattr(error, 'reason', error)})")
        if digest.hexdigest() != expected:
            return _refuse(notes, progress, f"release: {url} has SHA-256 {digest.hexdigest()}, pinned is {expected}: not used")
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:gz") as archive_file:
            member = archive_file.extractfile(program.program)
            if member is None:
                return _refuse(notes, progress, f"release: {url} holds no {program.program}")
            with open(target, "wb") as output:
                shutil.copyfileobj(member, output, 1 << 20)
    return True


def _refuse(notes: list[str], progress: Progress, note: str) -> bool:
    notes.append(note)
    progress(note)
    return False


def _build(program: Program, target: Path, notes: list[str], progress: Progress) -> bool:
    return build.build(program.title, program.sources, program.package, program.stamp, target, cache_folder(), notes, progress)


@contextlib.contextmanager
def _scratch(final: Path):  # type: ignore[no-untyped-def]
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after success it has already been renamed away


def main() -> int:
    """Find or make both binaries, telling how far it is. 0, or 3 when one could not be had."""

    def tell(line: str) -> None:
        print(f"servers: {line}", file=sys.stderr, flush=True)

    def stop(number: int, _frame: object) -> None:
        """Compilers share our group and end with us; the next build removes what they left."""
        tell("stopped")
        signal.signal(number, signal.SIG_IGN)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    if os.environ.get("REPRO_OWN_GROUP"):  # beside the environment's installation: whoever waits for both must be able to end all of us
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
    try:
        find_all(tell)
    except ServerError as error:
        tell(str(error))
        return 3
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
