"""The table that the rules judge: one row a record, from its token leaf and from the record leaf that this one names.

Leaves pass through one at a time; what stays is numbers, labels and the texts of a keyed sample. The rules are in `rules.py`, `conversations.py`.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from repro_assets.data import lines
from repro_assets.data.errors import LeafError
from repro_assets.data.leaves import Leaf
from repro_assets.data.lines import Message
from repro_assets.documents import TokenLeaf
from repro_assets.trust.blob import BlobStore

#: Slice labels come after these, one nullable text column each, named by `label_column`.
COLUMNS = {
    "record": pl.String,
    "split": pl.String,
    "leaf": pl.UInt32,
    "tokens": pl.UInt32,
    "trained": pl.UInt32,
    "cut": pl.UInt32,
    "highest": pl.UInt32,
    "spans_apart": pl.Boolean,
    "answers": pl.UInt32,
    "answers_ended": pl.UInt32,
    "characters": pl.UInt32,
    "turns": pl.UInt32,
    "longest_turn": pl.UInt32,
    "blank_turns": pl.UInt32,
    "roles": pl.String,
    "framed": pl.Boolean,
}

#: after the role of a turn that is more than its text, such as a tool call, in the column `roles`
CALLS = "+"

#: Whether ids begin and end as the template writes for these roles: (roles joined by commas, ids, tokens cut off). None: not to be told.
Framed = Callable[[str, NDArray[Any], int], bool | None]


def label_column(label: str) -> str:
    """The column that holds a slice label."""
    return f"slice {label}"


class Drawn(msgspec.Struct, frozen=True):
    """A record of the keyed sample with its texts. `ids` as in its token leaf."""

    record: str
    messages: tuple[Message, ...]
    ids: NDArray[Any]
    cut: int


class Sample:
    """The `size` records with the lowest keyed hash of their id, whatever order they come in; each record once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: list[tuple[int, Drawn]] = []
        self._names: set[str] = set()

    def offer(self, record: str, make: Callable[[], Drawn]) -> None:
        """Take the record if it belongs to the sample so far; `make` is called only then."""
        rank = -int.from_bytes(hashlib.sha256(f"validation|{record}".encode()).digest())
        if record in self._names or not self._size or (len(self._held) == self._size and rank <= self._held[0][0]):
            return
        push = heapq.heappush if len(self._held) < self._size else heapq.heapreplace
        out = push(self._held, (rank, make()))
        self._names.add(record)
        if out is not None:
            self._names.discard(out[1].record)

    def drawn(self, count: int) -> list[Drawn]:
        """The first `count` records by keyed hash."""
        return [drawn for _rank, drawn in sorted(self._held, key=lambda item: -item[0])[:count]]


