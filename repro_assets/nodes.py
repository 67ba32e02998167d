"""Training and scoring of a stage on GPU nodes: order the job, follow it, turn what comes back into documents and lakeFS commits.

The programs and the executor know no lakeFS; orders are written in `orders.py`. Every blob that a node names is read and verified here.
"""

import os
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import msgspec

from repro_assets import basemodel, bundling, orders
from repro_assets.documents import (
    BaseModel,
    CheckpointObserved,
    EvalObserved,
    EvalResults,
    EvalSuites,
    QloraCheckpoint,
    Shards,
    TrainingBundle,
)
from repro_assets.shelf import folder
from repro_assets.stage import SCRATCH, TERMINAL, Stage
from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import digest
from repro_assets.trust.hardware import gpus, hardware_class
from repro_assets.trust.signing import sign
from repro_assets.trust.statements import CHECKPOINT, descriptor, provenance, test_result
from resources.gpu import TRUST, Event, Executor, Job, Outcome

RANKS = "repro/ranks"
BUILDER = "urn:repro-assets:builder:gpu-executor"


def verify_bundle(stage: Stage[QloraCheckpoint]) -> None:
    """Refuse to train without a bundle that a trusted builder signed for these shards. The program checks it again on its node."""
    bundling.check(stage, stage.document(TrainingBundle))


def world(stage: Stage[Any]) -> int:
    """Ranks of a training: the run tag, else the resource's setting, else the GPUs that CUDA_VISIBLE_DEVICES leaves, at least one."""
    return int(stage.tags.get(RANKS) or 0) or stage.bench.gpu.world() or max(1, len(gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))))


def train(stage: Stage[QloraCheckpoint]) -> tuple[QloraCheckpoint, CheckpointObserved]:
    """Run the training; each checkpoint becomes a lakeFS commit while it runs."""
    bundle = stage.document(TrainingBundle)
    hardware = hardware_class()
    spec = orders.training(
        envelope=bundle.observed.envelope,
        section=stage.recipe.training,
        compute_dtype=orders.compute_dtype(stage.recipe.training, hardware),
        shards=stage.input(Shards),
        stored=stage.observed(Shards),
        base_model=stage.input(BaseModel),
        special=basemodel.special_tokens(basemodel.small_files(stage.input(BaseModel).model_files, stage.blobs)),
    )
    ranks = world(stage)
    commits: dict[str, str] = {}
    follow = _Follower(stage, commits)
    trust = msgspec.json.encode(stage.bench.signing.trust).decode()
    # a re-execution is no experiment of its own for a tracker
    quiet = {"REPRO_WANDB": "off"} if stage.tags.get(SCRATCH) else {}
    outcome = _run(stage, "train", spec, ranks, follow, {TRUST: trust, **quiet})
    result = msgspec.convert(outcome.result, QloraCheckpoint)
    _hold(stage, result.files())
    envelope = stage.blobs.put_bytes(_sign_checkpoint(stage, result))
    facts = outcome.observed
    observed = CheckpointObserved(
        timings=msgspec.convert(facts["timings"], Blob),
        envelope=envelope,
        tokens_per_second=facts["tokens_per_second"],
        steps_per_second=facts["steps_per_second"],
        seconds=facts["seconds"],
        device_hours=facts["device_hours"],
        world_size=facts["world_size"],
        backend=outcome.backend,
        job=outcome.key,
        attempts=outcome.attempt + 1,
        commits=commits,
        losses=msgspec.convert(facts["losses"], tuple[tuple[int, float], ...]),
        validation=msgspec.convert(facts["validation"], tuple[tuple[int, float], ...]),
    )
    return result, observed


def score(stage: Stage[EvalResults], baseline: str | None) -> tuple[EvalResults, EvalObserved]:
    """Score the candidate and the baseline (content digest of a qlora_checkpoint document, or None for the untuned base) in one process."""
    candidate: QloraCheckpoint = stage.input(QloraCheckpoint)
    held: QloraCheckpoint | None = stage.shelf.by_digest(baseline, QloraCheckpoint)[1] if baseline else None
    section = stage.recipe.evaluation
    spec = orders.scoring(
        base_model=stage.input(BaseModel),
        suites=stage.input(EvalSuites),
        section=section,
        training_section=stage.recipe.training,
        candidate=candidate.adapter,
        baseline=held.adapter if held else None,
        compute_dtype=candidate.compute_dtype,
    )
    outcome = _run(stage, "score", spec, 1, _Follower(stage, {}))
    found = outcome.result
    result = EvalResults(
        scores=msgspec.convert(found["scores"], EvalResults.__annotations__["scores"]),
        samples=msgspec.convert(found["samples"], Blob),
        candidate=candidate.tensors,
        baseline=held.tensors if held else stage.inputs["base_model"],
        hardware=found["hardware"],
        compute_dtype=found["compute_dtype"],
        batch_size=section.batch_size,
    )
    _hold(stage, result.files())
    observed = EvalObserved(
        envelope=stage.blobs.put_bytes(_sign_evaluation(stage, result)),
        seconds=outcome.observed["seconds"],
        job=outcome.key,
        attempts=outcome.attempt + 1,
        peak_memory=outcome.observed["peak_memory"],
        latency=outcome.observed["latency"],
    )
    return result, observed


