"""Where a record came from and what saw it: raw file and line, leaves, bundles, checkpoints, releases, over all snapshots of a recipe.

Cost: every distinct index blob is read once (60 bytes a record), newest snapshot first, and as a rule one to three leaves in all,
since the place in the raw file says about where a record's leaf is. A record that no index has is looked for in the rows set aside: the raw
files that hold such rows are read once each. Changes nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.bench import Bench
from repro_assets.data import exposure, lines, parts, places, readers
from repro_assets.data import records as intake
from repro_assets.data.places import ORIGINAL, Place
from repro_assets.data.records import Aside
from repro_assets.documents import Document, DocumentError, Records, RecordsObserved
from repro_assets.inspecting import Inspector
from repro_assets.recipe import RecordsSection, TrainingSection
from repro_assets.releases import Releases
from repro_assets.shelf import MissingDocument

HEX = re.compile(r"[0-9a-f]{4,64}")
PLACE = re.compile(r"(?P<path>.+):(?P<line>[0-9]+)")
#: rows set aside for these reasons were records, so they have an id; rows of other reasons never became one
HAD_AN_ID = ("duplicate", "near_duplicate", "contaminated", "unsampled")


class Checkpoint(msgspec.Struct, frozen=True):
    """A training whose shards hold the record. `use`: trained or validated. `steps`: steps that trained on it, null when not asked for."""

    document: str
    tensors: str
    use: str
    steps: tuple[int, ...] | None
    saved: tuple[int, ...]


class Seen(msgspec.Struct, frozen=True):
    """A snapshot that holds the record. `since`: raw commit that brought the file as it is; `by`: the augmentation that made the record, or
    null; `token_leaf` null: no token of it is trained on; the rest null where it was not made from these shards."""

    snapshot: str
    file: str
    line: int
    since: str
    by: int | None
    split: str
    record_leaf: str
    token_leaf: str | None
    bundle: str | None
    checkpoint: Checkpoint | None
    releases: tuple[int, ...]


class SetAside(msgspec.Struct, frozen=True):
    """A snapshot in which the row was set aside."""

    snapshot: str
    file: str
    line: int
    reason: str
    detail: str


class Trace(msgspec.Struct, frozen=True):
    """All that is known of a record, newest snapshot first. `record` null: a row that never became one. `unread`: snapshots whose documents
    cannot be read, with the reason. `reads`: what was read for the answer."""

    record: str | None
    first_snapshot: str
    seen: tuple[Seen, ...]
    aside: tuple[SetAside, ...]
    unread: dict[str, str]
    reads: dict[str, int]


@dataclass
class _Snapshot:
    """One snapshot with its records, and where the record is in it."""

    key: str
    commit: str
    head: str
    records: Document[Records, RecordsObserved]
    at: tuple[str, int, Place] | None = None  # path, records of the file before it, place


@dataclass
class _Index:
    """What is kept of one index blob: how many records it lists, and those that are wanted with the number of records before each."""

    count: int
    found: list[tuple[int, Place]]


class _Wanted(msgspec.Struct, frozen=True):
    """What was asked for: the beginning of a record id, or else a place."""

    beginning: str = ""
    path: str = ""
    line: int = 0

    @classmethod
    def of(cls, text: str) -> "_Wanted":
        if HEX.fullmatch(text):
            return cls(beginning=text)
        if place := PLACE.fullmatch(text):
            return cls(path=place["path"], line=int(place["line"]))
        raise MissingDocument(f"{text!r} is no record id (at least 4 hexadecimal digits) and no place in a raw file (path:line)")

    def rows(self, index: NDArray[Any]) -> NDArray[np.int64]:
        """Rows of an index (`places.PLACE`) that are meant."""
        if self.path:
            return np.flatnonzero(index["line"] == self.line)
        whole = bytes.fromhex(self.beginning[: len(self.beginning) // 2 * 2])
        found = np.flatnonzero((index["id"][:, : len(whole)] == np.frombuffer(whole, np.uint8)).all(axis=1))
        if len(self.beginning) % 2:
            found = found[index["id"][found, len(whole)] >> 4 == int(self.beginning[-1], 16)]
        return found


@dataclass
class Tracer:
    """Traces records under the bench's recipe."""

    bench: Bench
    reads: dict[str, int] = field(default_factory=lambda: {"indices": 0, "leaves": 0, "raw files": 0})

    def __post_init__(self) -> None:
        self.inspector = Inspector(self.bench)
        self.lake, self.shelf = self.inspector.lake, self.inspector.shelf
        self.recipe = self.inspector.recipe.name
        self.unread: dict[str, str] = {}
        self._indices: dict[str, _Index] = {}
        self._holders: dict[str, bool] = {}

    def trace(self, wanted: str, *, steps: bool = False) -> Trace:
        """The record whose id is or begins with `wanted` (4 hexadecimal digits at least), or that stands at `wanted` as `path:line`.

        `steps`: also which training steps had it; reads all train leaves of the snapshots that were trained on it.
        Raises MissingDocument when there is no such record, or several have this beginning.
        """
        self._indices, self._holders = {}, {}  # they hold answers about one record
        snapshots = list(self._snapshots())
        if not snapshots:
            raise MissingDocument(f"no snapshot has records under recipe {self.recipe!r}: run `repro materialize --snapshot newest`")
        asked = _Wanted.of(wanted)
        for snapshot in snapshots:
            self._look(snapshot, asked)
        ids = sorted({snapshot.at[2].id for snapshot in snapshots if snapshot.at})
        if asked.path and ids:
            # A place can hold other records in other snapshots: the newest is meant, wherever it stood before.
            newest = next(snapshot.at[2].id for snapshot in snapshots if snapshot.at)
            return self.trace(newest, steps=steps)
        if len(ids) > 1:
            raise MissingDocument(f"{len(ids)} records begin with {wanted}: {', '.join(ids[:5])}; give more of the id")
        seen = tuple(self._seen(snapshot, steps) for snapshot in snapshots if snapshot.at)
        aside: tuple[SetAside, ...] = ()
        if not seen:
            aside = tuple(self._at_place(snapshots, asked.path, asked.line) if asked.path else self._rows(snapshots, wanted))
        if not seen and not aside:
            skipped = f"; not read: {', '.join(self.unread)}" if self.unread else ""
            raise MissingDocument(
                f"no record {wanted!r} in {len(snapshots)} snapshots of recipe {self.recipe!r}, nor among the rows set aside{skipped}. "
                "A row can be named by its place: `repro blame path:line`"
            )
        first = (seen or aside)[-1].snapshot
        return Trace(ids[0] if ids else None, first, seen, aside, dict(self.unread), dict(self.reads))

    def _snapshots(self) -> Iterator[_Snapshot]:
        heads = dict(self.lake.branches("snapshot-"))
        for key, commit in self.shelf.raw_commits():
            head = heads.get(f"snapshot-{key}")
            if head is None:
                continue
            try:
                records = self.shelf.read(head, key, self.recipe, "records")
            except DocumentError as error:
                self.unread[key] = str(error)
                continue
            if records is not None:
                yield _Snapshot(key, commit, head, records)

    # ---- records

    def _look(self, snapshot: _Snapshot, wanted: _Wanted) -> None:
        matches: dict[str, tuple[str, int, Place]] = {}
        for path in snapshot.records.result.index:
            if wanted.path in ("", path):
                for before, place in self._index(snapshot, path, wanted).found:
                    matches.setdefault(place.id, (path, before, place))
        if not wanted.path and len(matches) > 1:
            raise MissingDocument(f"{len(matches)} records begin like that: {', '.join(sorted(matches)[:5])}; give more of the id")
        snapshot.at = next(iter(matches.values()), None)

    def _index(self, snapshot: _Snapshot, path: str, wanted: _Wanted) -> _Index:
        blob = snapshot.records.result.index[path]
        if blob.sha256 not in self._indices:
            rows = places.index(self.shelf.blobs, snapshot.records.result, path)
            self.reads["indices"] += 1
            found = []
            for at in wanted.rows(rows).tolist():
                name = rows["id"][at].tobytes().hex()
                found.append((at, Place(name, *(int(rows[column][at]) for column in ("length", "line", "offset", "by")))))
            self._indices[blob.sha256] = _Index(len(rows), found)
        return self._indices[blob.sha256]

    def _seen(self, snapshot: _Snapshot, steps: bool) -> Seen:
        assert snapshot.at is not None
        path, _before, place = snapshot.at
        split, leaf = self._leaf(snapshot)
        raw = self.shelf.read(snapshot.head, snapshot.key, self.recipe, "raw_snapshot")
        shards = self._made_from(snapshot, "shards", "records", snapshot.records)
        entry = next((entry for entry in shards.result.leaves if (entry.split, entry.source) == (split, leaf)), None) if shards else None
        if entry is not None and place.id in entry.untrained:
            entry = None
        bundle = self._made_from(snapshot, "training_bundle", "shards", shards) if entry else None
        trained = self._made_from(snapshot, "qlora_checkpoint", "shards", shards) if entry else None
        return Seen(
            snapshot=snapshot.key,
            file=path,
            line=place.line,
            since=raw.observed.first_seen.get(path, snapshot.commit) if raw else snapshot.commit,
            by=None if place.by == ORIGINAL else place.by,
            split=split,
            record_leaf=leaf,
            token_leaf=entry.sha256 if entry else None,
            bundle=bundle.digest if bundle else None,
            checkpoint=self._checkpoint(trained, shards, split, place.id, steps) if trained and shards else None,
            releases=self._releases(trained.digest) if trained else (),
        )

    def _made_from(self, snapshot: _Snapshot, asset: str, upstream: str, document: Document[Any, Any] | None) -> Document[Any, Any] | None:
        """The snapshot's document of `asset`, when it was made from just this upstream document."""
        try:
            found = self.shelf.read(snapshot.head, snapshot.key, self.recipe, asset)
        except DocumentError as error:
            self.unread[f"{snapshot.key} {asset}"] = str(error)
            return None
        return found if found and document and found.inputs.get(upstream) == document.digest else None

    def _leaf(self, snapshot: _Snapshot) -> tuple[str, str]:
        """(split, digest) of the record leaf, looked for from where the record's place in the raw files says that it should be."""
        assert snapshot.at is not None
        path, before, place = snapshot.at
        result = snapshot.records.result
        section = msgspec.convert(snapshot.records.section, RecordsSection)
        counts = {name: self._indices[blob.sha256].count if blob.sha256 in self._indices else 0 for name, blob in result.index.items()}
        earlier = sum(count for name, count in counts.items() if name.encode() < path.encode())
        share = (earlier + before) / max(1, sum(counts.values()))
        likely = parts.SPLITS[0] if place.by != ORIGINAL else parts.side(place.id, section)
        listed = []
        passed = dict.fromkeys(parts.SPLITS, 0)
        for leaf in result.leaves:
            middle = (passed[leaf.split] + leaf.records / 2) / max(1, result.splits[leaf.split])
            passed[leaf.split] += leaf.records
            known = self._holders.get(leaf.blob.sha256)
            if known is not False:
                listed.append((not known, leaf.split != likely, abs(middle - share), leaf))
        for *_order, leaf in sorted(listed, key=lambda item: item[:3]):
            if self._holds(leaf.blob.sha256, place.id):
                return leaf.split, leaf.blob.sha256
        raise DocumentError(
            f"records of {snapshot.key}: the index of {path} lists {place.id} and no leaf holds it; materialize records again"
        )

    def _holds(self, leaf: str, record: str) -> bool:
        if leaf not in self._holders:
            self.reads["leaves"] += 1
            self._holders[leaf] = any(held.id == record for held in lines.decode(self.shelf.blobs.get_bytes(leaf)))
        return self._holders[leaf]

    # ---- what was made of it

    def _checkpoint(self, trained: Document[Any, Any], shards: Document[Any, Any], split: str, record: str, steps: bool) -> Checkpoint:
        had: tuple[int, ...] | None = None
        if steps:
            section = msgspec.convert(trained.section, TrainingSection)
            ledger = self.shelf.blobs.get_bytes(trained.result.ledger.sha256)
            train = split == parts.SPLITS[0]
            had = exposure.steps_of(record, shards.result, shards.observed, section, ledger, self.shelf.blobs) if train else ()
        saved = tuple(item.step for item in trained.result.checkpoints if had is None or any(step <= item.step for step in had))
        use = "trained" if split == parts.SPLITS[0] else "validated"
        return Checkpoint(trained.digest, trained.result.tensors, use, had, saved)

    def _releases(self, checkpoint: str) -> tuple[int, ...]:
        return tuple(
            release.number
            for release in Releases(self.lake, self.shelf.blobs).all()
            if release.documents.get("qlora_checkpoint") == checkpoint
        )

    # ---- rows set aside

    def _at_place(self, snapshots: list[_Snapshot], path: str, line: int) -> Iterator[SetAside]:
        for snapshot in snapshots:
            for aside in intake.asides(self.shelf.blobs, snapshot.records.result):
                if (aside.file, aside.line) == (path, line):
                    yield _told(snapshot, aside)

    def _rows(self, snapshots: list[_Snapshot], wanted: str) -> Iterator[SetAside]:
        """Rows set aside that would be the record: read again from raw, each raw file once."""
        known: dict[tuple[str, str], dict[int, str]] = {}
        for snapshot in snapshots:
            raw = self.shelf.read(snapshot.head, snapshot.key, self.recipe, "raw_snapshot")
            files = {file.path: file for file in raw.result.files_listed} if raw else {}
            there: dict[str, list[Aside]] = {}
            for aside in intake.asides(self.shelf.blobs, snapshot.records.result):
                if aside.reason in HAD_AN_ID and aside.file in files:
                    there.setdefault(aside.file, []).append(aside)
            section = msgspec.convert(snapshot.records.section, RecordsSection)
            for path, asides in there.items():
                name = (files[path].sha256, snapshot.records.made.components["code"])
                if name not in known:
                    self.reads["raw files"] += 1
                    with cast(BinaryIO, self.lake.open(snapshot.commit, path)) as stream:
                        known[name] = dict(_ids(path, files[path].format, stream, section))
                yield from (_told(snapshot, aside) for aside in asides if known[name].get(aside.line, "").startswith(wanted))


def _told(snapshot: _Snapshot, aside: Aside) -> SetAside:
    return SetAside(snapshot.key, aside.file, aside.line, aside.reason, aside.detail)


def _ids(path: str, format: str, stream: BinaryIO, section: RecordsSection) -> Iterator[tuple[int, str]]:
    """(line, record id) of every row of a raw file that can be a record."""
    made = parts.Intake(section)
    source = readers.source_for(path, section.sources)
    for row in readers.read(path, format, stream, source, section.row_limit):
        if isinstance(row, readers.Row):
            try:
                yield row.line, made.record(row).id
            except readers.Unfit:
                continue
