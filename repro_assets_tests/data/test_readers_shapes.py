"""Shapes of rows: tools in chats, instructions, preference pairs, raw text; and identities that plain messages keep."""

import io
import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro_assets.data import lines, readers, rows
from repro_assets.data.errors import SourceError
from repro_assets.data.lines import Message
from repro_assets.data.readers import Bad, Row, read
from repro_assets.recipe import Source
from repro_assets.trust.canonical import canonical, digest, sha256

CHAT = Source(match="**", shape="messages")
INSTRUCTION = Source(match="**", shape="instruction", fields={"system": "sys"})
PREFERENCE = Source(match="**", shape="preference")
TEXT = Source(match="**", shape="text", fields={"text": "body", "id": "n"})
CALL = {"id": "call_9", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
USER = {"role": "user", "content": "Weather?"}


def one(value: Any, source: Source) -> Row | Bad:
    (found,) = read("a.jsonl", "jsonl", io.BytesIO(json.dumps(value).encode()), source)
    return found


def messages(value: Any, source: Source) -> list[tuple[str, str]]:
    found = one(value, source)
    assert isinstance(found, Row), found
    return [(message.role, message.content) for message in found.messages]


def chat(*turns: Any) -> Row | Bad:
    return one({"messages": list(turns)}, CHAT)


def reason(found: Row | Bad, expected: str, detail: str) -> None:
    assert isinstance(found, Bad), found
    assert (found.reason, bool(re.search(detail, found.detail))) == (expected, True), found
    assert found.reason in readers.REASONS


# ---- tools


def test_tool_turns_and_calls_are_kept() -> None:
    found = chat(
        {"role": "system", "content": "Help."},
        {**USER, "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "", "tool_call_id": "call_9", "name": "weather"},
        {"role": "assistant", "content": "Dry."},
    )
    assert isinstance(found, Row)
    call = canonical([{"function": CALL["function"], "type": "function"}]).decode()
    assert found.messages == (
        Message("Help.", "system"),
        Message("Weather?", "user", name="ann"),
        Message("", "assistant", tool_calls=call),
        Message("", "tool", name="weather"),
        Message("Dry.", "assistant"),
    )


def test_ids_of_calls_are_no_part_of_a_record_and_their_order_says_what_they_said() -> None:
    def talk(*names: str, answers: tuple[str, ...]) -> Row | Bad:
        calls = [{**CALL, "id": name, "function": {"name": f"f{n}"}} for n, name in enumerate(names)]
        turns = [{"role": "tool", "content": f"r{n}", "tool_call_id": name} for n, name in enumerate(answers)]
        return chat(USER, {"role": "assistant", "content": "", "tool_calls": calls}, *turns, {"role": "assistant", "content": "ok"})

    first, second = talk("a", "b", answers=("a", "b")), talk("x", "y", answers=("x", "y"))
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert lines.identity(first.messages) == lines.identity(second.messages)
    reason(talk("a", "b", answers=("b", "a")), "wrong_type", r"messages\[2\].tool_call_id: answers a later call first")
    reason(talk("a", answers=("c",)), "wrong_type", "no earlier turn made a call of this id")
    reason(talk("a", answers=("a", "a")), "wrong_type", "still without an answer")


@pytest.mark.parametrize(
    ("turn", "detail"),
    [
        ({"role": "assistant", "content": "x", "tool_calls": "f()"}, "tool_calls: a string, not an array of calls"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, r"tool_calls\[0\]: not an object that names its function"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "calls of tools in a turn of the user"),
        ({"role": "user", "content": "x", "tool_call_id": "call_9"}, "an answer to a call in a turn of the user"),
        ({"role": "assistant", "content": "x", "tool_calls": [{**CALL, "n": 2**60}]}, "tool_calls: no canonical JSON"),
        ({"role": "assistant", "content": "x", "name": 3}, "name: a number, not a string"),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "holds 'refusal' beside role and content"),
        ({"role": "tool", "content": {"x": 1}}, "content: a object|an object"),
    ],
)
def test_a_turn_that_would_lose_something_is_set_aside(turn: dict[str, Any], detail: str) -> None:
    reason(chat(USER, turn, {"role": "assistant", "content": "fine"}), "wrong_type", detail)


def test_a_turn_that_calls_nothing_has_to_say_something() -> None:
    reason(chat(USER, {"role": "assistant", "content": "", "tool_calls": []}), "empty", "no text")
    reason(chat(USER, {"role": "assistant", "content": None, "tool_calls": None}), "missing_field", "content")
    reason(chat(USER, {"role": "developer", "content": "x"}), "unknown_role", "known: system, user, assistant, tool")


# ---- identities


def test_plain_messages_keep_the_identity_that_they_had_before_there_were_tools() -> None:
    turns = (Message("q \u00e9\u2028\x7f", "user"), Message("a", "assistant"))
    assert lines.identity(turns).hex() == sha256('[{"content":"q é\u2028\x7f","role":"user"},{"content":"a","role":"assistant"}]'.encode())
    record = lines.make([Message("q", "user"), Message("a", "assistant")], "k", {"s": "v"})
    # Digests written down before `name` and `tool_calls` were fields of a message.
    assert record.id == "802c07c64a696eb461a3b1df545862087eb9ea3487512369339a5e6ee286526d"
    assert sha256(lines.encode(record)) == "6785bb9dd3a6554e62ebeb61b1d3b1bc65725b7da607c1209e57b43ac484d428"


def test_a_record_with_tools_is_canonical_json_too_and_comes_back_as_it_was() -> None:
    turns = [
        Message("w", "user", name="ann"),
        Message("", "assistant", tool_calls=canonical([{"function": {"name": "f", "x": "e\u0301"}}]).decode()),
        Message("r", "tool", name="f"),
        Message("done", "assistant"),
    ]
    record = lines.make(turns, "k", {"\U0001f600": "1", "\uffee": "2"}, "none")
    shown = msgspec.to_builtins(record)
    assert lines.encode(record) == canonical(shown) + b"\n"
    assert record.id == digest(shown["messages"])
    assert list(lines.decode(lines.encode(record))) == [record]
    composed = lines.make(turns, "k", {})
    assert composed.messages[1].tool_calls == '[{"function":{"name":"f","x":"\u00e9"}}]'
    others = [[*turns[:2], Message("r", "tool"), turns[3]], [turns[0], Message("", "assistant", tool_calls="[]"), *turns[2:]]]
    assert len({record.id, *(lines.make(other, "k", {}, "none").id for other in others)}) == 3


# ---- instruction


def test_an_instruction_its_input_and_its_output_become_two_turns() -> None:
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog", "sys": "Be brief."}
    assert messages(row, INSTRUCTION) == [("system", "Be brief."), ("user", "Translate.\n\nHund"), ("assistant", "dog")]
    for without in ({"input": ""}, {"input": None}):
        assert messages({**row, **without, "sys": None}, INSTRUCTION) == [("user", "Translate."), ("assistant", "dog")]
    del row["input"]
    assert messages({**row, "sys": ""}, INSTRUCTION) == [("user", "Translate."), ("assistant", "dog")]
    reason(one({**row, "input": 3}, INSTRUCTION), "wrong_type", "input: a number")
    reason(one({**row, "output": " "}, INSTRUCTION), "empty", "output: no text")
    reason(one({"output": "x", "sys": "s"}, INSTRUCTION), "missing_field", "instruction: not in the row")


# ---- preference


def test_of_a_preference_pair_the_chosen_side_is_the_record() -> None:
    answers = {"chosen": "good", "rejected": "bad"}
    assert messages({"prompt": "q", **answers}, PREFERENCE) == [("user", "q"), ("assistant", "good")]
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}]
    expected = [("user", "q"), ("assistant", "good")]
    worse = [said[0], {"role": "assistant", "content": "bad"}]
    assert messages({"chosen": said, "rejected": worse}, PREFERENCE) == expected
    assert messages({"prompt": "q", "chosen": said, "rejected": worse}, PREFERENCE) == expected
    assert messages({"prompt": "q", "chosen": said[1:], "rejected": worse[1:]}, PREFERENCE) == expected
    assert messages({"prompt": said[:1], "chosen": said[1:]}, PREFERENCE) == expected
    system = {"role": "system", "content": "s"}
    assert messages({"prompt": [system, *said[:1]], "chosen": said[1:]}, PREFERENCE) == [("system", "s"), *expected]


