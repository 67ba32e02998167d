"""fastokens behind its gate: the same ids and spans as the reference, or the reference with the reason."""

import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from repro_assets.data import engines, lines
from repro_assets.data.engines import EngineMismatch, Fastokens, Reference
from repro_assets.data.lines import Message, Record
from repro_assets.data.tokenizing import Codec
from repro_assets.trust.canonical import digest
from repro_assets_tests.data.material import CHATML, MARKED, SPECIAL, TEMPLATE, tokenizer_files

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = st.text(st.sampled_from("ab 1\n<|end>assistant|é你 \u200b\u0301'sT\u00a0")) | st.text() | st.sampled_from(engines.fuzz(SPECIAL, 400))
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


def with_pretokenizer(tokenizer_json: bytes, regex: str | None = None, **changed: Any) -> bytes:
    """The small tokenizer with the parts that models of today have."""
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    if regex is not None:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if changed.get("nfc"):
        tokenizer.normalizer = normalizers.NFC()
    definition = json.loads(tokenizer.to_str())
    definition["model"]["ignore_merges"] = bool(changed.get("ignore_merges"))
    return json.dumps(definition).encode()


def fallback_bpe() -> bytes:
    """A BPE that writes spaces as U+2581 and unknown characters as bytes, as Gemma's does."""
    pieces = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>", *(f"<0x{value:02X}>" for value in range(256))]
    pieces += ["\u2581", "a", "b", "\u2581a", "ab", "e", "\n"]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, [("\u2581", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in ("<|user|>", "<|assistant|>", "<|end|>")])
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def kinds(tokenizer_json: bytes) -> dict[str, bytes]:
    return {
        "gpt-2": tokenizer_json,
        "llama-3": with_pretokenizer(tokenizer_json, LLAMA3, ignore_merges=True),
        "qwen": with_pretokenizer(tokenizer_json, LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), nfc=True),
    }


@pytest.fixture(scope="module")
def pairs(kinds: dict[str, bytes]) -> dict[tuple[str, str], tuple[Codec, Codec]]:
    out = {}
    for kind, data in kinds.items():
        for template in (TEMPLATE, CHATML, MARKED):
            files = tokenizer_files(data, template)
            out[kind, template] = (Codec(files), Codec(files, engine="fastokens"))
    return out


def record(turns: Sequence[tuple[str, str]]) -> Record:
    messages = [Message(text, role) for pair in turns for text, role in zip(pair, ("user", "assistant"), strict=True)]
    return lines.make(messages, None, {}, "none")


def drawn() -> Record:
    """A record of the 1 % that is held against the reference."""
    return next(one for n in range(10_000) if engines.sampled((one := record([(f"question {n}", "answer")])).id))


def by_offsets(codec: Codec, chat: Record, limit: int = 10_000) -> tuple[list[int], list[list[int]]]:
    """Ids and spans as the reference's character offsets give them, without frames and without bytes."""
    rendered = codec.renderer.by_template(chat.messages)
    encoding = codec._engine.encode(rendered.text, add_special_tokens=False)
    ids, spans = codec._spans(chat, rendered, encoding)
    return ids.tolist(), [[max(1, start), end] for start, end in spans if end > 1]


@settings(max_examples=150)
@given(turns=TURNS, kind=st.sampled_from(["gpt-2", "llama-3", "qwen"]), template=st.sampled_from([TEMPLATE, CHATML, MARKED]))
def test_ids_and_spans_are_those_of_the_references_offsets_with_both_engines(
    pairs: dict[tuple[str, str], tuple[Codec, Codec]], turns: list[tuple[str, str]], kind: str, template: str
) -> None:
    """S1.12, S0.20: neither the faster engine nor the way without offsets shows in ids or masks, and a user's control tokens stay text."""
    slow, fast = pairs[kind, template]
    chat = record(turns)
    expected = by_offsets(slow, chat)
    for codec in (slow, fast):
        (tokens,) = codec.tokens([chat], 10_000)
        assert (tokens.ids.tolist(), tokens.spans.tolist()) == expected


