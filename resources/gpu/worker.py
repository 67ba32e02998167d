"""What runs on a node, on every rank: `python -m resources.gpu.worker KEY`. Connects to S3, reads the job, calls its program, reports.

The composition root of nodes: the programs are pure and take storage as a Protocol. It needs S3 and no lakeFS. Nobody reads exit codes.
"""

import faulthandler
import importlib
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec

from resources.blobs import Blobs, Objects
from resources.errors import NotFound, Unavailable
from resources.gpu.job import (
    ENDED,
    FAILED,
    PREEMPTED,
    SUCCEEDED,
    TRUST,
    errors_prefix,
    event_path,
    events_prefix,
    job_path,
    outcome_path,
)
from resources.gpu.processes import FOLDER, SUBMISSION
from resources.settings import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_REGION,
    Connections,
    SettingsError,
)

PROGRAMS: Final = {"train": "repro_assets.training.program", "score": "repro_assets.evaluation.program"}
EXIT: Final = {SUCCEEDED: 0, PREEMPTED: 75, FAILED: 1}
SECONDS_FOR_FIRST_RANK: Final = 120.0
# How torch.distributed says that a peer is gone: types by name, because this module never imports torch, and gloo's RuntimeError by text.
PEER_ERRORS: Final = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError"})
PEER_SIGNS: Final = ("gloo/transport/", "Connection closed by peer")


