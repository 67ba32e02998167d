"""Tokenizer libraries behind one call, and the gate that a faster one must pass: on every string it is shown, the ids of the reference.

What a record's text is and which of its tokens are trained is not known here; that is `tokenizing.py`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import tokenizers
from numpy.typing import NDArray

from repro_assets.data.errors import DataError, TokenizerError
from repro_assets.trust.canonical import digest

FUZZ_STRINGS = 3000
VOCABULARY_TOKENS = 40_000
#: one record in so many is tokenised by the reference too
SAMPLE = 100
CANARY = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces\tand\ttabs\r\nand lines\n\n\n",
    "1234567890 3.14159 -42 1e-9 2026-11-21",
    "def f(x):\n    return {'a': x ** 2}\n",
    "Grüße, naïve façade; Žluťoučký kůň; 你好，世界; здравствуй; مرحبا; नमस्ते",
    "e\u0301 \u00e9 \ufb01 \u2126 \u00a0 \u200b \ufeff \U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea",
    "don't WON'T I'll HTTPServer snake_case camelCase <tag attr=\"1\"/> ###",
)
# Where pre-tokenisers and normalisers differ: classes of white space, digits of other scripts, case pairs that are not one to one,
# marks that compose or reorder, jamo, emoji sequences, bidi and format characters, noncharacters, private use, the last code point.
PIECES = (
    *"abcXYZ019 .,;:!?'\"-_/\\()[]{}<>|=+*&^%$#@~`",
    *("the", "ing", " of", "HTTP", "'s", "'LL", "'re", "'ſ", "1234", "12,345.67", "３５", "٣٤", "Ⅷ", "½", "x²", "://", "...", "——"),
    *(
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\r\n",
        "\n\n",
        " \n ",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u1680",
        "\u2028",
        "\u2029",
        "\x85",
        "\x0b",
        "\x0c",
    ),
    *("é", "e\u0301", "\u0301", "ñ", "a\u0323\u0307", "a\u0307\u0323", "Å", "\u212b", "ﬁ", "ß", "ẞ", "İ", "ı", "ς", "Σ", "ǅ", "ŉ"),
    *("你好", "世界", "ｶﾞ", "が", "か\u3099", "한국", "\u1112\u1161\u11ab", "각\u11a8", "مرحبا", "שָׁלוֹם", "नमस्ते", "ไทย", "ကြ", "ა", "Ա"),
    *("😀", "👩\u200d💻", "🇩🇪", "👍🏽", "\u200d", "\u200b", "\u200e", "\u202e", "\u2066", "\ufeff", "\ufe0f", "\u00ad", "\u034f", "\u180e"),
    *(
        "\x00",
        "\x01",
        "\x1b",
        "\x7f",
        "\x80",
        "\ufffd",
        "\ufdd0",
        "\uffff",
        "\ue000",
        "\U000f0000",
        "\U0010ffff",
        "▁",
        "Ġ",
        "Ċ",
        "##",
        "</w>",
    ),
)


class EngineMismatch(DataError):
    """What stood in for the reference, fastokens or the cache of words, gave a sampled record other tokens after it had passed its trial.
    `gate`: what `Engine.gate` says when everything is then made again with the reference, nothing if it was the cache; it names no record,
    because which one is met first depends on the workers."""

    def __init__(self, message: str, gate: str) -> None:
        # Both as arguments, so that the error survives the way back from a worker process.
        super().__init__(message, gate)
        self.gate = gate

    def __str__(self) -> str:
        return str(self.args[0])


class Backend(Protocol):
    """A library that turns texts into ids."""

    name: str
    version: str

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """All ids in one array (t,), and where each text's ids begin and the last one's end (n + 1,). Nothing is added."""
        ...


class Reference:
    """The Hugging Face `tokenizers` library: what it says is right. `library` gives character offsets too, at more cost."""

    name = "tokenizers"
    version = tokenizers.__version__

    def __init__(self, definition: Mapping[str, Any]) -> None:
        """Raises TokenizerError when the library cannot load the definition (the value of tokenizer.json)."""
        try:
            self.library = tokenizers.Tokenizer.from_buffer(msgspec.json.encode(definition))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise TokenizerError(f"tokenizer.json cannot be loaded by tokenizers {self.version}: {error}") from error

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        rows = [encoding.ids for encoding in self.library.encode_batch_fast(list(texts), add_special_tokens=False)]
        bounds = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=bounds[1:])
        flat = np.empty(bounds[-1], dtype=np.uint32)
        for row, start, end in zip(rows, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            flat[start:end] = row
        return flat, bounds


class Fastokens:
    """`fastokens`: ten to fifty times faster, gives ids only."""

    name = "fastokens"

    def __init__(self, definition: Mapping[str, Any]) -> None:
        """Raises TokenizerError when the library is missing or does not know a part of the definition."""
        try:
            import fastokens
        except ImportError as error:
            raise TokenizerError("fastokens is not installed: pip install fastokens, or set sharding.engine to tokenizers") from error
        from importlib.metadata import version

        self.version = version("fastokens")
        try:
            self._library = fastokens.Tokenizer.from_json_str(msgspec.json.encode(definition).decode())
        except ValueError as error:
            raise TokenizerError(f"fastokens {self.version} cannot load tokenizer.json: {error}") from error

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        ids, bounds = self._library.encode_batch_flat(list(texts))
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(bounds, dtype="<u8").astype(np.int64)


def steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, sequences laid open."""
    if not isinstance(part, dict):
        return []
    inner = part.get("pretokenizers")
    return [step for one in inner for step in steps(one)] if isinstance(inner, list) else [part]


