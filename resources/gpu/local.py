"""The local backend: a job is processes on this machine, in a session of their own, that outlive the orchestrator and are found again.

Under `<home>/jobs/<key>/`: `log.txt`, `state.json` (the last start), and two lock files. How a job ended is read from S3 by the
executor; devices are handed out by `lease.py`.
"""

import fcntl
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import psutil

import resources
from resources.gpu import processes
from resources.gpu.backend import BackendError, State, Status
from resources.gpu.job import Job
from resources.gpu.lease import Holder, Leases, Slot, gpu_names, lease_folder

ENTRY: Final = ("-m", "resources.gpu.worker")
DROPPED: Final = ("LAKECTL_", "DAGSTER_", "TORCHELASTIC_", "REPRO_")
RANK_VARIABLES: Final = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"})


class Started(msgspec.Struct, frozen=True):
    """One process start. `pid` is 0 between asking for the process and having it; times are seconds since 1970."""

    submission: str
    started: float
    devices: tuple[str, ...]
    host: str
    pid: int = 0
    created: float = 0.0


class LocalBackend:
    """Jobs on this machine. `leases` default to its GPUs, or REPRO_CPU_SLOTS (1) jobs at a time where it has none.

    `entry` is what Python runs on a rank, before the key.
    """

    name = "local"

    def __init__(self, home: Path, leases: Leases | None = None, entry: tuple[str, ...] = ENTRY) -> None:
        self.home, self.entry = Path(home).absolute(), entry
        self.leases = leases or _leases(self.home)
        self._children: list[subprocess.Popen[bytes]] = []

    def submit(self, job: Job, key: str, environment: Mapping[str, str]) -> Status:
        """Starts the job when its devices are free, or attaches. Raises BackendError when this machine can never run it."""
        if job.nodes > 1:
            raise BackendError(f"a job of {job.nodes} nodes: the local backend is one machine; ask for 1 node, or use another backend")
        with self._lock(key, "submit.lock"):
            if (status := self.poll(key)).state is State.RUNNING:
                return status
            slots = self.leases.take(job.gpus)
            if not slots:
                return Status(State.PENDING, self._held(job))
            try:
                for slot in slots:
                    if slot.before:  # its first process is gone, or the lock would be held; ranks may sit on the device still
                        self._clear(processes.SUBMISSION, slot.before.submission)
                self._clear(processes.FOLDER, str(self._folder(key)))
                return self._start(job, key, environment, slots)
            finally:
                for slot in slots:
                    slot.drop()

    def poll(self, key: str) -> Status:
        """RUNNING while the job's first process lives."""
        self._children = [child for child in self._children if child.poll() is None]
        started = self._state(key)
        submission, at = (started.submission, started.started) if started else ("", 0.0)
        # A process of another host, on a shared home, is known by the lock alone.
        noted = started is not None and started.pid != 0 and started.host == socket.gethostname()
        if self._is_free(key) or (noted and not _leader(started)):
            return Status(State.GONE, submission=submission, started=at)
        return Status(State.RUNNING, f"process {started.pid}" if started else "starting", submission, at)

    def cancel(self, key: str, grace: float, submission: str = "") -> None:
        """Ends every process of the job; with torchrun the ranks get TERM, because torchrun gives them 30 s and no more."""
        with self._lock(key, "submit.lock"):
            folder = str(self._folder(key))
            started = self._state(key)
            if submission and started and started.submission != submission:
                return
            if started and started.host != socket.gethostname() and not self._is_free(key):
                raise BackendError(f"job {key} runs on {started.host}, this is {socket.gethostname()}: cancel it there")
            first = _leader(started)
            ranks = _children(first) if first and _is_torchrun(first) else []
            found = processes.members(processes.FOLDER, folder)
            processes.end(lambda: processes.members(processes.FOLDER, folder), ranks or ([first] if first else found), grace)

    def tail(self, key: str, lines: int = 40) -> str:
        """The last `lines` lines of the job's log, at most 64 KiB."""
        try:
            with open(self._folder(key) / "log.txt", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
                return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    def log(self, key: str) -> str:
        """Path of the job's log."""
        return str(self._folder(key) / "log.txt")

    def _folder(self, key: str) -> Path:
        return self.home / "jobs" / key

    @contextmanager
    def _lock(self, key: str, name: str) -> Iterator[int]:
        self._folder(key).mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder(key) / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _is_free(self, key: str) -> bool:
        """Whether no process holds the job's own lock, which its first process inherited."""
        try:
            lock = os.open(self._folder(key) / "alive.lock", os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True

    def _state(self, key: str) -> Started | None:
        try:
            return msgspec.json.decode((self._folder(key) / "state.json").read_bytes(), type=Started)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def _write_state(self, key: str, started: Started) -> None:
        scratch = self._folder(key) / ".state.json.part"
        scratch.write_bytes(msgspec.json.encode(started))
        os.replace(scratch, self._folder(key) / "state.json")

    def _clear(self, variable: str, value: str) -> None:
        processes.end(lambda: processes.members(variable, value), [], 0)

    def _held(self, job: Job) -> str:
        """Who has the devices that `job` waits for."""
        taken = self.leases.holders(job.gpus)
        said = [
            f"{device} is held by job {holder.job[:12]} ({holder.purpose}, process {holder.pid}, since {_clock(holder.since)})"
            if holder
            else f"{device} is held by a job that is just starting"
            for device, holder in taken.items()
        ]
        free = len(self.leases.devices(job.gpus)) - len(taken)
        return f"{max(job.gpus, 1)} wanted, {free} free; {'; '.join(said)}"

    def _start(self, job: Job, key: str, environment: Mapping[str, str], slots: list[Slot]) -> Status:
        folder, devices = self._folder(key), tuple(slot.device for slot in slots)
        started = Started(secrets.token_hex(8), time.time(), devices, socket.gethostname())
        argv = self._argv(job, key)
        with self._lock(key, "alive.lock") as alive, open(folder / "log.txt", "ab") as log:
            self._write_state(key, started)
            log.write(f"--- {_clock(started.started)} start {started.submission} on {', '.join(devices)}: {' '.join(argv)}\n".encode())
            log.flush()
            try:
                child = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env=self._environment(job, folder, started, environment),
                    start_new_session=True,
                    pass_fds=(alive, *(slot.lock for slot in slots)),
                )
            except OSError as error:
                raise BackendError(f"cannot start {argv[0]}: {error}; free memory or disk space and run again") from error
            self._children.append(child)
            try:
                created = psutil.Process(child.pid).create_time()
            except psutil.Error:
                created = started.started  # it ended at once; the log says why
            self._write_state(key, msgspec.structs.replace(started, pid=child.pid, created=created))
            for slot in slots:
                slot.describe(Holder(key, job.purpose, started.submission, child.pid, started.started))
        return Status(State.RUNNING, f"process {child.pid}", started.submission, started.started)

    def _argv(self, job: Job, key: str) -> list[str]:
        if job.ranks == 1:  # torchrun's own imports cost about five seconds
            return [sys.executable, *self.entry, key]
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job.ranks))
        return [sys.executable, *launcher, *self.entry, key]

    def _environment(self, job: Job, folder: Path, started: Started, given: Mapping[str, str]) -> dict[str, str]:
        """The orchestrator's environment without what a node must not have, then what the job needs."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED) and name not in RANK_VARIABLES}
        root = str(Path(resources.__file__).parent.parent)
        return {
            "OMP_NUM_THREADS": "1",  # the programs insist on it too: more cores are used by more ranks
            **kept,
            "HF_HUB_OFFLINE": "1",  # a program reads blobs and nothing else
            "PYTHONPATH": os.pathsep.join(part for part in (root, kept.get("PYTHONPATH")) if part),
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(started.devices) if job.gpus else "",
            **given,
            **job.environment,
            processes.FOLDER: str(folder),
            processes.SUBMISSION: started.submission,
        }


def _leases(home: Path) -> Leases:
    gpus = gpu_names()
    slots = os.environ.get("REPRO_CPU_SLOTS") or "1"
    if not slots.isdecimal() or slots == "0":
        raise BackendError(f"REPRO_CPU_SLOTS is {slots!r}: it must be a whole number of jobs, at least 1")
    return Leases(lease_folder(home, gpus), gpus, int(slots))


def _leader(started: Started | None) -> psutil.Process | None:
    return processes.leader(started.pid, started.created) if started and started.pid else None


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.Error:
        return []


def _is_torchrun(process: psutil.Process) -> bool:
    try:
        return "torch.distributed.run" in process.cmdline()
    except psutil.Error:
        return False


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
