"""What the executor needs of a place that runs jobs. Local processes are in `local.py`; Slurm, Ray and Kubernetes fit the same Protocol."""

from collections.abc import Mapping
from enum import Enum
from typing import Protocol

import msgspec

from resources.gpu.job import Job


class BackendError(Exception):
    """A job that this backend can never start; the message names what it lacks and the remedy."""


class State(Enum):
    """Where a job is. How it ended is said by its outcome in S3 alone: a backend only knows that nothing of it runs."""

    PENDING = "pending"
    RUNNING = "running"
    GONE = "gone"


class Status(msgspec.Struct, frozen=True):
    """`detail`: for people, as who holds the device. `submission` names a process start, at `started` (seconds since 1970, 0 if never)."""

    state: State
    detail: str = ""
    submission: str = ""
    started: float = 0.0


class Backend(Protocol):
    """Keys are those of `job_key`; every call may be made from any process that shares the backend's home."""

    name: str

    def submit(self, job: Job, key: str, environment: Mapping[str, str]) -> Status:
        """Starts the job, or attaches to the one that runs under `key`. PENDING means no device is free: call again."""
        ...

    def poll(self, key: str) -> Status: ...

    def cancel(self, key: str, grace: float, submission: str = "") -> None:
        """Ends every process of the job: TERM, up to `grace` seconds, KILL. Returns when nothing is left; fine when nothing was there.

        With `submission` only if the job was not started again since.
        """
        ...

    def tail(self, key: str, lines: int = 40) -> str:
        """The end of the job's log; empty when there is none."""
        ...

    def log(self, key: str) -> str:
        """Where the whole log lies, for people."""
        ...
