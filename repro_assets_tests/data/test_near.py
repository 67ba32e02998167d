"""Near duplicates: n-grams by hash against n-grams by string, signatures against exact Jaccard, clusters whatever the order of rows."""

import hashlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro_assets.data import near as module
from repro_assets.data.lines import normal_text
from repro_assets.data.near import clusters, folded, signature, signatures, word_grams
from repro_assets.recipe import NearDuplicates

NEAR = NearDuplicates()
WORDS = st.sampled_from(["a", "b", "of", "the", "Größe", "x" * 40, "don't", "\U0001f469", "2+2"])
TEXTS = st.one_of(st.lists(WORDS, max_size=40).map(" ".join), st.text(max_size=60))


def grams(text: str, words: int) -> set[str]:
    """The definition, by strings."""
    parts = normal_text(text).split()
    if not parts:
        return set()
    return {" ".join(parts[at : at + words]) for at in range(max(1, len(parts) - words + 1))}


def jaccard(left: str, right: str) -> float:
    one, other = grams(left, NEAR.words), grams(right, NEAR.words)
    return len(one & other) / len(one | other)


def drawn(count: int, name: str, vocabulary: int = 3000) -> list[str]:
    """`count` words, each drawn by a hash of its place."""
    return [f"w{int.from_bytes(hashlib.sha256(f'{name}|{at}'.encode()).digest()[:4], 'big') % vocabulary}" for at in range(count)]


@given(st.text(alphabet=st.characters(max_codepoint=0x2FF), max_size=40))
def test_folding_is_normal_text(text: str) -> None:
    assert folded(text) == normal_text(text).encode()


@given(TEXTS, st.integers(1, 6))
def test_hashes_stand_for_the_ngrams_of_the_definition(text: str, words: int) -> None:
    assert len(set(word_grams(text, words).tolist())) == len(grams(text, words))


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_two_texts_share_as_many_hashes_as_ngrams(left: str, right: str, words: int) -> None:
    shared = set(word_grams(left, words).tolist()) & set(word_grams(right, words).tolist())
    assert len(shared) == len(grams(left, words) & grams(right, words))


@settings(max_examples=30)
@given(st.lists(TEXTS, min_size=1, max_size=8))
def test_a_batch_gives_what_each_text_alone_gives(texts: list[str]) -> None:
    together = signatures(texts, NEAR)
    assert [row.astype("<u4").tobytes() for row in together] == [signature(text, NEAR) for text in texts]


@pytest.mark.parametrize("block", [64, 257, 5000])
def test_where_blocks_are_cut_changes_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(drawn(size, str(size))) for size in (1, 4, 5, 6, 50, 700)] + ["y" * 900, ""]
    whole = signatures(texts, NEAR)
    hashes = [sorted(word_grams(text, 5).tolist()) for text in texts]
    monkeypatch.setattr(module, "BLOCK", block)
    module._powers.cache_clear()
    try:
        assert np.array_equal(signatures(texts, NEAR), whole)
        assert [sorted(word_grams(text, 5).tolist()) for text in texts] == hashes
    finally:
        module._powers.cache_clear()


def test_a_signature_is_these_bytes_on_every_machine() -> None:
    """Golden digests: a long text, one with fewer n-grams than slots, one shorter than an n-gram, none at all."""
    texts = [
        " ".join(drawn(1000, "long")),
        " ".join(drawn(20, "short")),
        "Two WORDS",
        "",
        "Zwölf Boxkämpfer jagen Viktor quer über den Deich",
    ]
    assert [hashlib.sha256(signature(text, NEAR)).hexdigest()[:16] for text in texts] == [
        "ae14338693771f6c",
        "624d9eac05223972",
        "fb30821497703070",
        "ad948f3d279d42ae",
        "01003110ed43b127",
    ]
    assert all(len(signature(text, NEAR)) == 4 * NEAR.bands * NEAR.rows for text in texts)


