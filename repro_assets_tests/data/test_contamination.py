"""Contamination: items found word for word and by n-grams, at the limits of share and length, in every kind of record."""

import unicodedata

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro_assets.data.contamination import Evaluated
from repro_assets.data.errors import DataError
from repro_assets.data.lines import Message, normal_text
from repro_assets.recipe import RecordsSection, Source
from repro_assets.trust.canonical import canonical, sha256

ITEM = " ".join(f"word{number}" for number in range(20))


def prompts(*texts: str) -> bytes:
    rows = [{"item": str(number), "suite": "gsm8k", "text": normal_text(text)} for number, text in enumerate(texts)]
    return b"".join(canonical(row) + b"\n" for row in rows)


def section(kind: str, words: int = 13, share: float = 0.5) -> RecordsSection:
    how = {"contamination": kind, "contamination_words": words, "contamination_share": share}
    return RecordsSection(sources=(Source(match="**", shape="messages"),), **how)  # type: ignore[arg-type]


def turns(*texts: str, role: str = "user") -> tuple[Message, ...]:
    return (*(Message(content=text, role=role) for text in texts), Message(content="an answer", role="assistant"))


def found(kind: str, messages: tuple[Message, ...], *items: str, words: int = 13, share: float = 0.5) -> str | None:
    return Evaluated.build(prompts(*items), section(kind, words, share)).find(messages)


def test_an_item_is_found_whatever_its_case_and_spaces_in_a_turn_or_in_the_turns_joined() -> None:
    detail = "the prompt is the evaluation item gsm8k/0"
    for kind in ("exact", "ngram"):
        assert found(kind, turns("hello", " WHAT is\n2+2? "), "What is 2+2?") == detail
        assert found(kind, turns("What is", "2+2?"), "What is 2+2?") == detail
        assert found(kind, (Message(content="what is 2+2?", role="text"),), "What is 2+2?") == detail
        assert found(kind, turns("What is 2+3?"), "What is 2+2?") is None
    assert found("off", turns("What is 2+2?"), "What is 2+2?") is None


@given(
    st.lists(st.text(st.sampled_from("aBς\u0301\u0130ßé你\u1100\u1161.")) | st.text(max_size=6), min_size=1, max_size=6),
    st.sampled_from([" ", "  ", "\n", "\u2003", "\x1f", "\u00a0 "]),
    st.booleans(),
)
def test_a_prompt_that_folds_to_an_item_is_found_however_it_is_written(words: list[str], between: str, upper: bool) -> None:
    text = between.join(words)
    written = unicodedata.normalize("NFD", text.upper() if upper else text)
    if normal_text(text) and normal_text(text) == normal_text(written):
        assert found("exact", turns(written), text) == "the prompt is the evaluation item gsm8k/0"


def test_an_item_inside_a_longer_prompt_is_found_by_ngrams_and_not_by_exact_comparison() -> None:
    longer = turns(f"Please solve this for me: {ITEM.upper()} Thank you.")
    assert found("exact", longer, ITEM) is None
    assert found("ngram", longer, "something else", ITEM) == "100 % of the 13-grams of the evaluation item gsm8k/1"


def test_an_item_shorter_than_an_ngram_is_compared_whole_only() -> None:
    """Else a greeting that is an item would take out every conversation that happens to say no more than that."""
    across = (Message(content="hello", role="user"), Message(content="there", role="assistant"))
    assert found("ngram", across, "hello there", ITEM) is None
    assert found("ngram", turns("hello there"), "hello there", ITEM) == "the prompt is the evaluation item gsm8k/0"


def test_ngrams_are_looked_for_in_every_turn_and_in_text_records() -> None:
    quoted = (Message(content="ask me", role="user"), Message(content=f"The question was: {ITEM}", role="assistant"))
    detail = "100 % of the 13-grams of the evaluation item gsm8k/0"
    assert found("ngram", quoted, ITEM) == detail
    assert found("ngram", (Message(content=f"page 1 {ITEM} page 2", role="text"),), ITEM) == detail
    half, rest = ITEM[: ITEM.index(" word9")], ITEM[ITEM.index("word9") :]
    between = (Message(content=half, role="user"), Message(content="go on", role="assistant"), Message(content=rest + " x", role="user"))
    assert found("ngram", between, ITEM) == detail


@pytest.mark.parametrize(("kept", "detail"), [(16, "50 % of the 13-grams"), (15, None), (20, "100 % of the 13-grams")])
def test_the_share_of_ngrams_decides_and_equal_is_enough(kept: int, detail: str | None) -> None:
    """20 words have 8 13-grams; the first 16 words have 4 of them."""
    text = " ".join(ITEM.split()[:kept]) + " and other words that no item has at all in it anywhere"
    said = found("ngram", turns(text), ITEM)
    assert said is None if detail is None else said is not None and said.startswith(detail)


