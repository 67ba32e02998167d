"""Records as hashed counts of their words, and how well a classifier tells two sets of them apart.

Counts are whole numbers, so that they may be stored and digested; the classifier's floats are rounded before anything depends on them.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from repro_assets.data.errors import DataError
from repro_assets.data.lines import normal_text

DIMENSIONS = 256
#: characters of a record that are counted
LOOKED_AT = 4000
FOLDS = 5
#: records a side below which no classifier can be judged: the area's standard error would be above 0.04
FEWEST = 100
MAGIC = b"repro word counts 1\n"
# Decision values are rounded to 6 digits before they are ranked: equal records must tie, whichever kernel multiplied their rows.
RANKED_DIGITS = 6
AUC_DIGITS = 3


def counts(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Counts of words and of their character trigrams in 256 buckets by CRC-32, at most 255 each, uint8 (256,)."""
    words = normal_text(" ".join(texts)[:LOOKED_AT]).split()
    grams = [word.encode("utf-8", "surrogatepass") for word in words]
    grams += [f"<{word}>"[at : at + 3].encode("utf-8", "surrogatepass") for word in words for at in range(len(word))]
    buckets = np.array([zlib.crc32(gram) % DIMENSIONS for gram in grams], dtype=np.int64)
    return np.bincount(buckets, minlength=DIMENSIONS).clip(0, 255).astype(np.uint8)


class Words:
    """Records by id (hexadecimal SHA-256, sorted) with their counts, uint8 (n, 256)."""

    def __init__(self, records: Iterable[tuple[str, NDArray[np.uint8]]]) -> None:
        held = sorted(dict(records).items())
        self.names = [name for name, _row in held]
        self.rows = np.array([row for _name, row in held], dtype=np.uint8).reshape(-1, DIMENSIONS)

    def __len__(self) -> int:
        return len(self.names)

    def encode(self) -> bytes:
        """MAGIC | uint32 n | for each record: 32 bytes id, 256 bytes counts."""
        body = b"".join(bytes.fromhex(name) + row.tobytes() for name, row in zip(self.names, self.rows, strict=True))
        return MAGIC + struct.pack("<I", len(self)) + body


def decode(data: bytes) -> Words:
    """The records in encoded form. Raises DataError for anything else."""
    head, size = len(MAGIC) + 4, 32 + DIMENSIONS
    if data[: len(MAGIC)] != MAGIC or len(data) < head or len(data) != head + size * struct.unpack("<I", data[len(MAGIC) : head])[0]:
        raise DataError(
            f"the word counts of the reference ({len(data)} bytes) are not whole; materialize validation_report of the snapshot that "
            "is promoted again, or use the run tag repro/refresh-references"
        )
    rows = (data[at : at + size] for at in range(head, len(data), size))
    return Words((row[:32].hex(), np.frombuffer(row[32:], np.uint8)) for row in rows)


def auc(now: Words, before: Words) -> float | None:
    """Area under the ROC curve of a logistic regression that guesses which set a record is from, cross-validated; 0.5..1, 3 digits.

    Both copies of a record that is in both sets lie in one fold, so that what they share pulls towards 0.5 and nothing is learnt by heart.
    None with fewer than 100 records on a side.
    """
    if min(len(now), len(before)) < FEWEST:
        return None
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # products this small are slower on more threads, most of all where cores are shared
        return _auc(now, before)


def _auc(now: Words, before: Words) -> float | None:
    from sklearn.linear_model import LogisticRegression

    names = [*now.names, *before.names]
    features = np.sqrt(np.concatenate([now.rows, before.rows]).astype(np.float64))
    features /= np.maximum(np.sqrt((features**2).sum(axis=1, keepdims=True)), 1.0)
    label = np.concatenate([np.ones(len(now), np.int64), np.zeros(len(before), np.int64)])
    fold = folds(names)
    doubled = pairs = 0
    for held in range(FOLDS):
        test, train = fold == held, fold != held
        middle, spread = features[train].mean(axis=0), features[train].std(axis=0)
        scaled = (features - middle) / np.where(spread > 0, spread, 1.0)
        # Newton's method ends at the one optimum of a strictly convex loss, far closer than the digits that are kept.
        model = LogisticRegression(C=0.01, solver="newton-cholesky", tol=1e-10, max_iter=200).fit(scaled[train], label[train])
        scores = np.round(model.decision_function(scaled[test]), RANKED_DIGITS)
        won, of = _wins(scores[label[test] == 1], scores[label[test] == 0])
        doubled, pairs = doubled + won, pairs + of
    return max(0.5, round(doubled / (2 * pairs), AUC_DIGITS)) if pairs else None


def folds(names: Sequence[str]) -> NDArray[np.int64]:
    """The fold of each record, 0..4, by keyed hash of its id: both copies of a record in one fold."""
    return np.array([hashlib.sha256(f"fold|{name}".encode()).digest()[0] % FOLDS for name in names], dtype=np.int64)


def _wins(ones: NDArray[np.float64], zeros: NDArray[np.float64]) -> tuple[int, int]:
    """Twice the pairs in which the first score is higher, a tie counting once; and the number of pairs."""
    ordered = np.sort(zeros, kind="stable")
    below, upto = np.searchsorted(ordered, ones, "left"), np.searchsorted(ordered, ones, "right")
    return int(below.sum() + upto.sum()), len(ones) * len(zeros)
