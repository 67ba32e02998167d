"""The one call that assets see: run a job, or attach to it, hand on its progress, and come back with its outcome.

Which attempt it is, how it ended and what it reported are read from S3 alone, so that any process can take over. Starting and ending
processes is the backend's.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from resources.blobs import Objects
from resources.errors import NotFound, StorageError
from resources.gpu.backend import Backend, BackendError, State, Status
from resources.gpu.job import (
    CANCELLED,
    ENDED,
    FAILED,
    PREEMPTED,
    SUCCEEDED,
    Event,
    Job,
    Outcome,
    errors_prefix,
    event_path,
    job_key,
    job_path,
    outcome_path,
)
from resources.gpu.local import LocalBackend

if TYPE_CHECKING:
    from resources.settings import Connections

OnInterrupt = Callable[[], Literal["cancel", "detach"]]
SECONDS_TO_EXIT = 30.0


class JobError(Exception):
    """A job that did not succeed. `outcome` says how; the message has the reason, where the log is, and its last lines."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


class JobFailed(JobError):
    """The program failed, ran out of time, or kept being killed. The next run of the job is a new attempt."""


class JobCancelled(JobError):
    """Somebody cancelled the job, here or in another process. The next run of the job is a new attempt."""


class _Run(msgspec.Struct):
    """What one call of `run` knows so far."""

    job: Job
    key: str
    attempt: int
    progress: Callable[[Event], None]
    status: Status = Status(State.PENDING)
    seen: int = 0
    checkpoints: int = 0
    checkpoints_at_start: int = 0
    fruitless: int = 0
    starts: int = 0
    waiting_since: float = 0.0
    waiting_seconds: float = 0.0
    waiting_for: str = ""
    written: bool = False


