"""A conversation as the tokenizer's chat template writes it, and which characters are the template's, which the user's, which are trained.

Templates run as in `transformers`, so that training and serving see the same text; their sandbox is `templates.py`. Turning text into ids
is `tokenizing.py`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import jinja2
import msgspec

from repro_assets.data.errors import RenderingError
from repro_assets.data.lines import Message
from repro_assets.data.templates import ANY, TRIMMED, Content, Inspected, Symbolic, environment, traceable

#: the role of a text that no template touches: trained from its first token to the end-of-text token that is put behind it
TEXT = "text"
# Unicode noncharacters: never assigned, so a template cannot treat them specially and honest text does not hold them.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
MOST_MESSAGES = 1000
MOST_FRAMES = 4096
_SLOTS = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
# What a template might look for in a content. A frame is used only when it writes them all as the template does.
_TRIALS = (
    *("a", "", " a ", "\n\nb\n", "\t", '"x": "\\n"', "<think>t</think>\n\nu", "<tool_response>1</tool_response>", "{{ a }}{% b %}", "it's"),
    *("\u2028é\u00a0", "0", "[1, 2]", "None", "Ünï", "A" * 3000, "<|im_start|>", "</s>", "[INST] x [/INST]", "</think>", "&lt;<b>"),
)

Span = tuple[int, int]


class Places(msgspec.Struct, frozen=True, gc=False):
    """Contents and trained text of a rendered conversation as spans of UTF-8 bytes, and the size of the whole."""

    contents: tuple[Span, ...]
    trained: tuple[Span, ...]
    size: int


class Rendered(msgspec.Struct, frozen=True, gc=False):
    """`contents`: spans of characters that come from messages, in text order. `trained`: spans of the assistant, end mark included.
    `counted`: the same in bytes, where the renderer had them at hand."""

    text: str
    contents: tuple[Span, ...]
    trained: tuple[Span, ...]
    counted: Places | None = None

    def in_bytes(self) -> Places:
        """Contents and trained spans in bytes."""
        if self.text.isascii():
            return Places(self.contents, self.trained, len(self.text))
        if self.counted is not None:
            return self.counted
        edges = sorted({0, len(self.text), *(edge for span in (*self.contents, *self.trained) for edge in span)})
        place = {0: 0}
        for start, end in pairwise(edges):
            place[end] = place[start] + len(self.text[start:end].encode())
        contents, trained = (tuple([(place[start], place[end]) for start, end in spans]) for spans in (self.contents, self.trained))
        return Places(contents, trained, place[len(self.text)])


class _Frame(msgspec.Struct, frozen=True):
    """`pieces`: the text in order, None where a content goes. `slots`: (piece, message, trimmed). `trained`: first and past last piece."""

    pieces: tuple[str | None, ...]
    slots: tuple[tuple[int, int, bool], ...]
    trained: tuple[tuple[int, int], ...]

    def fill(self, messages: Sequence[Message]) -> Rendered:
        texts: list[Any] = list(self.pieces)
        for piece, number, trimmed in self.slots:
            content = messages[number].content
            texts[piece] = content.strip() if trimmed else content
        text = "".join(texts)
        contents, trained, _size = self._places([0, *accumulate(map(len, texts))])
        if text.isascii():
            return Rendered(text, contents, trained)
        sizes = [len(piece) if piece.isascii() else len(piece.encode()) for piece in texts]
        return Rendered(text, contents, trained, Places(*self._places([0, *accumulate(sizes)])))

    def _places(self, at: Sequence[int]) -> tuple[tuple[Span, ...], tuple[Span, ...], int]:
        contents = tuple([(at[piece], at[piece + 1]) for piece, _number, _trimmed in self.slots])
        return contents, tuple([(at[first], at[end]) for first, end in self.trained if at[first] < at[end]]), at[-1]


class Renderer:
    """Renders conversations. `controls`: the strings that end a turn or otherwise steer the model (special tokens)."""

    def __init__(self, template: str, named: Mapping[str, str], controls: Sequence[str] = ()) -> None:
        self._environment = environment()
        try:
            self._template = self._environment.from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise RenderingError(
                f"chat template, line {error.lineno}: {error.message}; mend the base model's chat_template.jinja"
            ) from error
        self._symbols = environment(Symbolic)
        self._symbolic = self._symbols.from_string(template) if traceable(template) else None
        self._frames: dict[tuple[bool, tuple[str, ...]], _Frame | None] = {}
        self._named = dict(named)
        self._marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self._controls = re.compile("|".join(re.escape(token) for token in sorted(controls, key=len, reverse=True)) or "(?!)")

    def render(self, messages: Sequence[Message], last_only: bool = False, check: bool = False) -> Rendered:
        """The conversation's text with its spans; `last_only` trains the last assistant turn only.

        The template runs once for each sequence of roles where it can be shown that contents go into the text as they are (or trimmed),
        else for each conversation; `check` runs it all the same and compares. Raises RenderingError when the template fails, drops or
        changes a message, or rewrites earlier turns, because then nobody can tell what the assistant said.
        """
        roles = tuple([message.role for message in messages])
        if TEXT in roles:
            return self._plain(messages)
        if any(message.name is not None or message.tool_calls is not None for message in messages):
            return self.by_template(messages, last_only)
        key = (last_only, roles)
        if key not in self._frames:
            frame = self._learn(roles, last_only) if len(roles) <= MOST_MESSAGES and len(self._frames) < MOST_FRAMES else None
            if len(self._frames) < MOST_FRAMES:
                self._frames[key] = frame
        frame = self._frames.get(key)
        if frame is None:
            return self.by_template(messages, last_only)
        rendered = frame.fill(messages)
        if check and rendered.text != self._run([_turn(message) for message in messages]):
            raise RenderingError(
                f"the chat template writes {_roles(roles)} in a way that depends on what the messages say, and this was not seen on "
                "trial texts: report the template, and take the row out of the raw data"
            )
        return rendered

    def by_template(self, messages: Sequence[Message], last_only: bool = False) -> Rendered:
        """As `render`, by running the template on these very messages."""
        turns = [_turn(message) for message in messages]
        text = self._run(turns)
        contents, calls, marked = self._segments(turns, text)
        trained = self._trained(turns, text, contents, marked, last_only)
        return Rendered(text=text, contents=tuple(sorted([*contents.values(), *calls])), trained=tuple(trained))

    def _plain(self, messages: Sequence[Message]) -> Rendered:
        if len(messages) != 1:
            raise RenderingError(f"{_roles([message.role for message in messages])}: a text stands alone; map it with its own source")
        content, end = messages[0].content, self._named.get("eos_token", "")
        if not end:
            raise RenderingError(
                "tokenizer_config.json names no eos_token, with which a plain text must end; "
                "name it there, or map the source to prompt and completion"
            )
        whole = len(content) + len(end)
        return Rendered(text=content + end, contents=((0, len(content)),), trained=((0, whole),))

    def _learn(self, roles: tuple[str, ...], last_only: bool) -> _Frame | None:
        """The frame of conversations of these roles, or None when it cannot be shown that there is one."""
        if self._symbolic is None:
            return None
        turns = [{"role": role, "content": Content(chr(ANY + number))} for number, role in enumerate(roles)]
        try:
            text = str(self._run(turns, symbolic=True))
            slots = {ord(mark.group()) % 0x10000: mark.start() for mark in _SLOTS.finditer(text)}
            if slots.keys() != set(range(len(roles))) or len(_SLOTS.findall(text)) != len(roles):
                return None
            marks = NONCHARACTERS[:5]
            found = _unmark(self._run(turns, marks=(marks[3], marks[4]), symbolic=True), marks)
            if found is None or found[0] != text:
                return None
            contents = {number: (at, at + 1) for number, at in slots.items()}
            trained = self._trained(turns, text, contents, found[2], last_only, symbolic=True)
            frame = _frame(text, slots, trained)
            return frame if frame is not None and self._holds_for_trials(frame, roles, last_only) else None
        except (Inspected, RenderingError):
            return None

    def _holds_for_trials(self, frame: _Frame, roles: tuple[str, ...], last_only: bool) -> bool:
        for turn in range(len(_TRIALS)):
            messages = [Message(_TRIALS[(turn + number) % len(_TRIALS)], role) for number, role in enumerate(roles)]
            if frame.fill(messages).text != self._run([_turn(message) for message in messages]):
                return False
        benign = [Message(f"t{number}", role) for number, role in enumerate(roles)]
        return frame.fill(benign) == self.by_template(benign, last_only)

    def _run(
        self, turns: Sequence[Mapping[str, Any]], prompt: bool = False, marks: tuple[str, str] = ("", ""), symbolic: bool = False
    ) -> str:
        template = self._symbolic if symbolic and self._symbolic else self._template
        self._environment.marks = self._symbols.marks = marks  # type: ignore[attr-defined]
        try:
            return template.render(messages=turns, tools=None, documents=None, add_generation_prompt=prompt, **self._named)
        except jinja2.exceptions.UndefinedError as error:
            clock = (
                "; a template that reads the clock gives other text every day: write the date into it"
                if "strftime_now" in str(error)
                else ""
            )
            raise RenderingError(f"the chat template fails on {_roles(_of(turns))}: {error}{clock}") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RenderingError(
                f"the chat template refuses {_roles(_of(turns))}: {error}; mend the row, or take it out of the raw data"
            ) from error

    def _segments(self, turns: list[dict[str, Any]], text: str) -> tuple[dict[int, Span], list[Span], list[Span]]:
        """Message number to the span of its content, the spans of the strings of tool calls, and those of the generation blocks, in `text`.

        Found by rendering the strings between marks; the marked rendering without its marks must be `text` itself.
        """
        marks = self._unused(turns)
        begin, end = marks[3:]
        for wrapping in _wrappings(turns):
            wrapped = wrapping.apply(turns, marks)
            try:
                found = _unmark(self._run(wrapped, marks=(begin, end)), marks)
            except RenderingError:
                # A template may look at an id of a tool call, which is then left without marks.
                found = None
            if found is None or found[0] != text:
                continue
            plain, spans, marked = found
            if lost := [number for number in wrapping.needed if number not in spans]:
                raise RenderingError(_lost(lost[0], turns))
            for string, needed in wrapping.bare:
                if self._controls.search(string):
                    raise RenderingError(
                        f"a tool call or name in {_roles(_of(turns))} holds the characters of a control token where the template cannot be "
                        "followed; mend the row, or take it out of the raw data"
                    )
                if needed and string not in plain:
                    raise RenderingError(_lost(len(turns), turns))
            contents = {number: span for number, span in spans.items() if number < len(turns)}
            return contents, [span for number, span in spans.items() if number >= len(turns)], marked
        raise RenderingError(
            f"the chat template changes the text of messages in {_roles(_of(turns))}: what is the user's and what is the template's "
            "cannot be told apart; mend the template"
        )

    def _unused(self, turns: Sequence[Mapping[str, Any]]) -> list[str]:
        held = set().union(*(set(json.dumps(turn, ensure_ascii=False)) for turn in turns)) if turns else set()
        free = [character for character in NONCHARACTERS if character not in held]
        if len(free) < 5:
            raise RenderingError(
                "a record holds nearly all of Unicode's noncharacters U+FDD0..U+FDEF: mend the row, or take it out of the raw data"
            )
        return free[:5]

    def _trained(
        self,
        turns: Sequence[Mapping[str, Any]],
        text: str,
        contents: Mapping[int, Span],
        marked: list[Span],
        last_only: bool,
        symbolic: bool = False,
    ) -> list[Span]:
        if self._marked:
            return self._from_markers(turns, contents, marked, last_only)
        return self._from_prefixes(turns, text, contents, last_only, symbolic)

    def _from_markers(
        self, turns: Sequence[Mapping[str, Any]], contents: Mapping[int, Span], marked: list[Span], last_only: bool
    ) -> list[Span]:
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant" and number in contents and any(_overlap(contents[number], span) for span in marked):
                raise RenderingError(
                    f"the chat template's generation markers enclose message {number}, which is of the {turn['role']}; mend the template"
                )
        if not last_only:
            return [span for span in marked if span[0] < span[1]]
        # Blocks of the last turn are those behind what came before it; its own content may be empty, as beside a tool call.
        last = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
        before = max((contents[number][1] for number in range(last) if number in contents), default=0)
        return [span for span in marked if span[0] >= before and span[0] < span[1]]

    def _from_prefixes(
        self, turns: Sequence[Mapping[str, Any]], text: str, contents: Mapping[int, Span], last_only: bool, symbolic: bool
    ) -> list[Span]:
        numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        spans = []
        for number in numbers[-1:] if last_only else numbers:
            before = self._run(turns[:number], prompt=True, symbolic=symbolic)
            until = text if number + 1 == len(turns) else self._run(turns[: number + 1], symbolic=symbolic)
            start, behind = contents.get(number, (len(before), len(before)))
            if not (text.startswith(until) and until.startswith(before) and len(before) <= start):
                raise RenderingError(
                    f"the chat template writes message {number} of {_roles(_of(turns))} differently when more follows, so its span cannot be "
                    "found by prefixes; put {% generation %} ... {% endgeneration %} around the assistant's text in the template"
                )
            # The turn ends with its end mark; the white space that templates write after it is never generated. Templates write
            # control tokens around tool calls too, so that there the last one is the turn's.
            ends = [mark.end() for mark in self._controls.finditer(text, behind, len(until))]
            last = -1 if "tool_calls" in turns[number] else 0
            spans.append((len(before), ends[last] if ends else len(until)))
        return spans


def _turn(message: Message) -> dict[str, Any]:
    """A message as `transformers` hands it to a template."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_calls is not None:
        turn["tool_calls"] = json.loads(message.tool_calls)
    return turn


