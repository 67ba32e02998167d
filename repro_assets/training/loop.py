"""The step loop: forward, ordered sum, clip, AdamW, ledger, validation, checkpoints, and the agreement to stop.

Everything that moves bits happens here in one order that the world size cannot change. Loading and outcomes are `program.py`.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch
from torch.nn.functional import cross_entropy

from repro_assets.recipe import TrainingSection
from repro_assets.training import checkpoint, determinism, ledger, model
from repro_assets.training.batches import IGNORED, Batch, Course, Step
from repro_assets.training.exchange import OrderedSum, World, any_rank, shared_values
from repro_assets.training.job import TrainingError
from repro_assets.training.preemption import Preemption
from repro_assets.training.schedule import learning_rate

#: elements behind the gradient in the exchanged vector: the loss sum, and the wish to stop
LOSS, STOP = 0, 1

Report = Callable[..., None]


class Timing(msgspec.Struct, frozen=True):
    """Wall time of one step in seconds, the part of it spent in exchanges, its tokens, and the device memory peak in bytes."""

    step: int
    seconds: float
    exchange: float
    tokens: int
    memory: int


class Progress(msgspec.Struct):
    """How far a training is. `rows`: the whole ledger. `closed`: steps whose rows are in a regular checkpoint's segments."""

    step: int = 0
    rows: list[ledger.Row] = []
    closed: int = 0
    best_step: int = 0
    best_loss: float | None = None
    timings: list[Timing] = []


def optimizer_for(parameters: dict[str, torch.nn.Parameter], section: TrainingSection) -> torch.optim.AdamW:
    """AdamW with every choice written out; its arithmetic is part of a checkpoint's identity (`OPTIMIZER`)."""
    return torch.optim.AdamW(
        list(parameters.values()),
        lr=section.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=section.weight_decay,
        foreach=False,
        fused=False,
    )


OPTIMIZER = "adamw betas=0.9,0.999 eps=1e-8"


