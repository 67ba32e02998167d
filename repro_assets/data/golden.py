"""The first records of a snapshot through the whole data path again, held against what the shards say: the tiny run.

The golden is not kept apart: it is the digest over record ids and token digests of the first records of the stored leaves. A sample of
the whole is `reproduction.py`; saying why something came out differently is the caller's.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, Literal

import msgspec
import numpy as np

from repro_assets.data import diff, leaves, lines, places, readers, sharding
from repro_assets.data.decoding import Decoder
from repro_assets.data.errors import DataError, RenderingError
from repro_assets.data.lines import Record
from repro_assets.data.parts import Intake
from repro_assets.data.tokenizing import Codec, Tokens
from repro_assets.documents import BaseModel, RawFile, RawSnapshot, Records, Shards, ShardsObserved, TokenLeaf
from repro_assets.recipe import RecordsSection, ShardingSection
from repro_assets.trust.blob import BlobStore

Stage = Literal["row", "cleaning", "rendering", "ids"]
OpenRaw = Callable[[RawFile], BinaryIO]


class Stored(msgspec.Struct, frozen=True):
    """A record as the shards hold it: hexadecimal SHA-256, the record leaf it is in, its 32-byte token digest, its ids and spans."""

    record: str
    leaf: str
    token: bytes
    tokens: Tokens


class Rebuilt(msgspec.Struct, frozen=True):
    """A record as it comes out now. `problem`: why there is none. `where`: path:line of its row, empty when no index leads to it."""

    where: str
    record: Record | None
    tokens: Tokens | None
    problem: str = ""


class Deviation(msgspec.Struct, frozen=True):
    """The first record that came out differently, the stage of the path where it first did, and what differs there (never any text)."""

    record: str
    where: str
    stage: Stage
    detail: str


class Vector(msgspec.Struct, frozen=True):
    """A golden vector: how many records it is over, and its digest."""

    records: int
    digest: str


def vector(entries: Iterable[tuple[str, bytes]]) -> Vector:
    """SHA-256 over (32 bytes of record, 32 bytes of token digest) of each entry, in order. An entry without tokens counts as zeros."""
    parts = [bytes.fromhex(record) + token for record, token in entries]
    return Vector(len(parts), hashlib.sha256(b"".join(parts)).hexdigest())


def first(shards: Shards, observed: ShardsObserved, store: BlobStore, count: int) -> list[Stored]:
    """The first `count` records of the leaves in their order, all of them when there are fewer; reads only the leaves that hold them."""
    entries: list[TokenLeaf] = []
    held = 0
    for entry in shards.leaves:
        if held >= count:
            break
        entries.append(entry)
        held += entry.records
    head = msgspec.structs.replace(shards, leaves=tuple(entries))
    found = [
        Stored(record, entry.source, bytes(token), Tokens(ids=ids, spans=spans, cut=cut))
        for entry, leaf in sharding.stored_leaves(head, observed, store)
        for record, token, ids, spans, cut in zip(leaf.records, leaf.token, leaf.ids, leaf.spans, leaf.cut.tolist(), strict=True)
    ]
    return found[:count]


def golden(stored: Iterable[Stored]) -> Vector:
    """The golden vector of stored records."""
    return vector((item.record, item.token) for item in stored)


class Path:
    """The data path of one snapshot as it runs here and now: raw row, cleaning, rendering, ids."""

    def __init__(
        self, snapshot: RawSnapshot, open_raw: OpenRaw, records: Records, cleaning: RecordsSection, sharding: ShardingSection, codec: Codec
    ) -> None:
        self.snapshot, self.open_raw, self.records = snapshot, open_raw, records
        self.cleaning, self.sharding, self.codec = cleaning, sharding, codec
        self.intake = Intake(cleaning)

    def again(self, wanted: Sequence[str], store: BlobStore) -> dict[str, Rebuilt]:
        """Every record of `wanted` rebuilt from its raw row. Indices are read file by file until all are found."""
        found: dict[str, Rebuilt] = {}
        waiting = set(wanted)
        for file in self.snapshot.files_listed:
            if not waiting:
                break
            if file.path in self.records.index:
                found |= self._of_file(file, waiting, store)
                waiting -= found.keys()
        for name, item in found.items():
            if item.record is not None:
                found[name] = self._tokenised(item, item.record)
        return {**{name: Rebuilt("", None, None, "no index leads to it") for name in waiting}, **found}

    def _tokenised(self, item: Rebuilt, record: Record) -> Rebuilt:
        try:
            (tokens,) = self.codec.tokens([record], self.sharding.max_tokens, self.sharding.train_on)
        except RenderingError as error:
            return msgspec.structs.replace(item, problem=str(error))
        return msgspec.structs.replace(item, tokens=tokens)

    def _of_file(self, file: RawFile, waiting: set[str], store: BlobStore) -> dict[str, Rebuilt]:
        rows = places.index(store, self.records, file.path)
        found: dict[str, places.Place] = {}
        for at in diff.positions(rows["id"], waiting):
            name = rows["id"][at].tobytes().hex()
            # With duplicates kept, a record has several places: the first one is enough.
            found.setdefault(name, places.Place(name, *(int(rows[column][at]) for column in ("length", "line", "offset", "by"))))
        if not found:
            return {}
        at_line: dict[int, list[places.Place]] = {}
        for place in found.values():
            at_line.setdefault(place.line, []).append(place)
        chosen = [(here[0].line, here[0].offset, here[0].length) for here in at_line.values()]
        source = readers.source_for(file.path, self.cleaning.sources)
        read = readers.again(file.path, file.format, lambda: self.open_raw(file), source, chosen)
        return {place.id: self._rebuilt(file, row, place) for row in read for place in at_line[row.line]}

    def _rebuilt(self, file: RawFile, row: readers.Row | readers.Bad, place: places.Place) -> Rebuilt:
        where = f"{file.path}:{row.line}"
        if isinstance(row, readers.Bad):
            return Rebuilt(where, None, None, f"the row is bad now: {row.reason}: {row.detail}")
        try:
            return Rebuilt(where, self.intake.record(row, place.by), None)
        except readers.Unfit as unfit:
            return Rebuilt(where, None, None, f"the row is no record now: {unfit}")

    def raw_changed(self, path: str) -> str:
        """What is wrong with a raw file's bytes, empty when they are those of the manifest. Reads the whole file."""
        file = next(file for file in self.snapshot.files_listed if file.path == path)
        hashed = hashlib.sha256()
        with self.open_raw(file) as stream:
            while block := stream.read(readers.BLOCK):
                hashed.update(block)
        found = hashed.hexdigest()
        return "" if found == file.sha256 else f"{path} has SHA-256 {found[:12]} now, the manifest says {file.sha256[:12]}"


