"""Whether servers and machine are in order: what `repro status` and `repro doctor` look at. Starts nothing, changes nothing.

What lies in lakeFS is `inspecting.py` and `verifying.py`. Clients are imported where they are used: `repro status` answers at once.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from repro_assets.terminal import FINDING, explained
from resources.settings import Connections, home_folder

if TYPE_CHECKING:
    from repro_assets.bench import Bench

FREE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `good` or not, what was seen, and the exit code it stands for when it is not good."""

    what: str
    good: bool
    seen: str
    code: int = FINDING


def servers_seen() -> list[dict[str, Any]]:
    """One row per server: name, endpoint, whether it answers; pid and log of embedded ones. Starts nothing."""
    from resources import servers

    if not os.environ.get("LAKECTL_SERVER_ENDPOINT_URL"):
        return [
            {"name": row.name, "endpoint": row.endpoint, "healthy": row.healthy, "pid": row.pid, "log": str(row.log)}
            for row in servers.status()
        ]
    from resources.errors import StorageError

    where = Connections.from_environment()
    rows = []
    for name, endpoint, look in (("s3", where.s3_endpoint or "AWS", _look_at_s3), ("lakefs", where.lakefs_endpoint, _look_at_lakefs)):
        try:
            look(where)
            healthy = True
        except (StorageError, OSError):
            healthy = False
        rows.append({"name": name, "endpoint": endpoint, "healthy": healthy, "pid": None, "log": None})
    return rows


def _look_at_lakefs(where: Connections) -> str:
    from resources.lake import Lake, Patience

    head = Lake.connect(where, patience=Patience(attempts=1)).head("main")
    return f"{where.lakefs_endpoint}, repository {where.repository}, main at {head[:12]}"


def _look_at_s3(where: Connections) -> str:
    from resources.blobs import Blobs, Objects

    Objects.connect(where).exists("memo/none")
    Blobs.connect(where).exists("0" * 64)
    return f"{where.s3_endpoint or 'AWS'}, buckets {where.blobs_bucket} and {where.jobs_bucket}"


def examine(bench: "Bench") -> Iterator[Finding]:
    """Whether this machine and its servers can do the work. Every point is looked at, whatever the one before it said."""
    points: dict[str, Callable[[Any], str | Finding]] = {
        "recipe": lambda bench: str(bench.recipe.load().path),
        "lakeFS": lambda bench: _look_at_lakefs(bench.lake.connections),
        "S3": lambda bench: _look_at_s3(bench.lake.connections),
        "raw": _raw,
        "keys": _keys,
        "disk": _disk,
        "hardware": _hardware,
        "lock": _lock,
        "git": _git,
    }
    for what, look in points.items():
        try:
            found = look(bench)
        except Exception as error:  # a doctor reports what it meets
            known = explained(error)
            if known is None:
                raise
            yield Finding(what, False, known[1], known[0])
        else:
            yield found if isinstance(found, Finding) else Finding(what, True, found)


def _raw(bench: "Bench") -> str | Finding:
    if not bench.lake.client.exists("raw"):
        return "no branch raw yet: `repro import PATH` makes it"
    staged = list(bench.lake.client.uncommitted("raw"))
    return Finding("raw", False, f"{len(staged)} uncommitted objects: `repro commit-raw -m MESSAGE`") if staged else "nothing uncommitted"


def _keys(bench: "Bench") -> str:
    signing = bench.signing
    if signing.configured is None and not signing.trust_file.exists():
        return f"none yet: local ones are made under {signing.folder} when something is signed"
    trust = signing.trust
    return f"{len(trust.keys)} trusted, {len(trust.revoked.keys)} revoked ({signing.trust_file})"


def _hardware(_bench: "Bench") -> str:
    from repro_assets.trust.hardware import hardware_class

    return hardware_class()


def _disk(_bench: "Bench") -> str | Finding:
    folder = home_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.0f} GB free under {folder}"
    return said if free > FREE_BYTES else Finding("disk", False, f"{said}: make room before training, or move REPRO_HOME")


def _lock(_bench: "Bench") -> str | Finding:
    from repro_assets.trust.environment import capture

    found = capture().lock
    return found if found else Finding("lock", False, "no requirements.lock beside the package: set REPRO_LOCK, or work from a checkout")


def _git(_bench: "Bench") -> str:
    from repro_assets.trust.environment import capture

    environment = capture()
    state = environment.git
    return f"{state.commit[:12]}{' with uncommitted changes' if state.dirty else ''}" if state else environment.git_absent
