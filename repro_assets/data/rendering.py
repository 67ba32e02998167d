"""A conversation as the tokenizer's chat template writes it, and which characters are the template's, which the user's, which are trained.

Templates run in a sandbox with the options that `transformers` uses, so that training and serving see the same text. Turning text into
ids is `tokenizing.py`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from repro_assets.data.errors import RenderingError
from repro_assets.data.lines import Message

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Unicode noncharacters: never assigned, so a template cannot treat them specially and honest text does not hold them.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

Span = tuple[int, int]


class Rendered(msgspec.Struct, frozen=True):
    """`contents`: spans of characters that come from messages, in text order. `trained`: spans of the assistant, end mark included."""

    text: str
    contents: tuple[Span, ...]
    trained: tuple[Span, ...]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`: its body, between the two strings of `environment.marks`."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        start, end = self.environment.marks  # type: ignore[attr-defined]
        return f"{start}{caller()}{end}"


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    # strftime_now is left out on purpose: a template that reads the clock would give other bytes tomorrow.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.extend(marks=("", ""))
    return environment


def find_template(files: Mapping[str, bytes]) -> str:
    """The chat template among a tokenizer's files: chat_template.jinja, else the one in tokenizer_config.json (the default of several).

    Raises RenderingError when there is none.
    """
    if (own := files.get("chat_template.jinja")) is not None:
        return own.decode("utf-8")
    found = _config(files).get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not isinstance(found, str):
        raise RenderingError(
            "the base model has no chat template: neither chat_template.jinja nor `chat_template` in tokenizer_config.json; "
            "put the template that the model will be served with into chat_template.jinja"
        )
    return found


def named_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """The special tokens that a template may name (`bos_token`, `eos_token`, ...), from tokenizer_config.json."""
    config = _config(files)
    extra = config.get("extra_special_tokens")
    found = {**{name: config.get(name) for name in NAMED}, **(extra if isinstance(extra, dict) else {})}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: value for name, value in texts.items() if isinstance(value, str)}


def _config(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(files.get("tokenizer_config.json", b"{}"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RenderingError(f"tokenizer_config.json is not JSON: {error}; restore the base model's files") from error
    return value if isinstance(value, dict) else {}


class Renderer:
    """Renders conversations. `controls`: the strings that end a turn or otherwise steer the model (special tokens)."""

    def __init__(self, template: str, named: Mapping[str, str], controls: Sequence[str] = ()) -> None:
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise RenderingError(
                f"chat template, line {error.lineno}: {error.message}; mend the base model's chat_template.jinja"
            ) from error
        self._named = dict(named)
        self._marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self._controls = re.compile("|".join(re.escape(token) for token in sorted(controls, key=len, reverse=True)) or "(?!)")

    def render(self, messages: Sequence[Message], last_only: bool = False) -> Rendered:
        """The conversation's text with its spans; `last_only` trains the last assistant turn only.

        Raises RenderingError when the template fails, drops or changes a message, or rewrites earlier turns, because then nobody can
        tell what the assistant said.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        text = self._run(turns)
        contents, marked = self._segments(turns, text)
        if self._marked:
            trained = self._from_markers(messages, contents, marked, last_only)
        else:
            trained = self._from_prefixes(turns, text, contents, last_only)
        return Rendered(text=text, contents=tuple(sorted(contents.values())), trained=tuple(trained))

    def _run(self, turns: list[dict[str, str]], prompt: bool = False, marks: tuple[str, str] = ("", "")) -> str:
        self._environment.marks = marks  # type: ignore[attr-defined]
        try:
            return self._template.render(messages=turns, tools=None, documents=None, add_generation_prompt=prompt, **self._named)
        except jinja2.exceptions.UndefinedError as error:
            clock = (
                "; a template that reads the clock gives other text every day: write the date into it"
                if "strftime_now" in str(error)
                else ""
            )
            raise RenderingError(f"the chat template fails on {_roles(turns)}: {error}{clock}") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RenderingError(
                f"the chat template refuses {_roles(turns)}: {error}; mend the row, or take it out of the raw data"
            ) from error

    def _segments(self, turns: list[dict[str, str]], text: str) -> tuple[dict[int, Span], list[Span]]:
        """Message number to the span of its content, and the spans of the generation blocks, in `text`.

        Found by rendering the contents between marks; the marked rendering without its marks must be `text` itself.
        """
        marks = self._unused(turns)
        opening, middle, closing, begin, end = marks
        for trim in (False, True):
            wrapped = [
                {"role": turn["role"], "content": f"{opening}{n}{middle}{turn['content'].strip() if trim else turn['content']}{closing}"}
                for n, turn in enumerate(turns)
            ]
            found = _unmark(self._run(wrapped, marks=(begin, end)), marks)
            if found is not None and found[0] == text:
                if lost := sorted(set(range(len(turns))) - found[1].keys()):
                    raise RenderingError(f"the chat template leaves out message {lost[0]} of {_roles(turns)}: its text would be lost")
                return found[1], found[2]
        raise RenderingError(
            f"the chat template changes the text of messages in {_roles(turns)}: what is the user's and what is the template's "
            "cannot be told apart; mend the template"
        )

    def _unused(self, turns: list[dict[str, str]]) -> list[str]:
        held = set().union(*(turn["content"] for turn in turns)) if turns else set()
        free = [character for character in NONCHARACTERS if character not in held]
        if len(free) < 5:
            raise RenderingError(
                "a record holds nearly all of Unicode's noncharacters U+FDD0..U+FDEF: mend the row, or take it out of the raw data"
            )
        return free[:5]

    def _from_markers(self, messages: Sequence[Message], contents: dict[int, Span], marked: list[Span], last_only: bool) -> list[Span]:
        for number, message in enumerate(messages):
            if message.role != "assistant" and any(_overlap(contents[number], span) for span in marked):
                raise RenderingError(
                    f"the chat template's generation markers enclose message {number}, which is of the {message.role}; mend the template"
                )
        if not last_only:
            return [span for span in marked if span[0] < span[1]]
        last = contents[max(number for number, message in enumerate(messages) if message.role == "assistant")]
        return [span for span in marked if _overlap(span, last)]

    def _from_prefixes(self, turns: list[dict[str, str]], text: str, contents: dict[int, Span], last_only: bool) -> list[Span]:
        numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        spans = []
        for number in numbers[-1:] if last_only else numbers:
            before = self._run(turns[:number], prompt=True)
            until = text if number + 1 == len(turns) else self._run(turns[: number + 1])
            if not (text.startswith(until) and until.startswith(before) and len(before) <= contents[number][0]):
                raise RenderingError(
                    f"the chat template writes message {number} of {_roles(turns)} differently when more follows, so its span cannot be "
                    "found by prefixes; put {% generation %} ... {% endgeneration %} around the assistant's text in the template"
                )
            # The turn ends with its end mark; the white space that templates write after it is never generated.
            mark = self._controls.search(text, contents[number][1], len(until))
            spans.append((len(before), mark.end() if mark else len(until)))
        return spans


