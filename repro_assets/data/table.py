"""All rows of a snapshot as one table of digests and places, and the leaf lines behind them, fetched when a leaf must be written.

What stays and how leaves are cut is `records.py`; how a part is made is `parts.py`.
"""

import hashlib
import os
import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.data import columns, readers
from repro_assets.data.columns import Spill
from repro_assets.data.errors import SourceError
from repro_assets.data.lines import encode
from repro_assets.data.parts import Parse
from repro_assets.documents import FilePart, ParsedFile, RawFile
from repro_assets.trust.blob import Blob, BlobStore


class Beside(msgspec.Struct, frozen=True):
    """What a part says beside its columns."""

    labels: tuple[dict[str, str], ...]
    set_aside: tuple[columns.Set, ...]
    cleaned: dict[str, int]
    flagged: dict[int, dict[str, int]]
    read: int


class Table:
    """Every row of all files in canonical order, as columns over the parts; about 110 bytes a row."""

    def __init__(self, files: list[RawFile], ranks: list[int], parsed: list[ParsedFile], store: BlobStore) -> None:
        self.files, self.store = files, store
        self.parts: list[tuple[int, FilePart]] = [(number, part) for number, file in enumerate(parsed) for part in file.parts]
        rows = [part.rows for _number, part in self.parts]
        self.starts = np.cumsum([0, *rows])
        self.beside: list[Beside] = []
        gathered: dict[str, list[NDArray[Any]]] = {name: [] for name in columns.COLUMNS if name not in ("raw", "steps")}
        for data in store.get_many(part.columns.sha256 for _number, part in self.parts):
            held = columns.columns(data)
            self.beside.append(Beside(held.labels, held.set_aside, held.cleaned, held.flagged, held.read))
            for name, arrays in gathered.items():
                if held.side:
                    arrays.append(columns.column(held, name))

        def whole(name: str) -> NDArray[Any]:
            arrays, (kind, wide) = gathered.pop(name), columns.COLUMNS[name]
            return np.concatenate(arrays) if arrays else np.zeros((0, 32) if wide else 0, kind)

        self.record, self.lines, self.key, self.signature = (whole(name) for name in ("record", "lines", "key", "signature"))
        self.line, self.offset, self.length, self.size = (whole(name) for name in ("line", "offset", "length", "size"))
        self.side, self.by, self.label = whole("side"), whole("by"), whole("label")
        self.part = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
        self._file = np.array([number for number, _part in self.parts], np.int32)
        self._rank = np.array([ranks[number] for number, _part in self.parts], np.int32)

    def __len__(self) -> int:
        return len(self.line)

    def file(self, position: int) -> int:
        return int(self._file[self.part[position]])

    def rank(self, position: int) -> int:
        return int(self._rank[self.part[position]])

    def ranks(self, positions: NDArray[np.int64]) -> NDArray[np.int32]:
        return self._rank[self.part[positions]]

    def rows_of(self, file: int) -> tuple[int, int]:
        """First position and end of a file's rows."""
        mine = np.flatnonzero(self._file == file)
        return (int(self.starts[mine[0]]), int(self.starts[mine[-1] + 1])) if len(mine) else (0, 0)

    def where(self, position: int) -> str:
        return f"{self.files[self.file(position)].path}:{self.line[position]}"

    def labels(self, position: int) -> dict[str, str]:
        return self.beside[self.part[position]].labels[self.label[position]]