def test_the_gate_admits_fastokens_on_the_tokenizers_of_today(pairs: dict[tuple[str, str], tuple[Codec, Codec]]) -> None:
    for slow, fast in pairs.values():
        assert (slow.engine().name, slow.engine().gate) == ("tokenizers", None)
        said = fast.engine()
        assert (said.name, said.canary) == ("fastokens", slow.engine().canary)
        assert said.gate == (
            f"fastokens {said.version} gave the ids of tokenizers {Reference.version} on 3095 strings; one record in 100 is held against it"
        )


def test_a_tokenizer_that_writes_spaces_otherwise_is_followed_by_bytes_too() -> None:
    codec = Codec(tokenizer_files(fallback_bpe(), TEMPLATE), engine="fastokens")
    assert codec._follows
    for turns in ([("a ab", "b aé")], [("\u2581a", " ")], [("你", "你\n")], [(" a <|end|>", "a")]):
        (tokens,) = codec.tokens([record(turns)], 100)
        assert (tokens.ids.tolist(), tokens.spans.tolist()) == by_offsets(codec, record(turns))


def test_a_record_gets_the_same_tokens_alone_and_among_others(pairs: dict[tuple[str, str], tuple[Codec, Codec]]) -> None:
    chats = [record([(text, text[::-1])]) for text in engines.fuzz(SPECIAL, 300)]
    slow, fast = pairs["qwen", CHATML]
    alone = [fast.tokens([chat], 500)[0] for chat in chats]
    for together in (slow.tokens(chats, 500), fast.tokens(chats, 500)):
        assert [one.ids.tolist() for one in together] == [one.ids.tolist() for one in alone]
        assert [one.spans.tolist() for one in together] == [one.spans.tolist() for one in alone]
        assert [one.cut for one in together] == [one.cut for one in alone]


def test_the_fuzz_strings_are_the_same_everywhere() -> None:
    """Golden: another set would be another gate."""
    strings = engines.fuzz(SPECIAL)
    assert len(strings) == 3000
    assert digest(strings) == "f811e6bddd6cba8aa2ecc881e267a7c7ea8cf842d2991e042571d903dffa63be"
    assert len({character for text in strings for character in text}) > 10_000


class OtherMerges(Fastokens):
    """fastokens itself, on a tokenizer that has lost a merge: it is right on most strings."""

    def __init__(self, definition: Mapping[str, Any]) -> None:
        super().__init__({**definition, "model": {**definition["model"], "merges": definition["model"]["merges"][:-1]}})