@pytest.mark.parametrize(
    ("row", "why", "detail"),
    [
        ({"chosen": "good", "rejected": "bad"}, "missing_field", "prompt: not in the row"),
        ({"prompt": "q", "rejected": "bad"}, "missing_field", "chosen"),
        ({"prompt": "q", "chosen": "good", "rejected": ["bad"]}, "wrong_type", "rejected: a array|rejected: an array"),
        ({"prompt": "q", "chosen": 4}, "wrong_type", "chosen: a number"),
        ({"prompt": "q", "chosen": ""}, "empty", "chosen: no text"),
        (
            {"prompt": "q", "chosen": [{"role": "user", "content": "other"}, {"role": "assistant", "content": "good"}]},
            "wrong_type",
            "chosen: opens with another user turn than prompt",
        ),
        ({"prompt": "q", "chosen": [{"role": "user", "content": "q"}]}, "no_assistant", "1 messages"),
    ],
)
def test_a_pair_that_has_no_chosen_side_says_why(row: dict[str, Any], why: str, detail: str) -> None:
    reason(one(row, PREFERENCE), why, detail)


# ---- raw text


def test_raw_text_is_one_message_of_its_own_role() -> None:
    found = one({"body": "Once upon a time", "n": 7}, TEXT)
    assert isinstance(found, Row)
    assert (found.messages, found.key) == ((Message("Once upon a time", "text"),), "7")
    reason(one({"body": "\n", "n": 7}, TEXT), "empty", "body: no text")
    reason(one({"text": "x", "n": 7}, TEXT), "missing_field", "body: not in the row")


