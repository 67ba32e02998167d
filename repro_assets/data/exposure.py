"""Which training steps had a record: the packing plan of every epoch, repeated, and held against the ledger.

Planning is `packing.py`; the program that trains builds its steps in `training/batches.py`, which this module must agree with: the ledger
says of every step which records it had, so a disagreement is an error and never a wrong answer.
"""

import hashlib

import msgspec

from repro_assets.data import packing, sharding
from repro_assets.data.errors import DataError
from repro_assets.documents import Shards, ShardsObserved
from repro_assets.recipe import TrainingSection
from repro_assets.trust.blob import BlobStore


class _Row(msgspec.Struct):
    """What of a ledger row is needed."""

    step: int
    epoch: int
    records: str


def steps_of(
    record: str, shards: Shards, observed: ShardsObserved, section: TrainingSection, ledger: bytes, store: BlobStore
) -> tuple[int, ...]:
    """Steps (1-based) whose rows held the record, by reading every train leaf. Raises DataError when the ledger says otherwise."""
    train = msgspec.structs.replace(shards, leaves=tuple(entry for entry in shards.leaves if entry.split == "train"))
    names: list[str] = []
    lengths: list[int] = []
    for _entry, leaf in sharding.stored_leaves(train, observed, store):
        names += leaf.records
        lengths += leaf.lengths.tolist()
    rows = [msgspec.json.decode(line, type=_Row) for line in ledger.splitlines()]
    size = section.rows * section.micro_batches
    plans: dict[int, list[list[int]]] = {}
    started: dict[int, int] = {}
    found = []
    for row in rows:
        if row.epoch not in plans:
            plans[row.epoch] = packing.plan(lengths, names, section.row_tokens, section.seed, row.epoch).rows
            started[row.epoch] = row.step
        at = (row.step - started[row.epoch]) * size
        had = [names[index] for line in plans[row.epoch][at : at + size] for index in line]
        if (digest := hashlib.sha256(b"".join(bytes.fromhex(name) for name in had)).hexdigest()) != row.records:
            raise DataError(
                f"step {row.step} of the ledger had the records {row.records[:12]}, the plan of these shards gives {digest[:12]}: "
                "the training was made from other shards or by other code; materialize qlora_checkpoint again"
            )
        if record in had:
            found.append(row.step)
    return tuple(found)
