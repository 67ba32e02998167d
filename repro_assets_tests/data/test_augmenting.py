"""Augmentation: a seeded pure function of the record; only user turns move, and only where something changes."""

import hashlib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro_assets.data.augmenting import _chosen, augmented
from repro_assets.data.lines import Message
from repro_assets.recipe import Augmentation
from repro_assets.trust.canonical import digest

QUESTION = "Where is my ORDER number 4711? Please write to [personal:email] soon, thank you."
MESSAGES = (
    Message(content="You HELP.", role="system"),
    Message(content=QUESTION, role="user"),
    Message(content="It IS on its WAY.", role="assistant"),
    Message(content="Grüße und DANK", role="user"),
    Message(content="Bye NOW", role="assistant"),
)
KINDS = ("lowercase", "typos", "spaces")


def all_of(*kinds: str, **how: Any) -> tuple[Augmentation, ...]:
    return tuple(Augmentation(kind=kind, share=1.0, **how) for kind in kinds)  # type: ignore[arg-type]


def test_each_kind_alters_user_turns_only() -> None:
    found = augmented(MESSAGES, "a" * 64, all_of(*KINDS))
    assert [index for index, _ in found] == [0, 1, 2]
    for _, altered in found:
        assert [message.role for message in altered] == [message.role for message in MESSAGES]
        for before, after in zip(MESSAGES, altered, strict=True):
            assert (before == after) == (before.role != "user")
    lowercase, typos, spaces = (altered[1].content for _, altered in found)
    assert lowercase == QUESTION.lower()
    assert len(typos) == len(QUESTION)
    assert sorted(typos) == sorted(QUESTION)
    assert "4711" in typos
    assert "[personal:email]" in typos
    assert " ".join(spaces.split()) == QUESTION


def test_the_copies_are_these_on_every_machine() -> None:
    """A golden digest: the draw and the places come from SHA-256 alone."""
    assert digest(
        [[index, [message.content for message in altered]] for index, altered in augmented(MESSAGES, "a" * 64, all_of(*KINDS))]
    ) == ("cbf6ca7c72551c41039e3c530ec81382ddbb38e3c2ef7ca974c0d7831e2b2ec8")


def test_seed_kind_and_record_give_other_places() -> None:
    def typos(record: str, seed: int) -> str:
        return augmented(MESSAGES, record, all_of("typos", seed=seed))[0][1][1].content

    assert len({typos("a" * 64, 0), typos("a" * 64, 1), typos("b" * 64, 0), typos("c" * 64, 0)}) >= 3
    assert typos("a" * 64, 0) == typos("a" * 64, 0)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_drawn_by_record_and_grows_with_the_share(share: float) -> None:
    names = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(4000)]
    some = {name for name in names if augmented(MESSAGES, name, (Augmentation(kind="lowercase", share=share),))}
    more = {name for name in names if augmented(MESSAGES, name, (Augmentation(kind="lowercase", share=share + 0.2),))}
    assert abs(len(some) / len(names) - share) < 0.03
    assert some < more


def test_what_changes_nothing_or_was_already_given_gives_nothing() -> None:
    plain = (Message(content="hello", role="user"), Message(content="HI", role="assistant"))
    assert augmented(plain, "a", all_of("lowercase", "spaces")) == []
    assert augmented((Message(content="A TEXT", role="text"),), "a", all_of(*KINDS)) == []
    assert [index for index, _ in augmented(MESSAGES, "a", all_of("lowercase", "lowercase"))] == [0]
    assert augmented(MESSAGES, "a", ()) == []


@given(st.text(max_size=200))
def test_typos_only_swap_neighbours_and_spaces_only_double(text: str) -> None:
    messages = (Message(content=text, role="user"),)
    for index, (altered,) in augmented(messages, "r", all_of("typos", "spaces")):
        if index == 0:
            assert len(altered.content) == len(text)
            assert sorted(altered.content) == sorted(text)
            moved = [at for at in range(len(text)) if text[at] != altered.content[at]]
            assert all(text[at].isalpha() for at in moved)
        else:
            assert altered.content.replace("  ", " ") == text.replace("  ", " ")


def test_a_long_turn_is_altered_in_time() -> None:
    text = "some words in a long turn " * 20_000
    (_, (altered,)), (_, (spaced,)) = augmented((Message(content=text, role="user"),), "r", all_of("typos", "spaces"))
    assert 5_000 < sum(a != b for a, b in zip(text, altered.content, strict=True)) < 25_000
    assert len(spaced.content) > len(text)


@given(st.integers(0, 60), st.integers(0, 40), st.integers(1, 3))
def test_places_are_drawn_apart_and_as_many_as_there_is_room_for(size: int, count: int, apart: int) -> None:
    places = list(range(size))
    drawn = _chosen(places, "name", count, apart=apart)
    assert drawn == sorted(drawn)
    assert set(drawn) <= set(places)
    assert all(later - earlier >= apart for earlier, later in pairwise(drawn))
    if len(drawn) < count:  # then there is no room for another
        assert all(any(abs(at - other) < apart for other in drawn) for at in places)
    assert len(_chosen(places, "name", count)) == min(size, count)


@given(st.text(st.sampled_from("abcdefghij"), min_size=2, max_size=80))
def test_swapped_pairs_do_not_overlap(text: str) -> None:
    found = augmented((Message(content=text, role="user"),), "r", all_of("typos"))
    altered = found[0][1][0].content if found else text
    at = 0
    while at < len(text):
        step = 1 if text[at] == altered[at] else 2
        assert altered[at : at + step] == text[at : at + step][::-1]
        at += step
