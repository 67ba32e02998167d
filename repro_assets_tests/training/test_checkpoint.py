"""Checkpoints on a folder store: complete or not there, strict on resume, the same bytes for the same state."""

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from repro_assets.training import checkpoint, ledger
from repro_assets.training.job import TrainingError
from repro_assets.trust.blob import Blob, FolderStore
from repro_assets_tests.training.lab import builtins

IDENTITY = checkpoint.Identity(
    training="b", section="s", base_model="m", quantised_base="q", plan="p", trainable="t", init="i", adapter_dtype="float32",
    compute_dtype="float32", hardware="cpu-avx2", optimizer="adamw", steps=12,
)  # fmt: skip


def rows(first: int, last: int) -> list[ledger.Row]:
    return [
        ledger.row(step=step, epoch=0, loss=1 / step, learning_rate=1e-3, gradient_norm=1.0, tokens=8, trained=4, records="ab")
        for step in range(first, last + 1)
    ]


def tensors(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    adapter = {"a.lora_A.weight": torch.full((2, 3), float(step)), "a.lora_B.weight": torch.full((3, 2), -float(step))}
    return adapter, {f"{moment}.{name}": tensor / 7 for name, tensor in adapter.items() for moment in ("exp_avg", "exp_avg_sq")}


class Run:
    """A writer with the events it led to."""

    def __init__(self, store: FolderStore) -> None:
        self.events: list[dict[str, Any]] = []
        self.saved: list[checkpoint.Saved] = []
        self.store = store
        self.writer = checkpoint.Writer(store, IDENTITY, self.note)

    def note(self, saved: checkpoint.Saved) -> None:
        self.saved.append(saved)
        self.events.append({"kind": "checkpoint", "step": saved.manifest.step, "manifest": builtins(saved.blob)})

    def save(self, step: int, first: int, regular: bool = True) -> None:
        self.writer.save(step, *tensors(step), rows(first, step), None, regular)
        self.writer.wait()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(FolderStore(tmp_path / "store"))


def test_a_checkpoint_reads_back_as_it_was_written(run: Run) -> None:
    """S2.13, S2.14: state is saved periodically and resumed from."""
    run.save(4, 1)
    run.save(8, 5)
    state = checkpoint.read_state(run.store, run.saved[1])
    adapter, moments = tensors(8)
    assert all(torch.equal(state.adapter[name], tensor) for name, tensor in adapter.items())
    assert all(torch.equal(state.optimizer[name], tensor) for name, tensor in moments.items())
    assert state.rows == rows(1, 8)
    assert [past.step for past in state.saved.manifest.past] == [4]


def test_a_preemption_leaves_no_trace_in_later_manifests(run: Run, tmp_path: Path) -> None:
    run.save(4, 1)
    run.save(8, 5)
    other = Run(FolderStore(tmp_path / "other"))
    other.save(4, 1)
    other.save(6, 5, regular=False)
    resumed = Run(other.store)
    resumed.writer.continue_from(other.saved[-1])
    resumed.save(8, 5)
    assert resumed.saved[-1].blob == run.saved[-1].blob


def test_the_newest_complete_checkpoint_is_found_and_one_without_all_its_blobs_does_not_exist(run: Run) -> None:
    run.save(4, 1)
    run.save(8, 5)
    newest = checkpoint.newest(run.store, None, run.events)
    assert newest is not None
    assert newest.manifest.step == 8
    run.store._path(run.saved[1].manifest.files[checkpoint.OPTIMIZER].sha256).unlink()
    older = checkpoint.newest(run.store, None, run.events)
    assert older is not None
    assert older.manifest.step == 4
    assert checkpoint.newest(run.store, None, []) is None


def test_an_explicit_checkpoint_is_used_until_the_job_has_one_beyond_it(run: Run) -> None:
    for step in (4, 8, 12):
        run.save(step, step - 3)
    explicit = run.saved[1].blob.sha256
    assert checkpoint.newest(run.store, explicit, run.events[:1]) == run.saved[1]
    assert checkpoint.newest(run.store, explicit, run.events) == run.saved[2]


@pytest.mark.parametrize("part", ["manifest", "adapter", "optimizer", "ledger"])
def test_one_flipped_byte_anywhere_in_a_checkpoint_is_refused_and_named(run: Run, part: str) -> None:
    run.save(4, 1)
    saved = run.saved[0]
    blob: Blob = {
        "manifest": saved.blob, "adapter": saved.manifest.files[checkpoint.ADAPTER],
        "optimizer": saved.manifest.files[checkpoint.OPTIMIZER], "ledger": saved.manifest.ledger[0],
    }[part]  # fmt: skip
    path = run.store._path(blob.sha256)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(TrainingError, match=blob.sha256):
        checkpoint.read_state(run.store, checkpoint.newest(run.store, None, run.events) or saved)


@pytest.mark.parametrize("field", checkpoint.Identity.__struct_fields__)
def test_another_trainings_checkpoint_is_refused_naming_the_field(run: Run, field: str) -> None:
    run.save(4, 1)
    checkpoint.check_identity(run.saved[0], IDENTITY)
    other = msgspec.structs.replace(IDENTITY, **{field: 13 if field == "steps" else "other"})
    with pytest.raises(TrainingError, match=f"made with {field} "):
        checkpoint.check_identity(run.saved[0], other)


def test_a_manifest_whose_tensors_or_ledger_belong_elsewhere_is_refused(run: Run) -> None:
    run.save(4, 1)
    manifest = run.saved[0].manifest
    for change, said in (({"tensors": "0" * 64}, "adapter's tensors"), ({"step": 5}, "its ledger does not hold steps 1 to 5")):
        with pytest.raises(TrainingError, match=said):
            checkpoint.read_state(run.store, checkpoint.Saved(msgspec.structs.replace(manifest, **change), run.saved[0].blob))


def test_writing_happens_behind_the_step_and_its_failure_reaches_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put = run.store.put_many

    def slow(items: Any) -> list[Blob]:
        time.sleep(0.3)
        return put(items)

    monkeypatch.setattr(run.store, "put_many", slow)
    began = time.monotonic()
    run.writer.save(4, *tensors(4), rows(1, 4), None, True)
    assert time.monotonic() - began < 0.2
    run.writer.poll()
    assert run.saved == []
    run.writer.wait()
    assert [saved.manifest.step for saved in run.saved] == [4]

    def full(_items: Any) -> list[Blob]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.store, "put_many", full)
    run.writer.save(8, *tensors(8), rows(5, 8), None, True)
    with pytest.raises(OSError, match="No space left on device"):
        run.writer.wait()
    assert [saved.manifest.step for saved in run.saved] == [4]


def test_an_optimizer_state_that_lacks_a_moment_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([parameter], foreach=False)
    state = {"exp_avg.a": torch.ones(2, 3), "exp_avg_sq.a": torch.ones(2, 3)}
    checkpoint.restore_optimizer(optimizer, {"a": parameter}, state, 3, "checkpoint x")
    assert float(optimizer.state[parameter]["step"]) == 3
    with pytest.raises(TrainingError, match=r"'exp_avg_sq.a' is missing"):
        checkpoint.restore_optimizer(optimizer, {"a": parameter}, {"exp_avg.a": torch.ones(2, 3)}, 3, "checkpoint x")
    with pytest.raises(TrainingError, match=r"exp_avg of 'a' is torch.float32"):
        checkpoint.restore_optimizer(optimizer, {"a": parameter}, {**state, "exp_avg.a": torch.ones(3, 2)}, 3, "checkpoint x")
