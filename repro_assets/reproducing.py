"""Proof: re-execute a snapshot on a scratch branch without the memo, compare every digest, name the first difference, sign the result.

Grades and the certificate's form are `trust/certificates.py`; the re-execution is an ordinary Dagster run with two tags.
"""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import msgspec

from repro_assets import certified, running
from repro_assets.bench import Bench
from repro_assets.documents import Document
from repro_assets.nodes import RANKS
from repro_assets.shelf import Shelf
from repro_assets.stage import SCRATCH
from repro_assets.trust.blob import Blob, BlobMissing, BlobStore
from repro_assets.trust.canonical import canonical, digest
from repro_assets.trust.certificates import Difference, Part, Run, certificate, first_difference, grade, part
from repro_assets.trust.environment import capture
from repro_assets.trust.signing import sign

DATA = ("raw_snapshot", "records", "shards", "validation_report")
TRAINING = ("qlora_checkpoint", "eval_results", "promotion")
VERIFIER = "urn:repro-assets:reproduce"


class CannotReproduce(Exception):
    """A snapshot that was never made whole, or a re-execution that failed; the message says which asset and why."""


@dataclass(frozen=True)
class Proof:
    """What came of a re-execution. `grade` None means that something differs; `first` names the earliest difference."""

    grade: str | None
    parts: tuple[Part, ...]
    first: Difference | None
    first_in_words: str
    certificate: Blob
    commit: str
    run: str
    was: Run | None
    now: Run | None


def reproduce(
    instance: dg.DagsterInstance, bench: Bench, key: str, *, recipe: str | None, ranks: int, say: Callable[[str, str], None] | None = None
) -> Proof:
    """Re-execute every asset of the snapshot and certify. The scratch branch is removed, the snapshot's documents are not touched."""
    shelf = Shelf(bench.lake.client, bench.blobs.store)
    name = bench.recipe.load().recipe.name
    snapshot = shelf.snapshot(key)
    head = bench.lake.client.head(snapshot.branch)
    originals = {asset: _original(shelf, head, key, name, asset) for asset in (*DATA, "training_bundle", *TRAINING)}
    scratch = f"{key}-{secrets.token_hex(4)}"
    branch = f"scratch-{scratch}"
    bench.lake.client.ensure_branch(branch, head, hidden=True)
    try:
        ran = running.materialize(instance, key=key, recipe=recipe, ranks=ranks, tags={SCRATCH: scratch, RANKS: str(ranks)}, say=say)
        if not ran.success:
            raise CannotReproduce(f"the re-execution of {key} did not finish: {ran.failure}")
        there = bench.lake.client.head(branch)
        again = {asset: _original(shelf, there, key, name, asset) for asset in originals}
        if copied := [asset for asset, document in again.items() if document.made.run != ran.run_id]:
            raise CannotReproduce(
                f"{copied[0]} was not executed by run {ran.run_id}: a comparison with the original's own copy proves nothing"
            )
    finally:
        bench.lake.client.delete_branch(branch)
    return _certify(instance, bench, shelf, key, name, originals, again, ran.run_id)


def _original(shelf: Shelf, commit: str, key: str, recipe: str, asset: str) -> Document[Any, Any]:
    found = shelf.read(commit, key, recipe, asset)
    if found is None:
        raise CannotReproduce(
            f"{asset} of snapshot {key} ({recipe}) was never made, so there is nothing to compare with: run `repro materialize --snapshot {key}`"
        )
    return found


def named_digests(document: Document[Any, Any]) -> dict[str, str]:
    """Every digest and fact of one result under a readable name: blobs by path, the rest by field."""
    kind = type(document.result).asset
    blobs = {f"{kind}/{path}": blob.sha256 for path, blob in document.result.files().items()}
    facts = {f"{kind}.{path}": digest(value) for path, value in _facts(msgspec.to_builtins(document.result))}
    return {**facts, **blobs}


