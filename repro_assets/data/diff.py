"""What changed between two states of the records: files, leaves, records, and the tokens of one record. Only leaves that differ are read.

Showing it is the callers'.
"""

import difflib
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.data import lines
from repro_assets.data.lines import Head
from repro_assets.data.places import index
from repro_assets.documents import RawSnapshot, RecordLeaf, Records, Since
from repro_assets.trust.blob import BlobStore


class Change(msgspec.Struct, frozen=True):
    """Names that came, went, or stand for something else now."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


class Edit(msgspec.Struct, frozen=True):
    """A record that became another one. `name`: its user key, or `path:line` of where it is now; `before`, `now`: record ids."""

    name: str
    before: str
    now: str


class Difference(msgspec.Struct, frozen=True):
    """Two states compared. `records.added` and `removed` are record ids; `changed` names what `edits` spells out, and those records are
    not among added and removed. `relabelled`: ids of records whose text stayed and whose key, slices or split did not.

    `slices`: label to value to (before, now) for the values whose count moved.
    """

    files: Change
    leaves_shared: int
    leaves_added: int
    leaves_removed: int
    records: Change
    slices: dict[str, dict[str, tuple[int, int]]]
    edits: tuple[Edit, ...] = ()
    relabelled: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return not (self.leaves_added or self.leaves_removed or any(self.files.added + self.files.removed + self.files.changed))


def files(before: RawSnapshot, now: RawSnapshot) -> Change:
    """Raw files by path and SHA-256."""
    return change_of({file.path: file.sha256 for file in before.files_listed}, {file.path: file.sha256 for file in now.files_listed})


def records(before: Records, now: Records, store: BlobStore, raw: tuple[RawSnapshot, RawSnapshot] | None = None) -> Difference:
    """Compare two states of the records; with `raw` the files are compared by content, else by their index.

    A removed and an added record are one changed record when they have the same user key, or, without keys, when they stand between the
    same neighbours in the same raw file; only for those the indices of files that differ are read too.
    """
    moved = (
        files(*raw)
        if raw
        else change_of({path: blob.sha256 for path, blob in before.index.items()}, {path: blob.sha256 for path, blob in now.index.items()})
    )
    gone, came = changed_leaves(before, now)
    found = _Records(_seen(gone, store), _seen(came, store))
    found.pair_by_key()
    found.pair_by_place(before, now, store)
    return Difference(
        files=moved,
        leaves_shared=len(now.leaves) - len(came),
        leaves_added=len(came),
        leaves_removed=len(gone),
        records=found.change(),
        slices=_slices(before.slices, now.slices),
        edits=tuple(sorted(found.edits, key=lambda edit: (edit.name, edit.before, edit.now))),
        relabelled=tuple(sorted(found.relabelled)),
    )


def summary(before: Records, now: Records, store: BlobStore, moved: Change | None = None) -> Since:
    """`records` as counts, for a table. `moved`: what became of the files, when the caller knows it better than their indices do."""
    found = records(before, now, store)
    return Since(
        files=_counted(moved or found.files),
        leaves=(found.leaves_added, found.leaves_removed),
        records=_counted(found.records),
        slices=found.slices,
    )


def _counted(change: Change) -> tuple[int, int, int]:
    return len(change.added), len(change.removed), len(change.changed)


def changed_leaves(before: Records, now: Records) -> tuple[list[RecordLeaf], list[RecordLeaf]]:
    """Leaves that only `before` has, and leaves that only `now` has, each in its own order; nothing is read."""
    old, new = Counter(_names(before.leaves)), Counter(_names(now.leaves))
    return _only(before.leaves, old - new), _only(now.leaves, new - old)


def _names(leaves: Iterable[RecordLeaf]) -> list[tuple[str, str]]:
    return [(leaf.split, leaf.blob.sha256) for leaf in leaves]


def _only(leaves: Iterable[RecordLeaf], surplus: Counter[tuple[str, str]]) -> list[RecordLeaf]:
    left = Counter(surplus)
    out = []
    for leaf in leaves:
        if left[(leaf.split, leaf.blob.sha256)] > 0:
            left[(leaf.split, leaf.blob.sha256)] -= 1
            out.append(leaf)
    return out


# ---- records


class _Seen(msgspec.Struct, frozen=True):
    """What of a record is compared. `labels`: digest-like text of key, slices and split; two records with one id differ in it or are equal."""

    id: str
    key: str | None
    labels: tuple[str, ...]


def _seen(leaves: Sequence[RecordLeaf], store: BlobStore) -> Iterator[tuple[str, bytes]]:
    """Split and line without messages of every record."""
    stored = store.get_many(leaf.blob.sha256 for leaf in leaves)
    return ((leaf.split, line) for leaf, data in zip(leaves, stored, strict=True) for line in lines.without_messages(data))


def _read(surplus: Counter[tuple[str, bytes]]) -> Counter[_Seen]:
    return Counter(_seen_of(lines.head(line), split) for split, line in surplus.elements())


def _seen_of(record: Head, split: str) -> _Seen:
    slices = (part for item in sorted(record.slices.items()) for part in item)
    return _Seen(record.id, record.key, (split, record.key or "", *slices))


class _Records:
    """Records of the leaves that went and came, taken out of the two lists pair by pair."""

    def __init__(self, old: Iterable[tuple[str, bytes]], new: Iterable[tuple[str, bytes]]) -> None:
        counted = Counter(old), Counter(new)
        removed, added = _read(counted[0] - counted[1]), _read(counted[1] - counted[0])
        self.edits: list[Edit] = []
        self.relabelled: list[str] = []
        by_id: dict[str, deque[_Seen]] = defaultdict(deque)
        for record in removed.elements():
            by_id[record.id].append(record)
        self.added: list[_Seen] = []
        for record in added.elements():
            if by_id[record.id]:
                by_id[record.id].popleft()
                self.relabelled.append(record.id)
            else:
                self.added.append(record)
        self.removed = [record for held in by_id.values() for record in held]

    def pair_by_key(self) -> None:
        """The same user key stands for another record now. Of several with one key, the first becomes the first."""
        waiting: dict[str, deque[_Seen]] = defaultdict(deque)
        for record in self.removed:
            if record.key is not None:
                waiting[record.key].append(record)
        pairs = [(waiting[new.key].popleft(), new) for new in self.added if new.key is not None and waiting[new.key]]
        self._take([(old, new, str(new.key)) for old, new in pairs])

    def pair_by_place(self, before: Records, now: Records, store: BlobStore) -> None:
        """Records without a key, in raw files that are in both states and differ."""
        old = {record.id: record for record in self.removed if record.key is None}
        new = {record.id: record for record in self.added if record.key is None}
        if not old or not new:
            return
        taken = []
        for path in sorted(before.index.keys() & now.index.keys()):
            if before.index[path] == now.index[path]:
                continue
            was, is_now = (index(store, state, path) for state in (before, now))
            for earlier, later, line in _between_neighbours(was, is_now, old.keys(), new.keys()):
                if earlier in old and later in new:
                    taken.append((old.pop(earlier), new.pop(later), f"{path}:{line}"))
        self._take(taken)

    def _take(self, pairs: list[tuple[_Seen, _Seen, str]]) -> None:
        gone, came = Counter(old for old, _new, _name in pairs), Counter(new for _old, new, _name in pairs)
        self.edits += [Edit(name, old.id, new.id) for old, new, name in pairs]
        self.removed = list((Counter(self.removed) - gone).elements())
        self.added = list((Counter(self.added) - came).elements())

    def change(self) -> Change:
        return Change(
            added=tuple(sorted(record.id for record in self.added)),
            removed=tuple(sorted(record.id for record in self.removed)),
            changed=tuple(sorted(edit.name for edit in self.edits)),
        )


def positions(ids: NDArray[np.uint8], wanted: Collection[str]) -> list[int]:
    """Rows of `ids` (uint8 (n, 32)) that are one of `wanted` (hexadecimal SHA-256), ascending."""
    names = {bytes.fromhex(name) for name in wanted}
    if not names or not len(ids):
        return []
    heads = np.ascontiguousarray(ids[:, :8]).view(">u8").reshape(-1)
    likely = np.flatnonzero(np.isin(heads, np.array([int.from_bytes(name[:8], "big") for name in names], np.uint64)))
    return [at for at in likely.tolist() if ids[at].tobytes() in names]


def _between_neighbours(
    was: NDArray[Any], now: NDArray[Any], gone: Collection[str], came: Collection[str]
) -> Iterator[tuple[str, str, int]]:
    """(removed id, added id, line now) of records that follow the same unchanged record, in order: an insertion elsewhere moves nothing."""
    earlier: dict[bytes, deque[str]] = defaultdict(deque)
    for anchor, at in _anchored(was["id"], gone):
        earlier[anchor].append(was["id"][at].tobytes().hex())
    for anchor, at in _anchored(now["id"], came):
        if earlier[anchor]:
            yield earlier[anchor].popleft(), now["id"][at].tobytes().hex(), int(now["line"][at])


def _anchored(ids: NDArray[np.uint8], moved: Collection[str]) -> Iterator[tuple[bytes, int]]:
    """(id of the last row before it that is none of `moved`, row) of every row that is one of `moved`; no bytes at the head."""
    last, anchor = -2, b""
    for at in positions(ids, moved):
        if at != last + 1:
            anchor = ids[at - 1].tobytes() if at else b""
        yield anchor, at
        last = at


def change_of(before: Mapping[str, str], now: Mapping[str, str]) -> Change:
    """Names that came, went, or stand for another digest now."""
    return Change(
        added=tuple(sorted(now.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - now.keys())),
        changed=tuple(sorted(name for name in before.keys() & now.keys() if before[name] != now[name])),
    )


def _slices(before: Mapping[str, Mapping[str, int]], now: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, tuple[int, int]]]:
    moved: dict[str, dict[str, tuple[int, int]]] = {}
    for label in sorted(before.keys() | now.keys()):
        old, new = before.get(label, {}), now.get(label, {})
        values = {value: (old.get(value, 0), new.get(value, 0)) for value in sorted(old.keys() | new.keys())}
        if differing := {value: pair for value, pair in values.items() if pair[0] != pair[1]}:
            moved[label] = differing
    return moved


# ---- tokens of one record


class Piece(msgspec.Struct, frozen=True):
    """A run of tokens that is in both records, or only in the earlier (removed) or the later one (added), with the text of each token."""

    kind: Literal["same", "removed", "added"]
    ids: tuple[int, ...]
    texts: tuple[str, ...]


def tokens(before: Sequence[int], now: Sequence[int], text_of: Callable[[int], str]) -> tuple[Piece, ...]:
    """Two records' ids side by side. What comes first in `before` comes first here; of a replaced run the removed tokens stand first."""
    pieces = []
    # autojunk treats frequent tokens as noise in sequences of 200 and more, and then finds no common run at all.
    for tag, first, last, start, end in difflib.SequenceMatcher(None, before, now, autojunk=False).get_opcodes():
        if tag == "equal":
            pieces.append(_piece("same", before[first:last], text_of))
            continue
        if first < last:
            pieces.append(_piece("removed", before[first:last], text_of))
        if start < end:
            pieces.append(_piece("added", now[start:end], text_of))
    return tuple(pieces)


def _piece(kind: Literal["same", "removed", "added"], ids: Iterable[int], text_of: Callable[[int], str]) -> Piece:
    whole = tuple(int(token) for token in ids)
    return Piece(kind, whole, tuple(text_of(token) for token in whole))


def moved(pieces: Iterable[Piece]) -> tuple[int, int]:
    """(tokens removed, tokens added)."""
    counts = Counter(itertools.chain.from_iterable([piece.kind] * len(piece.ids) for piece in pieces))
    return counts["removed"], counts["added"]
