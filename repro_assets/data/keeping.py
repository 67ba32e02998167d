"""Which rows stay: duplicates, near duplicates, weights and quotas, over digests and places; and the tally of those that do not.

No rule looks at the order of arrival. What a row is, and whether it is fit at all, is `parts.py`.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.data import near
from repro_assets.data.parts import threshold
from repro_assets.data.places import ORIGINAL
from repro_assets.data.table import Table
from repro_assets.recipe import RecordsSection, Source

#: reason of a row that was set aside -> the field of SourceCount that counts it; every other reason is quarantine
COUNTED = {
    "duplicate": "duplicates",
    "near_duplicate": "near_duplicates",
    "contaminated": "contaminated",
    "sensitive": "sensitive",
    "unsampled": "unsampled",
}


class Aside(msgspec.Struct, frozen=True):
    """One line of the quarantine: a row that is not among the records, and why. Line 0 is the file itself."""

    detail: str
    file: str
    line: int
    reason: str


class Tally:
    """What was read of each source and file, and every row that was set aside."""

    def __init__(self, sources: tuple[Source, ...]) -> None:
        self.sources = sources
        self.counts: list[Counter[str]] = [Counter() for _ in sources]
        self.asides: list[tuple[int, int, Aside]] = []
        self.bad: list[Aside] = []
        self.cleaned: Counter[str] = Counter()

    def aside(self, rank: int, number: int, aside: Aside) -> None:
        self.asides.append((number, aside.line, aside))
        kind = COUNTED.get(aside.reason, "quarantined")
        self.counts[rank][kind] += 1
        if kind == "quarantined":
            self.bad.append(aside)

    @property
    def read(self) -> int:
        return sum(count["read"] for count in self.counts)

    @property
    def reasons(self) -> dict[str, int]:
        return dict(sorted(Counter(aside.reason for _number, _line, aside in self.asides).items()))


class Kept:
    """Which positions of the table stay. A copy that an augmentation made goes, uncounted, when its original does."""

    def __init__(self, table: Table, tally: Tally) -> None:
        self.table, self.tally = table, tally
        self.mask = np.ones(len(table), bool)

    def drop(self, position: int, reason: str, detail: str) -> None:
        self.mask[position] = False
        if self.table.by[position] == ORIGINAL:
            number = self.table.file(position)
            aside = Aside(detail, self.table.files[number].path, int(self.table.line[position]), reason)
            self.tally.aside(self.table.rank(position), number, aside)

    def originals(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.mask & (self.table.by == ORIGINAL))

    def duplicates(self) -> None:
        """Equal messages are kept once. An original wins over a copy."""
        for group in _equal(self.table.record, np.flatnonzero(self.mask)):
            group.sort(key=lambda at: (self.table.by[at] != ORIGINAL, self.table.rank(at), bytes(self.table.lines[at]), at))
            for position in group[1:]:
                self.drop(position, "duplicate", f"the same messages as {self.table.where(group[0])}")

    def near_duplicates(self, section: RecordsSection) -> list[tuple[int, list[int]]]:
        """Of each cluster one record stays; the clusters as (kept, dropped) positions."""
        if (wanted := section.near_duplicates) is None:
            return []
        here = self.originals()
        clusters = []
        for cluster in near.clusters(self.table.signature[here], wanted):
            first, *rest = sorted((int(here[at]) for at in cluster), key=lambda at: (self.table.rank(at), bytes(self.table.lines[at])))
            clusters.append((first, rest))
            for position in rest:
                self.drop(position, "near_duplicate", f"nearly the same text as {self.table.where(first)}")
        return clusters

    def sample(self, sources: Sequence[Source]) -> None:
        """Weights and quotas: those records stay whose keyed hash is lowest, so that others come and go without moving them."""
        for rank, source in enumerate(sources):
            if source.weight >= 1 and source.quota is None:
                continue
            here = self.originals()
            drawn = [(_draw(self.table.record[at]), int(at)) for at in here[self.table.ranks(here) == rank]]
            limit = threshold(source.weight)
            for number, at in drawn:
                if number >= limit:
                    self.drop(at, "unsampled", f"outside the weight {source.weight} of the source")
            left = [pair for pair in drawn if pair[0] < limit]
            if source.quota is not None and len(left) > source.quota:
                stay = {at for _number, at in heapq.nsmallest(source.quota, left)}
                for _number, at in left:
                    if at not in stay:
                        self.drop(at, "unsampled", f"beyond the quota of {source.quota} records of the source")

    def copies(self) -> None:
        """Copies stand beside originals that stayed."""
        parent = np.maximum.accumulate(np.where(self.table.by == ORIGINAL, np.arange(len(self.table)), 0))
        self.mask &= self.mask[parent]

    def positions(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.mask)


def _equal(digests: NDArray[np.uint8], positions: NDArray[np.int64]) -> Iterator[list[int]]:
    """Groups of at least two positions with the same digest."""
    heads = np.ascontiguousarray(digests[positions, :8]).view(">u8").reshape(-1)
    order = np.argsort(heads, kind="stable")
    ranked = heads[order]
    edges = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]])) if len(ranked) else np.zeros(1, np.int64)
    for start in np.flatnonzero(np.diff(edges) > 1).tolist():
        groups: dict[bytes, list[int]] = {}
        for at in positions[order[edges[start] : edges[start + 1]]].tolist():
            groups.setdefault(bytes(digests[at]), []).append(at)
        yield from (group for group in groups.values() if len(group) > 1)


def _draw(record: NDArray[np.uint8]) -> int:
    return int.from_bytes(hashlib.sha256(b"sample|" + bytes(record)).digest()[:8], "big")