def test_fields_of_every_shape_are_checked_by_name() -> None:
    for shape, known in (("instruction", "instruction, output, input, system, id"), ("preference", "chosen, prompt, rejected, system, id")):
        with pytest.raises(SourceError, match=rf"shape {shape} has no field 'messages'; known: {known}"):
            readers.checked(Source(match="**", shape=shape, fields={"messages": "m"}))  # type: ignore[arg-type]


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["system", "user", "assistant", "tool", "x"]),
                "content": st.sampled_from(["", " ", "text", "é", None, 3]),
            },
            optional={
                "name": st.sampled_from([None, "n", 1]),
                "tool_calls": st.sampled_from([None, [], "x"]),
                "weight": st.none() | st.just(1),
            },
        ),
        max_size=3,
    ),
    st.sampled_from(["k", "", " ", 7, True, None, 1.5]),
    st.sampled_from(["v", "", 7, False, None, []]),
)
def test_the_short_way_makes_of_a_row_what_the_long_way_makes(messages: list[dict[str, Any]], key: Any, value: Any) -> None:
    source = Source(match="**", shape="messages", fields={"id": "id"}, slices={"intent": "intent"})
    data = msgspec.json.encode({"id": key, "messages": messages, "intent": value, "more": 1})
    if (found := rows.quick(source)(data)) is not None:
        assert found == rows.shaped(rows.parsed(data), source, rows.mapping(source))


def test_a_plain_row_goes_the_short_way() -> None:
    source = Source(match="**", shape="messages", fields={"id": "id"}, slices={"intent": "intent"})
    data = b'{"intent": "refund", "id": 7, "messages": [{"role": "user", "content": "a"}, {"content": "b", "role": "assistant"}], "more": null}'
    assert rows.quick(source)(data) == ((Message("a", "user"), Message("b", "assistant")), "7", {"intent": "refund"})
    dotted = Source(match="**", shape="messages", fields={"messages": "row.messages"})
    assert rows.quick(dotted)(data) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "judge", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "assistant", "content": "a", "name": "n"}]},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": "x"}]},
        {"messages": [{"role": "assistant", "content": "a", "weight": 1}]},
        {"id": " "},
        {"id": None},
        {"intent": ""},
        {"intent": 1.5},
    ],
)
def test_a_row_with_anything_unusual_goes_the_long_way(changed: dict[str, Any]) -> None:
    source = Source(match="**", shape="messages", fields={"id": "id"}, slices={"intent": "intent"})
    plain = {"id": "k", "intent": "v", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert rows.quick(source)(msgspec.json.encode(plain)) is not None
    assert rows.quick(source)(msgspec.json.encode({**plain, **changed})) is None
