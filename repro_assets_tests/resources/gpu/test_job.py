"""What makes two jobs the same one."""

import pytest

from resources.gpu import Job, job_key

BASE = Job(purpose="train", identity={"bundle": "b", "section": "s"}, spec={"resume": None})


def test_the_key_is_made_of_identity_purpose_attempt_and_nonce_alone() -> None:
    same = Job(
        purpose="train",
        identity={"section": "s", "bundle": "b"},
        spec={"resume": "x"},
        ranks=2,
        gpus=2,
        time_limit=9,
        environment={"A": "1"},
    )
    assert job_key(same) == job_key(BASE), "ranks, devices, limits and what the program reads do not name the job"
    others = [
        job_key(BASE, 1),
        job_key(Job(purpose="score", identity=BASE.identity, spec={})),
        job_key(Job(purpose="train", identity={**BASE.identity, "section": "t"}, spec={})),
        job_key(Job(purpose="train", identity=BASE.identity, spec={}, nonce="reproduction-1")),
    ]
    assert len({job_key(BASE), *others}) == 5
    assert job_key(BASE) == "dc4b79d2e36ea4ea19be1d7d8483a6c9", "a key that moves would orphan every running job"


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"nodes": 0}, {"ranks": 2, "gpus": 1}, {"time_limit": -1.0}, {"grace": -1.0}])
def test_a_job_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|one GPU for each rank|not below 0"):
        Job(purpose="train", identity={}, spec={}, **wrong)  # type: ignore[arg-type]
