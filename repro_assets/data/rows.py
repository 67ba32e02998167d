"""One raw row as chat messages, or as a bad row with its reason: field mapping and the shapes a recipe can name.

How rows are cut from files is `readers.py` and its neighbours. Cleaning, identity and counting are `records.py`.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from repro_assets.data.lines import Message
from repro_assets.recipe import Source
from repro_assets.trust.canonical import canonical

ROLES = ("system", "user", "assistant", "tool")
#: role of the one message of a record of raw text
TEXT = "text"

#: shape -> our names of the fields that every row must have, and of those that it may have
REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "preference": ("chosen",),
    "text": ("text",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("id",),
    "prompt_completion": ("system", "id"),
    "instruction": ("input", "system", "id"),
    "preference": ("prompt", "rejected", "system", "id"),
    "text": ("id",),
}
#: read under their own names when the recipe does not map them: leaving them out unseen would lose text
EXPECTED: dict[str, tuple[str, ...]] = {"instruction": ("input",), "preference": ("prompt", "rejected")}

#: every reason a row may be set aside for, and what it means
REASONS = {
    "empty_file": "the file has no rows",
    "not_utf8": "bytes that are not UTF-8",
    "not_json": "the line is not one JSON value",
    "not_object": "the row is not a JSON object",
    "not_csv": "quotes that do not follow RFC 4180",
    "ragged": "the row has more or fewer fields than the header",
    "missing_field": "a field that the recipe maps is not there",
    "wrong_type": "a field has another type than its use asks for",
    "empty": "a text is empty",
    "row_too_long": "the row is longer than records.row_limit",
    "unknown_role": "a message has a role that no template knows",
    "no_assistant": "no assistant turn to train on",
    "contaminated": "the prompt is an item of the evaluation suites",
    "duplicate": "the same messages are already there",
    "near_duplicate": "nearly the same messages are already there",
    "sensitive": "a secret or personal data was found",
    "unsampled": "left out by the source's weight or quota",
}

Shaped = tuple[tuple[Message, ...], str | None, dict[str, str]]


class Row(msgspec.Struct, frozen=True, gc=False):
    """One good row. `line`: 1-based line; row number in Parquet and in a JSON array. `offset`, `length`: bytes of the row in the file (in
    the uncompressed bytes of a compressed one), without its newline; in Parquet the row group and the row in it."""

    line: int
    offset: int
    length: int
    messages: tuple[Message, ...]
    key: str | None
    slices: dict[str, str]


class Seen(msgspec.Struct, frozen=True):
    """A row that the caller knew by its bytes, so that it was not parsed. `known`: what the caller said of it."""

    line: int
    offset: int
    length: int
    known: Any


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


def known(source: Source) -> tuple[str, ...]:
    """Our field names that the source's shape has."""
    return (*REQUIRED[source.shape], *OPTIONAL[source.shape])


def mapping(source: Source) -> dict[str, str]:
    """Our field names to the row's, for the fields that are read at all: required, expected, and what the recipe maps."""
    names = (*REQUIRED[source.shape], *EXPECTED.get(source.shape, ()))
    return {**{name: source.fields.get(name, name) for name in names}, **source.fields}


def demanded(source: Source) -> list[str]:
    """The row's field names without which no row of the source can be good."""
    fields = mapping(source)
    return [*(fields[name] for name in (*REQUIRED[source.shape], "id") if name in fields), *source.slices.values()]