def _facts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _facts(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from _facts(item, f"{path}[{index}]")
    else:
        yield path, value


def _certify(
    instance: dg.DagsterInstance,
    bench: Bench,
    shelf: Shelf,
    key: str,
    recipe: str,
    originals: dict[str, Document[Any, Any]],
    again: dict[str, Document[Any, Any]],
    run_id: str,
) -> Proof:
    parts = []
    for scope, assets in (("data", DATA), ("training", TRAINING)):
        was: dict[str, str] = {}
        now: dict[str, str] = {}
        for asset in assets:
            was |= named_digests(originals[asset])
            now |= named_digests(again[asset])
        parts.append(part(scope, was, now))  # type: ignore[arg-type]
    runs = [_run(documents["qlora_checkpoint"]) for documents in (originals, again)]
    earned = grade(parts, *runs)
    first = first_difference(parts)
    words = explain(shelf.blobs, first) if first else ""
    subjects = {f"{certified.SUBJECT}{asset}": document.digest for asset, document in originals.items()}
    recorded = shelf.blobs.put_bytes(canonical(capture()))
    statement = certificate(
        subjects,
        parts,
        original=originals["training_bundle"].result.statement.sha256,
        verifier=VERIFIER,
        certified=datetime.now(UTC),
        was=runs[0],
        now=runs[1],
        environment=recorded.sha256,
    )
    envelope = shelf.blobs.put_bytes(sign(statement, bench.signing.signer("builder")))
    snapshot = shelf.snapshot(key)
    commit = bench.lake.client.write(
        snapshot.branch,
        f"snapshots/{key}/{recipe}/{certified.FOLDER}/{envelope.sha256[:12]}",
        {certified.ENVELOPE: envelope, certified.ENVIRONMENT: recorded},
        message=f"certificate {earned or 'none: it differs'} for {key} ({recipe})",
        metadata={"asset": "certificate", "snapshot": key, "recipe": recipe, "grade": earned or "none", "run": run_id},
    ).commit
    proof = Proof(earned, tuple(parts), first, words, envelope, commit, run_id, runs[0], runs[1])
    _show(instance, key, proof)
    return proof


def _run(document: Document[Any, Any]) -> Run:
    observed = document.observed
    return Run(hardware=document.result.hardware, world_size=observed.world_size, backend=observed.backend)


def _show(instance: dg.DagsterInstance, key: str, proof: Proof) -> None:
    """The certificate on the asset's page in the UI, as an observation."""
    compared = sum(item.compared for item in proof.parts)
    instance.report_runless_asset_event(
        dg.AssetObservation(
            asset_key="qlora_checkpoint",
            partition=key,
            metadata={
                "certificate": proof.grade or "none: the re-execution differs",
                "compared": f"{compared} digests, {sum(len(item.differences) for item in proof.parts)} differ",
                "first difference": proof.first_in_words or "none",
                "envelope": proof.certificate.sha256,
                "lakeFS commit": proof.commit,
            },
        )
    )


def explain(blobs: BlobStore, first: Difference) -> str:
    """The first difference down to record or tensor, in words."""
    said = f"{first.name}: {_short(first.was)} became {_short(first.now)}"
    if not first.was or not first.now:
        return said
    try:
        inside = _inside(blobs.get_bytes(first.was), blobs.get_bytes(first.now), first.name)
    except BlobMissing:  # a fact of the document, not a blob: its digest names nothing in the store
        return said
    return f"{said} ({inside})"


def _inside(was: bytes, now: bytes, name: str) -> str:
    if name.endswith(".safetensors"):
        return _tensor(was, now)
    if name.endswith((".jsonl", ".json")):
        for number, (old, new) in enumerate(zip(was.splitlines(), now.splitlines(), strict=False), 1):
            if old != new:
                return f"line {number}: {old[:80]!r} became {new[:80]!r}"
        return f"{len(was.splitlines())} lines became {len(now.splitlines())}"
    at = next((index for index, (old, new) in enumerate(zip(was, now, strict=False)) if old != new), min(len(was), len(now)))
    return f"first different byte at {at}"


def _tensor(was: bytes, now: bytes) -> str:
    """The first tensor of two safetensors files that differs."""
    headers = []
    for data in (was, now):
        length = int.from_bytes(data[:8], "little")
        headers.append((msgspec.json.decode(data[8 : 8 + length]), 8 + length))
    (old, old_at), (new, new_at) = headers
    for name in sorted(old.keys() - {"__metadata__"}):
        if name not in new:
            return f"tensor {name} is gone"
        (start, end), (other, stop) = old[name]["data_offsets"], new[name]["data_offsets"]
        if was[old_at + start : old_at + end] != now[new_at + other : new_at + stop]:
            return f"tensor {name} {old[name]['dtype']}{old[name]['shape']}"
    return "the header differs, every tensor is the same"


def _short(value: str | None) -> str:
    return value[:12] if value else "absent"