class Trainer:
    """One training on this rank. `report` takes events (kind, facts); only rank 0's arrive anywhere."""

    def __init__(
        self,
        network: torch.nn.Module,
        course: Course,
        section: TrainingSection,
        dtype: torch.dtype,
        world: World,
        preemption: Preemption,
        report: Report,
    ) -> None:
        if section.micro_batches % world.size:
            raise TrainingError(
                f"training.micro_batches is {section.micro_batches}, which {world.size} ranks cannot share evenly; "
                f"start 1 rank or another divisor of {section.micro_batches}"
            )
        self.network, self.course, self.section, self.dtype, self.world = network, course, section, dtype, world
        self.preemption, self.report = preemption, report
        self.parameters = model.trainable(network)
        self.optimizer = optimizer_for(self.parameters, section)
        self.size = sum(parameter.numel() for parameter in self.parameters.values())
        self.sum = OrderedSum(world, self.size + 2)
        self.few_logits = model.keeps_logits(network)
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] | None = None
        self.writer: checkpoint.Writer | None = None
        network.train()

    # --- one step ---------------------------------------------------------------------------------------------------------------

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Sum of the token losses (nats, float32) of a batch on this rank's device."""
        batch = batch.to(self.world.device)
        asked: dict[str, Any] = {}
        targets = batch.targets
        if self.few_logits:
            # the head is a large part of a small model, and most tokens of a chat are not trained on
            kept = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
            targets, asked["logits_to_keep"] = targets[:, kept], kept
        # No attention mask and no cache: either makes transformers forget that a row holds several documents.
        with model.autocast(self.dtype, self.world.device), determinism.attention(self.world.device):
            logits = self.network(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **asked).logits
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def gradient(self, step: Step) -> tuple[torch.Tensor, bool]:
        """The step's summed vector (gradient, loss sum) and whether any rank wants to stop."""
        rows, trained = self.course.epochs[step.epoch], max(1, self.course.trained(step))
        self.sum.start()
        for first in range(0, self.section.micro_batches, self.world.size):
            number = first + self.world.rank
            indices = step.micro_batches[number]
            vector = self.sum.vector()
            if any(rows.trained[index] for index in indices):
                # dropout draws from this seed alone, whoever computes the micro-batch and whatever ran before it
                torch.manual_seed(determinism.mix(self.section.seed, step.number, number))
                loss = self.loss_sum(rows.batch(indices))
                (loss / trained).backward()
                self._collect(vector)
                vector[self.size + LOSS] = loss.detach()
            vector[self.size + STOP] = float(self.preemption.requested)
            self.sum.add(vector)
        total = self.sum.total()
        return total[: self.size + 1], bool(total[self.size + STOP] > 0)

    def _collect(self, vector: torch.Tensor) -> None:
        at = 0
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                vector[at : at + parameter.numel()] = parameter.grad.flatten()
                parameter.grad = None
            at += parameter.numel()

    def update(self, total: torch.Tensor, number: int) -> tuple[float, float]:
        """Clip, set the rate, step. Returns the gradient's norm before clipping, and the rate."""
        at = 0
        for parameter in self.parameters.values():
            parameter.grad = total[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.section.clip, foreach=False)
        rate = learning_rate(self.section, number, self.course.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm.item()), rate

    def one(self, number: int) -> bool:
        """Do step `number`; its row joins the ledger. Returns whether any rank wants to stop."""
        began, exchanged = time.perf_counter(), self.sum.seconds
        step = self.course.step(number)
        total, stop = self.gradient(step)
        trained, tokens = self.course.trained(step), self.course.tokens(step)
        loss = float(total[self.size + LOSS].item()) / max(1, trained)
        norm, rate = self.update(total, number)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(f"step {number}: loss {loss}, gradient norm {norm}; lower training.learning_rate or raise training.warmup")
        self.progress.rows.append(
            ledger.row(
                step=number, epoch=step.epoch, loss=loss, learning_rate=rate, gradient_norm=norm, tokens=tokens, trained=trained,
                records=self.course.epochs[step.epoch].record_ids(step.rows),
            )
        )  # fmt: skip
        self.progress.step = number
        memory = torch.cuda.max_memory_allocated(self.world.device) if self.world.device.type == "cuda" else 0
        self.progress.timings.append(Timing(number, time.perf_counter() - began, self.sum.seconds - exchanged, tokens, memory))
        return stop

    # --- validation -------------------------------------------------------------------------------------------------------------

    def validate(self) -> float | None:
        """Mean loss (nats a trained token) over the first validation rows; None without any. Draws nothing, changes nothing.

        Units of `rows` rows are dealt to the ranks by index, and their sums are added in the order of the index.
        """
        held_out, width = self.course.validation, self.section.rows
        indices = range(min(len(held_out), self.section.validation_rows))
        trained = sum(held_out.trained[index] for index in indices)
        if not trained:
            return None
        units = [indices[start : start + width] for start in range(0, len(indices), width)]
        sums = torch.zeros(len(units), dtype=torch.float64)
        self.network.eval()
        try:
            with torch.no_grad():
                for first in range(0, len(units), self.world.size):
                    self._stop_if_asked()
                    unit = first + self.world.rank
                    if unit < len(units) and any(held_out.trained[index] for index in units[unit]):
                        sums[unit] = self.loss_sum(held_out.batch(units[unit])).item()
        finally:
            self.network.train()
        return sum(shared_values(self.world, sums).tolist()) / trained

    def _stop_if_asked(self) -> None:
        """A validation can take longer than an engine's grace: stop in it, saved; the resumed run does it from its start."""
        if any_rank(self.world, self.preemption.requested):
            self.save(regular=False)
            raise Stopped

    # --- the course -------------------------------------------------------------------------------------------------------------

    def resume(self, state: checkpoint.State) -> None:
        """Continue a checkpoint: adapter, moments, ledger, best so far."""
        manifest = state.saved.manifest
        source = f"checkpoint {state.saved.blob.sha256}"
        model.restore(self.network, state.adapter, source)
        checkpoint.restore_optimizer(self.optimizer, self.parameters, state.optimizer, manifest.step, source)
        progress = self.progress
        progress.step, progress.rows = manifest.step, list(state.rows)
        progress.closed = manifest.step if manifest.regular else (manifest.past[-1].step if manifest.past else 0)
        for row in progress.rows:
            self._note_validation(row)

    def _note_validation(self, row: ledger.Row) -> bool:
        """Whether `row` is the best validation so far; of two equal ones the earlier stays best."""
        loss = row.get("validation_loss")
        if loss is None or (self.progress.best_loss is not None and loss >= self.progress.best_loss):
            return False
        self.progress.best_step, self.progress.best_loss = row["step"], loss
        return True

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.course.steps

    def duties(self) -> None:
        """What belongs to the step just done: its validation, and its regular checkpoint when it is due or the best so far."""
        best = False
        row = self.progress.rows[-1]
        if self._due(self.section.validate_every) and "validation_loss" not in row:
            loss = self.validate()
            if loss is not None:
                row["validation_loss"] = loss
                best = self._note_validation(row)
                self.report("validation", step=self.progress.step, loss=loss)
        if (self._due(self.section.checkpoint_every) or best) and self.progress.closed < self.progress.step:
            self.save(regular=True)

    def save(self, regular: bool) -> None:
        """Snapshot and start writing; every rank closes the segment, rank 0 writes it."""
        progress = self.progress
        if self.writer is not None:
            tensors = model.snapshot(self.parameters)
            moments = model.snapshot(checkpoint.optimizer_tensors(self.optimizer, self.parameters))
            rows = [dict(row) for row in progress.rows[progress.closed :]]
            self.writer.save(progress.step, tensors, moments, rows, progress.rows[-1].get("validation_loss"), regular)
        if regular:
            progress.closed = progress.step

    def run(self, last: int) -> Iterator[int]:
        """Train to step `last`, yielding each step's number once its duties are done. Stops early, saved, when any rank is asked to."""
        if self.progress.rows:
            # a preemption may have saved this step before its validation and checkpoint
            self.duties()
        while self.progress.step < last:
            stop = self.one(self.progress.step + 1)
            if stop:
                self.save(regular=False)
                raise Stopped
            self.duties()
            if self.writer is not None:
                self.writer.poll()
            yield self.progress.step


class Stopped(Exception):
    """Asked to stop, and saved."""