def parsed(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises Unfit."""
    try:
        value = msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        raise not_utf8(data, error) from None
    except msgspec.DecodeError as error:
        # msgspec stops at the first fault; a fault before the bad bytes would hide that the file is not UTF-8 at all.
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as bad:
            raise not_utf8(data, bad) from None
        raise Unfit("not_json", lower(str(error))) from None
    except RecursionError:
        raise Unfit("not_json", "nested too deep") from None
    if not isinstance(value, dict):
        raise Unfit("not_object", f"a JSON {kind_of(value)}")
    return value


def decoded(data: bytes) -> str:
    """The text in `data`. Raises Unfit when it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(data, error) from None


def not_utf8(data: bytes, error: UnicodeDecodeError) -> Unfit:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Unfit("not_utf8", "a UTF-16 byte order mark; save the file as UTF-8")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as whole:
        error = whole
    return Unfit("not_utf8", f"byte {error.start} of the line ({error.object[error.start]:#04x}): {error.reason}; save the file as UTF-8")


def lower(text: str) -> str:
    return text[:1].lower() + text[1:]


# ---- shapes


def quick(source: Source) -> Callable[[bytes], Shaped | None]:
    """What makes of the bytes of a plain chat row what `shaped` makes of it, in one typed decode; None for any other row, good or bad.

    Half of the time of reading went into Python objects that were looked at once."""
    fields = mapping(source)
    wanted = [fields["messages"], *([fields["id"]] if "id" in fields else []), *source.slices.values()] if "messages" in fields else []
    if source.shape != "messages" or any("." in name for name in wanted):
        return lambda data: None
    names = {name: f"field_{number}" for number, name in enumerate(dict.fromkeys(wanted))}
    kinds = [(held, tuple[Message, ...] if name == fields["messages"] else str | int) for name, held in names.items()]
    row = msgspec.defstruct("Plain", kinds, rename={held: name for name, held in names.items()})
    decode = msgspec.json.Decoder(row).decode
    said, key = names[fields["messages"]], names[fields["id"]] if "id" in fields else None
    labels = {name: names[field] for name, field in source.slices.items()}
    if len(set(wanted)) < len(wanted):
        return lambda data: None

    def plain(data: bytes) -> Shaped | None:
        try:
            found = decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        messages: tuple[Message, ...] = getattr(found, said)
        answered = False
        for message in messages:
            if message.role not in _PLAIN or not message.plain or not message.content or message.content.isspace():
                return None
            answered = answered or message.role == "assistant"
        values = {name: getattr(found, field) for name, field in labels.items()}
        name = getattr(found, key) if key else None
        if not answered or any(type(value) is str and (not value or value.isspace()) for value in (name, *values.values())):
            return None
        return messages, None if name is None else str(name), {label: str(value) for label, value in values.items()}

    return plain


def shaped(row: dict[str, Any], source: Source, fields: dict[str, str]) -> Shaped:
    """Messages, key and slices of a row's values; `fields` is `mapping(source)`. Raises Unfit."""
    messages = SHAPES[source.shape](row, fields)
    for message in messages:
        if message.role in ("assistant", TEXT):
            break
    else:
        raise Unfit("no_assistant", f"{len(messages)} messages, none of the assistant")
    key = label(row, fields["id"]) if "id" in fields else None
    return messages, key, {name: label(row, field) for name, field in source.slices.items()}


def _messages(row: dict[str, Any], fields: dict[str, str]) -> tuple[Message, ...]:
    return turns(lookup(row, fields["messages"]), fields["messages"])


def turns(found: Any, name: str) -> tuple[Message, ...]:
    """A row's array of messages. Ids that link a tool's answer to its call are checked and left out: answers are in the order of calls.

    Such ids are drawn anew by every API reply, so the same conversation logged twice would be two records.
    """
    if not isinstance(found, list):
        raise Unfit("wrong_type", f"{name}: a {kind_of(found)}, not an array of messages")
    if not found:
        raise Unfit("empty", f"{name}: no messages")
    messages = []
    calls: deque[str | None] = deque()
    for index, item in enumerate(found):
        if type(item) is dict and len(item) == 2 and calls is not None:
            content, role = item.get("content"), item.get("role")
            if type(content) is str and role in _PLAIN and content and not content.isspace():
                messages.append(Message(content, role))
                continue
        messages.append(_turn(item, f"{name}[{index}]", calls))
    return tuple(messages)


_PLAIN = frozenset(("system", "user", "assistant"))
_MAY_HOLD = frozenset(("role", "content", "name", "tool_calls", "tool_call_id"))


def _turn(item: Any, where: str, calls: deque[str | None]) -> Message:
    if not isinstance(item, dict):
        raise Unfit("wrong_type", f"{where}: a {kind_of(item)}, not an object with role and content")
    if extra := sorted(key for key, value in item.items() if key not in _MAY_HOLD and value is not None):
        raise Unfit("wrong_type", f"{where}: holds {extra[0]!r} beside role and content, which would be lost")
    role = item.get("role")
    if role not in ROLES:
        raise Unfit("unknown_role", f"{where}.role: {role!r:.40}; known: {', '.join(ROLES)}")
    name = item.get("name")
    if name is not None:
        name = text_of(name, f"{where}.name")
    made = _calls(item.get("tool_calls"), role, f"{where}.tool_calls", calls)
    if item.get("tool_call_id") is not None:
        _answer(item["tool_call_id"], role, f"{where}.tool_call_id", calls)
    elif role == "tool" and calls:
        calls.popleft()
    content = item.get("content")
    if made is not None and content is None:
        content = ""
    # A tool may well answer with nothing, and a turn that calls one says nothing beside the call.
    if not (isinstance(content, str) and (made is not None or role == "tool")):
        content = text_of(content, f"{where}.content")
    return Message(content, role, name=name, tool_calls=made)


def _calls(found: Any, role: str, where: str, calls: deque[str | None]) -> str | None:
    """The calls of an assistant turn as canonical JSON, without their ids, which are put in `calls`."""
    if found is None or found == []:
        return None
    if role != "assistant":
        raise Unfit("wrong_type", f"{where}: calls of tools in a turn of the {role}")
    if not isinstance(found, list):
        raise Unfit("wrong_type", f"{where}: a {kind_of(found)}, not an array of calls")
    calls.clear()
    kept = []
    for index, call in enumerate(found):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unfit("wrong_type", f"{where}[{index}]: not an object that names its function")
        calls.append(None if call.get("id") is None else text_of(call["id"], f"{where}[{index}].id"))
        kept.append({key: value for key, value in call.items() if key != "id" and value is not None})
    try:
        return canonical(kept).decode()
    except ValueError as error:
        raise Unfit("wrong_type", f"{where}: {error}") from None


def _answer(found: Any, role: str, where: str, calls: deque[str | None]) -> None:
    """Check that an answer of a tool belongs to the next call that has none."""
    if role != "tool":
        raise Unfit("wrong_type", f"{where}: an answer to a call in a turn of the {role}")
    answered = text_of(found, where)
    if not calls or answered not in calls:
        if calls and None in calls:
            calls.popleft()
            return
        raise Unfit("wrong_type", f"{where}: no earlier turn made a call of this id that is still without an answer")
    if calls[0] != answered:
        raise Unfit("wrong_type", f"{where}: answers a later call first; put the answers in the order of the calls")
    calls.popleft()


def _system(row: dict[str, Any], fields: dict[str, str]) -> list[Message]:
    if "system" in fields and (system := lookup(row, fields["system"], null=True)) not in (None, ""):
        return [Message(text_of(system, fields["system"]), "system")]
    return []


def _field(row: dict[str, Any], fields: dict[str, str], name: str) -> str:
    return text_of(lookup(row, fields[name]), fields[name])


def _pair(row: dict[str, Any], fields: dict[str, str]) -> tuple[Message, ...]:
    return (
        *_system(row, fields),
        Message(_field(row, fields, "prompt"), "user"),
        Message(_field(row, fields, "completion"), "assistant"),
    )


def _instruction(row: dict[str, Any], fields: dict[str, str]) -> tuple[Message, ...]:
    """The instruction and, after a blank line, its input are the user's turn."""
    asked = _field(row, fields, "instruction")
    given = optional(row, fields["input"])
    if given not in (None, ""):
        asked = f"{asked}\n\n{text_of(given, fields['input'])}"
    return (*_system(row, fields), Message(asked, "user"), Message(_field(row, fields, "output"), "assistant"))


def _preference(row: dict[str, Any], fields: dict[str, str]) -> tuple[Message, ...]:
    """The chosen side: a text after its prompt, or messages that hold the prompt, continue it, or follow its messages."""
    chosen, prompt = lookup(row, fields["chosen"]), optional(row, fields["prompt"])
    rejected = optional(row, fields["rejected"])
    if rejected is not None and (kind_of(rejected) != kind_of(chosen)):
        raise Unfit("wrong_type", f"{fields['rejected']}: a {kind_of(rejected)}, but {fields['chosen']} is a {kind_of(chosen)}")
    if isinstance(prompt, list):
        opening = turns(prompt, fields["prompt"])
    elif prompt is not None:
        opening = (Message(text_of(prompt, fields["prompt"]), "user"),)
    else:
        opening = ()
    if not isinstance(chosen, list):
        if not opening:
            raise Unfit("missing_field", f"{fields['prompt']}: not in the row, and {fields['chosen']} is a text without one")
        closing: tuple[Message, ...] = (Message(text_of(chosen, fields["chosen"]), "assistant"),)
    else:
        closing = turns(chosen, fields["chosen"])
        said = [message for message in closing if message.role != "system"]
        if opening and said and said[0].role == "user":
            repeated = [message for message in opening if message.role != "system"]
            if said[: len(repeated)] != repeated:
                raise Unfit("wrong_type", f"{fields['chosen']}: opens with another user turn than {fields['prompt']}")
            opening = ()
    system = _system(row, fields)
    messages = (*opening, *closing)
    return messages if any(message.role == "system" for message in messages) else (*system, *messages)


def _text(row: dict[str, Any], fields: dict[str, str]) -> tuple[Message, ...]:
    return (Message(_field(row, fields, "text"), TEXT),)


SHAPES: dict[str, Callable[[dict[str, Any], dict[str, str]], tuple[Message, ...]]] = {
    "messages": _messages,
    "prompt_completion": _pair,
    "instruction": _instruction,
    "preference": _preference,
    "text": _text,
}


# ---- values


def lookup(row: dict[str, Any], name: str, *, null: bool = False) -> Any:
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


def optional(row: dict[str, Any], name: str) -> Any:
    """As `lookup`, but None for what is not there."""
    try:
        return lookup(row, name, null=True)
    except Unfit:
        return None


def text_of(value: Any, where: str) -> str:
    if value is None:
        raise Unfit("missing_field", f"{where}: not in the row, or null")
    if not isinstance(value, str):
        raise Unfit("wrong_type", f"{where}: a {kind_of(value)}, not a string")
    if not value or value.isspace():
        raise Unfit("empty", f"{where}: no text")
    return value


def label(row: dict[str, Any], name: str) -> str:
    value = lookup(row, name)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return text_of(value, name)
    raise Unfit("wrong_type", f"{name}: a {kind_of(value)}, not a string, whole number or boolean")


def kind_of(value: Any) -> str:
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
