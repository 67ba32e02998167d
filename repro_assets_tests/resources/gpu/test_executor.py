"""Executor and local backend: real processes, a real S3 server, and every way in which a job or its orchestrator may end."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from repro_assets_tests.resources.gpu.probing import LAUNCH, left_over, probe
from resources.blobs import Objects
from resources.errors import Unavailable
from resources.gpu import (
    Event,
    Executor,
    Job,
    JobCancelled,
    JobFailed,
    LeaseError,
    State,
    job_key,
)
from resources.settings import Connections


class Watcher:
    """Keeps every event, and calls `act` when one of `kind` arrives for the first time."""

    def __init__(self, kind: str = "", act: Callable[[Event], None] = lambda event: None) -> None:
        self.events: list[Event] = []
        self.kind, self.act, self.acted = kind, act, False

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == self.kind and not self.acted:
            self.acted = True
            self.act(event)

    def steps(self) -> list[int]:
        return [event.facts["step"] for event in self.events if event.kind == "step"]

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


def interrupt(event: Event) -> None:
    raise KeyboardInterrupt


def starts_in(log: str) -> int:
    return sum(line.startswith("--- ") for line in Path(log).read_text().splitlines())


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """`call` in a thread; the list gets its result, or what it raised."""
    box: list[Any] = []

    def body() -> None:
        try:
            box.append(call())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, box


def test_a_job_returns_its_outcome_and_each_event_once_and_in_order(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY", "lakefs-secret")
    watcher = Watcher()
    outcome = executor.run(probe("plain", steps=4, checkpoint_every=2), watcher)
    assert outcome.status == "succeeded"
    assert outcome.result["steps"] == [1, 2, 3, 4]
    assert outcome.observed == {"begin": 0}
    assert (outcome.attempt, outcome.starts, outcome.backend, outcome.key) == (0, 1, "local", job_key(probe("plain")))
    assert [(event.number, event.kind) for event in watcher.events] == [
        (-1, "submitted"), (0, "started"), (1, "step"), (2, "step"), (3, "checkpoint"), (4, "step"), (5, "step"), (6, "checkpoint"),
    ]  # fmt: skip
    # another test of the session may have imported lm-eval's settings into this process
    environment = {
        name: value for name, value in watcher.of("started")[0].facts["environment"].items() if name != "HF_HUB_DISABLE_TELEMETRY"
    }
    assert environment == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}, "no lakeFS credentials on a node"
    assert "rank 0 begins at step 0" in Path(outcome.log).read_text()
    assert executor.backend.poll(outcome.key).state is State.GONE


def test_a_finished_job_is_collected_without_starting_anything(make_executor: Callable[..., Executor]) -> None:
    first, again, other = Watcher(), Watcher(), Watcher()
    outcome = make_executor().run(probe("once"), first)
    collected = make_executor().run(probe("once"), again)
    assert collected.result == outcome.result
    assert collected.starts == 0
    assert starts_in(outcome.log) == 1
    assert again.events == [event for event in first.events if event.number >= 0], "earlier events are replayed"
    reproduction = make_executor().run(probe("once", nonce="a reproduction"), other)
    assert reproduction.key != outcome.key
    assert reproduction.starts == 1, "a nonce never collects the original's result"


def test_two_orchestrators_at_once_start_one_process_and_see_the_same(make_executor: Callable[..., Executor]) -> None:
    job = probe("both", steps=10, step_seconds=0.1)
    watchers = [Watcher(), Watcher()]
    running = [in_thread(lambda watcher=watcher: make_executor().run(job, watcher)) for watcher in watchers]
    for thread, _ in running:
        thread.join(60)
    outcomes = [box[0] for _, box in running]
    assert [outcome.status for outcome in outcomes] == ["succeeded", "succeeded"]
    assert outcomes[0].submission == outcomes[1].submission
    assert starts_in(outcomes[0].log) == 1
    assert watchers[0].steps() == watchers[1].steps() == list(range(1, 11))


def test_cancel_ends_every_process_grandchildren_in_sessions_of_their_own_too(executor: Executor, home: Path) -> None:
    job = probe("cancelled", steps=1000, step_seconds=0.1, grandchildren=2, ignore_term=True, grace=0.5)
    watcher = Watcher("step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        executor.run(job, watcher, on_interrupt=lambda: "cancel")
    assert left_over(home) == []
    outcome = executor.outcome(job_key(job))
    assert outcome
    assert outcome.status == "cancelled"
    assert "KeyboardInterrupt" in outcome.reason
    assert executor.find(job)[0] == 1, "a cancelled outcome advances the attempt"
    assert executor.run(probe("cancelled", steps=1)).attempt == 1


def test_a_cancel_lets_the_program_save_within_its_grace(executor: Executor, home: Path) -> None:
    job = probe("saved", steps=1000, step_seconds=0.05)
    watcher = Watcher("step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        executor.run(job, watcher)
    assert [event.kind for event in executor.events(job_key(job))][-1] == "checkpoint"
    assert executor.outcome(job_key(job)).status == "cancelled"  # type: ignore[union-attr]
    assert left_over(home) == []


def test_whoever_follows_a_job_that_another_process_cancels_hears_of_it(make_executor: Callable[..., Executor]) -> None:
    job = probe("followed", steps=1000, step_seconds=0.05, ignore_term=True, grace=1.0)
    going = threading.Event()
    thread, box = in_thread(lambda: make_executor().run(job, Watcher("step", lambda event: going.set())))
    assert going.wait(30)
    make_executor().cancel(job_key(job), job.grace, "cancelled by hand")
    thread.join(60)
    assert isinstance(box[0], JobCancelled)
    assert "cancelled by hand" in str(box[0])
    assert starts_in(box[0].outcome.log) == 1


def test_a_detached_job_runs_on_and_the_next_call_takes_it_over(make_executor: Callable[..., Executor]) -> None:
    job = probe("detached", steps=20, step_seconds=0.1)
    with pytest.raises(KeyboardInterrupt):
        make_executor().run(job, Watcher("step", interrupt), on_interrupt=lambda: "detach")
    assert make_executor().backend.poll(job_key(job)).state is State.RUNNING
    watcher = Watcher()
    outcome = make_executor().run(job, watcher)
    assert outcome.result["steps"] == watcher.steps() == list(range(1, 21))
    assert starts_in(outcome.log) == 1


def test_a_killed_worker_is_started_again_and_goes_on_from_its_checkpoint(executor: Executor) -> None:
    """The executor's half of S2.14 and S2.16: after a crash the same job goes on, under the same key, without a person."""
    watcher = Watcher()
    outcome = executor.run(probe("killed", steps=6, checkpoint_every=2, killed_at=6), watcher)
    assert outcome.observed == {"begin": 4}
    assert outcome.result["steps"] == [5, 6]
    assert (outcome.starts, outcome.attempt, starts_in(outcome.log)) == (2, 0, 2)
    assert watcher.steps() == [1, 2, 3, 4, 5, 5, 6]
    assert [event.number for event in watcher.events if event.number >= 0] == list(range(len(executor.events(outcome.key))))
    assert "without an outcome" in watcher.of("restarted")[0].facts["detail"]


