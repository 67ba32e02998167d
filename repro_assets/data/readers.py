"""Raw rows of JSONL and Parquet, streamed, as chat messages or as a bad row with its reason.

Rows are strict: what the recipe maps must be there and of the right type. Cleaning, identity and counting are `records.py`.
"""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, BinaryIO, cast

import msgspec

from repro_assets.data.errors import SourceError
from repro_assets.data.lines import Message
from repro_assets.data.manifest import OTHER, SUFFIXES, matches
from repro_assets.recipe import Source

BLOCK = 1 << 20
ROLES = ("system", "user", "assistant")
FIELDS = {"messages": ("messages", "id"), "prompt_completion": ("prompt", "completion", "system", "id")}
LFS = b"version https://git-lfs.github.com/spec/"

#: every reason a row may be set aside for, and what it means
REASONS = {
    "empty_file": "the file has no rows",
    "not_utf8": "bytes that are not UTF-8",
    "not_json": "the line is not one JSON value",
    "not_object": "the row is not a JSON object",
    "missing_field": "a field that the recipe maps is not there",
    "wrong_type": "a field has another type than its use asks for",
    "empty": "a text is empty",
    "row_too_long": "the row is longer than records.row_limit",
    "unknown_role": "a message has a role that no template knows",
    "no_assistant": "no assistant turn to train on",
    "contaminated": "the prompt is an item of the evaluation suites",
    "duplicate": "the same messages are already there",
}


class Row(msgspec.Struct, frozen=True):
    """One good row. `line`: 1-based line, or row number in Parquet. `offset`, `length`: bytes of the row in the file, without its newline;
    in Parquet the row group and the row in it."""

    line: int
    offset: int
    length: int
    messages: tuple[Message, ...]
    key: str | None
    slices: dict[str, str]


class Bad(msgspec.Struct, frozen=True):
    """One bad row: a name of REASONS and what exactly is wrong, without the row's own text."""

    line: int
    offset: int
    length: int
    reason: str
    detail: str