class Breaks(Fastokens):
    """Gives one wrong id in a text of which the gate knows nothing."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        ids, bounds = super().encode(texts)
        ids = ids.copy()
        for number, text in enumerate(texts):
            if "question" in text:
                ids[bounds[number] + 1] += 1
        return ids, bounds


class Panics(Fastokens):
    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        raise type("PanicException", (BaseException,), {})("index out of bounds")


def test_an_engine_that_differs_on_the_fuzz_set_is_not_used(tokenizer_json: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tokenizer_files(tokenizer_json, CHATML)
    monkeypatch.setattr(engines, "Fastokens", OtherMerges)
    codec = Codec(files, engine="fastokens")
    said = codec.engine()
    assert said.name == "tokenizers"
    assert said.gate is not None
    assert "refused, tokenizers used: it gives other ids than tokenizers" in said.gate
    assert Codec(files, engine="fastokens").engine() == said
    chat = record([("hello", "there")])
    assert codec.tokens([chat], 100)[0].ids.tolist() == Codec(files).tokens([chat], 100)[0].ids.tolist()


def test_an_engine_that_panics_is_not_used(tokenizer_json: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "Fastokens", Panics)
    said = Codec(tokenizer_files(tokenizer_json), engine="fastokens").engine()
    assert said.name == "tokenizers"
    assert "broke on the fuzz strings: index out of bounds" in str(said.gate)


def test_a_machine_without_fastokens_uses_the_reference_and_says_so(tokenizer_json: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    said = Codec(tokenizer_files(tokenizer_json), engine="fastokens").engine()
    assert (said.name, said.gate) == (
        "tokenizers",
        "fastokens refused, tokenizers used: fastokens is not installed: pip install fastokens, or set sharding.engine to tokenizers",
    )


def test_a_tokenizer_whose_tokens_are_not_the_texts_bytes_keeps_the_reference() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<|user|>": 1, "<|assistant|>": 2, "<|end|>": 3, "hi": 4}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    said = Codec(tokenizer_files(tokenizer.to_str().encode(), TEMPLATE), engine="fastokens").engine()
    assert said.name == "tokenizers"
    assert "gives no character offsets" in str(said.gate)


def test_a_wrong_id_in_a_sampled_record_stops_the_engine(tokenizer_json: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """S0.20: what the fuzz set does not know, one record in a hundred finds, the same one wherever it lies."""
    monkeypatch.setattr(engines, "Fastokens", Breaks)
    files = tokenizer_files(tokenizer_json, CHATML)
    codec = Codec(files, engine="fastokens")
    assert codec.engine().name == "fastokens"
    unseen = next(one for n in range(100) if not engines.sampled((one := record([(f"question {n}", "answer")])).id))
    codec.tokens([unseen], 100)
    with pytest.raises(EngineMismatch, match=f"record {drawn().id}: fastokens .* gives other tokens than tokenizers") as caught:
        codec.tokens([unseen, drawn()], 100)
    returned = pickle.loads(pickle.dumps(caught.value))
    assert (str(returned), returned.gate) == (str(caught.value), caught.value.gate)
    assert drawn().id not in returned.gate
    again = Codec(files, engine="fastokens", refused=returned.gate)
    assert (again.engine().name, again.engine().gate) == ("tokenizers", returned.gate)
    assert again.tokens([drawn()], 100)[0].ids.tolist() == Codec(files).tokens([drawn()], 100)[0].ids.tolist()


def test_one_record_in_a_hundred_is_drawn_by_its_digest_alone() -> None:
    ids = [digest(number) for number in range(20_000)]
    assert 150 < sum(engines.sampled(name) for name in ids) < 250
    assert [name for name in ids if engines.sampled(name)] == [name for name in reversed(ids) if engines.sampled(name)][::-1]


def test_a_text_that_the_normaliser_reorders_is_not_followed_by_bytes(pairs: dict[tuple[str, str], tuple[Codec, Codec]]) -> None:
    """The number of bytes stays the same, the bytes do not: character offsets then say where a token lies."""
    codec = pairs["qwen", TEMPLATE][1]
    for said, followed in (("q\u0323\u0307", True), ("q\u0307\u0323", False)):
        rendered = codec.renderer.render([Message(said, "user"), Message("a", "assistant")])
        ids, bounds = codec._backend.encode([rendered.text])
        assert (0 in codec._bytes.spans([rendered], ids, bounds, codec._is_control)) is followed


def test_a_control_token_that_takes_in_the_white_space_behind_it_moves_no_span(tokenizer_json: bytes) -> None:
    """As Phi-3's do: the token stands for more bytes than it has characters."""
    definition = json.loads(tokenizer_json)
    for added in definition["added_tokens"]:
        added["rstrip"] = added["content"] == "<|assistant|>"
    for engine in ("tokenizers", "fastokens"):
        codec = Codec(tokenizer_files(json.dumps(definition).encode(), CHATML), engine)
        for said in ("a", "ab", "  b c", "\n"):
            chat = record([("question", said), ("again", said)])
            (tokens,) = codec.tokens([chat], 1000)
            assert (tokens.ids.tolist(), tokens.spans.tolist()) == by_offsets(codec, chat)
