"""Answers about what is there: snapshots, one document, why an asset would be made again, and whether machine and servers are in order.

Reads only. Verification of a snapshot is `verifying.py`.
"""

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from repro_assets.bench import Bench
from repro_assets.documents import KINDS, Document
from repro_assets.releases import Releases
from repro_assets.shelf import SHARED_ASSETS, MissingDocument, Shelf
from repro_assets.stage import SECTIONS
from repro_assets.terminal import FINDING, explained
from repro_assets.trust.canonical import digest, sha256
from repro_assets.trust.closure import Closure
from repro_assets.trust.environment import capture, hardware_class, lock_bytes
from repro_assets.trust.memo import differing
from resources.errors import StorageError
from resources.lake import Lake, Patience
from resources.servers import ServerError
from resources.settings import Connections

FREE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `good` or not, what was seen, and the exit code it stands for when it is not good."""

    what: str
    good: bool
    seen: str
    code: int = FINDING


class Inspector:
    """Looks through one bench's eyes, under its recipe."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.recipe = bench.recipe.load().recipe
        self.lake: Lake = bench.lake.client
        self.shelf = Shelf(self.lake, bench.blobs.store)
        self.lake.ensure()

    def head(self, key: str) -> str:
        """The commit that holds all work on a snapshot now. Raises MissingDocument for a key that no raw commit made."""
        return self.lake.head(self.shelf.snapshot(key).branch)

    def snapshots(self) -> list[dict[str, Any]]:
        """Every snapshot, newest first: key, raw commit, assets made under the recipe, decision, release."""
        released = {
            release.snapshot: release.number
            for release in Releases(self.lake, self.shelf.blobs).all()
            if release.kind == "promotion" and release.recipe == self.recipe.name
        }
        heads = dict(self.lake.branches("snapshot-"))
        rows = []
        for key, commit in self.shelf.raw_commits():
            made, decision = 0, ""
            if head := heads.get(f"snapshot-{key}"):
                partitioned = [asset for asset in KINDS if asset not in SHARED_ASSETS]
                made = sum(self.shelf.digest_at(head, key, self.recipe.name, asset) is not None for asset in partitioned)
                promotion = self.shelf.read(head, key, self.recipe.name, "promotion")
                decision = promotion.result.decision if promotion else ""
            rows.append({"snapshot": key, "raw_commit": commit, "assets": made, "decision": decision, "release": released.get(key)})
        return rows

    def show(self, asset: str, key: str | None) -> Document[Any, Any]:
        """The document of an asset. Raises MissingDocument naming the command that makes it."""
        if key is None:
            return self.shelf.shared(self.recipe.name, asset, None)
        return self._document(asset, key, self.head(key))

    def _document(self, asset: str, key: str, head: str) -> Document[Any, Any]:
        found = self.shelf.read(head, key, self.recipe.name, asset)
        if found is None:
            raise MissingDocument(
                f"{asset} of snapshot {key} was never made under recipe {self.recipe.name!r}: "
                f"run `repro materialize --snapshot {key} --select {asset}`"
            )
        return found

    # ---- why

    def why(self, asset: str, key: str | None) -> list[str]:
        """What differs, in words, between how the asset and all it stands on were last made and how they would be made now.

        Upstream first. Empty: nothing differs. Raises MissingDocument when the asset was never made.
        """
        head = self.head(key) if key else ""
        documents: dict[str, Document[Any, Any]] = {}

        def gather(name: str) -> None:
            if name in documents or name not in KINDS:
                return
            documents[name] = (
                self.shelf.shared(self.recipe.name, name, key) if name in SHARED_ASSETS else self._document(name, str(key), head)
            )
            for upstream in documents[name].inputs:
                gather(upstream)

        gather(asset)
        said = []
        for name in KINDS:
            if name in documents:
                said += self._differences(documents[name], documents)
        return said

    def _differences(self, document: Document[Any, Any], documents: dict[str, Document[Any, Any]]) -> list[str]:
        asset, was = type(document.result).asset, document.made.components
        reached = code_of(asset)
        now = {
            **was,
            "schema": KINDS[asset][0].schema,
            "section": SECTIONS[asset](self.recipe),
            "code": reached.digest,
            "inputs": {name: self._input(name, value, document, documents) for name, value in was.get("inputs", {}).items()},
        }
        if "hardware" in was:
            now |= {"hardware": hardware_class(), "lock": sha256(lock_bytes() or b"")}
        said = [line for line in differing(was, now) if not line.startswith(f"{asset}: code ")]
        if was.get("code") != reached.digest:
            said += [f"{asset}: {line}" for line in _changed(document.made.sources, reached)]
        for name, read in document.inputs.items():
            there = documents[name].digest if name in documents and name not in SHARED_ASSETS else read
            if there != read and not any(f"inputs.{name} " in line for line in said):
                said.append(f"{asset}: was made from {name} {read[:12]}, which is {there[:12]} now")
        return said

    def _input(self, name: str, value: str, document: Document[Any, Any], documents: dict[str, Document[Any, Any]]) -> str:
        """What this part of the key would be now. Shared assets stay as the document named them until references are refreshed."""
        if name == "adapter" and "qlora_checkpoint" in documents:
            return str(documents["qlora_checkpoint"].result.tensors)
        if name in documents and name not in SHARED_ASSETS:
            return digest(documents[name].result)
        return value


