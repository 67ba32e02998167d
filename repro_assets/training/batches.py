"""From token leaves to micro-batches: which rows a step trains on, as a pure function of (seed, step, micro-batch).

Leaves are read by `data/leaves.py` and packed by `data/packing.py`; the forward pass is `loop.py`.
"""

import hashlib
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import torch

from repro_assets.data import leaves, packing
from repro_assets.data.errors import LeafError, PackingError
from repro_assets.recipe import TrainingSection
from repro_assets.training.job import Job, Leaf, TrainingError
from repro_assets.trust.blob import BlobError, BlobStore
from repro_assets.trust.canonical import digest

#: target of a position that is not trained on
IGNORED = -100


class Batch(msgspec.Struct, frozen=True):
    """Packed rows, all of shape [rows, row_tokens], int64. `targets` is the next token of the same document, or IGNORED."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, name).to(device) for name in ("input_ids", "position_ids", "targets")))


class Corpus:
    """The records of one split end to end: `ids` and `trained` [tokens], `offsets` [records + 1], `records` their SHA-256."""

    def __init__(self, content: Sequence[leaves.Leaf]) -> None:
        self.records = [name for leaf in content for name in leaf.records]
        ids = [row for leaf in content for row in leaf.ids]
        self.lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])
        self.ids = np.concatenate([np.zeros(0, np.int64), *(row.astype(np.int64) for row in ids)])
        self.trained = np.zeros(len(self.ids), bool)
        for start, spans in zip(self.offsets.tolist(), (spans for leaf in content for spans in leaf.spans), strict=False):
            for first, last in spans.tolist():
                self.trained[start + first : start + last] = True
        # nothing of its own document comes before a first token, so it cannot be predicted
        self.trained[self.offsets[:-1][self.lengths > 0]] = False
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.trained)])
        self.trained_counts = ends[self.offsets[1:]] - ends[self.offsets[:-1]]


class Rows:
    """Packed rows of one epoch: each a tuple of record indices into `corpus`, filled up with `pad` to `row_tokens`."""

    def __init__(self, corpus: Corpus, rows: Sequence[Sequence[int]], row_tokens: int, pad: int) -> None:
        self.corpus, self.rows, self.row_tokens, self.pad = corpus, rows, row_tokens, pad
        self.trained = [int(corpus.trained_counts[list(row)].sum()) for row in rows]
        self.tokens = [int(corpus.lengths[list(row)].sum()) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Rows `indices` as tensors. Positions restart with each document; the padding is a document of its own, untrained."""
        shape = (len(indices), self.row_tokens)
        ids, positions = np.full(shape, self.pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        corpus = self.corpus
        for line, index in enumerate(indices):
            at = 0
            for record in self.rows[index]:
                first, last = int(corpus.offsets[record]), int(corpus.offsets[record + 1])
                length = last - first
                ids[line, at : at + length] = corpus.ids[first:last]
                positions[line, at : at + length] = np.arange(length)
                following = np.where(corpus.trained[first + 1 : last], corpus.ids[first + 1 : last], IGNORED)
                targets[line, at : at + length - 1] = following
                at += length
            positions[line, at:] = np.arange(self.row_tokens - at)
        return Batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(targets))

    def record_ids(self, indices: Iterable[int]) -> str:
        """SHA-256 over the ids of the records in rows `indices`, in order."""
        hasher = hashlib.sha256()
        for index in indices:
            for record in self.rows[index]:
                hasher.update(bytes.fromhex(self.corpus.records[record]))
        return hasher.hexdigest()


class Step(msgspec.Struct, frozen=True):
    """One step (1-based `number`): row indices of each of its micro-batches; the last step of an epoch may leave some empty."""

    number: int
    epoch: int
    micro_batches: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> list[int]:
        return [row for batch in self.micro_batches for row in batch]


