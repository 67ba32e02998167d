"""Records as token ids with loss spans, by the Hugging Face `tokenizers` library, which is the reference engine.

What a user writes is never read as a control token. The text comes from `rendering.py`; storing ids is `leaves.py`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import tokenizers
from numpy.typing import NDArray

from repro_assets.data.errors import RenderingError, TokenizerError
from repro_assets.data.lines import Record
from repro_assets.data.rendering import Rendered, Renderer, find_template, literals, named_tokens
from repro_assets.documents import BaseModel, Engine
from repro_assets.trust.blob import BlobStore
from repro_assets.trust.canonical import digest

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BATCH = 256
CANARY = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces\tand\ttabs\r\nand lines\n\n\n",
    "1234567890 3.14159 -42 1e-9 2026-11-21",
    "def f(x):\n    return {'a': x ** 2}\n",
    "Grüße, naïve façade; Žluťoučký kůň; 你好，世界; здравствуй; مرحبا; नमस्ते",
    "e\u0301 \u00e9 \ufb01 \u2126 \u00a0 \u200b \ufeff \U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea",
    "don't WON'T I'll HTTPServer snake_case camelCase <tag attr=\"1\"/> ###",
)

PROBES = ("a b", " a", "\n\nx", "é1")


class Tokens(msgspec.Struct, frozen=True):
    """Of one record: `ids` uint32 (n,), or uint16 when taken from a leaf; `spans` uint32 (k, 2) of trained token positions; `cut`: tokens
    beyond max_tokens."""

    ids: NDArray[Any]
    spans: NDArray[np.uint32]
    cut: int

    @property
    def trained(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


class Codec:
    """Tokenizer, template and renderer of one base model.

    `controls`: ids of the tokens that only the template may write: all special tokens, and the added tokens that stand in the
    template's own text. `width`: bytes an id needs (2 or 4).
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """`files`: tokenizer.json, tokenizer_config.json and chat_template.jinja by name. Raises TokenizerError or RenderingError."""
        definition = _definition(files)
        template = find_template(files)
        written = literals(template)
        named = named_tokens(files)
        added = [token for token in definition.get("added_tokens") or [] if isinstance(token, dict)]
        controls = [token for token in added if token["special"] or (token["content"] in written and not token["content"].isspace())]
        self.controls = frozenset(token["id"] for token in controls)
        self._plain_marks = not any(token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"] for token in controls)
        # Without a post-processor: templates write their own special tokens, and ByteLevel's would trim spaces out of the offsets.
        bare = {**definition, "post_processor": None, "truncation": None, "padding": None}
        self._engine = _load(bare)
        # The same engine that reads control tokens as plain text.
        escaped = [{**token, "special": token in controls or token["special"]} for token in added]
        self._escaping = _load({**bare, "added_tokens": escaped})
        self._escaping.encode_special_tokens = True
        self.size = self._engine.get_vocab_size(with_added_tokens=True)
        self.highest = max(self._engine.get_vocab(with_added_tokens=True).values(), default=0)
        self.width = 2 if self.highest < 1 << 16 else 4
        self._is_control = np.zeros(self.highest + 1, dtype=bool)
        self._is_control[sorted(self.controls)] = True
        self.renderer = Renderer(template, named, [token["content"] for token in controls])
        self._escapes = self._plain_marks and self._splits_alike([token["content"] for token in controls])

    def engine(self) -> Engine:
        """Name and version of the library, and the digest of the ids it gives to fixed strings."""
        ids = [self._engine.encode(text, add_special_tokens=False).ids for text in CANARY]
        return Engine(name="tokenizers", version=tokenizers.__version__, canary=digest(ids))

    def tokens(self, records: Sequence[Record], max_tokens: int, train_on: str = "assistant") -> list[Tokens]:
        """Ids and loss spans of every record, cut at `max_tokens`. Raises RenderingError naming the record."""
        out: list[Tokens] = []
        for start in range(0, len(records), BATCH):
            batch = records[start : start + BATCH]
            rendered = [self._render(record, train_on) for record in batch]
            encodings = self._engine.encode_batch([text.text for text in rendered], add_special_tokens=False)
            for record, text, encoding in zip(batch, rendered, encodings, strict=True):
                out.append(_cut(*self._spans(record, text, encoding), max_tokens))
        return out

    def _render(self, record: Record, train_on: str) -> Rendered:
        try:
            return self.renderer.render(record.messages, last_only=train_on == "last_assistant")
        except RenderingError as error:
            raise RenderingError(f"record {record.id}: {error}") from error

    def _spans(self, record: Record, text: Rendered, encoding: tokenizers.Encoding) -> tuple[NDArray[np.uint32], list[tuple[int, int]]]:
        ids = np.asarray(encoding.ids, dtype=np.uint32)
        for position in np.flatnonzero(self._is_control[ids]).tolist():
            start, end = _tight(text.text, *(encoding.token_to_chars(position) or (0, 0)))
            if any(start < stop and begin < end for begin, stop in text.contents):
                return self._escaped(record, text)
        spans = [_of_characters(encoding, start, end) for start, end in text.trained]
        return ids, [span for span in spans if span is not None]

    def _escaped(self, record: Record, text: Rendered) -> tuple[NDArray[np.uint32], list[tuple[int, int]]]:
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
        spans = []
        for begin, stop in text.trained:
            inside = [n for n, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < stop and begin < end]
            if inside:
                spans.append((inside[0], inside[-1] + 1))
        return np.asarray(ids, dtype=np.uint32), spans

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


def load(store: BlobStore, model: BaseModel) -> Codec:
    """The codec of a base model from its files in the store. Raises TokenizerError when it does not fit the model."""
    files = {name: store.get_bytes(model.model_files[name].sha256) for name in FILES if name in model.model_files}
    codec = Codec(files)
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


def _load(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise TokenizerError(f"tokenizer.json cannot be loaded by tokenizers {tokenizers.__version__}: {error}") from error


def _tight(text: str, start: int, end: int) -> tuple[int, int]:
    """Without the white space that an added token with lstrip or rstrip takes in."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _of_characters(encoding: tokenizers.Encoding, start: int, end: int) -> tuple[int, int] | None:
    """Token positions of the characters start..end; characters that the normaliser removed have no token."""
    first = next((token for at in range(start, end) if (token := encoding.char_to_token(at)) is not None), None)
    last = next((token for at in range(end - 1, start - 1, -1) if (token := encoding.char_to_token(at)) is not None), None)
    return None if first is None or last is None else (first, last + 1)


def _cut(ids: NDArray[np.uint32], spans: list[tuple[int, int]], max_tokens: int) -> Tokens:
    kept = [(start, min(end, max_tokens)) for start, end in spans if start < max_tokens]
    # One token cannot be trained twice, and token 0 has nothing before it to be predicted from.
    merged: list[tuple[int, int]] = []
    for start, end in sorted(kept):
        start = max(start, merged[-1][1] if merged else 1)
        if start < end:
            merged.append((start, end))
    return Tokens(ids=ids[:max_tokens], spans=np.array(merged, dtype=np.uint32).reshape(-1, 2), cut=max(0, len(ids) - max_tokens))