class Unfit(Exception):
    """A row that cannot be a record: reason and detail of its `Bad`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def source_for(path: str, sources: Iterable[Source]) -> Source:
    """The first source whose pattern matches. Raises SourceError naming the file and the remedy when none does."""
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
    known = FIELDS[source.shape]
    if unknown := sorted(set(source.fields) - set(known)):
        raise SourceError(f"records.sources {source.match!r}: shape {source.shape} has no field {unknown[0]!r}; known: {', '.join(known)}")
    return source


def read(path: str, format: str, stream: BinaryIO, source: Source, row_limit: int = 16 << 20) -> Iterator[Row | Bad]:
    """Every row of the file in order, streamed; a line of white space only is no row. An empty file gives one Bad of line 0.

    Raises SourceError for a format without a reader, a Git LFS pointer or a broken Parquet file.
    """
    checked(source)
    if format == "jsonl":
        yield from _read_jsonl(path, stream, source, row_limit)
    elif format == "parquet":
        yield from _read_parquet(path, stream, source, row_limit)
    else:
        remedy = "decompress it" if path.lower().endswith((".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz")) else "convert it"
        raise SourceError(f"{path}: no reader for this format ({', '.join(SUFFIXES)} are read); {remedy}, or leave it out with raw.exclude")


def row_at(data: bytes, source: Source) -> tuple[tuple[Message, ...], str | None, dict[str, str]]:
    """Messages, key and slices of the bytes of one JSONL row. Raises Unfit."""
    return _shape(_object(data), source, _mapping(source))


# ---- JSONL


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


def _read_jsonl(path: str, stream: BinaryIO, source: Source, row_limit: int) -> Iterator[Row | Bad]:
    rows, fields = False, _mapping(source)
    for line, (offset, length, data) in enumerate(lines(stream, row_limit), start=1):
        if data is None:
            rows = True
            yield Bad(line, offset, length, "row_too_long", f"{length} bytes, the limit is {row_limit}")
            continue
        if line == 1:
            if data.startswith(LFS):
                raise SourceError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull` where it came from and import again")
            if data.startswith(b"\xef\xbb\xbf"):
                offset, length, data = offset + 3, length - 3, data[3:]
        if not data or data.isspace():
            continue
        rows = True
        try:
            messages, key, slices = _shape(_object(data), source, fields)
        except Unfit as unfit:
            yield Bad(line, offset, length, unfit.reason, unfit.detail)
        else:
            yield Row(line, offset, length, messages, key, slices)
    if not rows:
        yield Bad(0, 0, 0, "empty_file", "no rows in it")


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        raise _not_utf8(data, error) from None
    except msgspec.DecodeError as error:
        # msgspec stops at the first fault; a fault before the bad bytes would hide that the file is not UTF-8 at all.
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as bad:
            raise _not_utf8(data, bad) from None
        raise Unfit("not_json", _lower(str(error))) from None
    except RecursionError:
        raise Unfit("not_json", "nested too deep") from None
    if not isinstance(value, dict):
        raise Unfit("not_object", f"a JSON {_kind(value)}")
    return value


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> Unfit:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Unfit("not_utf8", "a UTF-16 byte order mark; save the file as UTF-8")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as whole:
        error = whole
    return Unfit("not_utf8", f"byte {error.start} of the line ({error.object[error.start]:#04x}): {error.reason}; save the file as UTF-8")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


# ---- Parquet


def _read_parquet(path: str, stream: BinaryIO, source: Source, row_limit: int) -> Iterator[Row | Bad]:
    rows, fields = False, _mapping(source)
    for line, group, at, values in _parquet_rows(path, stream, source, None):
        rows = True
        try:
            messages, key, slices = _shape(values, source, fields)
            if (size := sum(len(message.content.encode()) for message in messages)) > row_limit:
                raise Unfit("row_too_long", f"{size} bytes of text, the limit is {row_limit}")
        except Unfit as unfit:
            yield Bad(line, group, at, unfit.reason, unfit.detail)
        else:
            yield Row(line, group, at, messages, key, slices)
    if not rows:
        yield Bad(0, 0, 0, "empty_file", "no rows in it")


def _parquet_rows(path: str, stream: BinaryIO, source: Source, only: set[int] | None) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """(row number, row group, row in the group, values) of every row, or of the row groups in `only`; only columns that are mapped."""
    import pyarrow
    import pyarrow.parquet

    with _seekable(stream) as seekable:
        head = seekable.read(len(LFS))
        if not head:
            return
        if head == LFS:
            raise SourceError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull` where it came from and import again")
        seekable.seek(0)
        try:
            file = pyarrow.parquet.ParquetFile(seekable)
            columns = [
                name for name in file.schema_arrow.names if any(name == used or used.startswith(name + ".") for used in _used(source))
            ]
            line = 0
            for group in range(file.num_row_groups):
                if only is not None and group not in only:
                    line += file.metadata.row_group(group).num_rows
                    continue
                at = 0
                # No mapped column means no rows in a batch: read them all, so that every row gets its reason.
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns or None, use_threads=False):
                    for values in batch.to_pylist():
                        line += 1
                        yield line, group, at, values
                        at += 1
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path}: not a readable Parquet file: {error}; write it again, or leave it out with raw.exclude") from error


def _used(source: Source) -> list[str]:
    return [*_mapping(source).values(), *source.slices.values()]


def _seekable(stream: BinaryIO) -> BinaryIO:
    """The stream itself when it can seek, else its bytes in a temporary file: a Parquet footer is at the end."""
    if stream.seekable():
        return stream
    spool = tempfile.SpooledTemporaryFile(max_size=64 << 20)  # noqa: SIM115  the caller closes it, as it does the stream
    while block := stream.read(BLOCK):
        spool.write(block)
    spool.seek(0)
    stream.close()
    return cast(BinaryIO, spool)


# ---- one row's shape


def _mapping(source: Source) -> dict[str, str]:
    """Our field names to the row's, for the fields that are read at all: required ones, and optional ones that the recipe maps."""
    required = ("messages",) if source.shape == "messages" else ("prompt", "completion")
    return {**{name: source.fields.get(name, name) for name in required}, **source.fields}


def _shape(row: dict[str, Any], source: Source, fields: dict[str, str]) -> tuple[tuple[Message, ...], str | None, dict[str, str]]:
    messages = _messages(row, fields["messages"]) if source.shape == "messages" else _pair(row, fields)
    if not any(message.role == "assistant" for message in messages):
        raise Unfit("no_assistant", f"{len(messages)} messages, none of the assistant")
    key = _label(row, fields["id"]) if "id" in fields else None
    return messages, key, {label: _label(row, name) for label, name in source.slices.items()}


