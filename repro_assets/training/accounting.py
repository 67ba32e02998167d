"""Where the device time of a job went, over all its processes: useful, lost to work done twice, and waiting for the first step.

Computed from the job's own events; a killed process is known up to its last event.
"""

from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]


def processes(events: Sequence[Event]) -> list[list[Event]]:
    """Events of each earlier process that got as far as its first step, oldest first."""
    found: list[list[Event]] = []
    for event in events:
        if event.get("kind") == "started":
            found.append([event])
        elif found and "elapsed" in event:
            found[-1].append(event)
    return found


def device_hours(events: Sequence[Event], resumed: int, world_size: int, startup: float, seconds: float) -> dict[str, float]:
    """Hours by use. This process started at step `resumed` and took `seconds`, of which `startup` before its first step."""
    earlier = processes(events)
    hours = {"useful": (seconds - startup) * world_size, "lost": 0.0, "waiting": startup * world_size}
    continued = [*(int(process[0].get("resumed", 0)) for process in earlier[1:]), resumed]
    for process, kept in zip(earlier, continued[: len(earlier)], strict=True):
        began = process[0]
        waited, ranks = float(began.get("elapsed", 0.0)), int(began["world_size"])
        ended = max(float(event["elapsed"]) for event in process)
        # a step counts as kept when a later process went on behind it
        held = max((float(event["elapsed"]) for event in process[1:] if int(event.get("step", 0)) <= kept), default=waited)
        hours["waiting"] += waited * ranks
        hours["useful"] += (held - waited) * ranks
        hours["lost"] += (ended - held) * ranks
    return {use: round(value / 3600, 6) for use, value in hours.items()}
