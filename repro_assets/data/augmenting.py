"""Altered copies of records: lower case, typing errors, doubled spaces in what the user says. A pure function of the record and the recipe.

Which copies become training records, and under which id, is decided by `records.py`.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

import msgspec

from repro_assets.data.lines import Message
from repro_assets.recipe import Augmentation

TYPO_LETTERS = 40  # one swapped pair in so many letters, at least one a turn
DOUBLED_SPACES = 8  # one doubled in so many spaces, at least one a turn
_MASK = re.compile(r"\[(?:secret|personal):[a-z0-9_]+\]")


def augmented(messages: tuple[Message, ...], record_id: str, augment: Sequence[Augmentation]) -> list[tuple[int, tuple[Message, ...]]]:
    """(index in `augment`, altered messages) for every augmentation that draws this record and changes it.

    Only user turns are altered. What equals the record, or a copy already given, is left out. Depends on kind, seed, share, record id and
    text alone; never on other records.
    """
    found: list[tuple[int, tuple[Message, ...]]] = []
    seen = {messages}
    for index, augmentation in enumerate(augment):
        if not _drawn(augmentation, record_id):
            continue
        altered = tuple(
            msgspec.structs.replace(message, content=_altered(message.content, augmentation, f"{record_id}|{turn}"))
            if message.role == "user"
            else message
            for turn, message in enumerate(messages)
        )
        if altered not in seen:
            seen.add(altered)
            found.append((index, altered))
    return found


def _drawn(augmentation: Augmentation, record_id: str) -> bool:
    drawn = hashlib.sha256(f"{augmentation.kind}|{augmentation.seed}|{record_id}|share".encode()).digest()[:8]
    return int.from_bytes(drawn, "big") < int(Fraction(augmentation.share) * (1 << 64))


def _altered(text: str, augmentation: Augmentation, place: str) -> str:
    if augmentation.kind == "lowercase":
        return text.lower()
    name = f"{augmentation.kind}|{augmentation.seed}|{place}"
    return _typos(text, name) if augmentation.kind == "typos" else _spaces(text, name)


def _typos(text: str, name: str) -> str:
    """Neighbouring letters swapped at hashed places. Only letters with case (those of alphabets) that nothing combines with, never inside
    a mask such as [personal:email]; digits stay, so that no question changes its answer."""
    masked = [match.span() for match in _MASK.finditer(text)]
    plain = bytearray(b"\x01") * len(text)
    for start, end in masked:
        plain[start:end] = bytes(end - start)
    pairs = [at for at in range(len(text) - 1) if plain[at] and text[at] != text[at + 1] and _letter(text, at) and _letter(text, at + 1)]
    letters = list(text)
    for at in _chosen(pairs, name, len(pairs) // TYPO_LETTERS + 1, apart=2):
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)


def _letter(text: str, at: int) -> bool:
    character = text[at]
    return (character.islower() or character.isupper()) and (at + 1 == len(text) or text[at + 1].isascii() or text[at + 1].isalpha())


def _spaces(text: str, name: str) -> str:
    """Single spaces doubled at hashed places; none taken out, since `1 2` is not `12`."""
    places = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", text)]
    letters = list(text)
    for at in _chosen(places, name, len(places) // DOUBLED_SPACES + 1):
        letters[at] = "  "
    return "".join(letters)


def _chosen(places: list[int], name: str, count: int, apart: int = 1) -> list[int]:
    """Up to `count` of `places`, at least `apart` from each other, drawn by the hash of `name`; sorted."""
    left = list(places)
    taken: set[int] = set()
    for number in _numbers(name):
        if not left or len(taken) == count:
            break
        draw = number % len(left)
        left[draw], left[-1] = left[-1], left[draw]
        at = left.pop()
        if not any(other in taken for other in range(at - apart + 1, at + apart)):
            taken.add(at)
    return sorted(taken)


def _numbers(name: str) -> Iterator[int]:
    """An endless stream of 64-bit numbers: SHA-256 of the name and a counter."""
    counter = 0
    while True:
        block = hashlib.sha256(f"{name}|{counter}".encode()).digest()
        yield from (int.from_bytes(block[at : at + 8], "big") for at in range(0, 32, 8))
        counter += 1
