"""Checkpoints: a snapshot in memory, written, hashed and uploaded by a thread; a manifest last of all; and strict resume.

A checkpoint without its manifest does not exist. A manifest is content: it holds no time, host, path or run id, and two honest runs
write the same bytes. When to save is `loop.py`.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from repro_assets.training import ledger
from repro_assets.training.job import TrainingError
from repro_assets.training.model import adapter_bytes, tensors_digest
from repro_assets.trust.blob import Blob, BlobError, BlobStore
from repro_assets.trust.canonical import canonical

ADAPTER, OPTIMIZER = "adapter_model.safetensors", "optimizer.safetensors"

Tensors = Mapping[str, torch.Tensor]


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a training state belongs to; a resume is refused when any of these differs.

    `training` (what the training is made of), `section`, `base_model`, `plan` and `init` are digests; `quantised_base` of the base as loaded; `trainable` of the keys.
    """

    training: str
    section: str
    base_model: str
    quantised_base: str
    plan: str
    trainable: str
    init: str
    adapter_dtype: str
    compute_dtype: str
    hardware: str
    optimizer: str
    steps: int


class Past(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An earlier regular checkpoint, as later manifests remember it."""

    step: int
    manifest: Blob
    tensors: str
    validation_loss: float | None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A complete checkpoint. `ledger`: segments in order. `regular`: due by the recipe, not by a preemption. `past`: regular ones."""

    kind: str = "checkpoint"
    schema: int = 1
    step: int
    identity: Identity
    files: dict[str, Blob]
    tensors: str
    validation_loss: float | None
    ledger: tuple[Blob, ...]
    regular: bool
    past: tuple[Past, ...]

    def blobs(self) -> set[str]:
        return {blob.sha256 for blob in (*self.files.values(), *self.ledger)}


class Saved(msgspec.Struct, frozen=True):
    """A manifest and the blob that holds it."""

    manifest: Manifest
    blob: Blob

    @property
    def past(self) -> Past:
        return Past(self.manifest.step, self.blob, self.manifest.tensors, self.manifest.validation_loss)


class State(msgspec.Struct, frozen=True):
    """What a resume needs. `rows`: the ledger up to `manifest.step`; `segments`: how many of its blobs are closed for good."""

    saved: Saved
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    rows: list[ledger.Row]


class Writer:
    """Writes one checkpoint at a time in a thread. Failures surface on the training thread, at the next call."""

    def __init__(self, store: BlobStore, identity: Identity, on_saved: Callable[[Saved], None]) -> None:
        self.store, self.identity, self.on_saved = store, identity, on_saved
        self.past: tuple[Past, ...] = ()
        self.closed: tuple[Blob, ...] = ()
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._error: BaseException | None = None

    def continue_from(self, saved: Saved) -> None:
        """Go on behind `saved`: what it remembers is remembered."""
        manifest = saved.manifest
        self.past = (*manifest.past, saved.past) if manifest.regular else manifest.past
        self.closed = manifest.ledger if manifest.regular else manifest.ledger[:-1]

    def save(
        self, step: int, adapter: Tensors, optimizer: Tensors, rows: Sequence[ledger.Row], validation_loss: float | None, regular: bool
    ) -> None:
        """Start writing. `adapter` and `optimizer` are snapshots nobody changes; `rows`: ledger rows since the last regular checkpoint."""
        self.wait()
        segment = list(rows)
        self._thread = threading.Thread(
            target=self._run, args=(step, adapter, optimizer, segment, validation_loss, regular), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    def _run(self, step: int, adapter: Tensors, optimizer: Tensors, rows: list[ledger.Row], loss: float | None, regular: bool) -> None:
        try:
            data = [adapter_bytes(adapter), save_tensors(dict(optimizer)), ledger.encode(rows)]
            blobs = self.store.put_many(data)
            manifest = Manifest(
                step=step,
                identity=self.identity,
                files={ADAPTER: blobs[0], OPTIMIZER: blobs[1]},
                tensors=tensors_digest(adapter),
                validation_loss=loss,
                ledger=(*self.closed, blobs[2]),
                regular=regular,
                past=self.past,
            )
            self._saved = Saved(manifest, self.store.put_bytes(canonical(manifest)))
        except BaseException as error:
            self._error = error

    def poll(self) -> None:
        """Report a checkpoint that is done by now; raise what its thread raised."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint under way, and report it."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            # as it is: the worker tells a store that is away from a training that is wrong by the error's type
            error.add_note("while a checkpoint was written; the last complete one stays valid")
            raise error
        assert self._saved is not None
        saved, self._saved = self._saved, None
        self.continue_from(saved)
        self.on_saved(saved)


def read_manifest(store: BlobStore, digest: str) -> Saved:
    """The manifest in blob `digest`. Raises TrainingError naming the manifest when it is missing, damaged or not one."""
    try:
        data = store.get_bytes(digest)
        return Saved(msgspec.json.decode(data, type=Manifest), Blob(digest, len(data)))
    except (BlobError, ValueError) as error:
        raise TrainingError(f"checkpoint manifest {digest}: {error}") from error


def newest(store: BlobStore, explicit: str | None, events: Sequence[dict[str, Any]]) -> Saved | None:
    """The newest complete checkpoint among `events`, or the explicitly named one when the job itself has none beyond it.

    A checkpoint whose blobs are not all there is incomplete and passed over; one whose manifest is damaged is an error.
    """
    start = read_manifest(store, explicit) if explicit else None
    found = {event["manifest"]["sha256"]: int(event["step"]) for event in events if event.get("kind") == "checkpoint"}
    for digest, step in sorted(found.items(), key=lambda item: -item[1]):
        if start is not None and step <= start.manifest.step:
            break
        if store.missing([digest]):
            continue
        saved = read_manifest(store, digest)
        if not store.missing(sorted(saved.manifest.blobs())):
            return saved
    return start


def check_identity(saved: Saved, identity: Identity) -> None:
    """Refuse, naming the first field that differs, to continue a state that belongs to another training."""
    for field in Identity.__struct_fields__:
        theirs, ours = getattr(saved.manifest.identity, field), getattr(identity, field)
        if theirs != ours:
            raise TrainingError(
                f"resume: checkpoint {saved.blob.sha256} (step {saved.manifest.step}) was made with {field} {theirs}, this run has {ours}; "
                "resume with what it was made with, or start a new training"
            )


def read_state(store: BlobStore, saved: Saved) -> State:
    """Tensors and ledger of a checkpoint, verified against its manifest."""
    manifest = saved.manifest
    name = f"checkpoint {saved.blob.sha256} (step {manifest.step})"
    try:
        adapter = load_tensors(store.get_bytes(manifest.files[ADAPTER].sha256))
        optimizer = load_tensors(store.get_bytes(manifest.files[OPTIMIZER].sha256))
        rows = [row for data in store.get_many([blob.sha256 for blob in manifest.ledger]) for row in ledger.decode(data)]
    except (BlobError, KeyError, SafetensorError, msgspec.DecodeError) as error:
        raise TrainingError(f"{name}: {error}; resume from an earlier checkpoint") from error
    if tensors_digest(adapter) != manifest.tensors:
        raise TrainingError(f"{name}: its adapter's tensors are not those that its manifest names; resume from an earlier checkpoint")
    if [row["step"] for row in rows] != list(range(1, manifest.step + 1)):
        raise TrainingError(f"{name}: its ledger does not hold steps 1 to {manifest.step}, each once; resume from an earlier checkpoint")
    return State(saved, adapter, optimizer, rows)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """AdamW's state under the adapter's keys: `exp_avg.<key>` and `exp_avg_sq.<key>`, float32. The step count is the manifest's."""
    state = {}
    for name, parameter in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return state


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], tensors: Tensors, step: int, source: str
) -> None:
    """Put a saved AdamW state back. Strict about keys, shapes and dtypes: a moment that silently restarts is another training."""
    wanted = {f"{moment}.{name}" for name in parameters for moment in ("exp_avg", "exp_avg_sq")}
    if odd := sorted(wanted ^ tensors.keys()):
        raise TrainingError(
            f"{source}: optimizer state {odd[0]!r} is {'missing' if odd[0] in wanted else 'unknown'}; resume from another checkpoint"
        )
    for name, parameter in parameters.items():
        state: dict[str, torch.Tensor] = {"step": torch.tensor(float(step), dtype=torch.float32)}
        for moment in ("exp_avg", "exp_avg_sq"):
            saved = tensors[f"{moment}.{name}"]
            if saved.shape != parameter.shape or saved.dtype != parameter.dtype:
                raise TrainingError(
                    f"{source}: {moment} of {name!r} is {saved.dtype} {tuple(saved.shape)}, not {parameter.dtype} {tuple(parameter.shape)}"
                )
            state[moment] = saved.to(parameter.device, copy=True)
        optimizer.state[parameter] = state