@pytest.mark.parametrize(("words", "hit"), [(12, False), (13, True)])
def test_an_item_with_fewer_words_than_an_ngram_is_compared_whole_only(words: int, hit: bool) -> None:
    item = " ".join(ITEM.split()[:words])
    assert found("ngram", turns(item), item) == "the prompt is the evaluation item gsm8k/0"
    assert (found("ngram", turns(f"so: {item} ?"), item) is not None) == hit


def test_the_item_with_the_largest_share_is_named_and_the_first_of_equal_ones() -> None:
    other = " ".join(f"thing{number}" for number in range(20))
    half = " ".join(other.split()[:16])
    assert found("ngram", turns(f"{half} . {ITEM} !"), other, ITEM) == "100 % of the 13-grams of the evaluation item gsm8k/1"
    assert found("ngram", turns(f"x {ITEM}"), "y", ITEM + " ", ITEM) == "100 % of the 13-grams of the evaluation item gsm8k/1"


def test_repeating_one_ngram_of_an_item_does_not_make_it_contaminated() -> None:
    first = " ".join(ITEM.split()[:13])
    assert found("ngram", turns(f"{first} {first} {first} {first} {first} {first}"), ITEM) is None


def test_an_item_that_repeats_itself_counts_each_of_its_ngrams_once() -> None:
    detail = "100 % of the 13-grams of the evaluation item gsm8k/0"
    assert found("ngram", turns("so: " + "la li lu " * 6), "la li lu " * 20) == detail
    assert found("ngram", turns("so: " + "la li lu " * 6), "la li lu " * 20 + ITEM) is None


def test_the_digest_is_of_the_prompts_and_nothing_else() -> None:
    data = prompts("one", "two")
    made = [
        Evaluated.build(data, section("exact")),
        Evaluated.build(data.splitlines(keepends=True), section("ngram", 5)),
        Evaluated.build(data.splitlines(), section("exact")),
    ]
    assert {one.digest for one in made} == {sha256(data)}
    assert Evaluated.build(data, section("off")).digest == ""
    assert Evaluated.build(prompts("one"), section("exact")).digest != sha256(data)


def test_broken_prompts_are_refused_with_line_and_remedy() -> None:
    with pytest.raises(DataError, match=r"prompts, line 2, cannot be read: .*materialize eval_suites again"):
        Evaluated.build(prompts("one") + b'{"item": 3}\n', section("exact"))


def test_real_items_are_found_in_rewritten_prompts_and_clean_rows_are_not(gsm8k: bytes) -> None:
    rows = [msgspec.json.decode(line)["question"] for line in gsm8k.splitlines()]
    items, clean = rows[:200], rows[200:]
    evaluated = Evaluated.build(prompts(*items), section("ngram", 8))
    assert [text for text in clean if evaluated.find(turns(text))] == []
    changed = [f"Solve step by step. {text} Show your work." for text in items if len(text.split()) >= 8]
    assert all(evaluated.find(turns(text)) for text in changed)


def test_many_records_at_once_are_found_as_each_alone(gsm8k: bytes) -> None:
    rows = [msgspec.json.decode(line)["question"] for line in gsm8k.splitlines()][:60]
    evaluated = Evaluated.build(prompts(*rows[:20]), section("ngram", 6))
    records = [turns(text) for text in rows] + [turns("well:", text, "?") for text in rows] + [turns(""), (), turns(rows[0], role="text")]
    said = evaluated.find_all(records)
    assert said == [evaluated.find(messages) for messages in records]
    assert sum(detail is not None for detail in said) == 41
    assert evaluated.find_all([]) == []


WORDS = st.lists(st.sampled_from(["What", "is", "the", "Größe", "e\u0301tude", "of", "a", "\u2003", "x" * 70]), min_size=1, max_size=30)


@given(WORDS, st.sampled_from([" ", "  ", "\n", "\u00a0"]))
def test_a_long_text_that_is_an_item_is_found_however_it_is_spaced_and_cased(words: list[str], space: str) -> None:
    item = normal_text(" ".join(words))
    found = Evaluated.build(prompts(item), section("exact"))
    spaced = space.join(words)
    said = spaced.upper() if normal_text(spaced.upper()) == item else spaced
    if item:
        assert found.find((Message(said, "user"),)) == "the prompt is the evaluation item gsm8k/0"
    assert found.find((Message(f"{said} and more", "user"),)) is None
