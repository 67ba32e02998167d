"""Making and checking the training bundle of a stage: environment, statement, signature. What the statement says is `trust/bundle.py`."""

import os
from typing import Any

import msgspec

from repro_assets.documents import (
    BaseModel,
    BundleObserved,
    Document,
    EvalSuites,
    RawSnapshot,
    Records,
    Shards,
    TrainingBundle,
    ValidationReport,
)
from repro_assets.stage import Stage
from repro_assets.trust import bundle
from repro_assets.trust.canonical import canonical, digest
from repro_assets.trust.closure import closure
from repro_assets.trust.environment import Environment, capture, git_state, lock_bytes
from repro_assets.trust.signing import sign
from repro_assets.trust.statements import PROVENANCE, timeless
from repro_assets.trust.verification import Refused, verify

UPSTREAM = (RawSnapshot, Records, Shards, ValidationReport)
STAGES = {
    "records": "repro_assets.data.records",
    "shards": "repro_assets.data.sharding",
    "training": "repro_assets.training.program",
    "evaluation": "repro_assets.evaluation.program",
}
BUILDER = "urn:repro-assets:builder:dagster"


class BundleRefused(Exception):
    """A bundle that may not be signed, or not be used; the message says why and what to do."""


def environment(stage: Stage[TrainingBundle]) -> Environment:
    """The environment as the statement pins it, made part of the memo key: another lock or commit is another bundle."""
    found = capture()
    pinned = [found.lock, found.image, found.git.commit if found.git else None, found.git.diff if found.git else None]
    stage.depends("environment", digest({"pinned": pinned, "code": {name: closure(module).digest for name, module in STAGES.items()}}))
    if found.git and found.git.dirty and os.environ.get("REPRO_STRICT"):
        raise BundleRefused(
            "REPRO_STRICT is set and the checkout has uncommitted changes: commit them, or unset REPRO_STRICT to store the diff in the bundle"
        )
    return found


def refuse_failed(report: ValidationReport) -> None:
    """A failed report forbids the bundle, whatever Dagster's checks show: they are ignored when one asset is materialized alone."""
    failed = [f"{rule.name} ({rule.detail})" for rule in report.rules if rule.verdict == "fail"]
    if report.verdict == "fail":
        raise BundleRefused(
            f"the validation report says fail: {'; '.join(failed) or 'see its page'}. Mend the raw data or the recipe, commit it to raw "
            "and materialize the new snapshot; nothing was signed"
        )


def build(stage: Stage[TrainingBundle], found: Environment) -> tuple[TrainingBundle, BundleObserved]:
    """Statement, signature, environment and lock as blobs."""
    refuse_failed(stage.input(ValidationReport))
    code = {name: closure(module).digest for name, module in STAGES.items()}
    statement = bundle.statement(
        shards=stage.input(Shards),
        section=stage.section,
        dependencies=bundle.dependencies(
            snapshot=stage.input(RawSnapshot),
            base_model=stage.input(BaseModel),
            suites=stage.input(EvalSuites),
            documents={kind.asset: stage.inputs[kind.asset] for kind in UPSTREAM},
            code=code,
            environment=found,
        ),
        builder=BUILDER,
        invocation=stage.context.run.run_id,
    )
    signer = stage.bench.signing.signer("builder")
    envelope, pinned, recorded = stage.blobs.put_many([sign(statement, signer), canonical(timeless(statement)), canonical(found)])
    lock, git = lock_bytes(), git_state()[0]
    if git and git.dirty:
        stage.blobs.put_bytes(git.diff)
    definition = statement["predicate"]["buildDefinition"]
    result = TrainingBundle(
        statement=pinned,
        subjects=len(statement["subject"]),
        dependencies=tuple(item["name"] for item in definition["resolvedDependencies"]),
    )
    observed = BundleObserved(
        envelope=envelope,
        key_id=signer.public_key.keyid,
        environment=recorded,
        lock=stage.blobs.put_bytes(lock) if lock else None,
        git={name: str(value) for name, value in msgspec.to_builtins(found.git).items()} if found.git else {},
    )
    return result, observed


def stands(stage: Stage[Any], made: Document[TrainingBundle, BundleObserved]) -> bool:
    """Whether the envelope of an earlier bundle still verifies under the trust configuration of today."""
    try:
        check(stage, made)
    except (Refused, BundleRefused):
        return False
    return True


def check(stage: Stage[Any], made: Document[TrainingBundle, BundleObserved]) -> None:
    """Raise unless a trusted builder signed exactly this bundle for exactly the shards and recipe in hand."""
    section = made.section
    held = bundle.subjects(stage.input(Shards), section)
    statement = verify(
        stage.blobs.get_bytes(made.observed.envelope.sha256),
        trust=stage.bench.signing.trust,
        role="builder",
        predicate_type=PROVENANCE,
        subjects=held,
    )
    if digest(timeless(statement)) != made.result.statement.sha256:
        raise BundleRefused("the signed statement is not the one that the bundle's document names: materialize training_bundle again")
