"""Cutting text files into rows: lines, elements of a JSON array, paragraphs, CSV records. Bytes and places only.

What is in a row is `rows.py`. Nothing here holds more than a row and two blocks, however the stream cuts its reads.
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from repro_assets.data.errors import SourceError
from repro_assets.data.rows import Bad

BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"


class Piece(NamedTuple):
    """The bytes of one row and where they are: 1-based line (or element of an array), offset and length in bytes. `data` is None for a
    row that is longer than the limit."""

    line: int
    offset: int
    length: int
    data: bytes | None


def lines(stream: BinaryIO, row_limit: int) -> Iterator[tuple[int, int, bytes | None]]:
    """(offset, length, bytes) of every line, its newline left out; None instead of bytes for a line longer than `row_limit`.

    Holds at most `row_limit` and two blocks in memory, however long a line is and however the stream cuts its reads.
    """
    start, held, kept = 0, 0, bytearray()
    while block := stream.read(BLOCK):
        at = 0
        while (end := block.find(b"\n", at)) >= 0:
            held += end - at
            if held > row_limit:
                yield start, held, None
            else:
                yield start, held, bytes(kept + block[at:end]) if kept else block[at:end]
            start, held, at = start + held + 1, 0, end + 1
            kept.clear()
        held += len(block) - at
        if held > row_limit:
            kept.clear()
        else:
            kept += block[at:]
    if held:
        yield start, held, None if held > row_limit else bytes(kept)


def every(stream: BinaryIO, row_limit: int) -> Iterator[Piece]:
    """Every line, blank ones too; a byte order mark before the first is left out."""
    for line, (offset, length, data) in enumerate(lines(stream, row_limit), start=1):
        if line == 1 and data is not None and data.startswith(BOM):
            offset, length, data = offset + 3, length - 3, data[3:]
        yield Piece(line, offset, length, data)


def numbered(stream: BinaryIO, row_limit: int) -> Iterator[Piece]:
    """Every line that is not white space only."""
    for piece in every(stream, row_limit):
        data = piece.data
        if data is None or (data and not data.isspace()):
            yield piece


def paragraphs(stream: BinaryIO, row_limit: int) -> Iterator[Piece]:
    """Runs of lines between lines of white space only. A run longer than `row_limit` is one piece without bytes."""
    held: list[bytes] = []
    first: Piece | None = None
    last, end, long = 0, 0, False
    for piece in numbered(stream, row_limit):
        if first is not None and piece.line > last + 1:
            yield Piece(first.line, first.offset, end - first.offset, None if long else b"\n".join(held))
            first = None
        if first is None:
            first, held, long = piece, [], False
        last, end = piece.line, piece.offset + piece.length
        long = long or piece.data is None or end - first.offset > row_limit
        if long:
            held = []
        elif piece.data is not None:
            held.append(piece.data)
    if first is not None:
        yield Piece(first.line, first.offset, end - first.offset, None if long else b"\n".join(held))


def whole(stream: BinaryIO, row_limit: int) -> Iterator[Piece]:
    """The file as one piece, without its byte order mark; none for a file of white space only."""
    kept, size, blank = bytearray(), 0, True
    while block := stream.read(BLOCK):
        size += len(block)
        blank = blank and block.isspace()
        if size > row_limit:
            kept.clear()
        else:
            kept += block
    if size and not blank:
        start = len(BOM) if kept.startswith(BOM) else 0
        yield Piece(1, start, size - start, None if size > row_limit else bytes(kept[start:]))


# ---- a JSON array

SPACE = re.compile(rb"[ \t\r\n]*+")
#: a whole string. First the common one, at ten times the speed: every quote inside it is behind a single backslash
STRING = rb'(?>"[^"]*+(?:(?<=[^\\]\\)"[^"]*+)*+(?<!\\)"|"[^"\\]*+(?:\\.[^"\\]*+)*+")'
#: inside an element: up to the next bracket, whole strings included; stops before a string that is not closed in this block
INSIDE = re.compile(rb'[^"{}\[\]]*+(?:' + STRING + rb'[^"{}\[\]]*+)*+', re.DOTALL)
#: an element that is no object or array: up to the comma or the end of the array
SCALAR = re.compile(rb'[^",\]]*+(?:' + STRING + rb'[^",\]]*+)*+', re.DOTALL)
#: the rest of a string that is not closed in its block
REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


class _Array:
    """The scanner of one JSON array: it knows where elements begin and end, not whether they are good JSON."""

    def __init__(self, path: str, stream: BinaryIO, row_limit: int) -> None:
        self.path, self.stream, self.row_limit = path, stream, row_limit
        self.block, self.at, self.base = b"", 0, 0  # `base`: offset of the block in the file
        self.kept, self.held, self.begin = bytearray(), 0, -1  # of the element at hand; `begin` in the block, -1 outside

    def pieces(self) -> Iterator[Piece]:
        """Every element. Raises SourceError for what is no array."""
        mark = self._next()
        if not mark:
            return
        if mark != b"[":
            raise self._broken("is not a JSON array of rows")
        self.at += 1
        number = 0
        while not ((mark := self._next()) == b"]" and not number):
            if mark in (b"", b",", b"]"):
                raise self._broken("has no element here" if mark else "ends inside the array: it was cut off")
            number += 1
            start = self.base + self.at
            data, length = self._element(mark)
            yield Piece(number, start, length, data)
            if (mark := self._next()) == b"]":
                break
            if mark != b",":
                raise self._broken("has no comma between two elements here" if mark else "ends inside the array: it was cut off")
            self.at += 1
        self.at += 1
        if self._next():
            raise self._broken("goes on after the end of its array")

    def _next(self) -> bytes:
        """The next byte that is no white space; none at the end of the file."""
        while True:
            self.at = SPACE.match(self.block, self.at).end()  # type: ignore[union-attr]  # it matches the empty string too
            if self.at < len(self.block):
                return self.block[self.at : self.at + 1]
            if not self._more():
                return b""

    def _more(self) -> bool:
        """The next block, after what is left of this one; False at the end of the file."""
        if self.begin >= 0:
            self._keep()
            self.begin = 0
        rest, block = self.block[self.at :], self.stream.read(BLOCK)
        self.base += self.at
        self.block, self.at = rest + block, 0
        if self.base == 0 and self.begin < 0:
            while len(self.block) < len(BOM) and BOM.startswith(self.block) and (block := self.stream.read(BLOCK)):
                self.block += block
            if self.block.startswith(BOM):
                self.at = len(BOM)
        return bool(block)

    def _keep(self) -> None:
        """Keep what was scanned of the element at hand, up to the limit."""
        self.held += self.at - self.begin
        if self.held > self.row_limit:
            self.kept.clear()
        else:
            self.kept += self.block[self.begin : self.at]

    def _element(self, mark: bytes) -> tuple[bytes | None, int]:
        self.kept.clear()
        self.held, self.begin = 0, self.at
        nested = mark in (b"{", b"[")
        match, depth = (INSIDE if nested else SCALAR).match, 0
        while True:
            at = match(self.block, self.at).end()  # type: ignore[union-attr]
            byte = self.block[at : at + 1]
            self.at = at
            if byte == b'"':
                self._string()
            elif not byte:
                if not self._more():
                    raise self._broken("ends inside an element: it was cut off")
            elif not nested:
                break
            else:
                self.at += 1
                depth += 1 if byte in (b"{", b"[") else -1
                if not depth:
                    break
        self._keep()
        self.begin = -1
        return (None if self.held > self.row_limit else bytes(self.kept)), self.held

    def _string(self) -> None:
        """Past a string that is not closed in this block."""
        self.at += 1
        while True:
            self.at = REST.match(self.block, self.at).end()  # type: ignore[union-attr]
            if self.block[self.at : self.at + 1] == b'"':
                self.at += 1
                return
            # What is left is nothing, or a backslash whose character is in the next block.
            if not self._more():
                raise self._broken("ends inside a string: it was cut off")

    def _broken(self, what: str) -> SourceError:
        return SourceError(
            f"{self.path}: the file {what} (byte {self.base + self.at:,}); write it as one JSON array of objects or as JSONL, "
            "or leave it out with raw.exclude"
        )


def elements(path: str, stream: BinaryIO, row_limit: int) -> Iterator[Piece]:
    """Every element of the JSON array that the file is; `line` is its number. Raises SourceError for anything else."""
    return _Array(path, stream, row_limit).pieces()


# ---- CSV

CLOSED, OPEN, BROKEN = range(3)
#: from inside a quoted field to behind its closing quote
CLOSE = re.compile(rb'[^"]*+(?:""[^"]*+)*+"')
CLOSE_TEXT = re.compile(r'[^"]*+(?:""[^"]*+)*+"')


def records(stream: BinaryIO, row_limit: int, delimiter: bytes) -> Iterator[Piece | Bad]:
    """Every record of a CSV file, its header too; quoted fields may hold line ends. `line` is the line on which it begins.

    A quote that is never closed, or closed in the middle of a field, spoils the line it stands on and no other.
    """
    source = every(stream, row_limit)
    back: deque[Piece] = deque()
    while (first := back.popleft() if back else next(source, None)) is not None:
        if first.data is None:
            yield first
            continue
        if b'"' not in first.data:
            if first.data and not first.data.isspace():
                yield first
            continue
        held, length, state, long = [first], first.length, _quotes(first.data, False, delimiter), False
        while state == OPEN and (piece := back.popleft() if back else next(source, None)) is not None:
            length = piece.offset + piece.length - first.offset
            long = long or piece.data is None or length > row_limit
            if not long:
                held.append(piece)
            # Of a line that is itself too long nothing is known: the record is taken to end with it.
            state = CLOSED if piece.data is None else _quotes(piece.data, True, delimiter)
        if long:
            unclosed = "" if state == CLOSED else "; is a quote never closed?"
            yield Bad(first.line, first.offset, length, "row_too_long", f"{length} bytes, the limit is {row_limit}{unclosed}")
        elif state == CLOSED:
            yield first if len(held) == 1 else Piece(first.line, first.offset, length, b"\n".join(piece.data or b"" for piece in held))
        else:
            said = "a quote is never closed" if state == OPEN else "a quote inside a quoted field; write it twice"
            yield Bad(first.line, first.offset, first.length, "not_csv", said)
            back.extendleft(reversed(held[1:]))


def _quotes(data: bytes, inside: bool, delimiter: bytes) -> int:
    """How the line leaves a record that it begins, or goes on with inside a quoted field."""
    at, end = 0, len(data) - data.endswith(b"\r")
    while True:
        if inside or data.startswith(b'"', at):
            at = _behind(data, at if inside else at + 1)
            if not at:
                return OPEN
            inside = False
            if at >= end:
                return CLOSED
            if not data.startswith(delimiter, at):
                return BROKEN
        else:
            at = data.find(delimiter, at)
            if at < 0:
                return CLOSED
        at += 1


def _behind(data: bytes, at: int) -> int:
    """The place behind the quote that closes a field, from a place inside it; 0 when the line does not close it."""
    end = data.find(b'"', at) + 1
    if end and data.startswith(b'"', end):
        found = CLOSE.match(data, at)
        return found.end() if found else 0
    return end


def fields(text: str, delimiter: str) -> list[str]:
    """The fields of one record as `records` cuts it."""
    text = text.removesuffix("\r")
    if '"' not in text:
        return text.split(delimiter)
    found, at = [], 0
    while at <= len(text):
        if text.startswith('"', at):
            end = text.find('"', at + 1)
            if text.startswith('"', end + 1) and (closing := CLOSE_TEXT.match(text, at + 1)):
                end = closing.end() - 1
                found.append(text[at + 1 : end].replace('""', '"'))
            else:
                found.append(text[at + 1 : end])
            at = end + 2
        else:
            end = text.find(delimiter, at)
            end = len(text) if end < 0 else end
            found.append(text[at:end])
            at = end + 1
    return found
