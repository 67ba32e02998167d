"""Raw rows of every format, streamed, as chat messages or as a bad row with its reason; the same rows again from their places.

This module ties the parts together: formats are named in `manifest.py`, cut in `cutting.py` and `parquet.py`, decompressed in `compressed.py`;
what a row says is `rows.py`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, BinaryIO, cast

from repro_assets.data import cutting, manifest, parquet
from repro_assets.data.compressed import Decompressed
from repro_assets.data.cutting import BLOCK, Piece, lines
from repro_assets.data.errors import SourceError
from repro_assets.data.lines import Message
from repro_assets.data.manifest import matches
from repro_assets.data.rows import (
    REASONS,
    TEXT,
    Bad,
    Row,
    Seen,
    Shaped,
    Unfit,
    decoded,
    demanded,
    known,
    lookup,
    mapping,
    parsed,
    quick,
    shaped,
    text_of,
)
from repro_assets.recipe import Source

__all__ = ["BLOCK", "REASONS", "Bad", "Row", "Seen", "Unfit", "again", "checked", "lines", "read", "row_at", "source_for"]

LFS = b"version https://git-lfs.github.com/spec/"
#: the beginning of a `.dvc` file under another name
DVC = re.compile(
    rb"(?:\s*#[^\n]*\n)*(?:(?:md5|frozen|wdir|desc):[^\n]*\n)*outs:\s*\n\s*-\s+(?:[a-z]+:[^\n]*\n\s+)*?(?:md5|etag|checksum|hash|path): "
)
DELIMITERS = {"csv": ",", "tsv": "\t"}

Shape = Callable[[bytes], Shaped]


def source_for(path: str, sources: Iterable[Source]) -> Source:
    """The first source whose pattern matches. Raises SourceError naming the file and the remedy when none does, and for a file that is no
    data whatever matches it."""
    _refuse_by_name(path)
    sources = tuple(sources)
    for source in sources:
        if matches(path, source.match):
            return source
    raise SourceError(
        f"{path}: no source of the recipe matches it (records.sources: {', '.join(source.match for source in sources)}); "
        "add a source for it, or leave it out with raw.exclude"
    )


def checked(source: Source) -> Source:
    """The source itself. Raises SourceError for a field name that its shape does not have."""
    names = known(source)
    if unknown := sorted(set(source.fields) - set(names)):
        raise SourceError(f"records.sources {source.match!r}: shape {source.shape} has no field {unknown[0]!r}; known: {', '.join(names)}")
    return source


def read(
    path: str,
    format: str,
    stream: BinaryIO,
    source: Source,
    row_limit: int = 16 << 20,
    *,
    row_group_limit: int = 256 << 20,
    known_by: Callable[[bytes], Any] | None = None,
) -> Iterator[Row | Bad | Seen]:
    """Every row of the file in order, streamed; a line of white space only is no row. An empty file gives one Bad of line 0.

    `known_by` is asked with the bytes of every row of JSON or plain text; what it knows (anything but None) is handed back as Seen.
    `row_limit`: bytes of a row; `row_group_limit`: uncompressed bytes of a Parquet row group. Raises SourceError for a format without a
    reader, a pointer instead of data, a broken container or stream, a CSV header without the mapped columns.
    """
    base, compression = _usable(path, format, checked(source))
    rows = False
    found = (
        _read_parquet(path, stream, source, row_limit, row_group_limit)
        if base == "parquet"
        else _read_text(path, base, compression, stream, source, row_limit, known_by)
    )
    for row in found:
        rows = True
        yield row
    if not rows:
        yield Bad(0, 0, 0, "empty_file", "no rows in it")


def row_at(data: bytes, source: Source) -> Shaped:
    """Messages, key and slices of the bytes of one JSON row. Raises Unfit."""
    return shaped(parsed(data), source, mapping(source))


# ---- what is no data


def _refuse_by_name(path: str) -> None:
    """Raise SourceError for a file whose name says that it is no data, with the remedy."""
    if remedy := manifest.remedy_for(path):
        raise SourceError(f"{path}: {remedy}, or leave it out with raw.exclude")


def _refuse_pointer(path: str, head: bytes) -> None:
    if head.startswith(LFS):
        raise SourceError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull` where it came from and import again")
    if DVC.match(head[:4096]):
        raise SourceError(f"{path}: a DVC pointer, not the data; run `dvc pull` where it came from and import the data itself")


def _usable(path: str, format: str, source: Source) -> tuple[str, str]:
    """The format without its compression, and the compression ("" for none). Raises SourceError for a format that cannot be read so."""
    base, compression = manifest.parts(format)
    if base == manifest.OTHER:
        _refuse_by_name(path)
        read_here = ", ".join(manifest.SUFFIXES)
        raise SourceError(
            f"{path}: no reader for this format ({read_here} are read, the text formats also as .gz or .zst); "
            "convert or rename it, or leave it out with raw.exclude"
        )
    if base == "txt":
        if source.shape != "text":
            raise SourceError(f"{path}: plain text has no fields for shape {source.shape} ({source.match!r}); use shape: text")
        if named := sorted({*source.fields, *source.slices}):
            raise SourceError(f"{path}: plain text has no fields, but {source.match!r} maps {named[0]!r}; leave fields and slices out")
    return base, compression


# ---- text formats


class _Headed:
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self.head, self.stream = head, stream

    def read(self, count: int = -1) -> bytes:
        if self.head:
            part = self.head if count < 0 else self.head[:count]
            self.head = self.head[len(part) :]
            return part
        return self.stream.read(count)

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.stream.close()


def _opened(path: str, stream: BinaryIO, compression: str) -> BinaryIO:
    """The uncompressed stream. Raises SourceError for a pointer file, which is never compressed, whatever its name says."""
    head = b""
    while len(head) < len(LFS) and (block := stream.read(BLOCK)):
        head += block
    _refuse_pointer(path, head)
    whole = cast(BinaryIO, _Headed(head, stream))
    return cast(BinaryIO, Decompressed(path, whole, compression)) if compression else whole


def _read_text(
    path: str,
    base: str,
    compression: str,
    stream: BinaryIO,
    source: Source,
    row_limit: int,
    known_by: Callable[[bytes], Any] | None,
) -> Iterator[Row | Bad | Seen]:
    pieces, shape = _pieces(path, base, _opened(path, stream, compression), source, row_limit)
    # What a CSV record means depends on the file's header.
    ask = None if base in DELIMITERS else known_by
    for piece in pieces:
        if isinstance(piece, Bad):
            yield piece
            continue
        line, offset, length, data = piece
        if data is None:
            yield Bad(line, offset, length, "row_too_long", f"{length} bytes, the limit is {row_limit}")
            continue
        if ask is not None and (before := ask(data)) is not None:
            yield Seen(line, offset, length, before)
            continue
        try:
            messages, key, slices = shape(data)
        except Unfit as unfit:
            yield Bad(line, offset, length, unfit.reason, unfit.detail)
        else:
            yield Row(line, offset, length, messages, key, slices)


def _pieces(path: str, base: str, stream: BinaryIO, source: Source, row_limit: int) -> tuple[Iterator[Piece | Bad], Shape]:
    """The pieces of a text file, and what makes a row of the bytes of one."""
    if base == "txt":
        cut = {"file": cutting.whole, "line": cutting.numbered, "paragraph": cutting.paragraphs}[source.record]
        return cut(stream, row_limit), _shape(base, source)
    if base in DELIMITERS:
        records = cutting.records(stream, row_limit, DELIMITERS[base].encode())
        return records, _shape(base, source, _header(path, base, records, source))
    if base == "json":
        head = b""
        while not head.removeprefix(cutting.BOM).strip() and (block := stream.read(BLOCK)):
            head += block
        stream = cast(BinaryIO, _Headed(head, stream))
        # Much data named .json is JSONL: an object to begin with is no array, and is read as its lines.
        if not head.removeprefix(cutting.BOM).lstrip().startswith(b"{"):
            return cutting.elements(path, stream, row_limit), _shape(base, source)
    return cutting.numbered(stream, row_limit), _shape(base, source)


def _shape(base: str, source: Source, header: list[str] | None = None) -> Shape:
    fields = mapping(source)
    if base == "txt":
        return lambda data: ((Message(text_of(decoded(data).removesuffix("\r"), "the text"), TEXT),), None, {})
    if header is not None:
        return lambda data: shaped(_record(data, DELIMITERS[base], header), source, fields)
    plain = quick(source)
    return lambda data: plain(data) or shaped(parsed(data), source, fields)


def _record(data: bytes, delimiter: str, header: list[str]) -> dict[str, Any]:
    values = cutting.fields(decoded(data), delimiter)
    if len(values) != len(header):
        raise Unfit("ragged", f"{len(values)} fields, the header has {len(header)}")
    return dict(zip(header, values, strict=True))


def _header(path: str, base: str, records: Iterator[Piece | Bad], source: Source) -> list[str]:
    """The names in the first record. Raises SourceError when they cannot be the header of this source; none for an empty file."""
    first = next(records, None)
    if first is None:
        return []
    remedy = "write a header line with the names of the columns, or map others in records.sources"
    if isinstance(first, Bad) or first.data is None:
        raise SourceError(f"{path}:1: no {base.upper()} header: {first.detail if isinstance(first, Bad) else 'too long a line'}; {remedy}")
    try:
        names = [name.strip() for name in cutting.fields(decoded(first.data), DELIMITERS[base])]
    except Unfit as unfit:
        raise SourceError(f"{path}:1: no {base.upper()} header: {unfit.detail}") from None
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SourceError(f"{path}:{first.line}: the header names the column {twice[0]!r} more than once; {remedy}")
    row = dict.fromkeys(names, "")
    for name in demanded(source):
        try:
            lookup(row, name)
        except Unfit:
            shown = ", ".join(names[:12])
            raise SourceError(f"{path}:{first.line}: the header has no column {name!r}: it reads {shown[:200]}; {remedy}") from None
    return names


# ---- Parquet


def _read_parquet(path: str, stream: BinaryIO, source: Source, row_limit: int, row_group_limit: int) -> Iterator[Row | Bad]:
    fields = mapping(source)
    if stream.seekable():
        _refuse_pointer(path, stream.read(4096))
        stream.seek(0)
    else:
        stream = _opened(path, stream, "")
    for line, group, at, values in parquet.rows(path, stream, source, row_group_limit):
        try:
            messages, key, slices = shaped(values, source, fields)
            if (size := sum(len(message.content.encode()) for message in messages)) > row_limit:
                raise Unfit("row_too_long", f"{size} bytes of text, the limit is {row_limit}")
        except Unfit as unfit:
            yield Bad(line, group, at, unfit.reason, unfit.detail)
        else:
            yield Row(line, group, at, messages, key, slices)


# ---- reading single rows again


def again(
    path: str, format: str, open_file: Callable[[], BinaryIO], source: Source, places: Iterable[tuple[int, int, int]]
) -> Iterator[Row | Bad]:
    """The rows at `places` (line, offset, length as an index holds them), in the order of lines. Raises SourceError as `read` does.

    A compressed file is read from its beginning up to the last place. `open_file` is called twice for a CSV file, whose header names the
    fields.
    """
    wanted = sorted(places)
    base, compression = _usable(path, format, checked(source))
    if base == "parquet":
        yield from _again_parquet(path, open_file, source, wanted)
        return
    header = None
    if base in DELIMITERS:
        with open_file() as stream:
            records = cutting.records(_opened(path, stream, compression), 1 << 30, DELIMITERS[base].encode())
            header = _header(path, base, records, source)
    shape = _shape(base, source, header)
    with open_file() as stream:
        whole = cast(BinaryIO, Decompressed(path, stream, compression)) if compression else stream
        seekable, here = whole.seekable(), 0
        for line, offset, length in wanted:
            if seekable:
                whole.seek(offset)
            else:
                _skip(whole, offset - here)
            data = _exactly(whole, length)
            here = offset + len(data)
            yield _again(line, offset, length, partial(shape, data))


def _again_parquet(path: str, open_file: Callable[[], BinaryIO], source: Source, wanted: list[tuple[int, int, int]]) -> Iterator[Row | Bad]:
    places = {(group, at) for _line, group, at in wanted}
    fields = mapping(source)
    with open_file() as stream:
        for line, group, at, values in parquet.rows(path, stream, source, None, {group for group, _at in places}):
            if (group, at) in places:
                yield _again(line, group, at, partial(shaped, values, source, fields))


def _again(line: int, offset: int, length: int, shape: Callable[[], Shaped]) -> Row | Bad:
    try:
        return Row(line, offset, length, *shape())
    except Unfit as unfit:
        return Bad(line, offset, length, unfit.reason, unfit.detail)


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0 and (block := stream.read(min(count, BLOCK))):
        count -= len(block)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    parts = []
    while count > 0 and (block := stream.read(count)):
        parts.append(block)
        count -= len(block)
    return b"".join(parts)
