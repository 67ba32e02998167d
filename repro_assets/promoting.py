"""Deciding on a checkpoint and acting on the decision: release, or failure bundle and notice; and rolling back. Policy is in `evaluation/`."""

import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from repro_assets.documents import EvalResults, EvalSuites, Promotion, PromotionObserved, QloraCheckpoint, TrainingBundle
from repro_assets.evaluation import failure, policy
from repro_assets.releases import Release, ReleaseError, Releases
from repro_assets.stage import SCRATCH, Stage
from repro_assets.trust import artifact
from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import canonical, digest
from repro_assets.trust.signing import sign
from repro_assets.trust.statements import TEST_RESULT, VSA, decision_of, descriptor, referenced, vsa
from repro_assets.trust.verification import SubjectMismatch, verify
from resources.notifier import Notice
from resources.signer import Signer

PROMOTE = "repro/promote"
BACKFILL = "dagster/backfill"
CHAIN = ("raw_snapshot", "records", "shards", "validation_report", "training_bundle", "qlora_checkpoint", "eval_results")
VERIFIER = "urn:repro-assets:gate"


def decide(stage: Stage[Promotion]) -> tuple[Promotion, list[dict[str, Any]]]:
    """The policy's decision on this snapshot's scores, and the table of samples it was made from."""
    results: EvalResults = stage.input(EvalResults)
    section = stage.recipe.gates
    suites: EvalSuites = stage.input(EvalSuites)
    policy.check_power(section, suites)
    lines = stage.blobs.get_bytes(results.samples.sha256).splitlines()
    samples = [msgspec.json.decode(line) for line in lines]
    recalled = stage.recall()
    if recalled:
        return recalled.result, samples
    found = policy.decide(samples, section, suites)
    result = Promotion(
        decision=found.decision,
        reasons=found.reasons,
        verdicts=found.verdicts,
        policy=digest(section.identity()),
        adapter=stage.input(QloraCheckpoint).tensors,
    )
    return result, samples


def act(stage: Stage[Promotion], result: Promotion, samples: list[dict[str, Any]]) -> PromotionObserved:
    """Carry the decision out. Everything here may be repeated: a chain that is released already stays the release it is."""
    checkpoint: QloraCheckpoint = stage.input(QloraCheckpoint)
    checked(stage)
    if result.decision != "promote":
        return _held(stage, result, samples, checkpoint)
    releases = Releases(stage.bench.lake.client, stage.blobs)
    documents = chain(stage)
    envelope = _sign(stage.bench.signing, stage.inputs, result, checkpoint.adapter, f"repro:snapshots/{stage.key}")
    blob = stage.blobs.put_bytes(envelope)
    if done := releases.of_documents(documents):
        said = f"already release {done.number}; nothing written"
        return PromotionObserved(acted=said, release=done.number, release_commit=None, envelope=blob, failure=None, notice=None)
    if why := _withheld(stage, releases):
        return PromotionObserved(
            acted=f"would promote; not released: {why}", release=None, release_commit=None, envelope=blob, failure=None, notice=None
        )
    artifact.check({name: stage.blobs.get_bytes(file.sha256) for name, file in checkpoint.adapter.items()})
    release = Release(
        number=releases.next_number(),
        kind="promotion",
        snapshot=stage.key,
        recipe=stage.recipe.name,
        documents=documents,
        adapter=checkpoint.adapter,
        decision=blob.sha256,
        reason="; ".join(result.reasons) or "every gate is non-inferior",
    )
    files = {**_statements(stage), "statements/decision.dsse.json": blob, **_documents(stage, documents)}
    commit = releases.write(
        release, files, {"asset": "promotion", "snapshot": stage.key, "recipe": stage.recipe.name, "run": stage.context.run.run_id}
    )
    said = f"released as release {release.number}"
    stage.log.info(f"promotion: {said}, commit {commit[:12]} on main")
    return PromotionObserved(acted=said, release=release.number, release_commit=commit, envelope=blob, failure=None, notice=None)


def chain(stage: Stage[Any]) -> dict[str, str]:
    """asset -> content digest of everything this decision stands on, shared assets included."""
    found = {asset: stage.shelf.digest_at(stage.head, stage.key, stage.recipe.name, asset) for asset in CHAIN}
    bundle = stage.document(TrainingBundle)
    return {
        **{asset: value for asset, value in found.items() if value},
        "base_model": bundle.inputs["base_model"],
        "eval_suites": bundle.inputs["eval_suites"],
    }


def checked(stage: Stage[Any]) -> None:
    """Refuse scores that no trusted evaluator signed for this very adapter."""
    checkpoint: QloraCheckpoint = stage.input(QloraCheckpoint)
    results: EvalResults = stage.input(EvalResults)
    statement = verify(
        stage.blobs.get_bytes(stage.observed(EvalResults).envelope.sha256),
        trust=stage.bench.signing.trust,
        role="evaluator",
        predicate_type=TEST_RESULT,
        subjects=_adapter(checkpoint.adapter),
    )
    # a genuine evaluation of the same adapter on other suites, or against another baseline, decides nothing here
    needed = {results.samples.sha256, results.baseline, *(suite.digest for suite in stage.input(EvalSuites).suites)}
    if missing := needed - referenced(statement).keys():
        raise SubjectMismatch(
            f"the signed evaluation does not name {sorted(missing)[0][:12]} of eval_results: it is about another scoring; "
            f"run `repro materialize --snapshot {stage.key} --select eval_results --no-memo`"
        )


def _adapter(files: Mapping[str, Blob]) -> dict[str, str]:
    return {f"adapter/{name}": blob.sha256 for name, blob in files.items()}


