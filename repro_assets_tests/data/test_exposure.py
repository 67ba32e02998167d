"""Which steps had a record, against the steps that the training program itself builds."""

import msgspec
import pytest

from repro_assets.data import exposure, packing, sharding
from repro_assets.data.errors import DataError
from repro_assets.documents import BaseModel, Shards, ShardsObserved
from repro_assets.recipe import RecordsSection, ShardingSection, Split, TrainingSection
from repro_assets.trust.blob import FolderStore
from repro_assets_tests.data.material import CHAT, Raw, jsonl, row

SECTION = TrainingSection(seed=3, row_tokens=128, rows=1, micro_batches=2, steps=9)


def ledger_of(shards: Shards, observed: ShardsObserved, store: FolderStore) -> tuple[bytes, dict[str, set[int]]]:
    """The ledger that a training of these shards writes, and record -> steps, both by `training/batches.py`."""
    from repro_assets.training import batches

    content = [leaf for entry, leaf in sharding.stored_leaves(shards, observed, store) if entry.split == "train"]
    corpus = batches.Corpus(content)
    epochs = []
    for epoch in range(9):
        plan = packing.plan(corpus.lengths.tolist(), corpus.records, SECTION.row_tokens, SECTION.seed, epoch)
        epochs.append(batches.Rows(corpus, plan.rows, SECTION.row_tokens, 0))
    course = batches.Course(epochs, batches.Rows(batches.Corpus([]), [], 128, 0), 9, SECTION, "")
    lines, had = [], dict[str, set[int]]()
    for number in range(1, 10):
        step = course.step(number)
        rows = epochs[step.epoch]
        lines.append(msgspec.json.encode({"step": number, "epoch": step.epoch, "records": rows.record_ids(step.rows)}) + b"\n")
        for index in step.rows:
            for record in rows.rows[index]:
                had.setdefault(corpus.records[record], set()).add(number)
    return b"".join(lines), had


@pytest.fixture
def made(store: FolderStore, base_model: BaseModel) -> tuple[Shards, ShardsObserved]:
    raw = Raw({"a.jsonl": jsonl(*(row(f"question number {n} " + "word " * (n % 9), f"answer {n}", key=f"k{n}") for n in range(40)))}, store)
    records = raw.records(RecordsSection(sources=(CHAT,), split=Split(validation=0.2)), target=8)
    return sharding.build(records, base_model, ShardingSection(max_tokens=128), store)


def test_the_steps_of_every_record_are_those_of_the_training_program(made: tuple[Shards, ShardsObserved], store: FolderStore) -> None:
    ledger, had = ledger_of(*made, store)
    assert any(len(steps) > 1 for steps in had.values()), "no record was trained twice: the epochs prove nothing"
    for record, steps in had.items():
        assert exposure.steps_of(record, *made, SECTION, ledger, store) == tuple(sorted(steps))
    assert exposure.steps_of("0" * 64, *made, SECTION, ledger, store) == ()


def test_a_ledger_of_another_training_is_refused(made: tuple[Shards, ShardsObserved], store: FolderStore) -> None:
    ledger, had = ledger_of(*made, store)
    other = msgspec.structs.replace(SECTION, seed=4)
    with pytest.raises(DataError, match="step 1 of the ledger had the records"):
        exposure.steps_of(next(iter(had)), *made, other, ledger, store)