class Texts:
    """Leaf lines by position: from the files that this run's workers wrote, else from the part's text in the store, else from leaves of the
    previous records, else from the raw file again; the last two line by line, known by the digest of the line."""

    HELD = 3

    def __init__(self, table: Table, spilled: dict[int, Spill], task: Parse) -> None:
        self.table, self.task = table, task
        self.files = {number: open(spill.path, "rb") for number, spill in spilled.items()}  # noqa: SIM115  closed by `close`
        self.held: dict[int, bytes] = {}
        self.lock = threading.Lock()
        self.again: dict[int, bytes] = {}
        self.there = np.zeros(len(table), bool)
        for number, (_file, part) in enumerate(table.parts):
            rows = slice(int(table.starts[number]), int(table.starts[number + 1]))
            if number in spilled:
                self.there[rows] = np.frombuffer(spilled[number].rows, bool)
            else:
                self.there[rows] = part.text is not None
        ends = np.cumsum(np.where(self.there, table.size, 0), dtype=np.int64)
        first = np.concatenate([[0], ends])[table.starts[:-1]] if len(ends) else np.zeros(0, np.int64)
        self.ends = ends - np.repeat(first, np.diff(table.starts))

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def prepare(self, positions: NDArray[np.int64], leaves: Iterable[Blob]) -> None:
        """Fetch those lines that no worker wrote: from `leaves` of the previous records, and what is in none from the raw files."""
        bare = {bytes(self.table.lines[at]): at for at in positions[~self.there[positions]].tolist()}
        missing = dict(bare)
        for data in self.table.store.get_many(leaf.sha256 for leaf in leaves) if bare else ():
            for bare_line in data.split(b"\n")[:-1]:
                line = bare_line + b"\n"
                if (at := missing.pop(hashlib.sha256(line).digest(), None)) is not None:
                    self.again[at] = line
        # Equal rows, where duplicates are kept, have one line.
        twins = [at for at in positions[~self.there[positions]].tolist() if at not in self.again]
        for at in twins:
            if (other := bare[bytes(self.table.lines[at])]) in self.again:
                self.again[at] = self.again[other]
        self._read_again([at for at in twins if at not in self.again])

    def _read_again(self, positions: list[int]) -> None:
        """From the raw files, each opened once."""
        table = self.table
        wanted: dict[int, dict[int, list[int]]] = {}
        for at in positions:
            wanted.setdefault(table.file(at), {}).setdefault(int(table.line[at]), []).append(at)
        for number, rows in sorted(wanted.items()):
            file = table.files[number]
            source = readers.source_for(file.path, self.task.section.sources)
            places = [(line, int(table.offset[here[0]]), int(table.length[here[0]])) for line, here in rows.items()]
            for row in readers.again(file.path, file.format, partial(self.task.open_raw, file), source, places):
                for at in rows[row.line]:
                    self.again[at] = self._checked(row, at)

    def _checked(self, row: readers.Row | readers.Bad, position: int) -> bytes:
        try:
            line = b"" if isinstance(row, readers.Bad) else encode(self.task.intake.record(row, int(self.table.by[position])))
        except readers.Unfit:
            line = b""
        if hashlib.sha256(line).digest() != bytes(self.table.lines[position]):
            raise SourceError(
                f"{self.table.where(position)}: the row is not the one that was parsed before from the same bytes: "
                "the raw object was changed; materialize raw_snapshot again, or restore the object"
            )
        return line

    def lines(self, positions: NDArray[np.int64]) -> bytes:
        """The lines of these rows, in this order; runs of neighbours are taken at once."""
        part, there = self.table.part[positions], self.there[positions]
        breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(part) != 0) | (np.diff(there) != 0)) + 1
        first, last = positions[np.concatenate([[0], breaks])], positions[np.concatenate([breaks - 1, [len(positions) - 1]])]
        runs = [self._run(*ends) for ends in zip(first.tolist(), last.tolist(), strict=True)]
        return runs[0] if len(runs) == 1 else b"".join(runs)

    def _run(self, first: int, last: int) -> bytes:
        if not self.there[first]:
            return b"".join(self.again[at] for at in range(first, last + 1))
        number = int(self.table.part[first])
        begin, end = int(self.ends[first]) - int(self.table.size[first]), int(self.ends[last])
        if number in self.files:
            return os.pread(self.files[number].fileno(), end - begin, begin)
        with self.lock:
            if number not in self.held:
                while len(self.held) >= self.HELD:
                    self.held.pop(next(iter(self.held)))
                stored = self.table.parts[number][1].text
                assert stored is not None, "a part whose text is nowhere has no row that is there"
                self.held[number] = columns.text(self.table.store.get_bytes(stored.sha256))
            return self.held[number][begin:end]