class Course:
    """All steps of a training. `plan`: digest of what every epoch's packing (and validation's) came out as."""

    def __init__(self, epochs: Sequence[Rows], validation: Rows, steps: int, section: TrainingSection, plan: str) -> None:
        self.epochs, self.validation, self.steps, self.plan = epochs, validation, steps, plan
        self.rows, self.micro_batches = section.rows, section.micro_batches
        self.ends = np.cumsum([steps_of(rows, section) for rows in epochs]).tolist()

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raise TrainingError when a token id is none of the model's."""
        for corpus in (self.epochs[0].corpus, self.validation.corpus):
            if len(corpus.ids) and int(corpus.ids.max()) >= vocabulary:
                raise TrainingError(
                    f"leaves: token id {int(corpus.ids.max())}, the base model has {vocabulary} tokens; "
                    "materialize shards again with this model's tokenizer"
                )

    def step(self, number: int) -> Step:
        """Step `number` (1..steps): whole epochs one after the other, the last step of each with what is left."""
        epoch = next(index for index, end in enumerate(self.ends) if number <= end)
        position = number - 1 - (self.ends[epoch - 1] if epoch else 0)
        start = position * self.rows * self.micro_batches
        total = len(self.epochs[epoch])
        batches = []
        for batch in range(self.micro_batches):
            first = start + batch * self.rows
            batches.append(tuple(range(min(first, total), min(first + self.rows, total))))
        return Step(number, epoch, tuple(batches))

    def trained(self, step: Step) -> int:
        """Trained tokens of the whole step, over all micro-batches and ranks: the divisor of its loss."""
        return sum(self.epochs[step.epoch].trained[row] for row in step.rows)

    def tokens(self, step: Step) -> int:
        """Tokens of the step without padding."""
        return sum(self.epochs[step.epoch].tokens[row] for row in step.rows)


def steps_of(rows: Rows, section: TrainingSection) -> int:
    return -(-len(rows) // (section.rows * section.micro_batches))


def load(job: Job, store: BlobStore) -> Course:
    """Read and verify the job's leaves, pack every epoch that is needed. Raises TrainingError naming a damaged leaf."""
    section = job.section
    train, held_out = (read(job, store, split) for split in ("train", "validation"))
    if not train.records:
        raise TrainingError("leaves: the train split has no record; look at the records asset's split and quarantine")
    digests: list[str] = []

    def rows(corpus: Corpus, epoch: int) -> Rows:
        try:
            plan = packing.plan(corpus.lengths.tolist(), corpus.records, section.row_tokens, section.seed, epoch)
        except PackingError as error:
            raise TrainingError(f"packing: {error}") from error
        digests.append(plan.digest)
        return Rows(corpus, plan.rows, section.row_tokens, job.special.pad)

    epochs = [rows(train, 0)]
    while sum(steps_of(epoch, section) for epoch in epochs) < (section.steps or 0) or (not section.steps and len(epochs) < section.epochs):
        epochs.append(rows(train, len(epochs)))
    steps = section.steps or sum(steps_of(epoch, section) for epoch in epochs)
    validation = rows(held_out, 0) if held_out.records else Rows(held_out, [], section.row_tokens, job.special.pad)
    return Course(epochs, validation, steps, section, digest(digests))


def read(job: Job, store: BlobStore, split: str) -> Corpus:
    """The records of one split, in the order of its leaves."""
    mine = [leaf for leaf in job.leaves if leaf.split == split]
    content = []
    for leaf, stored in zip(mine, _stored(store, mine), strict=True):
        try:
            loaded = leaves.load(stored, leaf.sha256)
        except LeafError as error:
            raise TrainingError(f"leaf {leaf.sha256} ({split}): {error}") from error
        if len(loaded) != leaf.records:
            raise TrainingError(
                f"leaf {leaf.sha256} ({split}): {len(loaded)} records, the job says {leaf.records}; materialize shards again"
            )
        content.append(loaded)
    return Corpus(content)


def _stored(store: BlobStore, mine: Sequence[Leaf]) -> Iterable[bytes]:
    """The stored form of each leaf; a missing or damaged one is named by its identity as well as by its blob."""
    stream = iter(store.get_many([leaf.stored.sha256 for leaf in mine]))
    for leaf in mine:
        try:
            yield next(stream)
        except BlobError as error:
            raise TrainingError(f"leaf {leaf.sha256} ({leaf.split}): {error}") from error