def code_of(asset: str) -> Closure:
    """The code that makes the asset, as its own module names it."""
    found = importlib.import_module(f"repro_assets.assets.{asset}").CODE
    assert isinstance(found, Closure), f"repro_assets.assets.{asset}.CODE is no closure"
    return found


def _changed(was: dict[str, str], now: Closure) -> Iterator[str]:
    for name in sorted(was.keys() | now.sources.keys()):
        if name not in now.sources:
            yield f"code of {name} is no longer reached"
        elif name not in was:
            yield f"code of {name} is reached now"
        elif was[name] != now.sources[name]:
            yield f"code of {name} changed"
    if was == now.sources:
        yield "the version of a library it names changed: " + ", ".join(f"{name} {version}" for name, version in now.libraries.items())


# ---- servers and machine


def servers_seen() -> list[dict[str, Any]]:
    """One row per server: name, endpoint, whether it answers; pid and log of embedded ones. Starts nothing."""
    from resources import servers

    if not os.environ.get("LAKECTL_SERVER_ENDPOINT_URL"):
        return [
            {"name": row.name, "endpoint": row.endpoint, "healthy": row.healthy, "pid": row.pid, "log": str(row.log)}
            for row in servers.status()
        ]
    where = Connections.from_environment()
    rows = []
    for name, endpoint, look in (("s3", where.s3_endpoint or "AWS", _look_at_s3), ("lakefs", where.lakefs_endpoint, _look_at_lakefs)):
        try:
            look(where)
            healthy = True
        except (StorageError, ServerError, OSError):
            healthy = False
        rows.append({"name": name, "endpoint": endpoint, "healthy": healthy, "pid": None, "log": None})
    return rows


def _look_at_lakefs(where: Connections) -> str:
    head = Lake.connect(where, patience=Patience(attempts=1)).head("main")
    return f"{where.lakefs_endpoint}, repository {where.repository}, main at {head[:12]}"


def _look_at_s3(where: Connections) -> str:
    from resources.blobs import Blobs, Objects

    Objects.connect(where).exists("memo/none")
    Blobs.connect(where).exists("0" * 64)
    return f"{where.s3_endpoint or 'AWS'}, buckets {where.blobs_bucket} and {where.jobs_bucket}"


def examine(bench: Bench) -> Iterator[Finding]:
    """Whether this machine and its servers can do the work. Every point is looked at, whatever the one before it said."""
    points: dict[str, Callable[[Bench], str | Finding]] = {
        "recipe": lambda bench: str(bench.recipe.load().path),
        "lakeFS": lambda bench: _look_at_lakefs(bench.lake.connections),
        "S3": lambda bench: _look_at_s3(bench.lake.connections),
        "raw": _raw,
        "keys": _keys,
        "disk": _disk,
        "hardware": lambda bench: hardware_class(),
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


def _raw(bench: Bench) -> str | Finding:
    if not bench.lake.client.exists("raw"):
        return "no branch raw yet: `repro import PATH` makes it"
    staged = list(bench.lake.client.uncommitted("raw"))
    return Finding("raw", False, f"{len(staged)} uncommitted objects: `repro commit-raw -m MESSAGE`") if staged else "nothing uncommitted"


def _keys(bench: Bench) -> str:
    signing = bench.signing
    if signing.configured is None and not signing.trust_file.exists():
        return f"none yet: local ones are made under {signing.folder} when something is signed"
    trust = signing.trust
    return f"{len(trust.keys)} trusted, {len(trust.revoked.keys)} revoked ({signing.trust_file})"


def _disk(_bench: Bench) -> str | Finding:
    from resources.settings import home_folder

    folder = home_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.0f} GB free under {folder}"
    return said if free > FREE_BYTES else Finding("disk", False, f"{said}: make room before training, or move REPRO_HOME")


def _lock(_bench: Bench) -> str | Finding:
    found = capture().lock
    return found if found else Finding("lock", False, "no requirements.lock beside the package: set REPRO_LOCK, or work from a checkout")


def _git(_bench: Bench) -> str:
    environment = capture()
    state = environment.git
    return f"{state.commit[:12]}{' with uncommitted changes' if state.dirty else ''}" if state else environment.git_absent
