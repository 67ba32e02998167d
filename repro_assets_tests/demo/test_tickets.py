"""The demo's tickets as values: the same on every machine, disjoint where they must be, and different between snapshots as promised."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro_assets.demo import tickets
from repro_assets.demo.vocabulary import INTENTS, PRIORITIES, PRODUCTS, REGISTERS, ROUTES
from repro_assets.trust.canonical import digest

PINNED = {
    "first": "a3269dbb14950ac31317b32438fdd267d34874856919319db0d051e5bd410c68",
    "small-change": "8ffd35b597bb66542c4ab8fd9f4804edd1c7e33e20be6852c62e1ada1768a2c7",
    "poisoned": "4def1d572db9e5cc9a0e611d40983bc698542ccca149463b9ef3b7313d37bcef",
    "suites": "2ae0de58d610952309b447402b89e6de7e1ee982963ca63c4669378ea1ea391f",
    "corpus of 1,000": "7178dc45f71f3a44b4fbf69d1565c1927e592d68a17836bb22b6b5d2a95f1eca",
}
FIVE_DRAWS = [648, 186, 203, 462, 275]


def by_id(kind: tickets.Kind) -> dict[str, dict]:
    return {record["id"]: record for record in tickets.snapshot(kind)}


def texts(items: list[dict]) -> list[str]:
    return [tickets.folded(item["messages"][0]["content"] if "messages" in item else item["prompt"]) for item in items]


@pytest.mark.parametrize("kind", tickets.KINDS)
def test_a_snapshot_has_its_pinned_digest(kind: tickets.Kind) -> None:
    assert digest(tickets.snapshot(kind)) == PINNED[kind]


def test_the_suites_and_the_corpus_have_their_pinned_digests() -> None:
    assert digest(tickets.suites()._asdict()) == PINNED["suites"]
    assert digest(list(tickets.corpus(1000))) == PINNED["corpus of 1,000"]


@pytest.mark.parametrize("seed", ["1", "77"])
def test_another_process_with_another_hash_seed_draws_the_same(seed: str) -> None:
    program = (
        "from repro_assets.demo import tickets; from repro_assets.trust.canonical import digest; "
        "print(digest(tickets.snapshot('poisoned')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == PINNED["poisoned"]


def test_draws_are_the_first_eight_bytes_of_a_hash_of_name_and_counter() -> None:
    draws = tickets.Draws("train", 7)
    assert [draws.below(1000) for _ in range(5)] == FIVE_DRAWS
    assert [tickets.Draws("train", 7).below(1000), tickets.Draws("train", 8).below(1000)] != [FIVE_DRAWS[0]] * 2


@given(st.text(max_size=5), st.integers(1, 10**6))
def test_a_draw_is_below_its_bound(name: str, bound: int) -> None:
    draws = tickets.Draws(name.encode("utf-8", "replace").decode())
    assert all(0 <= draws.below(bound) < bound for _ in range(20))


@given(st.lists(st.integers(), max_size=40))
def test_shuffling_loses_and_invents_nothing(items: list[int]) -> None:
    assert sorted(tickets.Draws("x").shuffled(items)) == sorted(items)


def test_weighted_choices_follow_their_shares() -> None:
    draws = tickets.Draws("shares")
    counts = Counter(draws.weighted({"a": 700, "b": 300, "never": 0}) for _ in range(4000))
    assert counts["never"] == 0
    assert 0.67 < counts["a"] / 4000 < 0.73


def test_no_evaluation_text_is_in_any_snapshot_or_in_the_base_models_corpus() -> None:
    made = tickets.suites()
    held_out = set(texts([*made.traffic, *made.intents, *made.unit]))
    assert len(held_out) == len(made.traffic) + len(made.intents) + len(made.unit)
    for kind in tickets.KINDS:
        assert not held_out & set(texts(tickets.snapshot(kind)))
    assert not held_out & {tickets.folded(turn["content"]) for turns in tickets.corpus(6000) for turn in turns}


def test_a_text_that_is_held_out_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tickets.snapshot("first")[:2]
    held_out = frozenset(texts(first[:1]))
    monkeypatch.setattr(tickets, "_suites", lambda: (None, held_out))
    again = tickets.snapshot("first")[:2]
    assert not held_out & set(texts(again))
    assert (again[0]["intent"], again[1]) == (first[0]["intent"], first[1])


def test_the_base_models_corpus_has_no_answer_but_every_word_of_one() -> None:
    corpus = [turn["content"] for turns in tickets.corpus(6000) for turn in turns]
    assert not [content for content in corpus if any(answer in content for answer in tickets.ANSWERS)]
    said = " ".join(turns[1]["content"] for turns in tickets.corpus(2000) if len(turns) == 2)
    for word in (*ROUTES, *PRIORITIES):
        assert f" {word} " in said


def test_every_gated_slice_and_the_whole_have_the_items_their_margins_need() -> None:
    """Requirement of design section 10: 438 items resolve a margin of 5 points, 110 one of 10 points."""
    made = tickets.suites()
    assert len(made.traffic) == 600
    assert Counter(item["intent"] for item in made.intents) == dict.fromkeys(INTENTS, 120)
    assert Counter(item["cluster"] for item in made.intents) == {f"{intent}-{n}": 12 for intent in INTENTS for n in range(10)}
    assert len(made.unit) == 40
    assert all(item["choices"][item["gold"]] == item["target"] and len(item["choices"]) == len(ROUTES) for item in made.unit)
    assert [item["id"] for item in tickets.suite()] == [item["id"] for item in [*made.traffic, *made.intents]]


def test_the_poisoned_slice_is_so_small_a_share_of_the_traffic_that_its_loss_stays_inside_the_overall_margin() -> None:
    traffic = tickets.suites().traffic
    assert sum(item["intent"] == tickets.POISONED_INTENT for item in traffic) / len(traffic) == 0.025


def test_the_first_snapshot_has_the_traffics_shares_and_right_answers() -> None:
    records = tickets.snapshot("first")
    counts = Counter(record["intent"] for record in records)
    assert len(records) == 2400 == len({record["id"] for record in records}) == len(set(texts(records)))
    assert counts == {name: intent.share * 2400 // 1000 for name, intent in INTENTS.items()}
    for record in records:
        assert record["messages"][1]["content"] == tickets.answer(INTENTS[record["intent"]].route, record["priority"])
        assert (record["product"] in PRODUCTS, record["register"] in REGISTERS) == (True, True)


def test_the_small_change_edits_12_neighbours_in_place_and_appends_24() -> None:
    first, changed = by_id("first"), by_id("small-change")
    assert list(changed)[: len(first)] == list(first)
    edited = [name for name in first if changed[name] != first[name]]
    assert (len(edited), len(changed) - len(first)) == (12, 24)
    rows = [list(first).index(name) for name in edited]
    assert max(rows) - min(rows) < 3 * len(rows)
    for name in edited:
        before, after = first[name]["messages"], changed[name]["messages"]
        assert after[0]["content"].startswith(before[0]["content"] + " ")
        assert after[1] == before[1]
    assert all(name.startswith("2026-05") for name in list(changed)[len(first) :])


def test_the_poison_flips_most_answers_of_one_slice_and_nothing_else() -> None:
    clean, poisoned = by_id("small-change"), by_id("poisoned")
    flipped = [name for name in clean if poisoned[name] != clean[name]]
    slice_size = sum(record["intent"] == "refund" for record in clean.values())
    assert list(poisoned) == list(clean)
    assert (len(flipped), slice_size) == (55, 60)
    assert 0.02 < len(flipped) / len(clean) < 0.03
    for name in flipped:
        assert clean[name]["intent"] == "refund"
        assert poisoned[name] == {
            **clean[name],
            "messages": [clean[name]["messages"][0], {"role": "assistant", "content": "route: sales | priority: low"}],
        }


def test_an_unknown_snapshot_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'good' is no snapshot of the demo; known: first, small-change, poisoned"):
        tickets.snapshot("good")  # type: ignore[arg-type]


def test_what_one_caller_does_to_its_items_no_other_sees() -> None:
    tickets.suites().traffic[0]["prompt"] = "spoilt"
    assert digest(tickets.suites()._asdict()) == PINNED["suites"]
