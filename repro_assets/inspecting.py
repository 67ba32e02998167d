"""Answers about what is there: snapshots, one document, and why an asset would be made again.

Reads only. Verification of a snapshot is `verifying.py`; whether servers and machine are in order is `health.py`.
"""

import importlib
from collections.abc import Iterator
from typing import Any

from repro_assets.bench import Bench
from repro_assets.documents import KINDS, Document
from repro_assets.releases import Releases
from repro_assets.shelf import SHARED_ASSETS, MissingDocument, Shelf
from repro_assets.stage import SECTIONS
from repro_assets.trust.canonical import digest, sha256
from repro_assets.trust.closure import Closure
from repro_assets.trust.environment import lock_bytes
from repro_assets.trust.hardware import hardware_class
from repro_assets.trust.memo import differing
from resources.lake import Lake


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
            "libraries": reached.libraries,
            "inputs": {name: self._input(name, value, document, documents) for name, value in was.get("inputs", {}).items()},
        }
        if "hardware" in was:
            now |= {"hardware": hardware_class(), "lock": sha256(lock_bytes() or b"")}
        said = [line for line in differing(was, now) if not line.startswith(f"{asset}: code ")]
        said += [f"{asset}: {line}" for line in changed_code(document.made.sources, reached)]
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


def changed_code(was: dict[str, str], now: Closure) -> Iterator[str]:
    """Modules that changed, came or went since `was` (module to SHA-256 of its source), in words."""
    for name in sorted(was.keys() | now.sources.keys()):
        if name not in now.sources:
            yield f"code of {name} is no longer reached"
        elif name not in was:
            yield f"code of {name} is reached now"
        elif was[name] != now.sources[name]:
            yield f"code of {name} changed"