class Table:
    """What was read. `frame`: COLUMNS and labels. `expected`: record to its token digest. `torn`: leaves that are not what their entry says.

    `framed` counts nothing: it is asked once a record while its leaf is in hand.
    """

    def __init__(self, controls: Iterable[int], sample: int, framed: Framed | None = None) -> None:
        self._controls = np.array(sorted(controls), dtype=np.int64)
        self._framed = framed
        self._parts: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._labels: dict[str, dict[int, str]] = {}
        self._rows = 0
        self._leaves = 0
        self.sources: list[str] = []
        self.expected: dict[str, bytes] = {}
        self.torn: list[str] = []
        self.sample = Sample(sample)

    def add(self, entry: TokenLeaf, leaf: Leaf, texts: Mapping[str, tuple[Message, ...]]) -> None:
        """One leaf with the messages of its records by id, as far as the record leaf has them."""
        names = leaf.records
        self.expected.update(zip(names, (bytes(row) for row in leaf.token), strict=True))
        if (entry.records, entry.tokens, entry.trained) != (len(leaf), len(leaf.flat_ids), int(leaf.trained.sum())):
            self.torn.append(f"leaf {entry.sha256[:12]}")
        self._extend(
            record=names,
            split=[entry.split] * len(leaf),
            leaf=[self._leaves] * len(leaf),
            tokens=leaf.lengths.tolist(),
            trained=leaf.trained.clip(0).tolist(),
            cut=leaf.cut.tolist(),
            **_of_ids(leaf, self._controls),
            **self._of_texts(names, leaf, texts),
        )
        for row, slices in enumerate(leaf.slices, start=self._rows):
            for label, value in slices.items():
                self._labels.setdefault(label, {})[row] = value
        self.sources.append(entry.source)
        self._rows += len(leaf)
        self._leaves += 1

    def _extend(self, **columns: Sequence[Any]) -> None:
        for name, values in columns.items():
            self._parts[name] += values

    def _of_texts(self, names: list[str], leaf: Leaf, texts: Mapping[str, tuple[Message, ...]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in ("characters", "turns", "longest_turn", "blank_turns", "roles", "framed")}
        for name, ids, cut in zip(names, leaf.ids, leaf.cut.tolist(), strict=True):
            messages = texts.get(name)
            if messages is None:
                for values in columns.values():
                    values.append(None)
                continue
            lengths = [len(message.content) for message in messages]
            roles = ",".join(message.role if message.plain else f"{message.role}{CALLS}" for message in messages)
            columns["characters"].append(sum(lengths))
            columns["turns"].append(len(messages))
            columns["longest_turn"].append(max(lengths, default=0))
            columns["blank_turns"].append(sum(message.plain and not message.content.strip() for message in messages))
            columns["roles"].append(roles)
            columns["framed"].append(self._framed(roles, ids, cut) if self._framed else None)
            self.sample.offer(name, lambda n=name, m=messages, i=ids, c=cut: Drawn(n, m, np.array(i), c))  # type: ignore[misc]
        return columns

    def frame(self, required: Iterable[str] = ()) -> pl.DataFrame:
        """One row a record in the order of the leaves. `required`: labels that get a column even when no record has them."""
        frame = pl.DataFrame(self._parts, schema=COLUMNS)
        labels = sorted(self._labels.keys() | set(required))
        held = [self._labels.get(label, {}) for label in labels]
        return frame.with_columns(
            [
                pl.Series(label_column(label), [values.get(row) for row in range(self._rows)], dtype=pl.String)
                for label, values in zip(labels, held, strict=True)
            ]
        )


def _of_ids(leaf: Leaf, controls: NDArray[np.int64]) -> dict[str, list[Any]]:
    """`highest` id; `spans_apart`: spans in order, apart, inside the record; `answers`: trained spans that were not cut off;
    `answers_ended`: those of them whose last token is a control token, which is how a turn ends."""
    count = len(leaf)
    lengths, ends = leaf.lengths, leaf.id_ends
    begins = ends - lengths
    highest = np.zeros(count, np.int64)
    full = np.flatnonzero(lengths)
    if len(full):
        highest[full] = np.maximum.reduceat(leaf.flat_ids, begins[full])
    spans = leaf.flat_spans.astype(np.int64)
    owner = np.repeat(np.arange(count), np.diff(leaf.span_ends, prepend=0))
    start, end = spans[:, 0], spans[:, 1]
    sound = (end > start) & (end <= lengths[owner])
    if len(owner) > 1:
        sound[1:] &= (owner[1:] != owner[:-1]) | (start[1:] >= end[:-1])
    apart = np.bincount(owner, weights=~sound, minlength=count) == 0
    whole = apart[owner] & ~((leaf.cut[owner] > 0) & (end >= lengths[owner]))
    last = leaf.flat_ids[(begins[owner] + end - 1)[whole]].astype(np.int64)
    ended = owner[whole][np.isin(last, controls)]
    return {
        "highest": highest.tolist(),
        "spans_apart": apart.tolist(),
        "answers": np.bincount(owner[whole], minlength=count).tolist(),
        "answers_ended": np.bincount(ended, minlength=count).tolist(),
    }


def read(entries: Iterable[tuple[TokenLeaf, Leaf]], store: BlobStore, table: Table, progress: Callable[[int], None] | None = None) -> Table:
    """Pass every token leaf and the texts it was made from through the table. Raises LeafError for a record leaf that is none."""
    for number, (entry, leaf, source) in enumerate(_with_texts(entries, store), start=1):
        table.add(entry, leaf, messages_of(entry.source, source))
        if progress:
            progress(number)
    return table


def _with_texts(entries: Iterable[tuple[TokenLeaf, Leaf]], store: BlobStore) -> Iterator[tuple[TokenLeaf, Leaf, bytes]]:
    """Each entry with its record leaf; a window is asked of the store at a time, which reads it concurrently."""
    window: list[tuple[TokenLeaf, Leaf]] = []

    def full() -> Iterator[tuple[TokenLeaf, Leaf, bytes]]:
        for (entry, leaf), source in zip(window, store.get_many(entry.source for entry, _leaf in window), strict=True):
            yield entry, leaf, source

    for item in entries:
        window.append(item)
        if len(window) == 32:
            yield from full()
            window.clear()
    yield from full()


def messages_of(source: str, data: bytes) -> dict[str, tuple[Message, ...]]:
    """Record id to its messages, of one record leaf. Raises LeafError naming the leaf."""
    try:
        return {record.id: record.messages for record in lines.decode(data)}
    except msgspec.DecodeError as error:
        raise LeafError(f"record leaf {source}: its lines are not records: {error}; materialize records again") from error


def histograms(frame: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Records by tenth of trained tokens (lower edge in percent), by turns, and by characters (lower edge of a power of two)."""
    pairs = zip(frame["trained"].to_list(), frame["tokens"].to_list(), strict=True)
    shares = Counter(10 * trained // tokens * 10 if tokens else 0 for trained, tokens in pairs)
    characters = Counter(1 << (value.bit_length() - 1) if value else 0 for value in frame["characters"].to_list() if value is not None)
    turns = Counter(value for value in frame["turns"].to_list() if value is not None)
    named = {"trained_percent": shares, "turns": turns, "characters": characters}
    return {name: {str(edge): count for edge, count in sorted(counts.items())} for name, counts in named.items()}


def shown(frame: pl.DataFrame, table: Table, names: Sequence[str], store: BlobStore) -> list[dict[str, Any]]:
    """Rows of records by id, numbers and labels as they are, texts as their shape only; a record that is not in the frame by its id alone."""
    by_name = {row["record"]: row for row in frame.filter(pl.col("record").is_in(list(names))).iter_rows(named=True)} if names else {}
    rows: list[dict[str, Any]] = []
    for name in names:
        row = by_name.get(name)
        if row is None:
            rows.append({"record": name})
            continue
        messages = messages_of(table.sources[row["leaf"]], store.get_bytes(table.sources[row["leaf"]])).get(name, ())
        labels = {key: value for key, value in row.items() if key.startswith("slice ") and value is not None}
        kept = {key: row[key] for key in ("record", "split", "tokens", "trained", "cut", "characters", "turns")}
        rows.append({**kept, "labels": labels, "shape": shape(messages)})
    return rows


def shape(messages: Sequence[Message], characters: int = 60) -> str:
    """The look of a conversation without what it says: letters as x, digits as 9, spaces and punctuation as they are.

    >>> shape([Message(content="Call +1 555 0100!", role="user")])
    'user: xxxx +9 999 9999!'
    """
    shown = []
    for message in messages[:4]:
        text = "".join("x" if char.isalpha() else "9" if char.isnumeric() else char for char in message.content[:characters])
        text = "".join(char if char.isprintable() else "·" for char in text)
        shown.append(f"{message.role}: {text}" + ("…" if len(message.content) > characters else ""))
    return " ‖ ".join(shown) + (f" ‖ … {len(messages) - 4} more turns" if len(messages) > 4 else "")
