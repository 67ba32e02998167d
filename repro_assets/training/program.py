"""The training program: verify, load, resume, train, say what came out. `run` is all that a node's worker calls.

Needs a blob store and the job's events, nothing else. The step loop is `loop.py`.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from repro_assets.documents import Checkpoint, QloraCheckpoint
from repro_assets.training import accounting, batches, checkpoint, determinism, exchange, ledger, loop, model, tracker, verify
from repro_assets.training.exchange import World
from repro_assets.training.job import Events, Job, TrainingError, parse
from repro_assets.training.preemption import Preempted, Preemption
from repro_assets.trust.blob import Blob, BlobStore
from repro_assets.trust.canonical import digest

#: seconds between two step events; a fast model does hundreds of steps in this time
EVENT_EVERY = 3.0
#: points of the loss curve that the observed half keeps
CURVE = 500

Outcome = dict[str, Any]


def run(job: dict[str, Any], store: BlobStore, events: Events) -> Outcome:
    """Do one training job on this rank.

    Returns {"status": "succeeded" | "preempted", "reason", "result", "observed"}, the same status on every rank; result and observed
    are rank 0's. Raises TrainingError or BlobError, with the reason and the remedy, for what must not be trained.
    """
    began = time.monotonic()
    with Preemption() as preemption:
        parsed = parse(job)
        determinism.prepare()
        world = exchange.join()
        determinism.settle()
        try:
            outcome = Training(parsed, store, events, world, preemption, began).run()
        except Preempted:
            outcome = {
                "status": "preempted",
                "reason": f"asked to stop ({preemption.signal or 'another rank'}) before the first step",
                "result": {},
                "observed": {},
            }
        # only on the way out without an error: after one, the other ranks may never come here
        exchange.leave(world)
        return outcome


class Training:
    """One process's part of a training job."""

    def __init__(self, job: Job, store: BlobStore, events: Events, world: World, preemption: Preemption, began: float) -> None:
        self.job, self.store, self.events, self.world, self.preemption, self.began = job, store, events, world, preemption, began
        self.phases: dict[str, float] = {}
        self.prior: list[dict[str, Any]] = events.prior() if world.first else []
        self.resumed = 0
        self.reported = 0
        self.last_event = 0.0
        self.timings_written = 0
        self.latest: checkpoint.Saved | None = None

    # --- small helpers ----------------------------------------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def report(self, kind: str, **facts: Any) -> None:
        """An event with the seconds since this process began; rank 0 only."""
        if self.world.first:
            self.events.emit(kind, **facts, elapsed=round(self.elapsed, 3))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the start-up, and stop behind it when any rank is asked to."""
        started = time.monotonic()
        yield
        self.phases[name] = round(time.monotonic() - started, 3)
        if exchange.any_rank(self.world, self.preemption.requested):
            raise Preempted

    # --- start-up ---------------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        job, world = self.job, self.world
        if job.section.micro_batches % world.size:
            raise TrainingError(
                f"training.micro_batches is {job.section.micro_batches}, which {world.size} ranks cannot share evenly; "
                f"start 1 rank or another divisor of {job.section.micro_batches}"
            )
        dtype = determinism.compute_dtype(job.compute_dtype, world.device)
        with self.phase("verify"):
            self.bundle = verify.check_bundle(job, self.store)
        with self.phase("leaves"):
            self.course = batches.load(job, self.store)
        with self.phase("base_model"), self.base_folder() as folder:
            base = model.load_base(folder, job.section, dtype, world.device)
        with self.phase("adapter"):
            self.course.check_vocabulary(int(base.config.vocab_size))
            self.network = model.attach_adapter(base, job.section)
        with self.phase("probe"):
            model.check_isolation(self.network, dtype, world.device)
        with self.phase("identity"):
            self.identity = self.describe()
            for field in checkpoint.Identity.__struct_fields__:
                exchange.agree(world, field, str(getattr(self.identity, field)))
        with self.phase("resume"):
            self.trainer = loop.Trainer(self.network, self.course, job.section, dtype, world, self.preemption, self.report)
            self.resume()
        return self.train()

    @contextmanager
    def base_folder(self) -> Iterator[Path]:
        """A folder with the base model's files, one a node: its first rank fetches them, the others wait."""
        with tempfile.TemporaryDirectory(prefix="repro-base-") as own:
            if self.world.local == 0:
                model.fetch(self.store, self.job.base_model, Path(own))
            folders = exchange.gather_bytes(self.world, own.encode())
            yield Path(folders[self.world.node_leader].decode())
            exchange.any_rank(self.world, False)

    def describe(self) -> checkpoint.Identity:
        """What this training is; every rank must come to the same."""
        parameters = model.trainable(self.network)
        return checkpoint.Identity(
            # not the bundle: one signed anew for another commit of the same code must give the same manifests
            training=self.job.content,
            section=self.job.section.digest(),
            base_model=self.job.base,
            quantised_base=model.base_digest(self.network),
            plan=self.course.plan,
            trainable=digest({name: list(parameter.shape) for name, parameter in parameters.items()}),
            init=model.tensors_digest(parameters),
            adapter_dtype="float32",
            compute_dtype=self.job.compute_dtype,
            hardware=determinism.hardware(self.world.device),
            optimizer=loop.OPTIMIZER,
            steps=self.course.steps,
        )

    def resume(self) -> None:
        """Find the checkpoint to continue (rank 0 looks, all agree), refuse another training's, and load it."""
        found = b""
        if self.world.first:
            saved = checkpoint.newest(self.store, self.job.resume, self.prior)
            found = saved.blob.sha256.encode() if saved else b""
        name = exchange.gather_bytes(self.world, found)[0].decode()
        if self.world.first:
            self.trainer.writer = checkpoint.Writer(self.store, self.identity, self.on_saved)
        if not name:
            return
        saved = checkpoint.read_manifest(self.store, name)
        checkpoint.check_identity(saved, self.identity)
        self.trainer.resume(checkpoint.read_state(self.store, saved))
        self.resumed, self.latest = saved.manifest.step, saved
        if self.trainer.writer is not None:
            self.trainer.writer.continue_from(saved)

    # --- training ---------------------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        trainer, job = self.trainer, self.job
        last = min(job.stop_after or self.course.steps, self.course.steps)
        if last < self.resumed:
            raise TrainingError(
                f"stop_after is {job.stop_after}, the checkpoint to resume is at step {self.resumed}; name an earlier checkpoint"
            )
        self.startup = self.elapsed
        self.report(
            "started", world_size=self.world.size, device=self.world.device.type, compute_dtype=job.compute_dtype,
            hardware=self.identity.hardware, steps=self.course.steps, resumed=self.resumed, phases=self.phases,
        )  # fmt: skip
        sink = tracker.choose(self.store) if self.world.first else tracker.Guarded(tracker.NoTracker())
        sink.start(f"train-{job.content[:16]}", self.tracked(), trainer.progress.rows[: self.resumed])
        logged = self.resumed
        try:
            for number in trainer.run(last):
                if time.monotonic() - self.last_event >= EVENT_EVERY or number == last:
                    self.step_event(number)
                    sink.log(trainer.progress.rows[logged:number])
                    logged = number
        except loop.Stopped:
            self.flush()
            self.report("preempted", step=trainer.progress.step)
            reason = (
                f"asked to stop ({self.preemption.signal or 'another rank'}); saved at step {trainer.progress.step} of {self.course.steps}"
            )
            return {"status": "preempted", "reason": reason, "result": {}, "observed": self.observed({})}
        if last < self.course.steps and trainer.progress.closed < last:
            trainer.save(regular=False)
        self.flush()
        self.check_base()
        return self.finish(sink)

    def tracked(self) -> dict[str, Any]:
        return {**self.job.section.identity(), "digests": msgspec.to_builtins(self.identity)}

    def step_event(self, number: int) -> None:
        """One line for the people who wait: loss, rate, speed since the last one, time left."""
        self.last_event = time.monotonic()
        done = self.trainer.progress.timings[self.reported - self.resumed if self.reported else 0 :]
        self.reported = number
        row = self.trainer.progress.rows[number - 1]
        seconds = sum(item.seconds for item in done) or 1e-9
        speed = sum(item.tokens for item in done) / seconds
        left = (self.course.steps - number) * seconds / max(1, len(done))
        self.report(
            "step", step=number, steps=self.course.steps, loss=row["loss"], learning_rate=row["learning_rate"],
            tokens_per_second=round(speed, 1), eta_seconds=round(left, 1),
        )  # fmt: skip

    def on_saved(self, saved: checkpoint.Saved) -> None:
        """A checkpoint is complete: say so, with the timings since the last one beside it."""
        self.latest = saved
        manifest, progress = saved.manifest, self.trainer.progress
        fresh = [item for item in progress.timings[self.timings_written :] if item.step <= manifest.step]
        self.timings_written += len(fresh)
        timings = self.store.put_bytes(ledger.encode(msgspec.to_builtins(item) for item in fresh))
        self.report(
            "checkpoint", step=manifest.step, manifest=msgspec.to_builtins(saved.blob), tensors=manifest.tensors, regular=manifest.regular,
            validation_loss=manifest.validation_loss, best=manifest.step == progress.best_step, timings=msgspec.to_builtins(timings),
        )  # fmt: skip

    def flush(self) -> None:
        if self.trainer.writer is not None:
            self.trainer.writer.wait()

    def check_base(self) -> None:
        """Raise when training moved what is frozen: every loss after that was of another model."""
        after = model.base_digest(self.network)
        if after != self.identity.quantised_base:
            raise TrainingError(
                f"base model: training moved its quantised weights from {self.identity.quantised_base} to {after}; the result is void"
            )

    # --- the outcome ------------------------------------------------------------------------------------------------------------

    def finish(self, sink: tracker.Guarded) -> Outcome:
        if not self.world.first:
            return {"status": "succeeded", "reason": "", "result": {}, "observed": {}}
        progress, writer = self.trainer.progress, self.trainer.writer
        assert writer is not None
        assert self.latest is not None
        regular = writer.past
        best = progress.best_step or self.latest.manifest.step
        chosen = next((past.manifest.sha256 for past in regular if past.step == best), self.latest.blob.sha256)
        released = checkpoint.read_manifest(self.store, chosen).manifest
        self.check_released(released)
        config = self.store.put_bytes(model.adapter_config(self.network, self.job.base))
        result = QloraCheckpoint(
            adapter={"adapter_config.json": config, "adapter_model.safetensors": released.files[checkpoint.ADAPTER]},
            tensors=released.tensors,
            steps=self.course.steps,
            best_step=best,
            ledger=self.store.put_bytes(ledger.encode(progress.rows)),
            checkpoints=tuple(Checkpoint(past.step, past.manifest, past.tensors, past.validation_loss) for past in self.listed(regular)),
            quantised_base=self.identity.quantised_base,
            plan=self.course.plan,
            compute_dtype=self.job.compute_dtype,
            hardware=self.identity.hardware,
        )
        tracked = sink.finish({"adapter": released.tensors, "ledger": result.ledger.sha256, "bundle": self.bundle, "best_step": best})
        observed = self.observed(tracked)
        if sink.failure:
            observed["tracker_failure"] = sink.failure
        self.report("finished", step=progress.step, best_step=best, tensors=released.tensors)
        return {
            "status": "succeeded",
            "reason": f"trained to step {progress.step}",
            "result": msgspec.to_builtins(result),
            "observed": observed,
        }

    def listed(self, regular: Sequence[checkpoint.Past]) -> list[checkpoint.Past]:
        """Regular checkpoints, and the one a replayed segment ended with."""
        assert self.latest is not None
        return [*regular, *([] if self.latest.manifest.regular else [self.latest.past])]

    def check_released(self, released: checkpoint.Manifest) -> None:
        """Read the released adapter back from the store: every key, every shape, and no layer that learned nothing."""
        from safetensors.torch import load

        tensors = load(self.store.get_bytes(released.files[checkpoint.ADAPTER].sha256))
        if tensors.keys() != model.trainable(self.network).keys() or model.tensors_digest(tensors) != released.tensors:
            raise TrainingError(
                f"adapter of step {released.step}: the stored file does not hold the tensors that were trained; run the job again"
            )
        model.check_trained(tensors)

    def observed(self, tracked: dict[str, Blob]) -> dict[str, Any]:
        """What may differ between two honest runs. Rank 0's."""
        if not self.world.first:
            return {}
        progress = self.trainer.progress
        rows, timings = progress.rows, progress.timings
        seconds = sum(item.seconds for item in timings) or 1e-9
        stride = max(1, -(-len(rows) // CURVE))
        shown = [row for index, row in enumerate(rows) if index % stride == 0 or index == len(rows) - 1]
        return {
            "timings": msgspec.to_builtins(self.all_timings()),
            "tokens_per_second": round(sum(item.tokens for item in timings) / seconds, 3),
            "steps_per_second": round(len(timings) / seconds, 4),
            "seconds": round(self.elapsed, 3),
            "device_hours": accounting.device_hours(self.prior, self.resumed, self.world.size, self.startup, self.elapsed),
            "world_size": self.world.size,
            "losses": [[row["step"], row["loss"]] for row in shown],
            "validation": [[row["step"], row["validation_loss"]] for row in rows if "validation_loss" in row],
            "phases": self.phases,
            "tracking": {name: msgspec.to_builtins(blob) for name, blob in tracked.items()},
        }

    def all_timings(self) -> Blob:
        """timings.jsonl of the whole job: the kept parts of earlier processes' timings, then ours."""
        rows: dict[int, dict[str, Any]] = {}
        for event in self.prior:
            if event.get("kind") == "checkpoint" and "timings" in event and int(event["step"]) <= self.resumed:
                rows |= {row["step"]: row for row in ledger.decode(self.store.get_bytes(event["timings"]["sha256"]))}
        rows |= {item.step: msgspec.to_builtins(item) for item in self.trainer.progress.timings}
        return self.store.put_bytes(ledger.encode(rows[step] for step in sorted(rows)))
