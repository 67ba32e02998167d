"""The cache of words in front of the reference tokenizer: always the reference's own ids, on any text, warm or cold, or it is not used."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from repro_assets.data import engines, sharding, word_cache
from repro_assets.data.engines import Reference
from repro_assets.data.tokenizing import Codec
from repro_assets.data.word_cache import WordCache
from repro_assets.documents import BaseModel, Records
from repro_assets.recipe import ShardingSection
from repro_assets.trust.blob import FolderStore
from repro_assets_tests.data.material import CHATML, GSM8K, SPECIAL, Raw, row, tokenizer_files
from repro_assets_tests.data.test_engines import LLAMA3, fallback_bpe, record

O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MakeRaw = Callable[[Mapping[str, bytes]], Raw]
KINDS = ("gpt-2", "llama-3", "qwen", "o200k", "digits", "lines")
PIECES = [
    "the",
    "The",
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u2028",
    "\x1c",
    "\x00",
    "\x01",
    ".",
    ",",
    "'s",
    "'LL",
]
PIECES += [
    "12",
    "3",
    "é",
    "e\u0301",
    "\u0301",
    "你好",
    "🙂",
    "_",
    "#",
    "(",
    ")",
    "--",
    "ß",
    "٣",
    "½",
    *SPECIAL,
    "<|en",
    "d|>",
    "\x85",
    "\u200b",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=60) | st.sampled_from(engines.fuzz(SPECIAL, 400))


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {"gpt-2": GPT2, "llama-3": LLAMA3, "qwen": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), "o200k": O200K}
CONTROLS = [*SPECIAL, "<|end|>s", "<|use"]


def trained(regex: str, nfc: bool = False, digits: bool = False) -> dict[str, Any]:
    """A BPE with the merges that this pattern gives on text with runs of every white space, as models of today have them."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), *steps] if digits else steps)
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    words = [word for line in GSM8K.read_text().splitlines() for word in json.loads(line)["question"].split()]
    ends = (
        *([" "] * 12),
        *(", ", ".\n", "\n", "\n\n", ".\n\n", "  ", "   ", " \n", "\n ", "\n    ", "\t", "\r\n", "\n\n\n", "'s ", "(", "é ", "!?\n"),
    )
    text = "".join(word + ends[n * n % 29] for n, word in enumerate(words))
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=CONTROLS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # Texts of nothing but white space, or the vocabulary has no token for a run that the pattern would take apart before a word.
    runs = ["\n\n\n", "\n\n", "\n", "   ", "  ", "\t\t", "\t ", " \n", "\n ", "\n\n  ", "\n  \n"] * 40
    tokenizer.train_from_iterator([*(text[at : at + 1000] for at in range(0, len(text), 1000)), *runs], trainer)
    return {**json.loads(tokenizer.to_str()), "post_processor": None}


def definition_of(kind: str) -> dict[str, Any]:
    made = trained(PATTERNS.get(kind, GPT2), nfc=kind == "qwen", digits=kind == "digits")
    if kind == "llama-3":
        made["model"]["ignore_merges"] = True
    if kind == "lines":
        # Pre-tokens of many words, but merges that stay within words: cutting them changes nothing.
        made["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"[^\n]*\n?"}
    return made


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Reference, WordCache]]:
    out = {}
    for kind in KINDS:
        definition = definition_of(kind)
        reference = Reference(definition)
        cache = word_cache.admit(reference, definition)
        assert cache is not None, kind
        out[kind] = (reference, cache)
    return out


@settings(max_examples=400)
@example(texts=["a  b", "a \n\nb", "a\n b", " a", "a ", "a\n", "\n", "", "a\x00b c", "a\x01 b", "x.\n\n\ny z", "a.\n\nb c"], kind="gpt-2")
@given(texts=st.lists(TEXTS, max_size=4), kind=st.sampled_from(KINDS))
def test_ids_are_the_librarys_cold_and_warm(pairs: dict[str, tuple[Reference, WordCache]], texts: list[str], kind: str) -> None:
    reference, cache = pairs[kind]
    fresh = WordCache(reference, CONTROLS)
    for turn in (fresh, fresh, cache):
        assert engines.difference(reference, turn, texts) is None