def fuzz(controls: Sequence[str] = (), count: int = FUZZ_STRINGS) -> list[str]:
    """`count` strings that tokenizers disagree about, the same on every machine. `controls`: mixed in as they are and torn."""
    pieces = [*PIECES, *controls, *(mark[:-1] for mark in controls), *(mark[1:] for mark in controls)]
    out = []
    for number in range(count):
        stream = hashlib.shake_256(f"repro fuzz {number}".encode()).digest(2 + 4 * 48)
        # One string in four is made of any code points at all; the others of pieces, one in eight of these drawn from few of them.
        anything, few = stream[0] % 4 == 0, stream[0] % 8 == 1
        words = np.frombuffer(stream, dtype="<u4", offset=2)[: 1 + stream[1] % 48].tolist()
        if anything:
            out.append("".join(chr(code + 0x800 if code >= 0xD800 else code) for code in (word % (0x110000 - 0x800) for word in words)))
        else:
            known = pieces[number % len(pieces) :][:3] if few else pieces
            out.append("".join(known[word % len(known)] for word in words))
    return out


def words(reference: Reference, count: int = VOCABULARY_TOKENS) -> list[str]:
    """What the vocabulary's tokens stand for, at most about `count` of them evenly over all ids, eight to a string and a line to each: a merge
    that another library lacks or ranks otherwise shows on its own token."""
    ids = sorted(reference.library.get_vocab(with_added_tokens=True).values())
    chosen = ids[:: len(ids) // count + 1]
    texts = reference.library.decode_batch([[number] for number in chosen], skip_special_tokens=False)
    return ["\n".join(texts[start : start + 8]) for start in range(0, len(texts), 8)]


def canary(backend: Backend) -> str:
    """Digest of the ids of fixed strings."""
    ids, bounds = backend.encode(CANARY)
    return digest([row.tolist() for row in np.split(ids, bounds[1:-1])])


def difference(reference: Backend, other: Backend, texts: Sequence[str]) -> str | None:
    """The first of `texts` to which `other` gives other ids, in words; None when there is none."""
    ids, bounds = reference.encode(texts)
    found, ends = other.encode(texts)
    if np.array_equal(bounds, ends) and np.array_equal(ids, found):
        return None
    for number, text in enumerate(texts):
        right, wrong = ids[bounds[number] : bounds[number + 1]].tolist(), found[ends[number] : ends[number + 1]].tolist()
        if right != wrong:
            at = next((n for n, (one, two) in enumerate(zip(right, wrong, strict=False)) if one != two), min(len(right), len(wrong)))
            return f"{text[:60]!a}: at token {at} {right[at : at + 3]} became {wrong[at : at + 3]}"
    return None


def admit(reference: Reference, definition: Mapping[str, Any], controls: Sequence[str], tried: bool = False) -> tuple[Backend, str]:
    """fastokens when it gives the reference's ids on the fuzz strings and the canary, else the reference; and the verdict in words.

    `tried`: take it without the trial, because the caller waits for the verdict of another process on the same library."""
    shown = [] if tried else [*CANARY, *fuzz(controls), *words(reference)]
    try:
        candidate = Fastokens(definition)
        if shown and (found := difference(reference, candidate, shown)):
            return reference, refusal(candidate.version, f"gives other ids than tokenizers {reference.version} for {found}")
    except TokenizerError as error:
        return reference, f"fastokens refused, tokenizers used: {error}"
    except BaseException as error:
        # A panic in the library's Rust arrives as a BaseException of its own.
        if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
            raise
        return reference, f"fastokens refused, tokenizers used: it broke on the fuzz strings: {error}"
    return candidate, (
        f"fastokens {candidate.version} gave the ids of tokenizers {reference.version} on {len(shown)} strings; "
        f"one record in {SAMPLE} is held against it"
    )


def refusal(version: str, reason: str) -> str:
    """What `Engine.gate` says of a fastokens that was not used."""
    return f"fastokens {version} refused, tokenizers used: it {reason}"


def sampled(record: str) -> bool:
    """Whether the record with this digest (hexadecimal SHA-256) is tokenised by the reference too: drawn by the digest, not by place."""
    return int(record[-8:], 16) % SAMPLE == 0
