"""Templates rendered as transformers renders them, with the spans of what the assistant says and of what the user wrote."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from repro_assets.data.errors import RenderingError
from repro_assets.data.lines import Message
from repro_assets.data.rendering import Renderer
from repro_assets.data.templates import find_template, literals, named_tokens
from repro_assets_tests.data.material import CHATML, MARKED, SPECIAL, TEMPLATE, tokenizer_files

NAMED = {"bos_token": "<s>", "eos_token": "<|end|>"}
LLAMA = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|' + message['role'] + '|>\n\n' + message['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|assistant|>\n\n' }}{% endif %}"
)
MERGED = (
    "{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\n\n' %}{% set loop_messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{% if m.role == 'user' %}<|user|>{{ (system if loop.first else '') + m.content }}<|end|>"
    "{% else %}<|assistant|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALL = {"plain": TEMPLATE, "chatml": CHATML, "marked": MARKED, "llama": LLAMA, "merged": MERGED}

TEXT = st.text(st.sampled_from("ab \n<|>é{}%\ufdd0\u2028#")) | st.text(min_size=1)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


def conversation(*turns: tuple[str, str]) -> list[Message]:
    return [Message(text, role) for pair in turns for text, role in zip(pair, ("user", "assistant"), strict=True)]


@pytest.fixture(scope="module")
def oracle(tokenizer_json: bytes) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json.decode()), bos_token="<s>", eos_token="<|end|>")


@settings(max_examples=60)
@given(turns=TURNS, name=st.sampled_from(sorted(ALL)), system=st.none() | TEXT)
def test_text_and_spans_are_those_of_transformers(oracle: Any, turns: list[tuple[str, str]], name: str, system: str | None) -> None:
    """S1.12: the text that is trained on is the text that is served."""
    messages = ([Message(system, "system")] if system is not None else []) + conversation(*turns)
    rendered = Renderer(ALL[name], NAMED, SPECIAL).render(messages)
    plain = [{"role": message.role, "content": message.content} for message in messages]
    assert rendered.text == oracle.apply_chat_template(plain, chat_template=ALL[name], tokenize=False)
    said = [rendered.text[start:end] for start, end in rendered.trained]
    assert said == [(text.strip() if "trim" in ALL[name] else text) + "<|end|>" for _user, text in turns]
    written = [rendered.text[start:end] for start, end in rendered.contents]
    assert sorted(written) == sorted(message.content.strip() if "trim" in ALL[name] else message.content for message in messages)


def test_the_span_starts_after_the_generation_prompt_and_ends_with_the_end_mark() -> None:
    rendered = Renderer(CHATML, NAMED, SPECIAL).render(conversation(("q1", "a1"), ("q2", "a2")))
    assert rendered.text == "<|user|>\nq1<|end|>\n<|assistant|>\na1<|end|>\n<|user|>\nq2<|end|>\n<|assistant|>\na2<|end|>\n"
    assert [rendered.text[start:end] for start, end in rendered.trained] == ["a1<|end|>", "a2<|end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_last_turn_is_trained_when_the_recipe_says_so(template: str) -> None:
    rendered = Renderer(template, NAMED, SPECIAL).render(conversation(("q1", "same"), ("q2", "same")), last_only=True)
    ((start, end),) = rendered.trained
    assert rendered.text[start:end] == "same<|end|>"
    assert rendered.text.index("q2") < start


def test_a_conversation_that_ends_with_the_user_trains_the_turns_before() -> None:
    for template in (CHATML, MARKED):
        rendered = Renderer(template, NAMED, SPECIAL).render([*conversation(("q1", "a1")), Message("q2", "user")])
        assert [rendered.text[start:end] for start, end in rendered.trained] == ["a1<|end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_instead_of_mislabelled() -> None:
    renderer = Renderer(FORGETS, NAMED, SPECIAL)
    assert renderer.render(conversation(("q", "<think>x</think>a"))).trained
    with pytest.raises(RenderingError, match=r"message 1 of a conversation of user, assistant, user, assistant.*|changes the text"):
        renderer.render(conversation(("q", "<think>x</think>a"), ("q", "a")))


def test_a_template_that_marks_earlier_turns_is_refused_without_generation_markers() -> None:
    inside = "{% if not loop.last and m.role == 'assistant' %}[earlier]{% endif %}"
    said = "{{ m.content }}<|end|>"
    plain = "{% for m in messages %}<|{{ m.role }}|>" + inside + said + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    chat = conversation(("q", "a"), ("r", "b"))
    with pytest.raises(
        RenderingError, match=r"message 1 of a conversation of user, assistant, user, assistant differently when more follows"
    ):
        Renderer(plain, NAMED, SPECIAL).render(chat)
    speaks = "{% if m.role == 'assistant' %}{% generation %}" + said + "{% endgeneration %}{% else %}" + said + "{% endif %}"
    rendered = Renderer(plain.replace(said, speaks), NAMED, SPECIAL).render(chat)
    assert [rendered.text[start:end] for start, end in rendered.trained] == ["a<|end|>", "b<|end|>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "changes the text of messages"),
        ("{% for m in messages %}{{ m.content | reverse }}{% endfor %}", "changes the text of messages"),
        ("{% for m in messages if m.role != 'user' %}{{ m.content }}<|end|>{% endfor %}", "leaves out message 0"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "changes the text of messages"),
        ("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}", "write the date into it"),
        (
            "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
            "enclose message 0, which is of the user",
        ),
        ("{{ raise_exception('only one turn') }}", "only one turn; mend the row"),
        ("{{ messages.__class__ }}{{ messages.append(1) }}", "refuses a conversation"),
    ],
)
def test_a_template_that_hides_who_said_what_is_refused(template: str, said: str) -> None:
    with pytest.raises(RenderingError, match=said):
        Renderer(template, NAMED, SPECIAL).render(conversation(("Hello", "World")))


def test_a_template_with_a_fault_names_its_line() -> None:
    with pytest.raises(RenderingError, match=r"line 2: .*chat_template\.jinja"):
        Renderer("{% for m in messages %}\n{% endif %}", NAMED)


def test_a_record_that_holds_the_first_marks_is_rendered_with_others() -> None:
    text = "\ufdd0\ufdd1\ufdd2 0 \ufdd3"
    rendered = Renderer(TEMPLATE, NAMED, SPECIAL).render(conversation((text, "a")))
    assert rendered.text == f"<|user|>{text}<|end|><|assistant|>a<|end|>"
    everything = "".join(chr(code) for code in range(0xFDD0, 0xFDF0))
    assert (
        Renderer(TEMPLATE, NAMED, SPECIAL).render(conversation((everything, "a"))).text
        == f"<|user|>{everything}<|end|><|assistant|>a<|end|>"
    )
    with pytest.raises(RenderingError, match="noncharacters"):
        Renderer(TEMPLATE, NAMED, SPECIAL).by_template(conversation((everything, "a")))


def test_the_template_is_found_where_transformers_looks_for_it(tokenizer_json: bytes) -> None:
    files = tokenizer_files(tokenizer_json, "own")
    assert find_template(files) == "own"
    several = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    assert find_template({"tokenizer_config.json": json.dumps(several).encode()}) == "D"
    with pytest.raises(RenderingError, match=r"neither chat_template\.jinja nor"):
        find_template({"tokenizer_config.json": b"{}"})
    with pytest.raises(RenderingError, match=r"tokenizer_config\.json is not JSON"):
        find_template({"tokenizer_config.json": b"{"})


def test_named_tokens_come_as_text_however_they_are_written() -> None:
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "extra_special_tokens": {"image_token": "<img>"},
    }
    assert named_tokens({"tokenizer_config.json": json.dumps(config).encode()}) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "image_token": "<img>",
    }


def test_literals_are_the_text_that_the_template_itself_writes() -> None:
    assert {"<|", "|>\n", "<|end|>\n", "<|assistant|>\n"} <= set(literals(CHATML).split("\0"))
    assert "role" not in literals(TEMPLATE).split("\0")


# Qwen 2.5's way with tools: an empty content is not written, arguments are JSON, a tool's answer is a user turn of its own.
TOOLS = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|user|>\n<tool_response>\n' + m.content + '\n</tool_response><|end|>\n' }}"
    "{% elif m.tool_calls %}<|assistant|>{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{% set call = call.function if call.function is defined else call %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + call.name + '\", \"arguments\": ' + call.arguments | tojson + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|end|>\n' }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
WEATHER = '[{"function":{"arguments":{"city":"Ulm \\"x\\"","days":2},"name":"weather"},"type":"function"}]'


def with_tools(calls: str = WEATHER, said: str = "") -> list[Message]:
    return [
        Message("How is it in Ulm?", "user"),
        Message(said, "assistant", tool_calls=calls),
        Message('{"sky": "grey"}', "tool", name="weather"),
        Message("Grey.", "assistant"),
    ]


@pytest.mark.parametrize("said", ["", "I look."])
def test_tool_calls_and_answers_are_written_as_transformers_writes_them(oracle: Any, said: str) -> None:
    """S1.12: calls are handed to the template decoded; a call is trained to the end mark of its turn, behind the tool tags."""
    messages = with_tools(said=said)
    rendered = Renderer(TOOLS, NAMED, [*SPECIAL, "<tool_call>", "</tool_call>"]).render(messages)
    plain = [
        {"role": "user", "content": "How is it in Ulm?"},
        {"role": "assistant", "content": said, "tool_calls": json.loads(WEATHER)},
        {"role": "tool", "content": '{"sky": "grey"}', "name": "weather"},
        {"role": "assistant", "content": "Grey."},
    ]
    assert rendered.text == oracle.apply_chat_template(plain, chat_template=TOOLS, tokenize=False)
    first, last = [rendered.text[start:end] for start, end in rendered.trained]
    assert last == "Grey.<|end|>"
    assert first.endswith('"arguments": {"city": "Ulm \\"x\\"", "days": 2}}\n</tool_call><|end|>')
    held = [rendered.text[start:end] for start, end in rendered.contents if start < end]
    assert held == ["How is it in Ulm?", *([said] if said else []), "weather", "city", 'Ulm \\"x\\"', "days", '{"sky": "grey"}', "Grey."]


def test_a_template_that_cannot_write_tool_calls_is_refused() -> None:
    for template in (TEMPLATE, CHATML):
        with pytest.raises(RenderingError, match="leaves out a tool call of a conversation of user, assistant, tool, assistant"):
            Renderer(template, NAMED, SPECIAL).render(with_tools(said="I look."))


def test_a_call_that_holds_a_control_token_is_refused_where_the_template_cannot_be_followed() -> None:
    checks = TOOLS.replace("{% set call", "{% if call.function.name | length > 8 %}{{ raise_exception('long') }}{% endif %}{% set call")
    calls = '[{"function":{"arguments":{"city":"Ulm"},"name":"<|end|>"},"type":"function"}]'
    renderer = Renderer(checks, NAMED, SPECIAL)
    rendered = renderer.render(with_tools(calls.replace("<|end|>", "weather")))
    assert [rendered.text[start:end] for start, end in rendered.contents if start < end][1:3] == ["city", "Ulm"]
    with pytest.raises(RenderingError, match="holds the characters of a control token"):
        renderer.render(with_tools(calls))
    rendered = Renderer(TOOLS, NAMED, SPECIAL).render(with_tools(calls))
    assert "<|end|>" in [rendered.text[start:end] for start, end in rendered.contents]


def test_a_text_is_itself_and_its_end_mark_and_trained_whole() -> None:
    renderer = Renderer(TEMPLATE, NAMED, SPECIAL)
    rendered = renderer.render([Message(" Once <|user|> upon\n", "text")])
    assert rendered.text == " Once <|user|> upon\n<|end|>"
    assert rendered.contents == ((0, 20),)
    assert rendered.trained == ((0, 27),)
    with pytest.raises(RenderingError, match="names no eos_token"):
        Renderer(TEMPLATE, {}, SPECIAL).render([Message("a", "text")])
    with pytest.raises(RenderingError, match="of text, assistant: a text stands alone"):
        renderer.render([Message("a", "text"), Message("b", "assistant")])


@settings(max_examples=60)
@given(turns=TURNS, name=st.sampled_from(sorted(ALL)), system=st.none() | TEXT, last_only=st.booleans())
def test_a_frame_gives_what_the_template_gives(turns: list[tuple[str, str]], name: str, system: str | None, last_only: bool) -> None:
    """The template runs once for a sequence of roles; every conversation of them comes out as if it ran on it."""
    messages = ([Message(system, "system")] if system is not None else []) + conversation(*turns)
    renderer = Renderer(ALL[name], NAMED, SPECIAL)
    framed = renderer.render(messages, last_only, check=True)
    assert renderer._frames[last_only, tuple(message.role for message in messages)] is not None
    run = renderer.by_template(messages, last_only)
    assert (framed.text, framed.contents, framed.trained) == (run.text, run.contents, run.trained)
    assert framed.in_bytes() == run.in_bytes()


LOOKS = {
    "length": "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}",
    "replace": "{% for m in messages %}{{ m.content | replace('zebra', '') }}{% endfor %}",
    "compare": "{% for m in messages %}{% if m.content == 'zebra' %}Z{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "contains": "{% for m in messages %}{{ m.content }}{% if 'zebra' in m.content %}Z{% endif %}{% endfor %}",
    "within": "{% for m in messages %}{{ m.content }}{% if m.content in 'zebras' %}Z{% endif %}{% endfor %}",
    "one of": "{% for m in messages %}{{ m.content }}{% if m.content in ['zebra'] %}Z{% endif %}{% endfor %}",
    "split": "{% for m in messages %}{{ m.content.split('zebra')[0] }}{% endfor %}",
    "tojson": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "message": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "join": "{% for m in messages %}{{ ['a', m.content] | join | replace('zebra', '') }}{% endfor %}",
    "concat": "{% for m in messages %}{{ ('a' ~ m.content) | replace('zebra', '') }}{% endfor %}",
    "format": "{% for m in messages %}{{ '{:5}'.format(m.content) | replace('zebra', '') }}{% endfor %}",
    "percent": "{% for m in messages %}{{ ('%s' % m.content) | replace('zebra', '') }}{% endfor %}",
    "block": "{% for m in messages %}{% set x %}{{ m.content }}{% endset %}{{ x | replace('zebra', '') }}{% endfor %}",
    "macro": "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{{ f(m.content) | replace('zebra', '') }}{% endfor %}",
    "table": "{% for m in messages %}{{ {'zebra': 'Z'}[m.content] | default(m.content) }}{% endfor %}",
    "each": "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}",
    "empty": "{% for m in messages %}{% if m.content %}{{ m.content }}{% endif %}{% endfor %}",
    "slice": "{% for m in messages %}{{ m.content[:7] }}{% endfor %}",
    "sort": "{% for m in messages | sort(attribute='content') %}{{ m.content }}{% endfor %}",
    "after": "{% for m in messages %}{{ (m.content + ' ') | trim }}{% endfor %}",
}


@pytest.mark.parametrize("way", sorted(LOOKS))
def test_a_template_that_looks_at_what_is_said_has_no_frame(way: str) -> None:
    renderer = Renderer(LOOKS[way], NAMED, SPECIAL)
    assert renderer._learn(("user", "assistant"), False) is None


def test_a_frame_that_proves_wrong_is_found_on_a_sampled_record() -> None:
    renderer = Renderer(TEMPLATE, NAMED, SPECIAL)
    chat = conversation(("q", "a"))
    renderer.render(chat)
    ((key, frame),) = renderer._frames.items()
    assert frame is not None
    renderer._frames[key] = type(frame)(("<|usr|>", *frame.pieces[1:]), frame.slots, frame.trained)
    renderer.render(chat)
    with pytest.raises(RenderingError, match="depends on what the messages say"):
        renderer.render(chat, check=True)


def test_of_control_tokens_that_begin_alike_the_longer_one_ends_a_turn() -> None:
    rendered = Renderer(TEMPLATE, NAMED, ["<|end", "<|end|>"]).by_template(conversation(("q", "a")))
    assert [rendered.text[start:end] for start, end in rendered.trained] == ["a<|end|>"]


def test_a_name_that_looks_like_a_control_token_is_the_users_text() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{% if m.name %}{{ m.name }}: {% endif %}{{ m.content }}<|end|>{% endfor %}"
    messages = [Message("hello", "user", name="<|end|>"), Message("hi", "assistant", name="desk")]
    rendered = Renderer(template, NAMED, SPECIAL).render(messages)
    assert [rendered.text[start:end] for start, end in rendered.contents] == ["<|end|>", "hello", "desk", "hi"]