class Events:
    """The job's reports in S3. Only the first rank writes; `emit` may be called from any thread."""

    def __init__(self, objects: Objects, key: str, rank: int = 0) -> None:
        self._objects, self._key, self._rank = objects, key, rank
        self._lock = threading.Lock()
        self._unsent: deque[dict[str, Any]] = deque()
        names = objects.list(events_prefix(key))
        with ThreadPoolExecutor(8) as pool:
            self._prior: list[dict[str, Any]] = [msgspec.json.decode(data) for data in pool.map(objects.get, names)]
        self._next = len(names)

    def prior(self) -> list[dict[str, Any]]:
        """What earlier processes of this job reported, oldest first."""
        return [dict(event) for event in self._prior]

    def emit(self, kind: str, **facts: Any) -> None:
        """Reports `facts` (JSON values). Kept back while S3 is away and sent, in order, with the next one."""
        if self._rank != 0:
            return
        with self._lock:
            self._unsent.append({"kind": kind, "at": time.time(), **facts})
            try:
                self._send()
            except Unavailable as error:
                print(f"event {kind} is kept back: {error}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Sends what was kept back. Raises Unavailable when S3 is still away."""
        with self._lock:
            self._send()

    def _send(self) -> None:
        while self._unsent:
            data = msgspec.json.encode(self._unsent[0])
            path = event_path(self._key, self._next)
            # One that is there already is our own, whose answer was lost, or was written by a process that should be dead.
            if not self._objects.put(path, data, if_absent=True) and self._objects.get(path) != data:
                raise RuntimeError(f"{path} was written by another process: two run under job key {self._key}; end the older one")
            self._next += 1
            self._unsent.popleft()


def node_connections(environ: Mapping[str, str]) -> Connections:
    """S3 as `Connections.node_environment` describes it; a node has no lakeFS address and no lakeFS credentials."""
    missing = [name for name in ("REPRO_BLOBS_BUCKET", "REPRO_JOBS_BUCKET") if not environ.get(name)]
    if missing:
        raise SettingsError(f"{', '.join(missing)} not set: the executor passes Connections.node_environment() to every node")
    return Connections(
        home=Path(environ.get(FOLDER) or ".").absolute(),
        lakefs_endpoint="",
        lakefs_access_key="",
        lakefs_secret_key="",
        s3_endpoint=environ.get("AWS_ENDPOINT_URL_S3"),
        s3_region=environ.get("AWS_REGION") or DEFAULT_REGION,
        s3_access_key=environ.get("AWS_ACCESS_KEY_ID"),
        s3_secret_key=environ.get("AWS_SECRET_ACCESS_KEY"),
        s3_session_token=environ.get("AWS_SESSION_TOKEN"),
        blobs_bucket=environ["REPRO_BLOBS_BUCKET"],
        jobs_bucket=environ["REPRO_JOBS_BUCKET"],
        cache=Path(environ.get("REPRO_CACHE") or ""),
        cache_bytes=int(environ.get("REPRO_CACHE_BYTES") or DEFAULT_CACHE_BYTES),
    )


def run(key: str, environ: Mapping[str, str], programs: Mapping[str, str] = PROGRAMS) -> int:
    """Runs the job `key` on this rank and reports how it ended. Returns the exit code: 0, 1, or 75 for preempted."""
    rank, submission = int(environ.get("RANK", "0")), environ.get(SUBMISSION, "")
    connections = node_connections(environ)
    objects = Objects.connect(connections)
    events: Events | None = None
    agreed = False
    try:
        job = msgspec.json.decode(objects.get(job_path(key)))
        if trust := environ.get(TRUST):
            # never from the store that it guards: whoever may write jobs/ could otherwise name a key of their own
            job["trust"] = msgspec.json.decode(trust)
        events = Events(objects, key, rank)
        program = importlib.import_module(_module(job["purpose"], programs))
        outcome = program.run(job, Blobs.connect(connections), events)
        if outcome.get("status") not in EXIT:
            raise RuntimeError(
                f"the {job['purpose']} program came back with status {outcome.get('status')!r}; it must be one of {sorted(EXIT)}"
            )
        agreed = True
    except Exception as error:  # whatever a program raises is its outcome
        traceback.print_exc()
        outcome = _outcome_of(error)
    if outcome["status"] == FAILED and int(environ.get("WORLD_SIZE", "1")) > 1:
        facts = {"rank": rank, "reason": outcome["reason"], "trace": outcome.get("trace", ""), "at": time.time()}
        objects.put(f"{errors_prefix(key, submission)}{rank}.json", msgspec.json.encode(facts))
    if rank == 0:
        _report(objects, key, events, {**outcome, "submission": submission})
    elif agreed:
        _await_first_rank(objects, key, submission)
    return EXIT[outcome["status"]]


def _outcome_of(error: Exception) -> dict[str, Any]:
    """Failed, unless the work is not at fault: then preempted, so that it is started again and goes on from its checkpoints."""
    if isinstance(error, Unavailable):
        return {"status": PREEMPTED, "reason": f"storage was away: {_one_line(error)}"}
    if type(error).__name__ in PEER_ERRORS or any(sign in str(error) for sign in PEER_SIGNS):
        return {"status": PREEMPTED, "reason": f"another rank went away: {_one_line(error)}"}
    return {"status": FAILED, "reason": _one_line(error), "trace": traceback.format_exc()}


def _module(purpose: str, programs: Mapping[str, str]) -> str:
    if purpose not in programs:
        raise RuntimeError(
            f"no program for purpose {purpose!r}; this worker has {', '.join(programs)}: are node and orchestrator of one version?"
        )
    return programs[purpose]


def _report(objects: Objects, key: str, events: Events | None, outcome: dict[str, Any]) -> None:
    """Writes the outcome, after every event. One that says cancelled or failed already is what ended this process, and stays."""
    if events:
        events.flush()
    if outcome["status"] == PREEMPTED and _status(objects, key) in ENDED:
        return
    objects.put(outcome_path(key), msgspec.json.encode(outcome))


def _await_first_rank(objects: Objects, key: str, submission: str) -> None:
    """Stays until the first rank has reported: torchrun ends the others, the first one too, as soon as one exits with an error code."""
    until = time.monotonic() + SECONDS_FOR_FIRST_RANK
    while time.monotonic() < until:
        try:
            if msgspec.json.decode(objects.get(outcome_path(key))).get("submission") == submission:
                return
        except (NotFound, Unavailable):
            pass
        time.sleep(0.2)


def _status(objects: Objects, key: str) -> str:
    try:
        return str(msgspec.json.decode(objects.get(outcome_path(key)))["status"])
    except NotFound:
        return ""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m resources.gpu.worker JOB_KEY", file=sys.stderr)
        return 2
    faulthandler.enable()
    return run(sys.argv[1], os.environ)


if __name__ == "__main__":
    sys.exit(main())
