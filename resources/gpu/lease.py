"""Leases on this machine's devices: one lock file a slot, held by the kernel for as long as the job's first process lives.

A lock is taken by the orchestrator, inherited by the job and never released by hand: no crash can leave it taken. Starting jobs is
`local.py`.
"""

import fcntl
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from resources.gpu.backend import BackendError


class LeaseError(BackendError):
    """More devices asked for than there are; the message says how many and what to change."""


class Holder(msgspec.Struct, frozen=True):
    """Who has a slot, for people and for cleaning up behind it. `since`: seconds since 1970; `submission`: one process start."""

    job: str
    purpose: str
    submission: str
    pid: int
    since: float


class Slot(msgspec.Struct, frozen=True):
    """A slot that is ours: the device's name (GPU index or UUID, `cpu-<n>`), its open lock and who had it before."""

    device: str
    lock: int
    path: Path
    before: Holder | None

    def describe(self, holder: Holder) -> None:
        """Writes who has the slot now."""
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, msgspec.json.encode(holder), 0)

    def drop(self) -> None:
        """Closes our copy of the lock; a job that inherited it keeps the slot."""
        os.close(self.lock)


class Leases:
    """The slots of one folder: each GPU, or on a machine without GPUs `cpu_slots` jobs at a time."""

    def __init__(self, folder: Path, gpus: tuple[str, ...] = (), cpu_slots: int = 1) -> None:
        self.folder, self.gpus, self.cpu_slots = folder, gpus, cpu_slots

    def devices(self, gpus: int) -> tuple[str, ...]:
        return self.gpus if gpus else tuple(f"cpu-{n}" for n in range(self.cpu_slots))

    def take(self, gpus: int) -> list[Slot]:
        """`gpus` GPUs, or one CPU slot for 0. All or nothing, without waiting: empty when too few are free.

        Raises LeaseError when the machine never has as many.
        """
        wanted, devices = max(gpus, 1), self.devices(gpus)
        if wanted > len(devices):
            raise LeaseError(
                f"the job wants {wanted} {'GPUs' if gpus else 'CPU slots'}, this machine has {len(devices)}: ask for fewer ranks, "
                "or name the GPUs to use in REPRO_GPUS"
            )
        taken: list[Slot] = []
        with self._choosing():
            try:
                for device in devices:
                    if len(taken) < wanted and (slot := self._try(device)):
                        taken.append(slot)
            except BaseException:
                _drop(taken)
                raise
            if len(taken) < wanted:
                _drop(taken)
                return []
        return taken

    def holders(self, gpus: int) -> dict[str, Holder | None]:
        """The slots that are taken now, and by whom as far as their files say."""
        found: dict[str, Holder | None] = {}
        with self._choosing():
            for device in self.devices(gpus):
                if slot := self._try(device):
                    slot.drop()
                else:
                    found[device] = _holder(self._path(device))
        return found

    def _path(self, device: str) -> Path:
        return self.folder / f"{device}.lock"

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        """One process chooses at a time: two that each want two of two GPUs would else take one each, for ever."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "choose.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _try(self, device: str) -> Slot | None:
        path = self._path(device)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        return Slot(device, lock, path, _holder(path))


def _drop(slots: list[Slot]) -> None:
    for slot in slots:
        slot.drop()


def _holder(path: Path) -> Holder | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Holder)
    except (FileNotFoundError, msgspec.DecodeError):
        return None  # a new slot, or one whose taker is only just writing its name


def lease_folder(home: Path, gpus: tuple[str, ...], environ: Mapping[str, str] | None = None) -> Path:
    """Where the lock files lie: CPU slots belong to one home, GPUs to all of this user's homes on this machine (or REPRO_LEASES)."""
    values = os.environ if environ is None else environ
    if "REPRO_LEASES" in values:
        return Path(values["REPRO_LEASES"]).expanduser().absolute()
    if not gpus:
        return home / "leases"
    cache = Path(values.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "repro-assets" / "leases" / socket.gethostname()


def gpu_names(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The GPUs that may be leased, as CUDA_VISIBLE_DEVICES names them, found without importing torch.

    REPRO_GPUS (`0,1`, or `none`) comes first, then CUDA_VISIBLE_DEVICES, then what nvidia-smi lists. Raises LeaseError when there are
    GPUs that it cannot list.
    """
    values = os.environ if environ is None else environ
    for name in ("REPRO_GPUS", "CUDA_VISIBLE_DEVICES"):
        if name in values:
            listed = [part.strip() for part in values[name].split(",")]
            # CUDA itself reads -1 as "none from here on".
            return tuple(part for part in listed if part and part not in ("none", "-1"))
    if not (program := shutil.which("nvidia-smi")):
        return ()
    try:
        answer = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        if Path("/dev/nvidia0").exists():  # never train on the CPU unasked because a driver is ill
            raise LeaseError(
                f"{program} cannot list this machine's GPUs: {error}; repair the driver, or set REPRO_GPUS=none to use the CPU"
            ) from error
        return ()  # the tool without a device, as in many container images
    return listed_gpus(answer.stdout)


def listed_gpus(listed: str) -> tuple[str, ...]:
    """The UUIDs in what `nvidia-smi -L` prints; of a GPU that is cut into MIG slices, those of its slices."""
    found: list[str] = []
    whole = ""
    for line in listed.splitlines():
        if match := re.match(r"GPU \d+: .*\(UUID: ([^)]+)\)", line):
            whole = match[1]
            found.append(whole)
        elif match := re.match(r"\s+MIG .*\(UUID: ([^)]+)\)", line):
            found = [name for name in found if name != whole] + [match[1]]
    return tuple(found)