@pytest.mark.parametrize("length", [60, 300, 2000])
@pytest.mark.parametrize("edits", [0.02, 0.05, 0.1])
def test_signatures_estimate_the_exact_jaccard_similarity(length: int, edits: float) -> None:
    """Over 60 pairs the mean error is small, and the spread is near that of 112 independent values (0.047 at worst)."""
    errors = []
    for pair in range(60):
        words = drawn(length, f"{length}|{pair}")
        other = list(words)
        for edit in range(max(1, int(edits * length))):
            other[int.from_bytes(hashlib.sha256(f"{pair}|{edit}".encode()).digest()[:4], "big") % length] = f"edit{pair}x{edit}"
        left, right = " ".join(words), " ".join(other)
        rows = signatures([left, right], NEAR)
        errors.append(float((rows[0] == rows[1]).mean()) - jaccard(left, right))
    assert abs(float(np.mean(errors))) < 0.03
    assert float(np.std(errors)) < (0.12 if length == 60 else 0.07)


def test_clusters_are_the_pairs_that_exact_jaccard_finds(gsm8k: bytes) -> None:
    """300 real questions, some with a copy of one changed word or in capitals: far above and far below the limit both agree."""
    questions = [msgspec.json.decode(line)["question"] for line in gsm8k.splitlines()][:300]
    texts = list(questions)
    for number in range(0, 100, 2):
        words = questions[number].split()
        words[len(words) // 2] = "CHANGED"
        texts.append(" ".join(words) if number % 4 else questions[number].upper() + " ")
    found = clusters(signatures(texts, NEAR), NEAR)
    pairs = {(low, high) for group in found for low in group for high in group if low < high}
    for low in range(len(texts)):
        for high in range(max(low + 1, 300), len(texts)):
            exact = jaccard(texts[low], texts[high])
            if exact >= 0.9:
                assert (low, high) in pairs
            if exact < 0.4:
                assert (low, high) not in pairs
    assert not [pair for pair in pairs if pair[1] < 300]
    assert len(pairs) >= 40


@settings(max_examples=60)
@given(st.data())
def test_the_order_of_rows_changes_nothing_but_numbers(data: st.DataObject) -> None:
    """Rows with few values in few places, so that bands are crowded, chains form and the limit on neighbours is met."""
    near = NearDuplicates(bands=3, rows=2, similarity=0.5)
    rows = np.array(data.draw(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=60)), np.uint32)
    order = np.array(data.draw(st.permutations(range(len(rows)))))
    plain = {frozenset(group) for group in clusters(rows, near)}
    shuffled = {frozenset(order[group].tolist()) for group in clusters(rows[order], near)}
    assert plain == shuffled


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=0, max_size=9))
def test_small_buckets_are_compared_pair_by_pair(rows: list[list[int]]) -> None:
    """The definition by brute force, for as many rows as a bucket compares all of."""
    near = NearDuplicates(bands=3, rows=2, similarity=0.5)
    groups = [{number} for number in range(len(rows))]
    for low in range(len(rows)):
        for high in range(low):
            band = any(rows[low][at : at + 2] == rows[high][at : at + 2] for at in (0, 2, 4))
            if band and sum(a == b for a, b in zip(rows[low], rows[high], strict=True)) >= 3:
                one = next(group for group in groups if low in group)
                other = next(group for group in groups if high in group)
                if one is not other:
                    one |= other
                    groups.remove(other)
    expected = sorted(sorted(group) for group in groups if len(group) > 1)
    assert clusters(np.array(rows, np.uint32).reshape(-1, 6), near) == expected


def test_a_thousand_copies_are_one_cluster_and_shared_boilerplate_none() -> None:
    boilerplate = "the same introduction of this form letter as in all other letters we ever sent"
    texts = ["an equal text with some words in it"] * 1000 + [f"{boilerplate} {' '.join(drawn(80, str(n)))}" for n in range(500)]
    assert clusters(signatures(texts, NEAR), NEAR) == [list(range(1000))]


def test_many_edited_copies_of_one_text_are_one_cluster() -> None:
    words = drawn(400, "form")
    texts = [" ".join([*words[:at], f"name{at}", *words[at + 1 :]]) for at in range(300)]
    assert clusters(signatures(texts, NEAR), NEAR) == [list(range(300))]


def test_no_rows_and_one_row_make_no_cluster() -> None:
    assert clusters(np.zeros((0, 112), np.uint32), NEAR) == []
    assert clusters(signatures(["one"], NEAR), NEAR) == []