def test_words_that_were_met_are_not_asked_for_again(
    pairs: dict[str, tuple[Reference, WordCache]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _cache = pairs["llama-3"]
    cache = WordCache(reference, SPECIAL)
    text = "<|user|>\nIs the order, as of 12 May, on its way?\nYes.\n\nThe order left.<|end|>\n"
    expected = cache.encode([text])[0].tolist()
    asked: list[str] = []
    whole = WordCache._asked
    monkeypatch.setattr(WordCache, "_asked", lambda self, piece: asked.append(piece) or whole(self, piece))
    assert cache.encode([text])[0].tolist() == expected == reference.encode([text])[0].tolist()
    assert not asked
    assert cache.encode(["<|user|>\nIs the order, as of yesterday, on its way?\n"])[0].tolist()
    assert asked == [" yesterday"]


def test_memory_is_bounded_and_what_was_forgotten_comes_back(
    pairs: dict[str, tuple[Reference, WordCache]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_cache, "WORDS", 50)
    reference, _cache = pairs["gpt-2"]
    cache = WordCache(reference, SPECIAL)
    texts = [f"<|user|>\nnumber {n} and {n * n}, the same\n" for n in range(400)]
    for _turn in range(2):
        assert engines.difference(reference, cache, texts) is None
        assert len(cache._words) <= 50
        assert len(cache._words._before) <= 50
        assert len(cache._pieces) <= 50
    made: list[str] = []
    whole = WordCache.composed
    monkeypatch.setattr(WordCache, "composed", lambda self, text: made.append(text) or whole(self, text))
    cache.encode(texts)
    assert " and" not in made  # met in every text, it outlives every turn of the halves
    assert len(made) > 300


def test_text_without_spaces_does_not_fill_the_memory(pairs: dict[str, tuple[Reference, WordCache]]) -> None:
    reference, _cache = pairs["gpt-2"]
    cache = WordCache(reference, CONTROLS)
    texts = ["你好世界" * 40 + f"{n}。" + "再见" * 30 + f"{n}\n\x00{n}" * (n % 2) for n in range(300)]
    assert engines.difference(reference, cache, texts) is None
    kept = [*cache._words, *cache._pieces]
    assert sum(map(len, kept)) < 10_000
    assert max(map(len, kept), default=0) <= word_cache.LONGEST


def changed(definition: dict[str, Any], **token: Any) -> dict[str, Any]:
    added = [{**one, **(token if one["content"] == "<|user|>" else {})} for one in definition["added_tokens"]]
    return {**definition, "added_tokens": added}


REFUSED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a control token that takes in white space": lambda d: changed(d, rstrip=True),
    "a control token with a space in it": lambda d: changed(d, content="<| user |>"),
    "a control token of whole words": lambda d: changed(d, single_word=True),
    "a control token that is looked for in normalised text": lambda d: changed(d, normalized=True),
    "a normaliser that writes other characters": lambda d: {**d, "normalizer": {"type": "Lowercase"}},
    "a space put before each piece": lambda d: {
        **d,
        "pre_tokenizer": {**d["pre_tokenizer"]["pretokenizers"][-1], "add_prefix_space": True},
    },
    "words with another ending": lambda d: {**d, "model": {**d["model"], "end_of_word_suffix": "</w>"}},
    "no pre-tokenizer": lambda d: {**d, "pre_tokenizer": None},
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_tokenizer_of_parts_that_may_look_over_a_cut_is_not_cached(case: str) -> None:
    definition = definition_of("gpt-2")
    assert word_cache.cuttable(definition)
    assert not word_cache.cuttable(REFUSED[case](definition)), case


def test_tokenizers_of_other_families_are_not_cached() -> None:
    definition = json.loads(fallback_bpe())
    assert word_cache.admit(Reference(definition), definition) is None
    pieces = json.loads(Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).to_str())
    assert word_cache.admit(Reference(pieces), pieces) is None


@pytest.mark.parametrize(
    ("regex", "token"),
    [
        (r"\p{L}+ \p{L}+|\s+|\S+", "of the"),  # two words at once
        (r"[^\n]*\n?", "e "),  # whole lines
        (r"\p{L}+[,.]?\s?|\s+|\S", "the "),  # the space belongs to the word before it
        (r" ?\p{L}+[,.]?| ?\S|\s+", "s."),  # so does the stop
    ],
)
def test_a_vocabulary_with_tokens_over_a_cut_is_refused_however_rare_they_are(regex: str, token: str) -> None:
    definition = trained(regex)
    assert word_cache.cuttable(definition)
    reference = Reference(definition)
    assert token in word_cache.crossing(reference)
    assert word_cache.admit(reference, definition) is None


def test_one_rare_merge_over_a_cut_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial string has it, but a text may."""
    definition = definition_of("lines")
    model = definition["model"]
    for left, right in (("\u0120", "Q"), ("x", "\u0120Q")):
        model["merges"].append([left, right])
        model["vocab"].setdefault(left + right, len(model["vocab"]))
    reference = Reference(definition)
    assert word_cache.admit(reference, definition) is None
    monkeypatch.setattr(word_cache, "crossing", lambda _reference: [])
    cache = word_cache.admit(reference, definition)
    assert cache is not None
    assert engines.difference(reference, cache, ["x Q"]) is not None


@pytest.mark.parametrize(
    "regex",
    [
        r" ?\p{L}+(?= \p{L})|.|\s",  # what follows decides
        r"(?<=\n)\p{L}+ ?|(?<=[,.] )\S| ?\S+|\s+",  # what stands before decides
    ],
)
def test_a_pattern_that_looks_over_a_cut_is_found_by_the_trial(regex: str) -> None:
    definition = definition_of("gpt-2")
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": regex}
    reference = Reference(definition)
    assert word_cache.cuttable(definition)
    assert not word_cache.crossing(reference)
    assert word_cache.admit(reference, definition) is None


@pytest.fixture
def chats(raw: MakeRaw) -> Records:
    texts = [f"What became of order {n}? It left on day {n % 7}, they said.\n\nOr not." for n in range(900)]
    return raw({"a.jsonl": b"".join(row(text) + b"\n" for text in texts)}).records()


def test_shards_are_the_same_with_and_without_the_cache(
    chats: Records, base_model: BaseModel, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0.20: the cache is no part of any identity."""
    monkeypatch.setattr(word_cache, "WORTHWHILE", 10_000)
    used: list[int] = []
    whole = WordCache.encode
    monkeypatch.setattr(WordCache, "encode", lambda self, texts: used.append(len(texts)) or whole(self, texts))
    cached, _observed = sharding.build(chats, base_model, ShardingSection(), store)
    assert used
    used.clear()
    sharding._kept.clear()
    monkeypatch.setenv("REPRO_WORD_CACHE", "off")
    plain, _observed = sharding.build(chats, base_model, ShardingSection(), store)
    assert not used
    assert cached == plain
    assert plain.engine.gate is None


def test_a_wrong_id_out_of_the_cache_in_a_sampled_record_drops_all_that_it_made(
    chats: Records, base_model: BaseModel, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, _observed = sharding.build(chats, base_model, ShardingSection(), store)
    monkeypatch.setattr(word_cache, "WORTHWHILE", 10_000)
    whole = WordCache.composed

    def wrong(cache: WordCache, text: str) -> bytes:
        """The bytes of the text, in other tokens."""
        return whole(cache, " ") + whole(cache, "order") if text == " order" else whole(cache, text)

    monkeypatch.setattr(word_cache, "admit", lambda reference, _definition: WordCache(reference, SPECIAL))
    monkeypatch.setattr(WordCache, "composed", wrong)
    sharding._kept.clear()
    with pytest.raises(engines.EngineMismatch, match="the cache of words gives other tokens than tokenizers"):
        codec = Codec(tokenizer_files(store.get_bytes(base_model.model_files["tokenizer.json"].sha256), CHATML))
        codec.tokens([record([(f"What of order {n}", "fine")]) for n in range(1000)], 100)
    shards, _observed = sharding.build(chats, base_model, ShardingSection(), store)
    assert shards == right
