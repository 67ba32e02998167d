"""What changed between two states of the records: files, leaves, records. Only leaves that differ are read.

Showing it is the callers'.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from repro_assets.data import lines
from repro_assets.documents import RawSnapshot, RecordLeaf, Records
from repro_assets.trust.blob import BlobStore


class Change(msgspec.Struct, frozen=True):
    """Names that came, went, or stand for something else now."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


class Difference(msgspec.Struct, frozen=True):
    """Two states compared. `records.changed`: user keys whose record is another one (they are not among added and removed).

    `slices`: label to value to (before, now) for the values whose count moved.
    """

    files: Change
    leaves_shared: int
    leaves_added: int
    leaves_removed: int
    records: Change
    slices: dict[str, dict[str, tuple[int, int]]]

    @property
    def same(self) -> bool:
        return not (self.leaves_added or self.leaves_removed or any(self.files.added + self.files.removed + self.files.changed))


def files(before: RawSnapshot, now: RawSnapshot) -> Change:
    """Raw files by path and SHA-256."""
    return _change({file.path: file.sha256 for file in before.files_listed}, {file.path: file.sha256 for file in now.files_listed})


def records(before: Records, now: Records, store: BlobStore, raw: tuple[RawSnapshot, RawSnapshot] | None = None) -> Difference:
    """Compare two states of the records; with `raw` the files are compared by content, else by their index."""
    moved = (
        files(*raw)
        if raw
        else _change({path: blob.sha256 for path, blob in before.index.items()}, {path: blob.sha256 for path, blob in now.index.items()})
    )
    old, new = Counter(_names(before.leaves)), Counter(_names(now.leaves))
    gone, came = _only(before.leaves, old - new), _only(now.leaves, new - old)
    return Difference(
        files=moved,
        leaves_shared=(old & new).total(),
        leaves_added=len(came),
        leaves_removed=len(gone),
        records=_records(gone, came, store),
        slices=_slices(before.slices, now.slices),
    )


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


def _records(gone: list[RecordLeaf], came: list[RecordLeaf], store: BlobStore) -> Change:
    old, new = _identities(gone, store), _identities(came, store)
    removed, added = Counter(old) - Counter(new), Counter(new) - Counter(old)
    was, is_now = ({key: name for name, key in side if key is not None} for side in (removed, added))
    changed = tuple(sorted(was.keys() & is_now.keys()))
    paired = {(table[key], key) for table in (was, is_now) for key in changed}
    left = [tuple(sorted(name for name, key in side.elements() if (name, key) not in paired)) for side in (added, removed)]
    return Change(added=left[0], removed=left[1], changed=changed)


def _identities(leaves: list[RecordLeaf], store: BlobStore) -> list[tuple[str, str | None]]:
    return [(record.id, record.key) for record in lines.read(store, [leaf.blob for leaf in leaves])]


def _change(before: Mapping[str, str], now: Mapping[str, str]) -> Change:
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
