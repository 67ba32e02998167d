"""What the executor's tests share: the probe job, who is left over, and how the worker is entered."""

import os
from pathlib import Path

import psutil

from resources.gpu import Job
from resources.gpu.processes import FOLDER

LAUNCH = Path(__file__).with_name("launch.py")


def left_over(home: Path) -> list[int]:
    """Processes of any job under `home`."""
    found = []
    for process in psutil.process_iter():
        try:
            inside = process.environ().get(FOLDER, "").startswith(str(home))
            if inside and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def probe(name: str, **spec: object) -> Job:
    """A job of the probe program; `name` is its identity, `ranks`, `nonce`, `time_limit` and `grace` are the job's own."""
    own = {field: spec.pop(field) for field in ("ranks", "nonce", "time_limit", "grace", "gpus") if field in spec}
    return Job(purpose="probe", identity={"name": name}, spec={"steps": 3, **spec}, **{"grace": 5.0, **own})  # type: ignore[arg-type]
