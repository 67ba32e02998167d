"""Word counts and the classifier that tells two snapshots apart: its area is an effect size, and the same on every CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy._core import _multiarray_umath as numpy_core  # type: ignore[attr-defined]

from repro_assets.data import embedding
from repro_assets.data.embedding import Words
from repro_assets.data.errors import DataError
from repro_assets.trust.canonical import sha256
from repro_assets_tests.data.material import GSM8K

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()]


def words(texts: list[str]) -> Words:
    return Words((sha256(text.encode()), embedding.counts([text])) for text in texts)


def test_counts_are_whole_numbers_of_words_and_their_trigrams() -> None:
    one = embedding.counts(["Save  SAVE"])
    assert (one.dtype, one.shape) == (np.uint8, (embedding.DIMENSIONS,))
    assert int(one.sum()) == 2 + 2 * 4  # two words; <sa sav ave ve> of each
    assert one.tolist() == embedding.counts(["save", "save"]).tolist()
    assert int(embedding.counts(["x " * 3000]).max()) == 255
    assert not embedding.counts([""]).any()
    assert embedding.counts(["我们退款"]).any()


def test_what_is_stored_comes_back_and_is_in_the_order_of_ids() -> None:
    held = words(QUESTIONS[:50])
    data = held.encode()
    assert data == words(QUESTIONS[:50][::-1]).encode()
    back = embedding.decode(data)
    assert (back.names, back.rows.tolist()) == (held.names, held.rows.tolist())
    assert held.names == sorted(held.names)
    assert len(embedding.decode(words([]).encode())) == 0


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"other" + data, lambda data: b""])
def test_counts_that_are_not_whole_are_refused_with_a_remedy(change: object) -> None:
    with pytest.raises(DataError, match=r"are not whole; materialize validation_report of the snapshot that is promoted again"):
        embedding.decode(change(words(QUESTIONS[:3]).encode()))  # type: ignore[operator]


def test_the_same_records_cannot_be_told_apart_and_others_can() -> None:
    """S0.33, S1.10: drift of embeddings by a domain classifier."""
    assert embedding.auc(words(QUESTIONS), words(QUESTIONS)) == 0.5
    other = [f"Please reset the password of my account, I have forgotten it. Ticket {n}." for n in range(200)]
    assert (embedding.auc(words(other), words(QUESTIONS)) or 0) > 0.99


def test_two_halves_of_one_corpus_are_no_drift_and_half_of_them_replaced_is() -> None:
    first, second = QUESTIONS[:200], QUESTIONS[200:]
    assert (embedding.auc(words(first), words(second)) or 1) < 0.65
    moved = [*second[:100], *(text.replace("how", "why").replace("the", "this") for text in second[100:])]
    found = embedding.auc(words(first), words(moved)) or 0
    assert 0.65 < found < 0.95


def test_records_in_both_sets_pull_towards_guessing() -> None:
    apart = embedding.auc(words(QUESTIONS[:200]), words([text.upper().replace("THE", "DER") for text in QUESTIONS[200:]])) or 0
    shared = embedding.auc(
        words(QUESTIONS[:200]), words([*QUESTIONS[:150], *(text.upper().replace("THE", "DER") for text in QUESTIONS[200:250])])
    )
    assert 0.5 <= (shared or 0) < apart


def test_both_copies_of_a_record_are_in_one_fold_and_every_fold_has_some() -> None:
    names = words(QUESTIONS).names
    found = embedding.folds([*names, *names[::-1]]).tolist()
    assert found[: len(names)] == found[len(names) :][::-1]
    assert set(found) == set(range(embedding.FOLDS))


def test_too_few_records_are_not_judged() -> None:
    assert embedding.auc(words(QUESTIONS[:99]), words(QUESTIONS[100:300])) is None
    assert embedding.auc(words(QUESTIONS[:100]), words([])) is None


CODE = """
import json
from numpy._core._multiarray_umath import __cpu_features__ as features
from repro_assets.data import embedding
from repro_assets.data.language import model
from repro_assets_tests.data.test_embedding import QUESTIONS, words
moved = [text.replace("the", "this") for text in QUESTIONS[200:]]
print(json.dumps({
    "auc": embedding.auc(words(QUESTIONS[:200]), words(moved)),
    "languages": [model().of([text[:40]]) for text in QUESTIONS[:60]],
    "on": sorted(name for name, on in features.items() if on),
}))
"""
# numpy, and OpenBLAS below it, call other code on another CPU. Off means the baseline of the build.
DISPATCHED = [name for name in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__.get(name)]


def test_the_area_and_the_languages_are_the_same_on_a_lesser_cpu_and_with_more_threads() -> None:
    """S0.9, S3.16: floats are rounded before anything depends on them."""
    said = []
    for surroundings in (
        {"OPENBLAS_NUM_THREADS": "4"},
        {"NPY_DISABLE_CPU_FEATURES": " ".join(DISPATCHED), "OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "1"},
    ):
        env = {**os.environ, "PYTHONPATH": str(ROOT), **surroundings}
        run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, check=False)
        assert run.returncode == 0, run.stderr
        said.append(json.loads(run.stdout))
    assert not set(DISPATCHED) & set(said[1].pop("on"))
    said[0].pop("on")
    assert said[0] == said[1]
    assert 0.5 < said[0]["auc"] < 1
