"""Two snapshots side by side: files, leaves, records, slices, and the tokens of one record that changed.

What differs is found by `data/diff.py`; this module reads the documents and the token leaves. Changes nothing.
"""

import difflib
import json
from collections.abc import Iterable
from typing import Any

import msgspec

from repro_assets.bench import Bench
from repro_assets.data import diff, leaves, lines
from repro_assets.data.decoding import Decoder
from repro_assets.data.diff import Difference, Edit, Piece
from repro_assets.data.lines import Record
from repro_assets.documents import BaseModel, Document, RecordLeaf, Shards, ShardsObserved
from repro_assets.inspecting import Inspector
from repro_assets.shelf import MissingDocument
from repro_assets.trust.blob import BlobStore

SHOWN = 60  # characters of a common run of tokens in a table


class Side(msgspec.Struct, frozen=True):
    """A record in one of the two snapshots. `leaf`: the record leaf it is in; `tokens`, `trained`: null when it has no trained token."""

    id: str
    key: str | None
    split: str
    leaf: str
    roles: tuple[str, ...]
    tokens: int | None
    trained: int | None


class RecordView(msgspec.Struct, frozen=True):
    """One record before and now (null where it is not there), token by token when both have tokens."""

    name: str
    before: Side | None
    now: Side | None
    removed_tokens: int
    added_tokens: int
    pieces: tuple[Piece, ...]


class Comparer:
    """Compares the records of two snapshots under one recipe."""

    def __init__(self, bench: Bench, before: str, now: str) -> None:
        """Raises MissingDocument naming the command that makes the records that are missing."""
        self.inspector = Inspector(bench)
        self.keys = (before, now)
        self.store: BlobStore = self.inspector.shelf.blobs
        self.raw = tuple(self.inspector.show("raw_snapshot", key) for key in self.keys)
        self.records = tuple(self.inspector.show("records", key) for key in self.keys)

    def difference(self) -> Difference:
        """Files, leaves, records and slices; only leaves that differ are read."""
        old, new = (document.result for document in self.records)
        return diff.records(old, new, self.store, (self.raw[0].result, self.raw[1].result))

    # ---- one record

    def record(self, name: str, found: Difference) -> RecordView:
        """The record that `name` means: a user key, `path:line`, or the beginning of a record id, among those that differ.

        Raises MissingDocument when nothing that differs has that name, or several do.
        """
        edit = _meant(name, found)
        leaves_of = diff.changed_leaves(self.records[0].result, self.records[1].result)
        placed = [_find(wanted, listed, self.store) for wanted, listed in zip((edit.before, edit.now), leaves_of, strict=True)]
        tokens = [
            self._tokens(key, leaf, record.id) if (leaf and record) else None for key, (leaf, record) in zip(self.keys, placed, strict=True)
        ]
        sides = [_side(leaf, record, row) if (leaf and record) else None for (leaf, record), row in zip(placed, tokens, strict=True)]
        pieces: tuple[Piece, ...] = ()
        if any(row is not None for row in tokens):
            decoder = self._decoder()
            ids = [row[0] if row is not None else [] for row in tokens]
            pieces = diff.tokens(ids[0], ids[1], decoder.piece)
        removed, added = diff.moved(pieces)
        return RecordView(edit.name, sides[0], sides[1], removed, added, pieces)

    def _tokens(self, key: str, leaf: RecordLeaf, record: str) -> tuple[list[int], int] | None:
        """(ids, trained tokens) of a record as the snapshot's shards hold it; None when it has no trained token."""
        document: Document[Shards, ShardsObserved] = self.inspector.show("shards", key)
        for entry in document.result.leaves:
            if (entry.split, entry.source) == (leaf.split, leaf.blob.sha256):
                stored = self.store.get_bytes(document.observed.stored[entry.sha256].sha256)
                tokens = leaves.load(stored, entry.sha256)
                if record in (names := tokens.records):
                    row = names.index(record)
                    return tokens.ids[row].tolist(), int(tokens.trained[row])
        return None

    def _decoder(self) -> Decoder:
        shards = self.inspector.show("shards", self.keys[1])
        _inputs, model = self.inspector.shelf.by_digest(shards.inputs["base_model"], BaseModel)
        return Decoder(self.store, model)