def now_vector(stored: Sequence[Stored], found: dict[str, Rebuilt]) -> Vector:
    """The vector of the same records as they came out now."""
    return vector((now.record.id if now.record else item.record, _token(now)) for item in stored for now in [found[item.record]])


def _token(found: Rebuilt) -> bytes:
    return bytes(32) if found.tokens is None else leaves.token_digest(found.tokens.ids, found.tokens.spans)


def deviations(stored: Sequence[Stored], found: dict[str, Rebuilt], path: Path, model: BaseModel, store: BlobStore) -> Iterator[Deviation]:
    """Records that came out differently, in canonical order, each with the stage where it first did."""
    for item in stored:
        now = found[item.record]
        if now.record is None:
            changed = path.raw_changed(now.where.rpartition(":")[0]) if now.where else ""
            yield Deviation(item.record, now.where, "row", changed or now.problem)
        elif now.record.id != item.record:
            changed = path.raw_changed(now.where.rpartition(":")[0])
            detail = changed or _messages(_stored_record(item, store), now.record)
            yield Deviation(item.record, now.where, "row" if changed else "cleaning", detail)
        elif now.tokens is None:
            yield Deviation(item.record, now.where, "rendering", now.problem)
        elif _token(now) != item.token:
            yield Deviation(item.record, now.where, *_tokens(item.tokens, now.tokens, Decoder(store, model)))


def _stored_record(item: Stored, store: BlobStore) -> Record:
    for record in lines.decode(store.get_bytes(item.leaf)):
        if record.id == item.record:
            return record
    raise DataError(f"record {item.record} is in the token leaf and not in its record leaf {item.leaf}; materialize shards again")


def _messages(was: Record, now: Record) -> str:
    """Where two records' messages first differ."""
    if len(was.messages) != len(now.messages):
        return f"{len(was.messages)} messages became {len(now.messages)}"
    for number, (old, new) in enumerate(zip(was.messages, now.messages, strict=True), start=1):
        if old.role != new.role:
            return f"message {number}: role {old.role} became {new.role}"
        if old.content != new.content:
            return f"message {number} ({old.role}): the texts differ from character {_first(old.content, new.content)} on"
    return "the messages differ beside role and content"


def _tokens(was: Tokens, now: Tokens, decoder: Decoder) -> tuple[Stage, str]:
    old, new = decoder.text(was.ids.tolist()), decoder.text(now.ids.tolist())
    if old != new:
        return "rendering", f"the rendered texts differ from character {_first(old, new)} on"
    if not np.array_equal(was.ids, now.ids):
        at = _first(was.ids.tolist(), now.ids.tolist())
        return "ids", f"the same text has other ids from token {at} on: {_at(was, at)} became {_at(now, at)}"
    return "rendering", f"the trained spans {was.spans.tolist()} became {now.spans.tolist()}"


def _first(old: Sequence[object], new: Sequence[object]) -> int:
    return next((at for at, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), min(len(old), len(new)))


def _at(tokens: Tokens, at: int) -> str:
    return str(int(tokens.ids[at])) if at < len(tokens.ids) else "the end"