def test_a_preempted_job_resumes_under_its_own_key(executor: Executor) -> None:
    job = probe("preempted", steps=12, step_seconds=0.1)
    watcher = Watcher("step", lambda event: os.kill(watcher.of("started")[0].facts["pid"], signal.SIGTERM))
    outcome = executor.run(job, watcher)
    assert outcome.attempt == 0
    assert outcome.starts == 2
    assert outcome.key == job_key(job)
    assert outcome.result["steps"][-1] == 12
    assert watcher.steps() == list(range(1, 13)), "no step is lost or done twice"
    assert "asked to stop" in watcher.of("restarted")[0].facts["detail"]


def test_an_orchestrator_that_is_late_leaves_the_restarted_job_alone(make_executor: Callable[..., Executor]) -> None:
    """The second one hears of the preemption only after the first has started the job again."""
    job = probe("preempted-twice", steps=30, step_seconds=0.1)
    restarted = threading.Event()

    class Prompt(Watcher):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if len(self.of("submitted")) == 2:
                restarted.set()

    prompt = Prompt("step", lambda event: os.kill(prompt.of("started")[0].facts["pid"], signal.SIGTERM))
    late = Watcher("checkpoint", lambda event: restarted.wait(30) and None)
    running = [in_thread(lambda watcher=watcher: make_executor().run(job, watcher)) for watcher in (late, prompt)]
    for thread, _ in running:
        thread.join(60)
    outcomes = [box[0] for _, box in running]
    assert [outcome.status for outcome in outcomes] == ["succeeded", "succeeded"]
    assert starts_in(outcomes[0].log) == 2
    assert late.steps() == prompt.steps() == list(range(1, 31))