def _messages(row: dict[str, Any], name: str) -> tuple[Message, ...]:
    found = _lookup(row, name)
    if not isinstance(found, list):
        raise Unfit("wrong_type", f"{name}: a {_kind(found)}, not an array of messages")
    if not found:
        raise Unfit("empty", f"{name}: no messages")
    messages = []
    for index, item in enumerate(found):
        where = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise Unfit("wrong_type", f"{where}: a {_kind(item)}, not an object with role and content")
        if extra := sorted(key for key, value in item.items() if key not in ("role", "content") and value is not None):
            raise Unfit("wrong_type", f"{where}: holds {extra[0]!r} beside role and content, which would be lost")
        role = item.get("role")
        if role not in ROLES:
            raise Unfit("unknown_role", f"{where}.role: {role!r:.40}; known: {', '.join(ROLES)}")
        messages.append(Message(content=_text(item.get("content"), f"{where}.content"), role=role))
    return tuple(messages)


def _pair(row: dict[str, Any], fields: dict[str, str]) -> tuple[Message, ...]:
    turns = []
    if "system" in fields and (system := _lookup(row, fields["system"], null=True)) not in (None, ""):
        turns.append(Message(content=_text(system, fields["system"]), role="system"))
    turns.append(Message(content=_text(_lookup(row, fields["prompt"]), fields["prompt"]), role="user"))
    turns.append(Message(content=_text(_lookup(row, fields["completion"]), fields["completion"]), role="assistant"))
    return tuple(turns)


def _lookup(row: dict[str, Any], name: str, *, null: bool = False) -> Any:
    """The value under `name`: a key of the row as it stands, else a dotted path into nested objects."""
    value: Any = row
    if name in row:
        value = row[name]
    else:
        for step in name.split("."):
            if not isinstance(value, dict) or step not in value:
                raise Unfit("missing_field", f"{name}: not in the row")
            value = value[step]
    if value is None and not null:
        raise Unfit("missing_field", f"{name}: null")
    return value


def _text(value: Any, where: str) -> str:
    if value is None:
        raise Unfit("missing_field", f"{where}: not in the row, or null")
    if not isinstance(value, str):
        raise Unfit("wrong_type", f"{where}: a {_kind(value)}, not a string")
    if not value or value.isspace():
        raise Unfit("empty", f"{where}: no text")
    return value


def _label(row: dict[str, Any], name: str) -> str:
    value = _lookup(row, name)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _text(value, name)
    raise Unfit("wrong_type", f"{name}: a {_kind(value)}, not a string, whole number or boolean")


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        dict: "object",
        list: "array",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


# ---- reading single rows again


def again(
    path: str, format: str, open_file: Callable[[], BinaryIO], source: Source, places: Iterable[tuple[int, int, int]]
) -> Iterator[Row | Bad]:
    """The rows at `places` (line, offset, length as an index holds them), in the order of lines. Raises SourceError as `read` does."""
    wanted = sorted(places)
    if format == "parquet":
        rows = {(group, at): line for line, group, at in wanted}
        with open_file() as stream:
            for line, group, at, values in _parquet_rows(path, stream, source, {group for group, _at in rows}):
                if (group, at) in rows:
                    yield _again(line, group, at, partial(_shape, values, source, _mapping(source)))
        return
    if format == OTHER:
        raise SourceError(f"{path}: no reader for this format")
    with open_file() as stream:
        seekable, here = stream.seekable(), 0
        for line, offset, length in wanted:
            if seekable:
                stream.seek(offset)
            else:
                _skip(stream, offset - here)
            data = _exactly(stream, length)
            here = offset + len(data)
            yield _again(line, offset, length, partial(row_at, data, source))


def _again(line: int, offset: int, length: int, shape: Callable[[], tuple[tuple[Message, ...], str | None, dict[str, str]]]) -> Row | Bad:
    try:
        return Row(line, offset, length, *shape())
    except Unfit as unfit:
        return Bad(line, offset, length, unfit.reason, unfit.detail)


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0 and (block := stream.read(min(count, BLOCK))):
        count -= len(block)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    out = io.BytesIO()
    while count > 0 and (block := stream.read(count)):
        out.write(block)
        count -= len(block)
    return out.getvalue()
