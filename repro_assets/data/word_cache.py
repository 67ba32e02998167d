"""The reference tokenizer behind a cache of words: ids that the library gave to a word are not asked for again.

Sound where a text may be cut between words before it is tokenised. Which tokenizers may be, and how each is tried, is here; the ids are the
library's own, so this is no engine of its own and no part of any identity. REPRO_WORD_CACHE=off does without, for who would rather see that.
"""

import hashlib
import os
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repro_assets.data import engines
from repro_assets.data.engines import Reference

#: words kept, and as many of those met before them; about 150 bytes each
WORDS = 200_000
#: characters of a word that is kept: scripts that write no spaces have whole paragraphs for words, which seldom come again
LONGEST = 48
#: characters of messages after which a process tries the tokenizer: the trial and the first words cost about as much as they save on a third
WORTHWHILE = 3_000_000
SEAM_STRINGS = 400
# Stand-ins in a text that is cut: for what stands before a word when that is no space, and for an empty line.
_BARE, _EMPTY_LINE = "\x00", "\x01"
_SINGLE_SPACES = re.compile(r"(?<=\S) (?=\S)")
#: cuts in a word: behind a single line end, and between a letter or digit and a stop or white space
_CUTS = re.compile(r"(?<=\S\n)(?=\S)|(?<=[^\W_])(?=[,.:;!?\s])")


class _Words(dict[str, bytes]):
    """A word between cuts, marked `_BARE` when no space stands before it, to its ids as little-endian uint32.

    KeyError for a cut beside more white space: pre-tokenisers take runs of it apart by what stands behind."""

    def __init__(self, cache: "WordCache") -> None:
        super().__init__()
        self._cache = cache
        self._before: dict[str, bytes] = {}

    def __missing__(self, word: str) -> bytes:
        return self.keep(word, self._before.get(word) or self._made(word))

    def keep(self, word: str, ids: bytes) -> bytes:
        if len(word) > LONGEST:
            return ids
        if len(self) >= WORDS:
            # What is still met comes back from the older half, one by one.
            self._before = dict(self)
            self.clear()
        self[word] = ids
        return ids

    def _made(self, word: str) -> bytes:
        bare = word.startswith(_BARE)
        inner = word[bare:].removesuffix("\n")
        if not inner or _white(inner[0]) or _white(inner[-1]):
            raise KeyError(word)
        text = word[1:] if bare else " " + word
        return self._cache.composed(text.replace(_EMPTY_LINE, "\n\n"))


def _white(character: str) -> bool:
    return character.isspace() or character == _EMPTY_LINE


class WordCache:
    """A backend (`engines.Backend`) that cuts texts at single spaces and behind single line ends, and words that it does not know yet further:
    around control tokens, and between a letter or digit and what ends the word. What is left goes to the library."""

    name = Reference.name
    version = Reference.version

    def __init__(self, reference: Reference, controls: Sequence[str]) -> None:
        """`controls`: the added tokens of the tokenizer."""
        self._library = reference.library
        self._words = _Words(self)
        self._pieces: dict[str, bytes] = {}
        found = "|".join(re.escape(token) for token in sorted(controls, key=len, reverse=True))
        self._controls = re.compile(f"({found})") if found else None

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        rows = [self._row(text) for text in texts]
        bounds = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) // 4 for row in rows], out=bounds[1:])
        return np.frombuffer(b"".join(rows), dtype="<u4"), bounds

    def _row(self, text: str) -> bytes:
        if not text:
            return b""
        if _BARE in text or _EMPTY_LINE in text:
            return self._asked(text)
        words = text.replace("\n\n", _EMPTY_LINE).replace("\n", "\n " + _BARE).split(" ")
        words[0] = _BARE + words[0]
        if words[-1] == _BARE:
            words.pop()
        try:
            return b"".join(map(self._words.__getitem__, words))
        except KeyError:
            first, *rest = _SINGLE_SPACES.split(text)
            known, keep = self._words.get, self._words.keep
            return self.composed(first) + b"".join([known(word) or keep(word, self.composed(" " + word)) for word in rest])

    def composed(self, text: str) -> bytes:
        """The ids of a word with what stands before it, from smaller pieces where it has such."""
        found = self._pieces.get
        if text[1:].isalpha():
            return found(text) or self._asked(text)
        pieces = [text] if self._controls is None else self._controls.split(text)
        return b"".join([found(part) or self._asked(part) for piece in pieces for part in _CUTS.split(piece)])

    def _asked(self, piece: str) -> bytes:
        found = self._library.encode(piece, add_special_tokens=False).ids
        ids = struct.pack(f"<{len(found)}I", *found)
        if len(piece) <= LONGEST:
            if len(self._pieces) >= WORDS:
                self._pieces.clear()
            self._pieces[piece] = ids
        return ids


def admit(reference: Reference, definition: Mapping[str, Any]) -> WordCache | None:
    """The cache when it is wanted and the tokenizer can be cut between words: by what it is made of, by its vocabulary, in which no token goes
    over a cut, so that no merge does, and by its ids on strings full of cuts, since patterns may look at what stands around them."""
    if os.environ.get("REPRO_WORD_CACHE") == "off" or not cuttable(definition) or crossing(reference):
        return None
    controls = [token["content"] for token in definition.get("added_tokens") or []]
    cache = WordCache(reference, controls)
    return None if engines.difference(reference, cache, [*engines.CANARY, *seams(controls)]) else cache


def cuttable(definition: Mapping[str, Any]) -> bool:
    """Whether nothing but the trial speaks against it: a byte-level BPE that splits by patterns, no normaliser but NFC, added tokens that are
    found wherever they stand and hold no white space."""
    model, steps = definition["model"], engines.steps(definition.get("pre_tokenizer"))
    normalizer = definition.get("normalizer")
    return (
        model.get("type") == "BPE"
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        and (normalizer is None or normalizer.get("type") == "NFC")
        and any(step.get("type") == "ByteLevel" for step in steps)
        and all(step.get("type") in ("Digits", "Split", "ByteLevel") and not step.get("add_prefix_space") for step in steps)
        and all(
            token["content"]
            and not any(character.isspace() for character in token["content"])
            and not (token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"])
            for token in definition.get("added_tokens") or []
        )
    )


def crossing(reference: Reference) -> list[str]:
    """Tokens of the vocabulary with a cut in them."""
    ids = sorted(reference.library.get_vocab(with_added_tokens=False).values())
    texts = reference.library.decode_batch([[number] for number in ids], skip_special_tokens=False)
    return [text for text in texts if _SINGLE_SPACES.search(text) or _CUTS.search(text)]


def seams(controls: Sequence[str], count: int = SEAM_STRINGS) -> list[str]:
    """`count` strings of pieces that tokenizers disagree about, with a cut after each; the same on every machine."""
    pieces = [*(piece for piece in engines.PIECES if not piece.isspace()), *controls]
    between = (" ", " ", "\n", "", ", ", ".\n", "! ", "'s ", "\n\n", " \n", "  ")
    out = []
    for number in range(count):
        drawn = np.frombuffer(hashlib.shake_256(f"repro seam {number}".encode()).digest(4 * 40), dtype="<u4").tolist()
        # Every other string holds nothing that tears it.
        ends = between[: 8 if number % 2 else 11]
        out.append("".join(pieces[word % len(pieces)] + ends[(word >> 16) % len(ends)] for word in drawn))
    return out
