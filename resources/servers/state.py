"""What the embedded servers of one home leave on disk: folders, lock, credentials, ports, and which process is which.

Starting, stopping and configuring the servers is done elsewhere; nothing here talks to a server.
"""

import contextlib
import fcntl
import json
import os
import random
import secrets
import socket
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

Progress = Callable[[str], None]
NAMES = ("s3", "lakefs")  # the order of starting: lakeFS keeps its objects in S3
LOCK_SECONDS = 180.0


class ServerError(RuntimeError):
    """A server or its files cannot be used; the message says which, why, and what to do."""


def quiet(_: str) -> None:
    """A progress callback that says nothing."""


@dataclass(frozen=True)
class Layout:
    """Every path of the embedded servers under one home folder."""

    home: Path

    @property
    def folder(self) -> Path:
        return self.home / "servers"

    @property
    def state(self) -> Path:
        return self.folder / "state.json"

    @property
    def credentials(self) -> Path:
        return self.folder / "credentials.json"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def lakefs_config(self) -> Path:
        return self.folder / "lakefs.yaml"

    @property
    def s3_objects(self) -> Path:
        return self.folder / "s3" / "objects"

    @property
    def s3_sidecar(self) -> Path:
        return self.folder / "s3" / "sidecar"

    def data(self, name: str) -> Path:
        return self.folder / name

    def working(self, name: str) -> Path:
        return self.folder / name / "empty"

    def log(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"

    def owns(self, name: str, arguments: list[str]) -> bool:
        """Whether a command line is that of this home's server. Exact on purpose: an editor on lakefs.yaml is not a server."""
        if name == "lakefs":
            return arguments[1:] == ["--config", str(self.lakefs_config), "run"]
        return "--port" in arguments and "posix" in arguments and arguments[-1] == str(self.s3_objects)


@dataclass(frozen=True)
class Credentials:
    """Generated once per home. Losing them loses the servers' data, because lakeFS encrypts its users with one of them."""

    lakefs_access_key: str
    lakefs_secret_key: str = field(repr=False)
    lakefs_encrypt_secret: str = field(repr=False)
    lakefs_signing_secret: str = field(repr=False)
    s3_access_key: str
    s3_secret_key: str = field(repr=False)

    @classmethod
    def generate(cls) -> "Credentials":
        letters = string.ascii_letters + string.digits

        def text(count: int, alphabet: str = letters) -> str:
            return "".join(secrets.choice(alphabet) for _ in range(count))

        capitals = string.ascii_uppercase + string.digits
        return cls(
            lakefs_access_key="AKIA" + text(16, capitals),
            lakefs_secret_key=text(40),
            lakefs_encrypt_secret=text(48),
            lakefs_signing_secret=text(48),
            s3_access_key="REPRO" + text(15, capitals),
            s3_secret_key=text(40),
        )


@dataclass(frozen=True)
class Process:
    """One started server. `started` is a clock-independent start time where the system has one, so that a recycled pid never matches."""

    pid: int
    started: str
    port: int
    binary: str
    depends: int = 0  # lakeFS: the S3 port it was configured with


@dataclass(frozen=True)
class State:
    """The chosen ports (kept for ever, so that addresses stay the same) and the processes last started."""

    ports: dict[str, int]
    processes: dict[str, Process]


def read_state(layout: Layout) -> State:
    """The state on disk; empty when there is none or when it is damaged (it can always be made again)."""
    try:
        data = json.loads(layout.state.read_text("utf-8"))
        names = {item.name for item in fields(Process)}
        processes = {
            name: Process(**{key: value for key, value in item.items() if key in names}) for name, item in data["processes"].items()
        }
        return State({name: int(port) for name, port in data["ports"].items()}, processes)
    except FileNotFoundError:
        return State({}, {})
    except (ValueError, KeyError, TypeError, AttributeError):
        return State({}, {})


def write_state(layout: Layout, state: State) -> None:
    write_private(
        layout.state,
        json.dumps({"ports": state.ports, "processes": {name: asdict(item) for name, item in state.processes.items()}}, indent=1),
    )


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 so that a reader sees the old or the new content, never half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise ServerError(
            f"{path} cannot be written ({error.strerror}): free some space, or choose another place with REPRO_HOME"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def read_credentials(layout: Layout) -> Credentials | None:
    try:
        return Credentials(**json.loads(layout.credentials.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ServerError(
            f"{layout.credentials} is damaged ({error}): restore it from a copy, or move {layout.folder} away to begin with empty servers"
        ) from error


def make_credentials(layout: Layout) -> Credentials:
    """The home's credentials, generated at the first call. Refuses to make new ones over existing data: lakeFS could not read it."""
    found = read_credentials(layout)
    if found is not None:
        layout.credentials.chmod(0o600)
        return found
    if (layout.data("lakefs") / "metadata").exists():
        raise ServerError(
            f"{layout.credentials} is missing but {layout.data('lakefs')} has data that was encrypted with it: restore the file from a "
            f"copy, or move {layout.folder} away to begin with empty servers"
        )
    made = Credentials.generate()
    write_private(layout.credentials, json.dumps(asdict(made), indent=1))
    return made


@contextlib.contextmanager
def locked(path: Path, progress: Progress = quiet, what: str = "the servers", seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold an exclusive lock that dies with the process. Waits at most `seconds`, telling who holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        start = time.monotonic()
        told = 0.0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - start
                file.seek(0)
                holder = file.read().strip() or "unknown"
                if waited > seconds:
                    raise ServerError(
                        f"process {holder} has held {path} for more than {seconds:.0f} s: see what it does, or end it"
                    ) from None
                if waited >= told:
                    progress(f"waiting for process {holder}, which is preparing {what}")
                    told += 15.0
                time.sleep(0.1)
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, only its holder cannot be named
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield


def start_time(pid: int) -> str | None:
    """The start of a live process, None when it is gone or a zombie. On Linux in ticks since boot, which no clock change moves."""
    import psutil  # not at the top: building the servers on a bare machine needs this module before anything is installed

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
            return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{ticks}"
        return repr(process.create_time())
    except psutil.NoSuchProcess:
        return None


def is_running(process: Process | None) -> bool:
    return process is not None and start_time(process.pid) == process.started


def strays(layout: Layout, name: str, known: Process | None) -> list[int]:
    """Servers of this very home that the state file has lost: same user, and the command line that only this home starts."""
    import psutil

    found = []
    for process in psutil.process_iter(["pid", "uids", "cmdline", "status"]):
        arguments: list[str] = process.info["cmdline"] or []
        if not layout.owns(name, arguments) or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if process.info["uids"] and process.info["uids"].real == os.getuid() and (known is None or process.pid != known.pid):
            found.append(process.pid)
    return found


def can_listen(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last server may still be in TIME_WAIT
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def choose_port(taken: set[int]) -> int:
    """A port nobody listens on, below the range that systems hand out to outgoing connections, so that it stays free while we are down."""
    for _ in range(200):
        port = random.SystemRandom().randrange(20000, 30000)
        if port not in taken and can_listen(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def addresses(state: State, credentials: Credentials) -> dict[str, Any]:
    """The embedded servers as the fields of settings.Connections."""
    return {
        "lakefs_endpoint": f"http://127.0.0.1:{state.ports['lakefs']}",
        "lakefs_access_key": credentials.lakefs_access_key,
        "lakefs_secret_key": credentials.lakefs_secret_key,
        "s3_endpoint": f"http://127.0.0.1:{state.ports['s3']}",
        "s3_access_key": credentials.s3_access_key,
        "s3_secret_key": credentials.s3_secret_key,
    }


def running_servers(home: Path) -> dict[str, Any]:
    """The fields of settings.Connections for the servers that run under `home`; ServerError names the remedy when one does not."""
    layout = Layout(home)
    state, credentials = read_state(layout), read_credentials(layout)
    stopped = [name for name in NAMES if not is_running(state.processes.get(name))]
    if stopped or credentials is None:
        which = "no servers run" if len(stopped) == len(NAMES) else f"the {' and '.join(stopped)} server is not running"
        raise ServerError(
            f"{which} for {home}: start them with `repro up`, or set LAKECTL_SERVER_ENDPOINT_URL and its credentials to use external ones"
        )
    return addresses(state, credentials)
