"""Finding and ending every process of a job, in whatever session it lives. What a job is and when it must end is decided elsewhere.

Process groups are not enough: torchrun starts each rank in a session of its own, so that killing its group leaves the ranks running.
Every process of a job inherits two variables instead, and is found by them even when its parents are gone.
"""

import os
import time
from collections.abc import Callable
from typing import Final

import psutil

FOLDER: Final = "REPRO_JOB_FOLDER"
SUBMISSION: Final = "REPRO_JOB_SUBMISSION"
UNKILLABLE_SECONDS: Final = 15.0


class StillRunning(Exception):
    """Processes that KILL did not end; the message has their ids."""


def members(variable: str, value: str) -> list[psutil.Process]:
    """Live processes, other than this one, that were started with `variable` set to `value`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(variable) == value and is_live(process):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # another user's process, or one that ended as we looked
    return found


def is_live(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def leader(pid: int, created: float) -> psutil.Process | None:
    """The live process `pid` that started at `created` (seconds since 1970), not a later one that got its number."""
    try:
        process = psutil.Process(pid)
        # The clock may have been stepped since; a number comes round again far later than this.
        return process if abs(process.create_time() - created) < 5 and is_live(process) else None
    except psutil.Error:
        return None


def end(find: Callable[[], list[psutil.Process]], first: list[psutil.Process], grace: float) -> None:
    """TERM to `first`, up to `grace` seconds for them to end, then KILL to whatever `find` finds until it finds nothing.

    Raises StillRunning when KILL did not help, which means a process inside the kernel (a hung driver or file system).
    """
    if grace > 0 and first:
        for process in first:
            _signal(process.terminate)
        until = time.monotonic() + grace
        while time.monotonic() < until and any(is_live(process) for process in first):
            time.sleep(0.05)
    until = time.monotonic() + UNKILLABLE_SECONDS
    while left := find():
        if time.monotonic() > until:
            raise StillRunning(
                f"processes {sorted(process.pid for process in left)} do not end on SIGKILL: "
                "look at the GPU driver or file system that they wait for"
            )
        for process in left:
            _signal(process.kill)
        time.sleep(0.05)


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return