def trusted(releases: Releases, signing: Signer, release: Release) -> Release:
    """`release`, after its signed decision was verified: promoted by a trusted approver, for this adapter, not revoked since."""
    statement = verify(
        releases.blobs.get_bytes(release.decision),
        trust=signing.trust,
        role="approver",
        predicate_type=VSA,
        subjects=_adapter(release.adapter),
    )
    if (said := decision_of(statement)) != "promote":
        raise ReleaseError(f"release {release.number}: the signed decision says {said}, not promote; find who wrote it with `lakectl log`")
    return release


def released(stage: Stage[Any], asset: str) -> str | None:
    """Content digest of an asset in the release to compare with, after its decision was verified; None before the first release."""
    releases = Releases(stage.bench.lake.client, stage.blobs)
    found = releases.in_force(stage.recipe.name)
    return trusted(releases, stage.bench.signing, found).documents[asset] if found else None


def _withheld(stage: Stage[Promotion], releases: Releases) -> str | None:
    """Why a promotion is not carried out although the gates allow it."""
    if stage.tags.get(SCRATCH):
        return "this run only reproduces"
    if stage.tags.get(PROMOTE):
        return None
    if stage.tags.get(BACKFILL):
        return f"a backfill never promotes (run tag {PROMOTE} does it anyway)"
    newest = releases.in_force(stage.recipe.name)
    if newest and newest.snapshot > stage.key:
        return f"release {newest.number} is of the newer snapshot {newest.snapshot} (run tag {PROMOTE} replaces it anyway)"
    return None


def _held(stage: Stage[Promotion], result: Promotion, samples: list[dict[str, Any]], checkpoint: QloraCheckpoint) -> PromotionObserved:
    command = f"repro materialize --snapshot {stage.key} --select promotion --recipe {shlex.quote(str(stage.loaded.path))}"
    content = failure.bundle(
        policy.Decision(result.decision, result.reasons, result.verdicts), samples, {**chain(stage), "adapter": checkpoint.tensors}, command
    )
    bundle, envelope = stage.blobs.put_many(
        [canonical(content), _sign(stage.bench.signing, stage.inputs, result, checkpoint.adapter, f"repro:snapshots/{stage.key}")]
    )
    if stage.tags.get(SCRATCH):
        notice = None
    else:
        notice = stage.bench.notifier.notify(
            Notice(
                kind=result.decision,
                title=f"{result.decision}: snapshot {stage.key} ({stage.recipe.name}) is not promoted",
                text="; ".join(result.reasons),
                facts={"failure_bundle": bundle.sha256, "command": command, "flipped": content["flipped_total"]},
            )
        )
    said = f"{result.decision}: not promoted; failure bundle {bundle.sha256[:12]}"
    return PromotionObserved(acted=said, release=None, release_commit=None, envelope=envelope, failure=bundle, notice=notice)


def _sign(signing: Signer, inputs: dict[str, str], result: Promotion, adapter: dict[str, Blob], resource: str) -> bytes:
    statement = vsa(
        _adapter(adapter),
        decision=result.decision,  # type: ignore[arg-type]
        verifier=VERIFIER,
        verified=datetime.now(UTC),
        resource=resource,
        policy=descriptor("gates", result.policy),
        inputs=[descriptor(name, value) for name, value in sorted(inputs.items()) if len(value) == 64],
    )
    return sign(statement, signing.signer("approver"))


def _statements(stage: Stage[Any]) -> dict[str, Blob]:
    return {
        "statements/bundle.dsse.json": stage.observed(TrainingBundle).envelope,
        "statements/checkpoint.dsse.json": stage.observed(QloraCheckpoint).envelope,
        "statements/evaluation.dsse.json": stage.observed(EvalResults).envelope,
    }


def _documents(stage: Stage[Any], documents: dict[str, str]) -> dict[str, Blob]:
    """The chain's documents themselves, so that a release explains itself without its snapshot branch."""
    return {f"documents/{asset}.json": Blob(value, len(stage.blobs.get_bytes(value))) for asset, value in documents.items()}


def roll_back(releases: Releases, signing: Signer, number: int, reason: str) -> tuple[Release, str]:
    """A new release that puts an earlier one's adapter in force again, after its decision is verified anew. (release, commit)

    Raises ReleaseError for an unknown number or one that is in force already, Refused when the old decision no longer verifies.
    """
    old = releases.get(number)
    in_force = releases.in_force(old.recipe)
    if in_force and in_force.adapter == old.adapter:
        raise ReleaseError(f"release {in_force.number} has the adapter of release {number}: it is in force already")
    trusted(releases, signing, old)
    statement = vsa(
        _adapter(old.adapter),
        decision="rollback",
        verifier=VERIFIER,
        verified=datetime.now(UTC),
        resource=f"repro:releases/{number}",
        policy=descriptor("rollback", digest({"restores": number, "reason": reason})),
        inputs=[descriptor(f"release/{number}/decision", old.decision)],
    )
    envelope = releases.blobs.put_bytes(sign(statement, signing.signer("approver")))
    release = Release(
        number=releases.next_number(),
        kind="rollback",
        snapshot=old.snapshot,
        recipe=old.recipe,
        documents=old.documents,
        adapter=old.adapter,
        decision=old.decision,
        reason=reason,
        restores=number,
    )
    commit = releases.write(
        release,
        {"statements/rollback.dsse.json": envelope},
        {"asset": "promotion", "snapshot": old.snapshot, "recipe": old.recipe, "restores": str(number)},
    )
    return release, commit