def _frame(text: str, slots: Mapping[int, int], trained: Sequence[Span]) -> _Frame | None:
    """The frame of a symbolic text; `slots`: message number to its place."""
    places = {at: number for number, at in slots.items()}
    for start, end in trained:
        if sum(start <= at < end for at in places) > 1:
            # Control tokens in one content could end the span of another.
            return None
    edges = sorted({0, len(text), *places, *(at + 1 for at in places), *(edge for span in trained for edge in span)})
    number_of = {edge: number for number, edge in enumerate(edges)}
    return _Frame(
        pieces=tuple([None if start in places else text[start:end] for start, end in pairwise(edges)]),
        slots=tuple([(number_of[at], places[at], ord(text[at]) >= TRIMMED) for at in sorted(places)]),
        trained=tuple([(number_of[start], number_of[end]) for start, end in trained]),
    )


class _Wrapping:
    """Puts the strings of a conversation between marks. `calls`: which of the names and tool calls, "all", "arguments" or "none".

    Afterwards `needed` are the marks that must come out again, and `bare` the strings that got none, each with whether it must stand in
    the text: of a call its name and arguments must, while the rest is the protocol's.
    """

    def __init__(self, trim: bool, empty: bool, calls: str) -> None:
        self._trim, self._empty, self._calls = trim, empty, calls
        self.needed: list[int] = []
        self.bare: list[tuple[str, bool]] = []

    def apply(self, turns: Sequence[Mapping[str, Any]], marks: Sequence[str]) -> list[dict[str, Any]]:
        """The turns with content n as mark n, and the other strings numbered from len(turns) on."""
        self._marks = marks
        self._used = len(turns)
        wrapped = []
        for number, turn in enumerate(turns):
            content = turn["content"].strip() if self._trim else turn["content"]
            new = dict(turn)
            if content or self._empty:
                self.needed.append(number)
                new["content"] = self._mark(number, content)
            if "name" in turn:
                new["name"] = self._string(turn["name"], needed=False, marked=self._calls == "all")
            if "tool_calls" in turn:
                new["tool_calls"] = [self._call(one) for one in turn["tool_calls"]]
            wrapped.append(new)
        return wrapped

    def _mark(self, number: int, text: str) -> str:
        opening, middle, closing = self._marks[:3]
        return f"{opening}{number}{middle}{text}{closing}"

    def _string(self, text: str, needed: bool, marked: bool) -> str:
        if not marked:
            self.bare.append((text, needed))
            return text
        self._used += 1
        if needed:
            self.needed.append(self._used - 1)
        return self._mark(self._used - 1, text)

    def _call(self, value: dict[str, Any]) -> dict[str, Any]:
        whole = self._calls == "all"
        out: dict[str, Any] = {}
        for key, one in value.items():
            if isinstance(one, str):
                needed = key in ("name", "arguments")
                out[key] = self._string(one, needed, marked=whole or (key == "arguments" and self._calls == "arguments"))
            elif key == "arguments":
                out[key] = self._within(one, marked=self._calls != "none")
            else:
                out[key] = self._call(one) if isinstance(one, dict) else one
        return out

    def _within(self, value: Any, marked: bool) -> Any:
        if isinstance(value, str):
            return self._string(value, needed=True, marked=marked)
        if isinstance(value, dict):
            return {self._within(key, marked): self._within(one, marked) for key, one in value.items()}
        return [self._within(one, marked) for one in value] if isinstance(value, list) else value


def _wrappings(turns: Sequence[Mapping[str, Any]]) -> Iterator[_Wrapping]:
    """From all strings to fewer: templates ask whether a content is empty, and some look into tool calls."""
    for calls in ("all", "arguments", "none") if any("tool_calls" in turn or "name" in turn for turn in turns) else ("none",):
        for trim in (False, True):
            for empty in (True, False):
                if empty or any(not turn["content"].strip() for turn in turns):
                    yield _Wrapping(trim, empty, calls)


def _lost(number: int, turns: Sequence[Mapping[str, Any]]) -> str:
    if number < len(turns):
        return f"the chat template leaves out message {number} of {_roles(_of(turns))}: its text would be lost"
    return (
        f"the chat template leaves out a tool call of {_roles(_of(turns))}: it cannot write tool calls; "
        "use the template that the model is served with for tools, or take the row out of the raw data"
    )


def _of(turns: Sequence[Mapping[str, Any]]) -> list[str]:
    return [turn["role"] for turn in turns]


def _roles(roles: Sequence[str]) -> str:
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