def test_a_program_that_lost_its_storage_is_started_again_not_failed(executor: Executor) -> None:
    watcher = Watcher()
    outcome = executor.run(probe("storage", steps=4, checkpoint_every=2, storage_away_at=4), watcher)
    assert outcome.result["steps"] == [3, 4]
    assert outcome.attempt == 0
    assert "storage was away" in watcher.of("restarted")[0].facts["detail"]


class Outage(Objects):
    """The real bucket, until the network goes."""

    down = False

    def get(self, key: str) -> bytes:
        if self.down:
            raise Unavailable("S3 did not answer")
        return super().get(key)


def test_an_orchestrator_without_s3_gives_up_and_the_job_goes_on(make_executor: Callable[..., Executor], connections: Connections) -> None:
    executor = make_executor()
    executor.objects = outage = Outage.connect(connections)
    job = probe("outage", steps=20, step_seconds=0.1)
    with pytest.raises(Unavailable):
        executor.run(job, Watcher("step", lambda event: setattr(outage, "down", True)), on_interrupt=lambda: "detach")
    outcome = make_executor().run(job)
    assert outcome.result["steps"] == list(range(1, 21))
    assert starts_in(outcome.log) == 1


def test_a_cancel_ends_the_processes_even_when_s3_is_away(
    make_executor: Callable[..., Executor], connections: Connections, home: Path
) -> None:
    executor = make_executor()
    executor.objects = outage = Outage.connect(connections)
    with pytest.raises(Unavailable):
        executor.run(probe("cut-off", steps=1000, step_seconds=0.1), Watcher("step", lambda event: setattr(outage, "down", True)))
    assert left_over(home) == []


def test_a_job_that_dies_again_and_again_fails_with_the_end_of_its_log(executor: Executor) -> None:
    job = probe("doomed", killed_at=2, always=True)
    with pytest.raises(JobFailed, match="started 3 times, the last 3 without a new checkpoint") as caught:
        executor.run(job)
    assert starts_in(caught.value.outcome.log) == 3
    assert caught.value.outcome.log in str(caught.value)
    assert "rank 0 begins at step 0" in str(caught.value)
    assert executor.find(job)[0] == 1


def test_a_job_that_leaves_a_checkpoint_each_time_is_started_as_often_as_it_takes(make_executor: Callable[..., Executor]) -> None:
    """Steps 3, 6 and 9 kill the process for ever; every start gets two steps and a checkpoint further than the last."""
    executor = make_executor(restarts=0)
    watcher = Watcher()
    watcher.kind = "checkpoint"

    def kill(event: Event) -> None:
        watcher.acted = len(watcher.of("checkpoint")) >= 3
        os.kill(watcher.of("started")[-1].facts["pid"], signal.SIGKILL)

    watcher.act = kill
    outcome = executor.run(probe("forward", steps=8, checkpoint_every=2, step_seconds=0.3), watcher)
    assert outcome.starts == 4
    assert outcome.observed["begin"] >= 6