def _roles(turns: list[dict[str, str]]) -> str:
    roles = [turn["role"] for turn in turns]
    return "a conversation of " + ", ".join(roles[:8]) + (f" and {len(roles) - 8} more" if len(roles) > 8 else "")


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _unmark(text: str, marks: list[str]) -> tuple[str, dict[int, Span], list[Span]] | None:
    """The text without marks, the spans of messages and of generation blocks in it; None when the marks came out torn."""
    opening, middle, closing, begin, end = marks
    pieces: list[str] = []
    length = 0
    contents: dict[int, Span] = {}
    generated: list[Span] = []
    open_message: tuple[int, int] | None = None
    open_block: int | None = None
    at = 0
    for mark in re.finditer(f"{opening}([0-9]+){middle}|[{closing}{begin}{end}]", text):
        pieces.append(text[at : mark.start()])
        length += mark.start() - at
        at = mark.end()
        if mark.group(1) is not None:
            if open_message or int(mark.group(1)) in contents:
                return None
            open_message = (int(mark.group(1)), length)
        elif mark.group() == closing:
            if open_message is None:
                return None
            contents[open_message[0]] = (open_message[1], length)
            open_message = None
        elif mark.group() == begin:
            if open_block is not None:
                return None
            open_block = length
        else:
            if open_block is None:
                return None
            generated.append((open_block, length))
            open_block = None
    plain = "".join([*pieces, text[at:]])
    torn = open_message or open_block is not None or any(mark in plain for mark in marks)
    return None if torn else (plain, contents, generated)


def literals(template: str) -> str:
    """The text that the template itself writes: its raw text and string constants, joined by a null character."""
    tree = _environment().parse(template)
    texts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    texts |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(texts))
