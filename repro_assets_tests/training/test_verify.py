"""The bundle check, without torch: what is signed is what is trained, down to the last leaf, file and setting."""

from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner

from repro_assets.training.job import TrainingError, parse
from repro_assets.training.verify import check_bundle
from repro_assets.trust import statements
from repro_assets_tests.training.lab import SECTION, Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def refusal(lab: Lab, **changes: object) -> str:
    with pytest.raises(TrainingError) as refused:
        check_bundle(parse({**lab.job(), **changes}), lab.store)
    return str(refused.value)


def test_a_signed_job_gives_the_statements_digest_and_a_second_signature_gives_the_same(lab: Lab) -> None:
    """S0.42: training requires a signed snapshot first."""
    first, second = lab.job(), lab.job()
    statement = check_bundle(parse(first), lab.store)
    assert statement == check_bundle(parse(second), lab.store)
    assert len(statement) == 64


def test_training_without_a_bundle_is_refused(lab: Lab) -> None:
    assert "training needs a signed bundle" in refusal(lab, bundle="0" * 64)


def test_a_bundle_with_one_bit_flipped_is_refused_and_named(lab: Lab) -> None:
    bundle = lab.job()["bundle"]
    before = lab.flip(bundle, at=40)
    try:
        assert bundle in refusal(lab, bundle=bundle)
    finally:
        lab.mend(bundle, before)


def test_a_payload_changed_under_its_signature_is_refused(lab: Lab) -> None:
    envelope = msgspec.json.decode(lab.store.get_bytes(lab.job()["bundle"]))
    other = msgspec.json.decode(lab.store.get_bytes(lab.bundle(msgspec.structs.replace(SECTION, seed=8)).sha256))
    forged = lab.store.put_bytes(msgspec.json.encode({**envelope, "payload": other["payload"]}))
    assert "signature" in refusal(lab, bundle=forged.sha256)


def test_a_key_that_configuration_does_not_know_is_refused(lab: Lab) -> None:
    stranger = lab.bundle(SECTION, signer=CryptoSigner.generate_ed25519())
    assert "is not in the trust configuration" in refusal(lab, bundle=stranger.sha256)


def test_a_leaf_left_out_and_a_leaf_too_many_are_refused_and_named(lab: Lab) -> None:
    assert f"leaves/train/{lab.leaves[0]['sha256']}" in refusal(lab, leaves=lab.leaves[1:])
    more = {**lab.leaves[0], "sha256": "a" * 64}
    assert f"leaves/train/{'a' * 64}" in refusal(lab, leaves=[*lab.leaves, more])


def test_a_leaf_listed_twice_is_refused(lab: Lab) -> None:
    assert "listed twice" in refusal(lab, leaves=[*lab.leaves, lab.leaves[0]])


def test_a_leaf_moved_from_validation_into_training_is_refused(lab: Lab) -> None:
    moved = [{**leaf, "split": "train"} for leaf in lab.leaves]
    assert lab.leaves[-1]["sha256"] in refusal(lab, leaves=moved)


def test_a_base_model_file_that_is_not_signed_for_is_refused_and_named(lab: Lab) -> None:
    files = lab.job()["base_model"]
    assert "'model.safetensors'" in refusal(lab, base_model={**files, "model.safetensors": files["config.json"]})
    assert "'extra.json'" in refusal(lab, base_model={**files, "extra.json": files["config.json"]})
    assert "lists no file" in refusal(lab, base_model={})


def test_a_setting_changed_after_signing_is_refused_and_named(lab: Lab) -> None:
    section = {**SECTION.identity(), "learning_rate": 1.0}
    assert "`learning_rate` is 1.0 in the job" in refusal(lab, section=section)


def test_a_genuine_statement_that_is_no_bundle_is_refused(lab: Lab) -> None:
    from repro_assets.trust import signing

    job = lab.job()
    subjects = {f"leaves/{leaf['split']}/{leaf['sha256']}": leaf["sha256"] for leaf in lab.leaves}
    checkpoint = statements.provenance(
        statements.CHECKPOINT, subjects, parameters={}, dependencies=[], builder="https://example.org/builder", invocation="a-run"
    )
    signed = lab.store.put_bytes(signing.sign(checkpoint, lab.signer))
    assert statements.CHECKPOINT in refusal(lab, **{**job, "bundle": signed.sha256})


def test_an_unknown_field_of_a_job_is_an_error_that_names_it(lab: Lab) -> None:
    with pytest.raises(TrainingError, match="unknown field `colour`"):
        parse({**lab.job(), "colour": "red"})


def test_the_lab_is_not_trusted_by_accident(lab: Lab, tmp_path: Path) -> None:
    assert lab.trust.ids("builder")
    assert not lab.trust.ids("approver")
