"""Cleaning of the texts of one record: control characters, Unicode normal form, white space. A pure function of text and recipe.

Secrets and personal data are `sensitive.py`, duplicates `near.py`; what a row must have at all is the readers' business.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Any

import msgspec

from repro_assets.data.lines import Message
from repro_assets.data.readers import Unfit
from repro_assets.recipe import RecordsSection
from repro_assets.trust.canonical import canonical

STEPS = ("nfc", "controls", "whitespace")

# C0 and C1 but tab, line feed and carriage return; U+061C, 200E, 200F, 202A-202E, 2066-2069 steer bidirectional text and hide what a
# reader sees ("Trojan Source"); U+FEFF is a byte order mark wherever it stands. ZWJ and ZWNJ stay: emoji and scripts are written with them.
_CONTROLS = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufdd0-\ufdef\ufffe\uffff"
_ASTRAL = "".join(chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF) for plane in range(1, 17))
_BASIC = re.compile(f"[{_CONTROLS}]")
_ALL = re.compile(f"[{_CONTROLS}{_ASTRAL}]")
_ASCII_CONTROLS = bytes({*range(32), 127} - {9, 10, 13})

_BLANK = " \t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
_RUN = re.compile(f"[{_BLANK}]{{2,}}")
_BLANKS = re.compile(f"[{_BLANK}]")


def clean(messages: tuple[Message, ...], section: RecordsSection) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The messages cleaned as the recipe says, and which of STEPS changed something; the messages themselves when nothing did.

    Always in the order controls, NFC, white space, so that a second cleaning changes nothing. Names and strings inside tool
    calls lose controls and get NFC, their white space stays. Raises Unfit for a text that cleaning leaves without a visible character.
    """
    done: set[str] = set()
    cleaned = tuple(_message(number, message, section, done) for number, message in enumerate(messages))
    return (cleaned, tuple(step for step in STEPS if step in done)) if done else (messages, ())


def untouched(said: bytes, messages: tuple[Message, ...], section: RecordsSection) -> bool:
    """Whether `clean` would leave the messages, of which `said` is the canonical JSON, as they are; False where that is not plain at a glance.

    One pass over the bytes takes out ASCII, and of what is left each character is looked at once in a process."""
    mode = section.whitespace
    if mode != "keep" and any(len(message.content.strip()) < len(message.content) for message in messages):
        return False
    if mode == "collapse" and any("  " in message.content or "\t" in message.content for message in messages):
        return False
    rest = said.translate(None, _ASCII)
    if not rest:
        return True
    if b"\\" in rest and _ESCAPED.search(said):
        return False
    text = rest.decode("utf-8")
    collapse = mode == "collapse"
    return _HARMLESS[collapse].issuperset(text) or _all_harmless(text, collapse)


_ASCII = bytes({*range(127)} - {ord("\\")})
_ESCAPED = re.compile(rb"\\[^nrt\"\\]")  # of the characters that JSON escapes, all but these are controls
#: by whether runs of blanks are collapsed: characters seen so far in this process that no step touches, wherever they stand
_HARMLESS = {False: {"\\"}, True: {"\\"}}


def _all_harmless(text: str, collapse: bool) -> bool:
    for character in set(text) - _HARMLESS[collapse]:
        if _ALL.search(character) or not unicodedata.is_normalized("NFC", character) or composes(character):
            return False
        if collapse and _BLANKS.search(character):
            return False
        _HARMLESS[collapse].add(character)
    return True


def composes(character: str) -> bool:
    """Whether NFC may join it with a character before it: marks, and Hangul vowels and finals."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me") or "\u1161" <= character <= "\u11c2"


def _message(number: int, message: Message, section: RecordsSection, done: set[str]) -> Message:
    content = _characters(message.content, section, done)
    spaced = _spaced(content, section.whitespace)
    if spaced != content:
        done.add("whitespace")
    if not message.tool_calls and message.content and (not spaced or spaced.isspace()):
        raise Unfit("empty", f"messages[{number}].content: no text is left after cleaning")
    return rewritten(message, spaced, lambda text: _characters(text, section, done))


def rewritten(message: Message, content: str, change: Callable[[str], str]) -> Message:
    """The message with this content, its name and the strings of its tool calls put through `change`; itself when all stay equal."""
    name = change(message.name) if message.name else message.name
    calls = strings(message.tool_calls, change) if message.tool_calls else message.tool_calls
    if (content, name, calls) == (message.content, message.name, message.tool_calls):
        return message
    return msgspec.structs.replace(message, content=content, name=name, tool_calls=calls)


def _characters(text: str, section: RecordsSection, done: set[str]) -> str:
    """Without controls and in NFC. In this order: a control taken out from between a letter and its accent lets them compose."""
    if section.controls == "drop" and (cleaner := without_controls(text)) is not text:
        done.add("controls")
        text = cleaner
    if section.normalize == "NFC" and not unicodedata.is_normalized("NFC", text):
        done.add("nfc")
        text = unicodedata.normalize("NFC", text)
    return text


def without_controls(text: str) -> str:
    """The text without control characters, bidirectional controls, byte order marks and noncharacters; the same object if it has none."""
    if text.isascii():
        # bytes.translate is five times as fast as a search by a character class
        data = text.encode("ascii")
        kept = data.translate(None, _ASCII_CONTROLS)
        return text if len(kept) == len(data) else kept.decode("ascii")
    if text.replace("\n", " ").isprintable() or not (_BASIC.search(text) or (_astral(text) and _ALL.search(text))):
        return text
    return _ALL.sub("", text)


def _astral(text: str) -> bool:
    """Whether it has characters above U+FFFF: a class that holds such is searched ten times as slowly as one that does not."""
    return len(text.encode("utf-16-le", "surrogatepass")) > 2 * len(text)


def _spaced(text: str, whitespace: str) -> str:
    """`trim`: none at the ends. `collapse`: also one space for a run within a line; indentation stays, since code means something by it."""
    if whitespace == "keep":
        return text
    text = text.strip()
    if whitespace == "collapse" and ("  " in text or "\t" in text or not text.isascii()):
        # a lookbehind in the pattern instead would be asked at every character
        whole = text
        text = _RUN.sub(lambda run: run.group() if whole[run.start() - 1] in "\r\n" else " ", whole)
    return text


def strings(tool_calls: str, change: Callable[[str], str]) -> str:
    """Canonical JSON of the tool calls, every string value in it put through `change`; the same object when that changes nothing.

    Keys are the schema of the tool and stay as they are.
    """

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, list):
            return [walk(item) for item in value]
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        return value

    changed = canonical(walk(msgspec.json.decode(tool_calls))).decode()
    return tool_calls if changed == tool_calls else changed
