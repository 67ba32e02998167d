"""A small real program for the executor's tests: counts steps, keeps checkpoints as events, stops on SIGTERM, and misbehaves as asked."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from resources.errors import Unavailable

SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def run(job: dict[str, Any], store: Any, events: Any) -> dict[str, Any]:
    prior = events.prior()
    first = sum(event["kind"] == "started" for event in prior) == 0
    begin = max((event["step"] for event in prior if event["kind"] == "checkpoint"), default=0)
    stop = threading.Event()
    rank = int(os.environ.get("RANK", "0"))
    signal.signal(signal.SIGTERM, signal.SIG_IGN if job.get("ignore_term") else lambda *_: stop.set())
    for _ in range(job.get("grandchildren", 0)):
        subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True)
    environment = {name: value for name, value in os.environ.items() if name.startswith(("LAKECTL_", "OMP_", "CUDA_", "HF_HUB"))}
    events.emit("started", pid=os.getpid(), begin=begin, environment=environment)
    print(f"rank {rank} begins at step {begin}")
    steps_run = []
    for step in range(begin + 1, job["steps"] + 1):
        time.sleep(job.get("step_seconds", 0.0))
        if rank == job.get("fail_rank", 0) and step == job.get("fail_at"):
            raise ValueError("the loss is not finite\nat all")
        if first and step == job.get("storage_away_at"):
            raise Unavailable("S3 did not answer")
        if (first or job.get("always")) and step == job.get("killed_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if stop.is_set():
            events.emit("checkpoint", step=step - 1, manifest={}, best=False)
            return {"status": "preempted", "reason": f"asked to stop at step {step - 1}"}
        steps_run.append(step)
        events.emit("step", step=step, steps=job["steps"])
        if step % job.get("checkpoint_every", 1000) == 0:
            events.emit("checkpoint", step=step, manifest={}, best=False)
    blob = store.put_bytes(b"adapter")
    if linger := job.get("linger"):
        Path("lingering").touch()
        time.sleep(linger)
    return {"status": "succeeded", "reason": "", "result": {"steps": steps_run, "blob": blob.sha256}, "observed": {"begin": begin}}