def test_a_failed_job_says_why_and_where_its_log_is_and_the_next_run_is_a_new_attempt(executor: Executor) -> None:
    job = probe("failing", fail_at=2)
    with pytest.raises(JobFailed) as caught:
        executor.run(job)
    message = str(caught.value)
    assert "failed: ValueError: the loss is not finite at all" in message
    assert f"The full log is {caught.value.outcome.log}" in message
    assert "Traceback" in message
    assert "raise ValueError" in caught.value.outcome.trace
    with pytest.raises(JobFailed) as again:
        executor.run(job)
    assert [caught.value.outcome.attempt, again.value.outcome.attempt] == [0, 1]
    assert caught.value.outcome.key != again.value.outcome.key


def test_a_job_that_runs_too_long_is_ended_and_fails(executor: Executor, home: Path) -> None:
    job = probe("slow", steps=1000, step_seconds=0.1, time_limit=2.0, grace=3.0)
    with pytest.raises(JobFailed, match="time limit of 2 s was reached; raise it"):
        executor.run(job)
    assert left_over(home) == []
    assert executor.find(job)[0] == 1


def test_an_unknown_purpose_is_refused_by_the_worker(executor: Executor) -> None:
    job = Job(purpose="os", identity={"name": "module"}, spec={"steps": 1})
    with pytest.raises(JobFailed, match="no program for purpose 'os'; this worker has probe"):
        executor.run(job)


def test_the_second_job_waits_for_the_lease_and_hears_who_holds_it(make_executor: Callable[..., Executor]) -> None:
    going, waiting = threading.Event(), threading.Event()
    held = probe("holder", steps=200, step_seconds=0.05)
    thread, box = in_thread(lambda: make_executor(slots=1).run(held, Watcher("step", lambda event: going.set())))
    assert going.wait(30)
    watcher = Watcher("waiting", lambda event: (waiting.set(), make_executor(slots=1).cancel(job_key(held), 2, "making room"))[0])
    outcome = make_executor(slots=1).run(probe("waiter"), watcher)
    thread.join(30)
    said = watcher.of("waiting")[0].facts["detail"]
    assert f"cpu-0 is held by job {job_key(held)[:12]} (probe, process " in said
    assert "1 wanted, 0 free" in said
    assert outcome.waiting_seconds > 0
    assert isinstance(box[0], JobCancelled)


def test_waiting_for_a_lease_can_be_interrupted(make_executor: Callable[..., Executor]) -> None:
    going = threading.Event()
    held = probe("keeper", steps=300, step_seconds=0.05)
    thread, box = in_thread(lambda: make_executor(slots=1).run(held, Watcher("step", lambda event: going.set())))
    assert going.wait(30)
    with pytest.raises(KeyboardInterrupt):
        make_executor(slots=1).run(probe("impatient"), Watcher("waiting", interrupt))
    executor = make_executor(slots=1)
    assert executor.backend.poll(job_key(held)).state is State.RUNNING, "the holder is not disturbed"
    assert executor.events(job_key(probe("impatient"))) == []
    executor.cancel(job_key(held), 2, "end of the test")
    thread.join(30)
    assert isinstance(box[0], JobCancelled)


def test_more_gpus_than_the_machine_has_are_refused_at_once(executor: Executor) -> None:
    with pytest.raises(LeaseError, match="wants 2 GPUs, this machine has 0: ask for fewer ranks"):
        executor.run(probe("greedy", ranks=2, gpus=2))
    assert executor.find(probe("greedy"))[2] is None, "a job that never started has no outcome"


ORCHESTRATOR = """
import sys
sys.path.insert(0, {root!r})
from repro_assets_tests.resources.gpu.probing import probe
from resources.blobs import Objects
from resources.gpu import Executor, Leases, LocalBackend
from resources.settings import Connections
from pathlib import Path

connections = Connections.from_environment()
home = Path({home!r})
backend = LocalBackend(home, Leases(home / "leases", (), 1), ({launch!r},))
executor = Executor(Objects.connect(connections), backend, connections.node_environment(), interval=0.1)
executor.run(probe("orphan", steps=40, step_seconds=0.1), lambda event: print(event.kind, flush=True))
"""