def _run(
    stage: Stage[Any], purpose: str, spec: dict[str, Any], ranks: int, follow: "_Follower", environment: dict[str, str] | None = None
) -> Outcome:
    executor: Executor = stage.bench.gpu.executor()
    job = Job(
        purpose=purpose,
        identity={"key": digest(stage.components()), "order": digest({name: value for name, value in spec.items() if name != "bundle"})},
        spec=spec,
        # a re-execution must never collect the result of the original
        nonce=stage.context.run.run_id if stage.unmemoed else "",
        ranks=ranks,
        gpus=ranks if gpus(os.environ.get("CUDA_VISIBLE_DEVICES")) else 0,
        environment=environment or {},
    )
    return executor.run(job, follow, on_interrupt=lambda: _wanted(stage))


def _wanted(stage: Stage[Any]) -> Any:
    """A person who terminates the run wants the job gone; a Dagster that restarts wants to find it again."""
    if stage.tags.get(TERMINAL):  # Ctrl-C in a terminal is a person
        return "cancel"
    run = stage.context.instance.get_run_by_id(stage.context.run.run_id)
    return "cancel" if run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED) else "detach"


def _hold(stage: Stage[Any], blobs: dict[str, Blob]) -> None:
    """Read every blob a node named: it is verified on the way, and missing or damaged ones are found before anything is committed."""
    for _data in stage.blobs.get_many(blob.sha256 for blob in blobs.values()):
        pass


class _Follower:
    """Hands a job's events to the Dagster log, and its checkpoints to lakeFS."""

    def __init__(self, stage: Stage[Any], commits: dict[str, str]) -> None:
        self.stage, self.commits = stage, commits
        self.kept: dict[int, dict[str, Blob]] = {}
        self.best = 0

    def __call__(self, event: Event) -> None:
        facts = event.facts
        say = self.stage.log.info
        match event.kind:
            case "step" if "loss" in facts:
                say(
                    f"step {facts['step']}/{facts['steps']} loss {facts['loss']:.4f} {facts['tokens_per_second']:,.0f} tokens/s, "
                    f"{facts['eta_seconds']:.0f} s to go"
                )
            case "validation":
                say(f"step {facts['step']} validation loss {facts['loss']:.4f}")
            case "checkpoint":
                self._commit(facts)
            case _:
                say(f"{event.kind}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))

    def _commit(self, facts: dict[str, Any]) -> None:
        """One lakeFS commit a checkpoint. The head keeps the last K and the best; earlier ones stay in the branch's history."""
        stage, step = self.stage, int(facts["step"])
        manifest = msgspec.convert(facts["manifest"], Blob)
        named = msgspec.json.decode(stage.blobs.get_bytes(manifest.sha256))["files"]
        files = {name: msgspec.convert(blob, Blob) for name, blob in named.items()}
        self.kept[step] = {**files, "manifest.json": manifest}
        if facts.get("best"):
            self.best = step
        stay = {*sorted(self.kept)[-stage.recipe.training.keep :], self.best} & self.kept.keys()
        listed = {f"step-{at:06d}/{name}": blob for at in sorted(stay) for name, blob in self.kept[at].items()}
        written = stage.bench.lake.client.write(
            stage.branch,
            f"{folder(stage.key, stage.recipe.name, stage.asset)}/checkpoints",
            listed,
            message=f"checkpoint at step {step} of {stage.key} ({stage.recipe.name})",
            metadata={
                "asset": stage.asset,
                "snapshot": stage.key,
                "recipe": stage.recipe.name,
                "step": str(step),
                "run": stage.context.run.run_id,
            },
        )
        self.commits[str(step)] = written.commit
        loss = facts.get("validation_loss")
        stage.log.info(
            f"checkpoint at step {step}" + (f", validation loss {loss:.4f}" if loss is not None else "") + f": commit {written.commit[:12]}"
        )


def _sign_checkpoint(stage: Stage[QloraCheckpoint], result: QloraCheckpoint) -> bytes:
    bundle = stage.document(TrainingBundle)
    statement = provenance(
        CHECKPOINT,
        {f"adapter/{name}": blob.sha256 for name, blob in result.adapter.items()},
        parameters={"training": stage.section, "compute_dtype": result.compute_dtype, "hardware": result.hardware},
        dependencies=[
            descriptor("training_bundle", bundle.result.statement.sha256),
            descriptor("ledger", result.ledger.sha256),
            descriptor("quantised_base", result.quantised_base),
        ],
        builder=BUILDER,
        invocation=stage.context.run.run_id,
        finished=datetime.now(UTC),
    )
    return sign(statement, stage.bench.signing.signer("builder"))


def _sign_evaluation(stage: Stage[EvalResults], result: EvalResults) -> bytes:
    suites: EvalSuites = stage.input(EvalSuites)
    candidate: QloraCheckpoint = stage.input(QloraCheckpoint)
    statement = test_result(
        {f"adapter/{name}": blob.sha256 for name, blob in candidate.adapter.items()},
        result="PASSED",
        configuration=[
            *(descriptor(f"eval_suites/{suite.name}", suite.digest) for suite in suites.suites),
            descriptor("baseline", result.baseline),
            descriptor("samples", result.samples.sha256),
        ],
        evaluated=datetime.now(UTC),
        passed=[f"{score.suite}/{score.task}/{score.metric}" for score in result.scores],
    )
    return sign(statement, stage.bench.signing.signer("evaluator"))
