"""A record, its identity, and its line in a record leaf. Reading raw rows is `readers.py`, cutting leaves is `records.py`.

A leaf line is the RFC 8785 canonical JSON of {"id", "key", "messages": [{"content", "role"}], "slices"} and a newline. It holds nothing
that moves with the record's position.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from repro_assets.trust.blob import Blob, BlobStore


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. Fields are in canonical order, so that encoding a struct gives canonical JSON."""

    content: str
    role: str


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One record. `id`: SHA-256 of the canonical JSON of `messages` alone, so that a new key or slice label is no new record."""

    id: str
    key: str | None
    messages: tuple[Message, ...]
    slices: dict[str, str]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


def identity(messages: tuple[Message, ...]) -> bytes:
    """32 bytes: SHA-256 of the canonical JSON of the messages. Raises UnicodeEncodeError for a lone surrogate."""
    # msgspec escapes strings exactly as RFC 8785 asks and is 25 times faster than a general canonicaliser; a test holds the two equal.
    return hashlib.sha256(_encoder.encode(messages)).digest()


def make(messages: Iterable[Message], key: str | None, slices: dict[str, str], normalize: Literal["NFC", "none"] = "NFC") -> Record:
    """The record of these turns, normalised as the recipe says, its slice labels in canonical order."""
    if normalize == "NFC":
        messages = tuple(Message(content=_nfc(message.content), role=message.role) for message in messages)
        key = None if key is None else _nfc(key)
        slices = {label: _nfc(value) for label, value in slices.items()}
    else:
        messages = tuple(messages)
    ordered = dict(sorted(slices.items(), key=lambda item: item[0].encode("utf-16-be")))
    return Record(id=identity(messages).hex(), key=key, messages=messages, slices=ordered)


def _nfc(text: str) -> str:
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def encode(record: Record) -> bytes:
    """The record's leaf line, newline included."""
    return _encoder.encode(record) + b"\n"


def decode(leaf: bytes) -> Iterator[Record]:
    """The records of a leaf, in order. Raises msgspec.DecodeError for anything else."""
    return (_decoder.decode(line) for line in leaf.split(b"\n") if line)


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
