"""Records as token ids with loss spans. What a user writes is never read as a control token.

The text comes from `rendering.py`, the ids from a library in `engines.py`; storing ids is `leaves.py`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import tokenizers
from numpy.typing import NDArray

from repro_assets.data import engines, word_cache
from repro_assets.data.engines import Backend, EngineMismatch, Reference
from repro_assets.data.errors import RenderingError, TokenizerError
from repro_assets.data.lines import Record
from repro_assets.data.rendering import Rendered, Renderer, Span
from repro_assets.data.templates import find_template, literals, named_tokens
from repro_assets.documents import BaseModel, Engine
from repro_assets.trust.blob import BlobStore

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BATCH = 256
PROBES = ("a b", " a", "\n\nx", "é1")
# A token of which the bytes are not known has this length, so that no sum with it is the length of a text.
_UNKNOWN = 1 << 40


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """Of one record: `ids` uint32 (n,), or uint16 when taken from a leaf; `spans` uint32 (k, 2) of trained token positions; `cut`: tokens
    beyond max_tokens."""

    ids: NDArray[Any]
    spans: NDArray[np.uint32]
    cut: int

    @property
    def trained(self) -> int:
        return sum([end - start for start, end in self.spans.tolist()])


class Codec:
    """Tokenizer, template and renderer of one base model.

    `controls`: ids of the tokens that only the template may write: all special tokens, and the added tokens that stand in the
    template's own text. `width`: bytes an id needs (2 or 4). `gate`: what was found when another engine than the reference was asked for.
    """

    def __init__(self, files: Mapping[str, bytes], engine: str = "tokenizers", refused: str | None = None, tried: bool = False) -> None:
        """`files`: tokenizer.json, tokenizer_config.json and chat_template.jinja by name. `engine`: fastokens is used if it passes the
        gate. `refused`: what a sampled record said against what stood in for the reference (`EngineMismatch.gate`); it alone is used then.
        `tried`: the caller has the gate's verdict on the same library from elsewhere. Raises TokenizerError or RenderingError."""
        definition = _definition(files)
        template = find_template(files)
        named = named_tokens(files)
        written = literals(template) + "\0" + named.get("eos_token", "")
        added = [token for token in definition.get("added_tokens") or [] if isinstance(token, dict)]
        controls = [token for token in added if token["special"] or (token["content"] in written and not token["content"].isspace())]
        marks = [token["content"] for token in controls]
        self.controls = frozenset(token["id"] for token in controls)
        plain_marks = not any(token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"] for token in controls)
        # Without a post-processor: templates write their own special tokens, and ByteLevel's would trim spaces out of the offsets.
        bare = {**definition, "post_processor": None, "truncation": None, "padding": None}
        self._reference = Reference(bare)
        self._engine = self._reference.library
        # The same engine that reads control tokens as plain text; few texts need it, and loading it is not free.
        escaped = [{**token, "special": token in controls or token["special"]} for token in added]
        self._escaped_definition = {**bare, "added_tokens": escaped}
        vocabulary = self._engine.get_vocab(with_added_tokens=True)
        self.size = self._engine.get_vocab_size(with_added_tokens=True)
        self.highest = max(vocabulary.values(), default=0)
        self.width = 2 if self.highest < 1 << 16 else 4
        self._is_control = np.zeros(self.highest + 1, dtype=bool)
        self._is_control[sorted(self.controls)] = True
        self.renderer = Renderer(template, named, marks)
        self._escapes = plain_marks and self._splits_alike(marks)
        self._bytes = _Bytes(bare, vocabulary, self.highest)
        self._follows = self._bytes.fit(self._reference)
        self._backend: Backend = self._reference
        self.gate: str | None = refused or None
        if engine == "fastokens" and refused is None:
            self._backend, self.gate = self._admit(bare, marks, tried)
        self._definition, self._wait = bare, word_cache.WORTHWHILE if refused is None and self._follows else None

    def _admit(self, definition: Mapping[str, Any], marks: Sequence[str], tried: bool) -> tuple[Backend, str]:
        if not self._follows:
            return self._reference, (
                "fastokens refused, tokenizers used: it gives no character offsets, and the tokens of this tokenizer are not the bytes of "
                "the text, so the loss spans need the reference"
            )
        return engines.admit(self._reference, definition, marks, tried)

    def engine(self) -> Engine:
        """Name and version of the library in use, the digest of the ids it gives to fixed strings, and the gate's verdict."""
        backend = self._backend
        return Engine(name=backend.name, version=backend.version, canary=engines.canary(backend), gate=self.gate)

    def tokens(self, records: Sequence[Record], max_tokens: int, train_on: str = "assistant") -> list[Tokens]:
        """Ids and loss spans of every record, cut at `max_tokens`.

        Raises RenderingError naming the record; EngineMismatch when what stands in for the reference gave a sampled record other ids.
        """
        self._hasten(records)
        out: list[Tokens] = []
        for start in range(0, len(records), BATCH):
            batch = records[start : start + BATCH]
            rendered = [self._render(record, train_on) for record in batch]
            for ids, spans in self._encoded(batch, rendered):
                out.append(_cut(ids, spans, max_tokens))
        return out

    def _hasten(self, records: Sequence[Record]) -> None:
        """Put the cache of words before the reference once enough text has come to pay for its trial."""
        if self._wait is None or self._backend is not self._reference:
            return
        self._wait -= sum([len(message.content) for record in records for message in record.messages])
        if self._wait <= 0:
            self._wait = None
            self._backend = word_cache.admit(self._reference, self._definition) or self._reference

    def _render(self, record: Record, train_on: str) -> Rendered:
        try:
            return self.renderer.render(record.messages, train_on == "last_assistant", check=engines.sampled(record.id))
        except RenderingError as error:
            raise RenderingError(f"record {record.id}: {error}") from error

    def _encoded(self, records: Sequence[Record], rendered: Sequence[Rendered]) -> list[tuple[NDArray[np.uint32], list[Span]]]:
        """Whole ids and trained token spans of each record: from the bytes of the tokens where they are the text's, else from the
        reference's character offsets."""
        found: dict[int, tuple[NDArray[np.uint32], list[Span]]] = {}
        if self._follows:
            ids, bounds = self._backend.encode([text.text for text in rendered])
            found = self._bytes.spans(rendered, ids, bounds, self._is_control)
        left = [number for number in range(len(records)) if number not in found]
        encodings = self._engine.encode_batch([rendered[number].text for number in left], add_special_tokens=False) if left else []
        for number, encoding in zip(left, encodings, strict=True):
            found[number] = self._spans(records[number], rendered[number], encoding)
        if self._backend is not self._reference:
            self._compare(records, rendered, found)
        return [found[number] for number in range(len(records))]

    def _compare(
        self, records: Sequence[Record], rendered: Sequence[Rendered], found: Mapping[int, tuple[NDArray[np.uint32], list[Span]]]
    ) -> None:
        """Hold the sampled records, ids and spans, against the reference."""
        drawn = [number for number, record in enumerate(records) if engines.sampled(record.id)]
        encodings = self._engine.encode_batch([rendered[number].text for number in drawn], add_special_tokens=False) if drawn else []
        for number, encoding in zip(drawn, encodings, strict=True):
            ids, spans = self._spans(records[number], rendered[number], encoding)
            if not np.array_equal(ids, found[number][0]) or spans != found[number][1]:
                raise EngineMismatch(*self._mismatch(records[number].id))

    def _mismatch(self, record: str) -> tuple[str, str]:
        """What is said of a record with other tokens, and what the gate says from then on."""
        backend = self._backend
        if backend.name == self._reference.name:
            return f"record {record}: the cache of words gives other tokens than tokenizers {backend.version}", self.gate or ""
        found = f"other tokens than tokenizers {tokenizers.__version__}"
        return (
            f"record {record}: fastokens {backend.version} gives {found}; set sharding.engine to tokenizers",
            engines.refusal(backend.version, f"gave a sampled record {found}"),
        )

    def _spans(self, record: Record, text: Rendered, encoding: tokenizers.Encoding) -> tuple[NDArray[np.uint32], list[Span]]:
        ids = np.asarray(encoding.ids, dtype=np.uint32)
        for position in np.flatnonzero(self._is_control[ids]).tolist():
            start, end = _tight(text.text, *(encoding.token_to_chars(position) or (0, 0)))
            if any(start < stop and begin < end for begin, stop in text.contents):
                return self._escaped(record, text)
        return ids, _of_characters([start for start, _end in encoding.offsets], [end for _start, end in encoding.offsets], text.trained)

    def _escaped(self, record: Record, text: Rendered) -> tuple[NDArray[np.uint32], list[Span]]:
        """Ids of a text in which a message holds a control token's characters: only those of the template count."""
        if not self._escapes:
            raise RenderingError(
                f"record {record.id}: a message holds the characters of a control token, and this tokenizer cannot encode them as "
                "plain text; mend the row, or take it out of the raw data"
            )
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        at = 0
        for start, end, control in [*self._written(text), (len(text.text), len(text.text), -1)]:
            if at < start:
                piece = self._escaping.encode(text.text[at:start], add_special_tokens=False)
                ids += piece.ids
                starts += [at + begin for begin, _stop in piece.offsets]
                ends += [at + stop for _begin, stop in piece.offsets]
                if self.controls.intersection(piece.ids):
                    raise RenderingError(
                        f"record {record.id}: this tokenizer makes a control token out of plain text; take the row out of the raw data"
                    )
            if control >= 0:
                ids.append(control)
                starts.append(start)
                ends.append(end)
            at = end
        return np.asarray(ids, dtype=np.uint32), _of_characters(starts, ends, text.trained)

    def _written(self, text: Rendered) -> list[tuple[int, int, int]]:
        """(start, end, id) of every control token in the template's own text."""
        found = []
        edges = [0, *(edge for span in text.contents for edge in span), len(text.text)]
        for begin, stop in zip(edges[::2], edges[1::2], strict=True):
            encoding = self._engine.encode(text.text[begin:stop], add_special_tokens=False)
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token in self.controls:
                    found.append((begin + start, begin + end, token))
        return found

    @cached_property
    def _escaping(self) -> tokenizers.Tokenizer:
        library = Reference(self._escaped_definition).library
        library.encode_special_tokens = True
        return library

    def _splits_alike(self, controls: list[str]) -> bool:
        """Whether text between control tokens has the same ids alone as in its place (SentencePiece models may add a space)."""
        if not controls:
            return True
        ids = sorted(set(self._engine.get_vocab(with_added_tokens=False).values()))
        words = {self._engine.decode([token], skip_special_tokens=False) for token in ids[:: max(1, len(ids) // 64)]}
        probes = [*PROBES, *sorted(word for word in words if word and not any(mark in word for mark in controls))]
        mark = controls[0]
        whole = self._engine.encode(mark + mark.join(probes), add_special_tokens=False).ids
        alone = [token for probe in probes for text in (mark, probe) for token in self._engine.encode(text, add_special_tokens=False).ids]
        return bool(whole == alone)


class _Bytes:
    """The bytes that each token stands for, from which its place in a text follows without character offsets.

    Used for a record only when the bytes of its tokens are the bytes of its text: their number where the tokenizer can neither add
    nor take away any, else the bytes themselves.
    """

    def __init__(self, definition: Mapping[str, Any], vocabulary: Mapping[str, int], highest: int) -> None:
        steps = engines.steps(definition.get("pre_tokenizer"))
        level = any(step.get("type") == "ByteLevel" for step in steps)
        inverse = _byte_characters() if level else {}
        table: list[bytes | None] = [None] * (highest + 1)
        plain = {ord(character): value for character, value in inverse.items()}
        # What is no character for a byte must not pass for the byte of its own number.
        plain |= {value: 0xFFFF for value in range(256) if chr(value) not in inverse} if inverse else {}
        for token, number in vocabulary.items():
            table[number] = _token_bytes(token, plain)
        for added in definition.get("added_tokens") or []:
            table[added["id"]] = added["content"].encode()
        self._table = [value or b"\xff" for value in table]
        self._lengths = np.array([len(value) if value else _UNKNOWN for value in table], dtype=np.int64)
        model = definition["model"]
        self._lossless = (
            level
            and definition.get("normalizer") is None
            and model.get("type") == "BPE"
            and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
            and all(
                step.get("type") in ("Digits", "Split", "ByteLevel")
                and not step.get("add_prefix_space")
                and step.get("behavior") != "Removed"
                for step in steps
            )
            and set(inverse) <= vocabulary.keys()
        )

    def fit(self, reference: Reference) -> bool:
        """Whether most texts can be followed by bytes; the others cost a second tokenising."""
        ids, bounds = reference.encode(engines.CANARY)
        rows = [ids[start:end] for start, end in pairwise(bounds.tolist())]
        return sum(self._are(row, text.encode()) for row, text in zip(rows, engines.CANARY, strict=True)) * 2 > len(rows)

    def _are(self, ids: NDArray[np.uint32], data: bytes) -> bool:
        return b"".join([self._table[token] for token in ids.tolist()]) == data

    def spans(
        self, rendered: Sequence[Rendered], ids: NDArray[np.uint32], bounds: NDArray[np.int64], is_control: NDArray[np.bool_]
    ) -> dict[int, tuple[NDArray[np.uint32], list[Span]]]:
        """Ids and trained token spans of those texts that can be followed and in whose messages no control token is.

        `ids` (t,) and `bounds` (n + 1,) as of `Backend.encode`. All texts at once: numpy's price is per call.
        """
        at = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(self._lengths[ids], out=at[1:])
        bases = at[bounds]
        spread = np.diff(bases).tolist()
        good: list[int] = []
        contents: list[Span] = []
        trained: list[Span] = []
        for number, (text, base, held) in enumerate(zip(rendered, bases.tolist(), spread, strict=False)):
            places = text.in_bytes()
            if held != places.size or not (self._lossless or self._are(ids[bounds[number] : bounds[number + 1]], text.text.encode())):
                continue
            good.append(number)
            contents += [(base + start, base + end) for start, end in places.contents if start < end]
            trained += [(base + start, base + end) for start, end in places.trained]
        forged = set(np.searchsorted(bounds, self._touching(at, ids, contents, is_control), "right").tolist())
        edges = np.array(trained, dtype=np.int64).reshape(-1, 2)
        first = (np.searchsorted(at, edges[:, 0], "right") - 1).tolist()
        last = np.searchsorted(at, edges[:, 1], "left").tolist()
        found = {}
        used = 0
        starts = bounds.tolist()
        for number in good:
            count, start = len(rendered[number].trained), starts[number]
            if number + 1 not in forged:
                spans = [(first[n] - start, last[n] - start) for n in range(used, used + count) if edges[n, 0] < edges[n, 1]]
                found[number] = (ids[start : starts[number + 1]], spans)
            used += count
        return found

    @staticmethod
    def _touching(at: NDArray[np.int64], ids: NDArray[np.uint32], contents: list[Span], is_control: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Positions of the control tokens that share a byte with a message."""
        places = np.flatnonzero(is_control[ids])
        if not contents:
            return places[:0]
        held = np.array(contents, dtype=np.int64)
        next_one = np.searchsorted(held[:, 1], at[places], "right")
        inside = next_one < len(held)
        inside[inside] = held[next_one[inside], 0] < at[places[inside] + 1]
        return places[inside]


def load(store: BlobStore, model: BaseModel, engine: str = "tokenizers", refused: str | None = None, tried: bool = False) -> Codec:
    """The codec of a base model from its files in the store. Raises TokenizerError when it does not fit the model."""
    files = {name: store.get_bytes(model.model_files[name].sha256) for name in FILES if name in model.model_files}
    codec = Codec(files, engine, refused, tried)
    if codec.highest >= model.vocabulary:
        raise TokenizerError(
            f"tokenizer.json has the id {codec.highest}, the model's embedding only {model.vocabulary} rows: "
            "tokenizer and weights are not of one model; use the files of one model"
        )
    return codec


def _definition(files: Mapping[str, bytes]) -> dict[str, Any]:
    if "tokenizer.json" not in files:
        raise TokenizerError("the base model has no tokenizer.json; save its fast tokenizer with `save_pretrained` and use that folder")
    try:
        definition = json.loads(files["tokenizer.json"])
    except ValueError as error:
        raise TokenizerError(f"tokenizer.json is not JSON: {error}; restore the base model's files") from error
    if (definition.get("model") or {}).get("dropout"):
        raise TokenizerError("tokenizer.json asks for BPE dropout, which gives other ids every time; set model.dropout to null")
    return dict(definition)


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {**{chr(value): value for value in printable}, **{chr(0x100 + n): value for n, value in enumerate(others)}}


def _token_bytes(token: str, plain: Mapping[int, int]) -> bytes | None:
    """`plain`: code point to byte where tokens are written in characters for bytes, else nothing."""
    if plain:
        try:
            return token.translate(plain).encode("latin-1")
        except UnicodeEncodeError:
            return None
    if single := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes([int(single.group(1), 16)])
    return token.replace("\u2581", " ").encode()


def _tight(text: str, start: int, end: int) -> Span:
    """Without the white space that an added token with lstrip or rstrip takes in."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _of_characters(starts: Sequence[int], ends: Sequence[int], trained: Sequence[Span]) -> list[Span]:
    """Token spans of character spans: from the first token that has one of the characters to the last; none when the normaliser
    removed them all. A character of several tokens has all of them."""
    spans = []
    for begin, stop in trained:
        inside = [number for number, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < stop and begin < end]
        if inside:
            spans.append((inside[0], inside[-1] + 1))
    return spans


def _cut(ids: NDArray[np.uint32], spans: list[Span], max_tokens: int) -> Tokens:
    # One token cannot be trained twice, and token 0 has nothing before it to be predicted from.
    merged: list[Span] = []
    for start, end in sorted(spans):
        start, end = max(start, merged[-1][1] if merged else 1), min(end, max_tokens)
        if start < end:
            merged.append((start, end))
    return Tokens(ids=ids[:max_tokens], spans=np.array(merged, dtype=np.uint32).reshape(-1, 2), cut=max(0, len(ids) - max_tokens))