def _meant(name: str, found: Difference) -> Edit:
    """The edit, removal or addition that a name means; a removed record has no `now`, an added one no `before`."""
    ways = [edit for edit in found.edits if name == edit.name]
    if not ways:
        ways = [edit for edit in found.edits if name and (edit.before.startswith(name) or edit.now.startswith(name))]
        ways += [Edit(record, record, "") for record in found.records.removed if name and record.startswith(name)]
        ways += [Edit(record, "", record) for record in found.records.added if name and record.startswith(name)]
        ways += [Edit(record, record, record) for record in found.relabelled if name and record.startswith(name)]
    if len(ways) == 1:
        return ways[0]
    if ways:
        shown = ", ".join(edit.name[:16] for edit in ways[:5])
        raise MissingDocument(f"{name!r} means {len(ways)} records that differ ({shown}, ...); give more of the id, or the key")
    known = [edit.name for edit in found.edits] + [*found.records.removed, *found.records.added]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise MissingDocument(f"no record that differs is called {name!r}{hint} `repro diff` without --record lists keys and ids")


def _find(wanted: str, listed: Iterable[RecordLeaf], store: BlobStore) -> tuple[RecordLeaf | None, Record | None]:
    if wanted:
        for leaf in listed:
            for record in lines.decode(store.get_bytes(leaf.blob.sha256)):
                if record.id == wanted:
                    return leaf, record
    return None, None


def _side(leaf: RecordLeaf, record: Record, tokens: tuple[list[int], int] | None) -> Side:
    return Side(
        id=record.id,
        key=record.key,
        split=leaf.split,
        leaf=leaf.blob.sha256,
        roles=tuple(message.role for message in record.messages),
        tokens=len(tokens[0]) if tokens else None,
        trained=tokens[1] if tokens else None,
    )


def side_by_side(pieces: Iterable[Piece]) -> list[dict[str, str]]:
    """One row for each run of tokens, as JSON strings; tokens that differ are divided by bars, long common runs are shortened."""
    table: list[dict[str, str]] = []
    replacing = False
    for piece in pieces:
        if piece.kind == "same":
            shown = _shortened(json.dumps("".join(piece.texts), ensure_ascii=False))
            table.append({"before": shown, "now": shown})
        elif piece.kind == "added" and replacing:
            table[-1]["now"] = json.dumps("|".join(piece.texts), ensure_ascii=False)
        else:
            shown = json.dumps("|".join(piece.texts), ensure_ascii=False)
            table.append({"before": shown, "now": ""} if piece.kind == "removed" else {"before": "", "now": shown})
        replacing = piece.kind == "removed"
    return table


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"


def counts(found: Difference) -> list[dict[str, Any]]:
    """One row for files, leaves and records each: what was added, removed, changed."""
    return [
        {"what": "files", "added": len(found.files.added), "removed": len(found.files.removed), "changed": len(found.files.changed)},
        {"what": "leaves", "added": found.leaves_added, "removed": found.leaves_removed, "changed": 0},
        {
            "what": "records",
            "added": len(found.records.added),
            "removed": len(found.records.removed),
            "changed": len(found.records.changed) + len(found.relabelled),
        },
    ]


def named(found: Difference) -> list[dict[str, str]]:
    """One row for each file and record that differs, files first."""
    rows = [
        {"what": "file", "change": change, "name": name, "before": "", "now": ""}
        for change in ("added", "removed", "changed")
        for name in getattr(found.files, change)
    ]
    rows += [
        {"what": "record", "change": "changed", "name": edit.name, "before": edit.before[:12], "now": edit.now[:12]} for edit in found.edits
    ]
    rows += [
        {"what": "record", "change": "relabelled", "name": record[:12], "before": record[:12], "now": record[:12]}
        for record in found.relabelled
    ]
    rows += [{"what": "record", "change": "removed", "name": name[:12], "before": name[:12], "now": ""} for name in found.records.removed]
    rows += [{"what": "record", "change": "added", "name": name[:12], "before": "", "now": name[:12]} for name in found.records.added]
    return rows


def slices(found: Difference) -> list[dict[str, Any]]:
    """One row for each slice whose count moved."""
    return [
        {"label": label, "value": value, "before": before, "now": now}
        for label, values in found.slices.items()
        for value, (before, now) in values.items()
    ]
