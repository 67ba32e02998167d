"""What a job is, what comes back of it, and where both lie in the jobs bucket. Nothing here starts, waits for or talks to anything."""

from typing import Any, Final

import msgspec

from repro_assets.trust.canonical import digest

TRUST: Final = "REPRO_NODE_TRUST"  # variable of a node: the trust configuration, as JSON
SUCCEEDED: Final = "succeeded"
PREEMPTED: Final = "preempted"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
ENDED: Final = frozenset({FAILED, CANCELLED})  # the next run of the same job is a new attempt


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One program on some processes. `purpose` names the program; `spec` is what it reads, beside the purpose, in `job.json`.

    `identity` is what makes two jobs the same one: digests of bundle and recipe section, never ranks, hosts or paths. `nonce` keeps a
    reproduction from collecting the original's result. `ranks`: processes on each of `nodes` nodes; `gpus` on each node is 0 (CPU) or
    equals `ranks`. `time_limit`, of one process start, and `grace`, between TERM and KILL, in seconds; a limit of 0 means none.
    """

    purpose: str
    identity: dict[str, Any]
    spec: dict[str, Any]
    nonce: str = ""
    nodes: int = 1
    ranks: int = 1
    gpus: int = 0
    environment: dict[str, str] = {}
    time_limit: float = 0.0
    grace: float = 20.0

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks < 1:
            raise ValueError(f"a job of {self.nodes} nodes with {self.ranks} ranks each: both must be at least 1")
        if self.gpus not in (0, self.ranks):
            raise ValueError(f"a job of {self.ranks} ranks with {self.gpus} GPUs a node: one GPU for each rank, or 0 for the CPU")
        if self.time_limit < 0 or self.grace < 0:
            raise ValueError("time_limit and grace are seconds, not below 0")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks

    def document(self) -> dict[str, Any]:
        """What `job.json` holds."""
        return {"purpose": self.purpose, **self.spec}


class Event(msgspec.Struct, frozen=True):
    """One thing that happened to a job. `number` counts up over all its processes; -1 marks the executor's own kinds.

    Those are `waiting` and `restarted` (facts: detail) and `submitted` (facts: backend, attempt, log). `at`: seconds since 1970, UTC.
    """

    number: int
    kind: str
    at: float
    facts: dict[str, Any]


class Outcome(msgspec.Struct, frozen=True):
    """How a job ended. `status`: succeeded, preempted, failed or cancelled; `reason`: one line; the program gives `result` and `observed`.

    `submission` names the process start that wrote it. The rest is filled in by the executor: `starts` counts process starts that this
    call saw, `waiting_seconds` is time before a device was free, `log` is where the whole log lies.
    """

    status: str
    reason: str = ""
    result: dict[str, Any] = {}
    observed: dict[str, Any] = {}
    trace: str = ""
    submission: str = ""
    key: str = ""
    attempt: int = 0
    starts: int = 0
    waiting_seconds: float = 0.0
    backend: str = ""
    log: str = ""


def job_key(job: Job, attempt: int = 0) -> str:
    """The job's name everywhere: 32 hexadecimal digits of the digest of identity, purpose, attempt and nonce."""
    return digest({"identity": job.identity, "purpose": job.purpose, "attempt": attempt, "nonce": job.nonce})[:32]


def job_path(key: str) -> str:
    return f"jobs/{key}/job.json"


def outcome_path(key: str) -> str:
    return f"jobs/{key}/outcome.json"


def events_prefix(key: str) -> str:
    return f"jobs/{key}/events/"


def event_path(key: str, number: int) -> str:
    return f"{events_prefix(key)}{number:08d}.json"


def errors_prefix(key: str, submission: str) -> str:
    """Where ranks other than the first leave what went wrong: `<rank>.json` under it."""
    return f"jobs/{key}/errors/{submission}/"