def test_a_job_outlives_a_killed_orchestrator_and_is_found_again(
    make_executor: Callable[..., Executor], connections: Connections, home: Path
) -> None:
    script = ORCHESTRATOR.format(root=str(LAUNCH.parents[3]), home=str(home), launch=str(LAUNCH))
    environment = {**os.environ, **connections.environment()}
    first = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert first.stdout is not None
    for line in first.stdout:
        if line.strip() == "step":
            break
    first.kill()
    first.wait()
    job = probe("orphan", steps=40, step_seconds=0.1)
    executor = make_executor(slots=1)
    assert executor.backend.poll(job_key(job)).state is State.RUNNING
    with pytest.raises(KeyboardInterrupt):  # its lease is still taken
        executor.run(probe("other"), Watcher("waiting", interrupt))
    watcher = Watcher()
    outcome = executor.run(job, watcher)
    assert outcome.result["steps"] == watcher.steps() == list(range(1, 41))
    assert starts_in(outcome.log) == 1, "nothing was started a second time"


def test_a_start_whose_orchestrator_died_before_noting_the_process_is_not_repeated(executor: Executor, home: Path) -> None:
    """SIGKILL between starting a process and writing its id: the state file names no process, but the job's lock is held."""
    job = probe("unnoted", steps=30, step_seconds=0.1)
    with pytest.raises(KeyboardInterrupt):
        executor.run(job, Watcher("step", interrupt), on_interrupt=lambda: "detach")
    state = home / "jobs" / job_key(job) / "state.json"
    import msgspec

    from resources.gpu.local import Started

    state.write_bytes(
        msgspec.json.encode(msgspec.structs.replace(msgspec.json.decode(state.read_bytes(), type=Started), pid=0, created=0.0))
    )
    outcome = executor.run(job)
    assert outcome.result["steps"] == list(range(1, 31))
    assert starts_in(outcome.log) == 1


def test_ranks_left_behind_by_a_killed_first_process_are_ended_before_the_job_starts_again(executor: Executor, home: Path) -> None:
    job = probe("leftover", steps=4, checkpoint_every=2, killed_at=4, grandchildren=1)
    watcher = Watcher()
    outcome = executor.run(job, watcher)
    assert outcome.starts == 2
    assert left_over(home) == []


def test_a_process_that_does_not_end_after_its_outcome_is_ended(executor: Executor, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resources.gpu.executor.SECONDS_TO_EXIT", 0.5)
    outcome = executor.run(probe("sticky", grandchildren=1))
    assert outcome.status == "succeeded"
    assert left_over(home) == []


# --- two ranks through torchrun ---------------------------------------------------------------------------------------------------------


def test_cancel_ends_ranks_that_torchrun_put_into_sessions_of_their_own(executor: Executor, home: Path) -> None:
    job = probe("two", steps=1000, step_seconds=0.1, ranks=2, ignore_term=True, grace=1.0)
    seen: list[int] = []

    def look(event: Event) -> None:
        until = time.monotonic() + 20
        while "rank 1 begins" not in executor.backend.tail(job_key(job)) and time.monotonic() < until:
            time.sleep(0.1)
        seen.extend(left_over(home))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.run(job, Watcher("step", look))
    assert len(seen) == 3, "torchrun and two ranks"
    assert len({os.getsid(0)} | set(seen)) == 4
    assert left_over(home) == []


def test_a_failing_rank_is_named_with_its_own_reason(executor: Executor, home: Path) -> None:
    job = probe("second-rank", steps=100, step_seconds=0.1, ranks=2, fail_at=3, fail_rank=1)
    with pytest.raises(JobFailed, match="failed: rank 1: ValueError: the loss is not finite at all"):
        executor.run(job)
    assert left_over(home) == []


def test_importing_the_executor_loads_neither_dagster_nor_torch() -> None:
    code = "import sys, resources.gpu, resources.gpu.worker; print([n for n in ('torch', 'dagster', 'transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_psutil_is_asked_for_the_process_and_not_for_its_successor() -> None:
    from resources.gpu import processes

    me = psutil.Process()
    assert processes.leader(me.pid, me.create_time()) is not None
    assert processes.leader(me.pid, me.create_time() - 3600) is None