class Executor:
    """Runs jobs on `backend`; `environment` is what a node needs to reach S3 (`Connections.node_environment`).

    `interval`: seconds between looks. `restarts`: how often a process that was killed or preempted without leaving a new checkpoint is
    started again; one that left a checkpoint always is.
    """

    def __init__(
        self, objects: Objects, backend: Backend, environment: Mapping[str, str], *, interval: float = 1.0, restarts: int = 2
    ) -> None:
        self.objects, self.backend, self.environment = objects, backend, dict(environment)
        self.interval, self.restarts = interval, restarts

    @classmethod
    def local(cls, connections: "Connections") -> Self:
        """Jobs on this machine, sharing its blob cache."""
        cache = {"REPRO_CACHE": str(connections.cache), "REPRO_CACHE_BYTES": str(connections.cache_bytes)}
        return cls(Objects.connect(connections), LocalBackend(connections.home), {**connections.node_environment(), **cache})

    def run(
        self, job: Job, progress: Callable[[Event], None] = lambda event: None, on_interrupt: OnInterrupt = lambda: "cancel"
    ) -> Outcome:
        """The outcome of `job`, which succeeded: run here, taken over while it runs, or collected when it already has.

        Each event goes to `progress` once and in order, from the job's first one on. Anything raised in this call, a KeyboardInterrupt
        or an error of `progress` included, asks `on_interrupt` whether to `cancel` the job (every process ends) or to `detach` (it runs
        on; the next call with the same identity attaches), and is raised again. Raises JobFailed, JobCancelled, BackendError, LeaseError.
        """
        attempt, key, earlier = self.find(job)
        run = _Run(job, key, attempt, progress)
        if earlier and earlier.status == SUCCEEDED:
            self._replay(run)
            return self._filled(run, earlier)
        try:
            return self._follow(run)
        except (JobError, BackendError):
            raise
        except BaseException as error:
            if on_interrupt() == "cancel":
                self.cancel(key, job.grace, f"cancelled: {type(error).__name__}")
            raise

    def find(self, job: Job) -> tuple[int, str, Outcome | None]:
        """The attempt that a run of `job` would continue, its key, and its outcome so far (none, preempted or succeeded)."""
        attempt = 0
        while True:
            key = job_key(job, attempt)
            outcome = self.outcome(key)
            if outcome is None or outcome.status not in ENDED:
                return attempt, key, outcome
            attempt += 1

    def outcome(self, key: str) -> Outcome | None:
        """What `jobs/<key>/outcome.json` says, if it is there."""
        found = self._get(outcome_path(key))
        return None if found is None else msgspec.json.decode(found, type=Outcome)

    def events(self, key: str) -> list[Event]:
        """Every event of the job so far, oldest first."""
        found: list[Event] = []
        while event := self._event(key, len(found)):
            found.append(event)
        return found

    def cancel(self, key: str, grace: float, reason: str) -> Outcome:
        """Ends every process of the job and writes the outcome `cancelled`, unless it succeeded meanwhile. Returns the outcome."""
        return self._end(key, grace, Outcome(CANCELLED, reason))

    def _follow(self, run: _Run) -> Outcome:
        run.status = self._submit(run)
        while True:
            if run.status.state is State.PENDING:
                self._wait(run)
            # In this order: an outcome or event is written before its process ends, so what is missing after GONE will never come.
            self._replay(run)
            outcome = self.outcome(run.key)
            if outcome and (outcome.status != PREEMPTED or (run.status.submission and outcome.submission == run.status.submission)):
                self._replay(run)
                self._let_exit(run)
                if outcome.status == PREEMPTED:
                    outcome = self._restart(run, outcome.reason or "preempted")
                elif outcome.status == FAILED:
                    outcome = self._rank_error(run) or outcome
                if outcome:
                    return self._finish(run, outcome)
            elif run.status.state is State.GONE:
                if outcome := self._restart(run, "the process ended without an outcome (killed, out of memory, or S3 was away)"):
                    return self._finish(run, outcome)
            elif self._is_late(run):
                reason = f"the time limit of {run.job.time_limit:g} s was reached; raise it, or ask for fewer steps"
                return self._finish(run, self._end(run.key, run.job.grace, Outcome(FAILED, reason, submission=run.status.submission)))
            else:
                time.sleep(self.interval)
                run.status = self._submit(run) if run.status.state is State.PENDING else self.backend.poll(run.key)

    def _submit(self, run: _Run) -> Status:
        if not run.written and self.backend.poll(run.key).state is State.GONE:
            self.objects.put(job_path(run.key), msgspec.json.encode(run.job.document()))
            run.written = True
        before = run.status.submission
        status = self.backend.submit(run.job, run.key, self.environment)
        if status.state is State.RUNNING:
            if run.waiting_since:
                run.waiting_seconds += time.monotonic() - run.waiting_since
                run.waiting_since = 0.0
            if status.submission != before:
                run.starts += 1
                run.checkpoints_at_start = run.checkpoints
                facts = {"backend": self.backend.name, "attempt": run.attempt, "job": run.key, "log": self.backend.log(run.key)}
                run.progress(Event(-1, "submitted", time.time(), facts))
        return status

    def _wait(self, run: _Run) -> None:
        run.waiting_since = run.waiting_since or time.monotonic()
        if run.status.detail != run.waiting_for:
            run.waiting_for = run.status.detail
            run.progress(Event(-1, "waiting", time.time(), {"detail": run.status.detail}))

    def _restart(self, run: _Run, reason: str) -> Outcome | None:
        """Starts the job again under its key, where its program finds its own checkpoints.

        Returns the outcome instead when a rank had failed, or when the job was started again and again without coming forward.
        """
        if error := self._rank_error(run):
            return self._end(run.key, 0, error)
        run.fruitless = 0 if run.checkpoints > run.checkpoints_at_start else run.fruitless + 1
        if run.fruitless > self.restarts:
            reason = f"{reason}; started {run.starts} times, the last {run.fruitless} without a new checkpoint"
            return self._end(run.key, 0, Outcome(FAILED, reason, submission=run.status.submission))
        run.progress(Event(-1, "restarted", time.time(), {"detail": reason, "checkpoints": run.checkpoints}))
        run.status = self._submit(run)
        return None

    def _replay(self, run: _Run) -> None:
        while event := self._event(run.key, run.seen):
            run.seen += 1
            run.checkpoints += event.kind == "checkpoint"
            run.progress(event)

    def _let_exit(self, run: _Run) -> None:
        """Gives a process whose outcome is written the time to end by itself; then nothing of the job is left."""
        until = time.monotonic() + SECONDS_TO_EXIT
        while (status := self.backend.poll(run.key)).state is State.RUNNING and time.monotonic() < until:
            if run.status.submission and status.submission != run.status.submission:
                return  # another orchestrator has started the job again already
            time.sleep(min(0.2, self.interval))
        self.backend.cancel(run.key, 0, run.status.submission)

    def _is_late(self, run: _Run) -> bool:
        limit, started = run.job.time_limit, run.status.started
        return bool(limit and started and run.status.state is State.RUNNING and time.time() - started > limit)

    def _end(self, key: str, grace: float, outcome: Outcome) -> Outcome:
        """Ends the processes and stores `outcome`, unless the job succeeded meanwhile. Returns the outcome that is stored."""
        # Written before they end: another orchestrator that follows this job must not take a killed process for a lost one.
        with suppress(StorageError):  # S3 away must not keep processes alive; the second write below says so
            before = self.outcome(key)
            if not before or before.status == PREEMPTED:
                self.objects.put(outcome_path(key), msgspec.json.encode(outcome), if_absent=before is None)
        try:
            self.backend.cancel(key, grace)
        except BaseException:  # a second interrupt during the grace: no more waiting, but nothing is left behind
            self.backend.cancel(key, 0)
            raise
        finally:
            after = self.outcome(key)
            if not after or after.status != SUCCEEDED:
                self.objects.put(outcome_path(key), msgspec.json.encode(outcome))
        return after if after and after.status == SUCCEEDED else outcome

    def _rank_error(self, run: _Run) -> Outcome | None:
        """What the first rank to fail left behind: the others only saw their peer go."""
        if run.job.world_size == 1 or not run.status.submission:
            return None
        names = self.objects.list(errors_prefix(run.key, run.status.submission))
        found = [msgspec.json.decode(self.objects.get(name)) for name in names]
        if not found:
            return None
        first = min(found, key=lambda error: error["at"])
        return Outcome(FAILED, f"rank {first['rank']}: {first['reason']}", trace=first["trace"], submission=run.status.submission)

    def _finish(self, run: _Run, outcome: Outcome) -> Outcome:
        """The outcome as `run` returns it. Raises JobFailed or JobCancelled for any that is not a success."""
        outcome = self._filled(run, outcome)
        if outcome.status == SUCCEEDED:
            return outcome
        what = f"{run.job.purpose} job {run.key[:12]} (attempt {run.attempt}, {self.backend.name}) {outcome.status}: {outcome.reason}"
        tail = self.backend.tail(run.key)
        message = f"{what}\nThe full log is {outcome.log}" + (f"; its end:\n{tail}" if tail else "")
        raise (JobCancelled if outcome.status == CANCELLED else JobFailed)(message, outcome)

    def _filled(self, run: _Run, outcome: Outcome) -> Outcome:
        return msgspec.structs.replace(
            outcome,
            key=run.key,
            attempt=run.attempt,
            starts=run.starts,
            waiting_seconds=run.waiting_seconds,
            backend=self.backend.name,
            log=self.backend.log(run.key),
        )

    def _event(self, key: str, number: int) -> Event | None:
        found = self._get(event_path(key, number))
        if found is None:
            return None
        facts: dict[str, Any] = msgspec.json.decode(found)
        return Event(number, facts.pop("kind"), facts.pop("at"), facts)

    def _get(self, path: str) -> bytes | None:
        try:
            return self.objects.get(path)
        except NotFound:
            return None
