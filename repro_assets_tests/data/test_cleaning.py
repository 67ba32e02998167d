"""Cleaning: what each step takes out and leaves, the order of steps, that a second cleaning changes nothing."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro_assets.data.cleaning import clean, composes, strings, untouched, without_controls
from repro_assets.data.lines import Message, said_by
from repro_assets.data.readers import Unfit
from repro_assets.recipe import RecordsSection, Source

SOURCES = (Source(match="**", shape="messages"),)
HARD = st.sampled_from(
    list(
        "ab \t\n\r\x00\x0b\x1f\x7f\x85\xa0\xad\u0301\u0327\u061c\u1100\u1161\u11a8\u2000\u200b\u200c\u200d\u200e\u202e\u2028\u2066\u3000\ufdd0\ufeff"
    )
    + list("\uffff\U0001f469\U0001f680\U0001fffe\U0010ffff\u212b\u0344éÅ")
)
TEXTS = st.one_of(st.text(HARD, max_size=30), st.text(max_size=30))


def section(**how: Any) -> RecordsSection:
    return RecordsSection(sources=SOURCES, **how)


def one(text: str, **how: Any) -> tuple[str, tuple[str, ...]]:
    (message,), steps = clean((Message(content=text, role="user"),), section(**how))
    return message.content, steps


@pytest.mark.parametrize(
    ("text", "how", "cleaned", "steps"),
    [
        ("e\u0301", {}, "é", ("nfc",)),
        ("e\u0301", {"normalize": "none"}, "e\u0301", ()),
        ("a\x00b\x1b[31mc\x7f\x9f", {}, "ab[31mc", ("controls",)),
        ("a\tb\r\nc\n", {}, "a\tb\r\nc\n", ()),
        ("\ufeffif admin\u202e\u2066 // \u2069\u2066begin", {}, "if admin // begin", ("controls",)),
        ("\u061c\u200e\u200fא", {}, "א", ("controls",)),
        ("x\ufdd0\uffff\U0001fffe\U0010ffffy", {}, "xy", ("controls",)),
        ("👩\u200d🚀 می\u200cخواهم", {}, "👩\u200d🚀 می\u200cخواهم", ()),
        ("a\x00b", {"controls": "keep"}, "a\x00b", ()),
        ("e\x00\u0301", {}, "é", ("nfc", "controls")),
        ("  a  b\n", {"whitespace": "trim"}, "a  b", ("whitespace",)),
        ("a  b\n    if c:\n\td \u00a0 e  \n", {"whitespace": "collapse"}, "a b\n    if c:\n\td e", ("whitespace",)),
        ("a \n b", {"whitespace": "collapse"}, "a \n b", ()),
        ("\x00 e\u0301 ", {"whitespace": "trim"}, "é", ("nfc", "controls", "whitespace")),
    ],
)
def test_each_step_changes_what_it_names_and_nothing_else(text: str, how: dict[str, Any], cleaned: str, steps: tuple[str, ...]) -> None:
    assert one(text, **how) == (cleaned, steps)


@given(TEXTS, st.sampled_from(["NFC", "none"]), st.sampled_from(["drop", "keep"]), st.sampled_from(["keep", "trim", "collapse"]))
def test_a_second_cleaning_changes_nothing(text: str, normalize: str, controls: str, whitespace: str) -> None:
    how = {"normalize": normalize, "controls": controls, "whitespace": whitespace}
    try:
        once, steps = one(text, **how)
    except Unfit:
        return
    assert one(once, **how) == (once, ())
    assert (once != text) or not steps
    if normalize == "NFC":
        assert unicodedata.is_normalized("NFC", once)


@given(TEXTS)
def test_the_fast_ways_take_out_what_the_definition_says(text: str) -> None:
    """The definition: category Cc but tab and line ends, the bidirectional controls, U+FEFF, the 66 noncharacters."""
    bidirectional = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF}

    def goes(character: str) -> bool:
        code = ord(character)
        nonchar = 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
        return (unicodedata.category(character) == "Cc" and character not in "\t\n\r") or code in bidirectional or nonchar

    expected = "".join(character for character in text if not goes(character))
    assert without_controls(text) == expected
    assert (without_controls(text) is text) == (expected == text)


def test_every_code_point_is_kept_or_dropped_by_the_definition() -> None:
    dropped = {code for code in range(0x110000) if without_controls("é" + chr(code)) == "é"}
    assert len(dropped) == 29 + 1 + 32 + 12 + 1 + 66  # C0 but three, DEL, C1, bidirectional, U+FEFF, noncharacters
    assert dropped >= {0, 0x7F, 0x9F, 0x061C, 0x202E, 0x2069, 0xFEFF, 0xFDD0, 0x10FFFF}
    assert not dropped & {9, 10, 13, 0xAD, 0x200B, 0x200C, 0x200D, 0x2028}


def test_clean_messages_come_back_as_they_are() -> None:
    messages = (Message(content="Grüße", role="user"), Message(content="fine\n", role="assistant"))
    cleaned, steps = clean(messages, section(whitespace="keep"))
    assert cleaned is messages
    assert steps == ()


@pytest.mark.parametrize("text", ["\u200e\u202c", "\x00 \x00", "\ufeff\n"])
def test_a_text_that_cleaning_empties_is_unfit_and_the_error_says_which(text: str) -> None:
    with pytest.raises(Unfit, match=r"empty: messages\[1\]\.content: no text is left after cleaning"):
        clean((Message(content="x", role="user"), Message(content=text, role="assistant")), section())


def test_strings_in_tool_calls_are_cleaned_and_their_json_stays_canonical() -> None:
    calls = '[{"arguments":{"a":"e\u0301\\u0000","b":[1,true,null,"  x  "]},"name":"f"}]'
    assert strings(calls, lambda text: unicodedata.normalize("NFC", without_controls(text))) == (
        '[{"arguments":{"a":"é","b":[1,true,null,"  x  "]},"name":"f"}]'
    )
    assert strings(calls, lambda text: text) is calls
    calling = Message(content="", role="assistant", tool_calls=calls)
    answer = Message(content="  42", role="tool", name="f\u202e")
    (called, answered), steps = clean((calling, answer), section(whitespace="trim"))
    assert called.tool_calls == '[{"arguments":{"a":"é","b":[1,true,null,"  x  "]},"name":"f"}]'
    assert answered == Message(content="42", role="tool", name="f")
    assert steps == ("nfc", "controls", "whitespace")


# ---- the short cut


@given(
    st.lists(TEXTS.filter(lambda text: not text.isspace() and bool(text)), min_size=1, max_size=3),
    st.sampled_from(["drop", "keep"]),
    st.sampled_from(["NFC", "none"]),
    st.sampled_from(["keep", "trim", "collapse"]),
)
def test_what_is_untouched_at_a_glance_is_what_cleaning_leaves_alone(
    texts: list[str], controls: str, normalize: str, whitespace: str
) -> None:
    how = section(controls=controls, normalize=normalize, whitespace=whitespace)
    messages = tuple(Message(text, "user") for text in texts)
    if untouched(said_by(messages), messages, how):
        assert clean(messages, how) == (messages, ())


@pytest.mark.parametrize("text", ["plain", "Grüße, naïve", "你好 здравствуй", "emoji 🙂 and 👩‍💻", "a\nb\tc", 'quoted "x" and C:\\new'])
def test_ordinary_text_is_untouched_at_a_glance(text: str) -> None:
    messages = (Message(text, "user"),)
    assert untouched(said_by(messages), messages, section())
    assert untouched(said_by(messages), messages, section(whitespace="trim"))
    assert untouched(said_by(messages), messages, section(whitespace="collapse")) == ("\t" not in text)


@pytest.mark.parametrize("text", ["e\u0301", "\u1100\u1161", "\u0915\u093c", "a\x00b", "a\x7fb", "\u202eabc", "\x85", "\ufeffx", "\u2126"])
def test_text_that_a_step_would_change_is_not(text: str) -> None:
    messages = (Message(text, "user"),)
    assert not untouched(said_by(messages), messages, section())


@pytest.mark.parametrize(
    ("text", "mode"), [(" a", "trim"), ("a\n", "trim"), ("a  b", "collapse"), ("a\u3000 b", "collapse"), ("a\u00a0", "trim")]
)
def test_white_space_that_a_step_would_change_is_seen_at_a_glance(text: str, mode: str) -> None:
    messages = (Message(text, "user"),)
    assert untouched(said_by(messages), messages, section())
    assert not untouched(said_by(messages), messages, section(whitespace=mode))


def test_every_character_that_nfc_may_join_with_one_before_it_is_known_as_such() -> None:
    joined = set()
    for code in range(0x80, 0x110000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            joined.add(chr(int(parts[1], 16)))
    syllables = unicodedata.normalize("NFD", "".join(chr(code) for code in range(0xAC00, 0xD7A4, 7)))
    joined |= {character for character in syllables if character >= "\u1161"}
    assert len(joined) > 80
    assert [character for character in sorted(joined) if not composes(character)] == []
