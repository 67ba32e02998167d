"""A record, its identity, and its line in a record leaf. Reading raw rows is `readers.py`, cutting leaves is `records.py`.

A leaf line is the RFC 8785 canonical JSON of {"id", "key", "messages": [{"content", "name", "role", "tool_calls"}], "slices"} and a newline,
`name` and `tool_calls` only where a message has them. It holds nothing that moves with the record's position.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from repro_assets.trust.blob import Blob, BlobStore
from repro_assets.trust.canonical import canonical


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """One turn, of `system`, `user`, `assistant` or `tool`; or the `text` of a record of raw text. `tool_calls`: canonical JSON of the calls
    of an assistant turn, without ids: answers follow in the order of the calls.

    The fields that every message has are in canonical order, so that encoding a plain message gives canonical JSON.
    """

    content: str
    role: str
    name: str | None = None
    tool_calls: str | None = None

    @property
    def plain(self) -> bool:
        """Whether it is content and role only."""
        return self.name is None and self.tool_calls is None


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One record. `id`: SHA-256 of the canonical JSON of `messages` alone, so that a new key or slice label is no new record."""

    id: str
    key: str | None
    messages: tuple[Message, ...]
    slices: dict[str, str]


class Head(msgspec.Struct, frozen=True, gc=False):
    """A record without its messages, which take most of the time to decode."""

    id: str
    key: str | None
    slices: dict[str, str]


_encoder = msgspec.json.Encoder()
_sorted = msgspec.json.Encoder(order="sorted")
_decoder = msgspec.json.Decoder(Record)
_heads = msgspec.json.Decoder(Head)
# In a string every quote is escaped and no other value of a line has these names with these brackets, so each stands in a line once.
_BEFORE_MESSAGES, _AFTER_MESSAGES = b',"messages":[', b',"slices":{'


def identity(messages: tuple[Message, ...]) -> bytes:
    """32 bytes: SHA-256 of the canonical JSON of the messages. Raises UnicodeEncodeError for a lone surrogate."""
    # msgspec escapes strings exactly as RFC 8785 asks and is 25 times faster than a general canonicaliser; a test holds the two equal.
    return hashlib.sha256(said_by(messages)).digest()


def said_by(messages: tuple[Message, ...]) -> bytes:
    """Canonical JSON of the messages."""
    for message in messages:
        if message.name is not None or message.tool_calls is not None:
            return _sorted.encode(messages)
    return _encoder.encode(messages)


def make(messages: Iterable[Message], key: str | None, slices: dict[str, str], normalize: Literal["NFC", "none"] = "NFC") -> Record:
    """The record of these turns, normalised as the recipe says, its slice labels in canonical order."""
    messages = tuple(_normal(message) for message in messages) if normalize == "NFC" else tuple(messages)
    return made(messages, key, slices, normalize)[0]


def made(
    messages: tuple[Message, ...], key: str | None, slices: dict[str, str], normalize: Literal["NFC", "none"] = "NFC", said: bytes = b""
) -> tuple[Record, bytes]:
    """The record of turns that are normalised already, and its leaf line. `said`: their canonical JSON, when the caller has it."""
    if normalize == "NFC":
        key = None if key is None else _nfc(key)
        slices = {label: _nfc(value) for label, value in slices.items()}
    if len(slices) > 1:
        slices = dict(sorted(slices.items(), key=lambda item: item[0].encode("utf-16-be")))
    said = said or said_by(messages)
    name = hashlib.sha256(said).hexdigest()
    return Record(id=name, key=key, messages=messages, slices=slices), _line(name, key, said, slices)


def _normal(message: Message) -> Message:
    if message.name is None and message.tool_calls is None:
        return Message(_nfc(message.content), message.role)
    # No quote or bracket composes with what follows it, so canonical JSON stays JSON; its keys are put in order anew.
    calls = None if message.tool_calls is None else canonical(msgspec.json.decode(_nfc(message.tool_calls))).decode()
    return Message(_nfc(message.content), message.role, None if message.name is None else _nfc(message.name), calls)


def _nfc(text: str) -> str:
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def encode(record: Record) -> bytes:
    """The record's leaf line, newline included."""
    return _line(record.id, record.key, said_by(record.messages), record.slices)


def _line(name: str, key: str | None, said: bytes, slices: dict[str, str]) -> bytes:
    parts = (
        b'{"id":"',
        name.encode(),
        b'","key":',
        _encoder.encode(key),
        b',"messages":',
        said,
        b',"slices":',
        _encoder.encode(slices),
        b"}\n",
    )
    return b"".join(parts)


def decode(leaf: bytes) -> Iterator[Record]:
    """The records of a leaf, in order. Raises msgspec.DecodeError for anything else."""
    return (_decoder.decode(line) for line in leaf.split(b"\n") if line)


def without_messages(leaf: bytes) -> list[bytes]:
    """The lines of a leaf as this module writes them, each without its messages: JSON that `head` decodes; two lines of one record differ
    in it or are equal."""
    lines = leaf.split(b"\n")[:-1]
    return [line[: line.find(_BEFORE_MESSAGES)] + line[line.rfind(_AFTER_MESSAGES) :] for line in lines]


def head(line: bytes) -> Head:
    """The head of a record from its line, with or without the messages. Raises msgspec.DecodeError for anything else."""
    return _heads.decode(line)


def read(store: BlobStore, leaves: Iterable[Blob]) -> Iterator[Record]:
    """Every record of `leaves`, in order, verified by the store."""
    for leaf in store.get_many(blob.sha256 for blob in leaves):
        yield from decode(leaf)


def normal_text(text: str) -> str:
    """Text as the contamination check compares it: NFC, case folded, runs of white space as one space, none at the ends."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.split())
