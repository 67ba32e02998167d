"""Packed rows and steps: what a step trains on is a function of its number, and every trained token is trained once an epoch."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from repro_assets.recipe import TrainingSection
from repro_assets.training import batches
from repro_assets.training.job import TrainingError, parse
from repro_assets_tests.training.lab import SECTION, Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def course(lab: Lab, **changes: object) -> batches.Course:
    section: TrainingSection = msgspec.structs.replace(SECTION, **changes)
    return batches.load(parse(lab.job(section)), lab.store)


def test_an_epoch_visits_every_record_and_every_trained_token_once(lab: Lab) -> None:
    whole = course(lab, steps=None, epochs=2)
    corpus = whole.epochs[0].corpus
    for epoch in (0, 1):
        steps = [step for step in map(whole.step, range(1, whole.steps + 1)) if step.epoch == epoch]
        rows = [row for step in steps for row in step.rows]
        assert rows == list(range(len(whole.epochs[epoch])))
        seen = sorted(record for row in rows for record in whole.epochs[epoch].rows[row])
        assert seen == list(range(len(corpus.records)))
        assert sum(map(whole.trained, steps)) == int(corpus.trained.sum())
    assert whole.epochs[0].rows != whole.epochs[1].rows


def test_a_row_restarts_positions_shifts_targets_inside_documents_and_ignores_padding(lab: Lab) -> None:
    rows = course(lab).epochs[0]
    index = next(number for number, row in enumerate(rows.rows) if len(row) > 1)
    batch = rows.batch([index])
    corpus, at = rows.corpus, 0
    for record in rows.rows[index]:
        first, last = corpus.offsets[record], corpus.offsets[record + 1]
        length = int(last - first)
        assert batch.input_ids[0, at : at + length].tolist() == corpus.ids[first:last].tolist()
        assert batch.position_ids[0, at : at + length].tolist() == list(range(length))
        targets = batch.targets[0, at : at + length].tolist()
        assert targets[-1] == batches.IGNORED
        assert targets[:-1] == [
            int(token) if trained else batches.IGNORED
            for token, trained in zip(corpus.ids[first + 1 : last], corpus.trained[first + 1 : last], strict=True)
        ]
        at += length
    assert set(batch.targets[0, at:].tolist()) <= {batches.IGNORED}
    assert batch.position_ids[0, at:].tolist() == list(range(rows.row_tokens - at))
    assert int((batch.targets != batches.IGNORED).sum()) == rows.trained[index]


def test_steps_beyond_the_first_epoch_are_packed_anew_and_the_plans_digest_says_so(lab: Lab) -> None:
    one = course(lab, steps=None, epochs=1)
    longer = course(lab, steps=one.steps + 3)
    assert longer.step(one.steps + 1).epoch == 1
    assert longer.plan != one.plan
    assert course(lab, steps=None, epochs=1, seed=8).plan != one.plan


def test_record_ids_of_a_step_follow_the_records(lab: Lab) -> None:
    rows = course(lab).epochs[0]
    assert rows.record_ids([0, 1]) == rows.record_ids(iter([0, 1])) != rows.record_ids([1, 0])


def test_a_damaged_leaf_is_refused_by_its_identity_and_its_blob(lab: Lab) -> None:
    leaf = lab.leaves[1]
    before = lab.flip(leaf["stored"]["sha256"])
    try:
        with pytest.raises(TrainingError) as refused:
            course(lab)
    finally:
        lab.mend(leaf["stored"]["sha256"], before)
    assert leaf["sha256"] in str(refused.value)
    assert leaf["stored"]["sha256"] in str(refused.value)


def test_a_stored_form_of_another_leaf_is_refused(lab: Lab) -> None:
    swapped = [{**lab.leaves[0], "stored": lab.leaves[1]["stored"]}, *lab.leaves[1:]]
    with pytest.raises(TrainingError, match=lab.leaves[0]["sha256"]):
        batches.load(parse(lab.job(leaves=swapped)), lab.store)


def test_a_record_longer_than_a_row_is_refused_with_the_remedy(lab: Lab) -> None:
    with pytest.raises(TrainingError, match=r"raise training.row_tokens to at least"):
        course(lab, row_tokens=16)


def test_a_split_without_training_records_is_refused(lab: Lab) -> None:
    held_out = [leaf for leaf in lab.leaves if leaf["split"] == "validation"]
    with pytest.raises(TrainingError, match="the train split has no record"):
        batches.load(parse(lab.job(leaves=held_out)), lab.store)


def test_token_ids_beyond_the_models_vocabulary_are_refused(lab: Lab) -> None:
    loaded = course(lab)
    highest = int(np.max(loaded.epochs[0].corpus.ids))
    loaded.check_vocabulary(highest + 1)
    with pytest.raises(TrainingError, match=f"token id {highest}"):
        loaded.check_vocabulary(highest)


def test_the_first_token_of_a_document_is_never_trained(lab: Lab, tmp_path: Path) -> None:
    corpus = course(lab).epochs[0].corpus
    assert not corpus.trained[corpus.offsets[:-1]].any()
