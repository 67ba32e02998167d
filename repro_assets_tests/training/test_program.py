"""The training program on real ranks: one result for every number of ranks and every interruption, and nothing it should refuse.

Starting a rank costs about ten seconds of imports, so one process runs many scenarios; the fixtures say which.
"""

import json
import shutil
from typing import Any

import msgspec
import pytest

from repro_assets.documents import QloraCheckpoint
from repro_assets_tests.training import lab as labs
from repro_assets_tests.training.lab import SECTION, Lab

Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def killed(lab: Lab) -> list[dict[str, Any]]:
    """Events of a process that kills itself with SIGKILL in the middle of step 10."""
    process = labs.start(lab, [{"name": "killed", "key": "killed", "job": lab.job(), "fault": {"at": 10, "signal": "SIGKILL"}}])[0]
    process.communicate(timeout=450)
    assert process.returncode == -9
    events = labs.events(lab, "killed")
    shutil.copytree(lab.root / "jobs" / "killed", lab.root / "jobs" / "killed-2")
    return events


@pytest.fixture(scope="module")
def alone(lab: Lab, killed: list[dict[str, Any]]) -> Outcomes:
    """One process, one rank."""
    job = lab.job()
    stored = lab.leaves[0]["stored"]["sha256"]
    manifest = next(event["manifest"]["sha256"] for event in reversed(killed) if event["kind"] == "checkpoint")
    middle = next(event["manifest"]["sha256"] for event in killed if event["kind"] == "checkpoint" and event["step"] == 4)
    quiet = msgspec.structs.replace(SECTION, validate_every=1000)
    moved = lab.job(msgspec.structs.replace(SECTION, learning_rate=1e-3), resume=manifest)
    refused: dict[str, Any] = {"refused": True}
    tracked = {"REPRO_WANDB": "", "WANDB_MODE": "offline"}  # holds for the scenarios after it too
    scenarios: list[dict[str, Any]] = [
        {"name": "plain", "job": job},
        {"name": "term-1", "key": "term", "job": job, "fault": {"at": 6, "signal": "SIGTERM"}},
        {"name": "term-2", "key": "term", "job": job, "fault": {"at": 9, "signal": "SIGINT"}},
        {"name": "term-3", "key": "term", "job": job, "fault": {"at": 10, "signal": "SIGUSR1"}},
        {"name": "term-4", "key": "term", "job": job},
        {"name": "resumed", "key": "killed", "job": job},
        {"name": "segment", "job": {**job, "resume": middle, "stop_after": 8}},
        {"name": "quiet", "job": lab.job(quiet)},
        {"name": "no-bundle", "job": {**job, "bundle": "0" * 64}, **refused},
        {"name": "bad-leaf", "job": job, "flip": [stored], **refused},
        {"name": "bad-base", "job": job, "flip": [lab.base["model.safetensors"].sha256], **refused},
        {"name": "bad-bundle", "job": job, "flip": [job["bundle"]], **refused},
        {"name": "bad-manifest", "job": {**job, "resume": manifest}, "flip": [manifest], **refused},
        {"name": "other-section", "job": moved, **refused},
        *(
            {"name": name, "check": name, "job": job}
            for name in ("oracle", "accumulation", "isolation", "base_guard", "strict_keys", "loaders", "bad_base")
        ),
        {"name": "reload", "check": "reload", "job": job, "result_of": "plain"},
        {"name": "wandb-1", "key": "wandb", "job": job, "fault": {"at": 6, "signal": "SIGTERM"}, "environment": tracked},
        {"name": "wandb-2", "key": "wandb", "job": job},
    ]
    return labs.run(lab, scenarios)


@pytest.fixture(scope="module")
def pair(lab: Lab, killed: list[dict[str, Any]]) -> Outcomes:
    """Two ranks: a whole run, one whose second rank is asked to stop, one that goes on where a single rank was killed."""
    job, three = lab.job(), lab.job(msgspec.structs.replace(SECTION, micro_batches=3))
    scenarios: list[dict[str, Any]] = [
        {"name": "two", "job": job},
        {"name": "term-two-1", "key": "term-two", "job": job, "fault": {"at": 7, "signal": "SIGTERM", "rank": 1}},
        {"name": "term-two-2", "key": "term-two", "job": job},
        {"name": "grown", "key": "killed-2", "job": job},
        {"name": "uneven", "job": three, "refused": True},
    ]
    return labs.run(lab, scenarios, ranks=2)


def ledger(lab: Lab, outcome: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lab.store.get_bytes(outcome["result"]["ledger"]["sha256"]).splitlines()]


def test_a_training_learns_and_says_what_came_out(lab: Lab, alone: Outcomes) -> None:
    """S2.6, S2.8, S2.15, S2.33, S2.36: metrics, device hours, checkpoints every N steps, the best kept apart."""
    outcome = alone["plain"]
    result = msgspec.convert(outcome["result"], QloraCheckpoint)
    rows = ledger(lab, outcome)
    assert outcome["status"] == "succeeded"
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    validated = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert sorted(validated) == [3, 6, 9, 12]
    assert result.best_step == min(validated, key=lambda step: (validated[step], step))
    assert {4, 8, 12} <= {saved.step for saved in result.checkpoints}
    best = next(saved for saved in result.checkpoints if saved.step == result.best_step)
    assert (best.tensors, best.validation_loss) == (result.tensors, validated[result.best_step])
    assert set(outcome["observed"]["device_hours"]) == {"useful", "lost", "waiting"}
    assert lab.store.missing([blob.sha256 for blob in result.files().values()]) == set()


def test_one_and_two_ranks_give_one_result(alone: Outcomes, pair: Outcomes) -> None:
    """S3.16: the same result across different compute; S0.4."""
    assert pair["two"]["observed"]["world_size"] == 2
    assert pair["two"]["result"] == alone["plain"]["result"]


def test_three_signals_later_the_result_is_the_uninterrupted_one(alone: Outcomes) -> None:
    """S2.14, S2.45: resume works, byte for byte, ledger and checkpoint manifests included."""
    said = [(alone[f"term-{number}"]["status"], alone[f"term-{number}"]["reason"]) for number in (1, 2, 3)]
    assert said == [
        ("preempted", f"asked to stop ({name}); saved at step {step} of 12")
        for name, step in (("SIGTERM", 6), ("SIGINT", 9), ("SIGUSR1", 10))
    ]
    assert alone["term-4"]["result"] == alone["plain"]["result"]


def test_a_signal_on_one_rank_stops_all_of_them(lab: Lab, alone: Outcomes, pair: Outcomes) -> None:
    assert pair["term-two-1"]["reason"] == "asked to stop (another rank); saved at step 7 of 12"
    assert labs.outcome(lab, "term-two-1", rank=1)["status"] == "preempted"
    assert pair["term-two-2"]["result"] == alone["plain"]["result"]


def test_kill_nine_loses_at_most_the_steps_since_the_last_checkpoint(killed: list[dict[str, Any]], lab: Lab, alone: Outcomes) -> None:
    """S2.16: a crash loses at most N steps, and is resumed."""
    started = [event for event in labs.events(lab, "killed") if event["kind"] == "started"]
    assert [event["resumed"] for event in started] == [0, max(event["step"] for event in killed if event["kind"] == "checkpoint")]
    assert started[1]["resumed"] >= 10 - 1 - SECTION.checkpoint_every
    assert alone["resumed"]["result"] == alone["plain"]["result"]
    assert alone["resumed"]["observed"]["device_hours"]["waiting"] > 0


def test_two_ranks_go_on_where_one_was_killed(alone: Outcomes, pair: Outcomes) -> None:
    assert pair["grown"]["result"] == alone["plain"]["result"]


def test_a_replayed_segment_ends_in_the_same_checkpoint(alone: Outcomes) -> None:
    """Segment 4..8 from its checkpoint, on its own: the manifest at 8 is the uninterrupted run's blob."""
    at_eight = [saved for saved in alone["plain"]["result"]["checkpoints"] if saved["step"] == 8]
    assert [saved for saved in alone["segment"]["result"]["checkpoints"] if saved["step"] == 8] == at_eight


def test_validation_cannot_move_training(lab: Lab, alone: Outcomes) -> None:
    def trained(name: str) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "validation_loss"} for row in ledger(lab, alone[name])]

    assert trained("quiet") == trained("plain")
    last = [next(saved["tensors"] for saved in alone[name]["result"]["checkpoints"] if saved["step"] == 12) for name in ("quiet", "plain")]
    assert last[0] == last[1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-bundle", "training needs a signed bundle"), ("bad-bundle", "bundle"), ("bad-leaf", "leaf"), ("bad-base", "model.safetensors"),
        ("bad-manifest", "checkpoint manifest"), ("other-section", "was made with"),
    ],
)  # fmt: skip
def test_what_must_not_be_trained_is_refused_and_named(lab: Lab, alone: Outcomes, name: str, said: str) -> None:
    """S0.42: no bundle, a damaged bundle, leaf, base model or checkpoint, another training's checkpoint."""
    assert alone[name]["status"] == "refused"
    expected = lab.base["model.safetensors"].sha256 if name == "bad-base" else said
    assert expected in alone[name]["message"]


def test_micro_batches_that_the_ranks_cannot_share_are_refused(pair: Outcomes) -> None:
    assert "training.micro_batches is 3, which 2 ranks cannot share evenly" in pair["uneven"]["message"]


def test_the_loop_agrees_with_transformers_trainer(alone: Outcomes) -> None:
    facts = alone["oracle"]
    assert facts["theirs"] == pytest.approx(facts["ours"], abs=1e-5)
    assert facts["weights"] < 1e-4 < facts["moved"]


def test_micro_batches_sum_to_the_gradient_of_one_big_batch(alone: Outcomes) -> None:
    facts = alone["accumulation"]
    assert facts["difference"] < 1e-5 * max(1.0, facts["largest"])
    assert facts["largest"] > 1e-3
    assert facts["losses"][0] == pytest.approx(facts["losses"][1], rel=1e-6)


def test_packed_documents_do_not_see_each_other_and_the_probe_notices_when_they_do(alone: Outcomes) -> None:
    facts = alone["isolation"]
    assert facts["difference"] < 1e-4
    assert "a document sees the one before it" in facts["refusal"]


def test_the_quantised_base_does_not_move_and_its_digest_would_say_so(alone: Outcomes) -> None:
    facts = alone["base_guard"]
    assert facts["before"] == facts["after"] != facts["changed"]
    assert facts["training"]


def test_adapter_keys_are_strict(alone: Outcomes) -> None:
    facts = alone["strict_keys"]
    assert "is missing" in facts["missing"]
    assert "unknown to this model" in facts["unknown"]
    assert "this model trains" in facts["shape"]
    assert "torch.float16" in facts["dtype"]
    assert "is still zero after training" in facts["dead"]


def test_llama_qwen_and_mistral_models_go_through_the_same_loader(alone: Outcomes) -> None:
    assert set(alone["loaders"]) == {"llama", "qwen2", "qwen3", "mistral"}
    assert {facts["keys"] for facts in alone["loaders"].values()} == {2 * 7 * 2}


def test_a_base_model_that_is_not_safetensors_or_not_a_model_is_refused(alone: Outcomes) -> None:
    assert "*.safetensors are needed" in alone["bad_base"]["pickle"]
    assert "transformers cannot load it" in alone["bad_base"]["unknown"]


def test_the_released_files_load_in_peft_and_score_as_the_best_step_did(alone: Outcomes) -> None:
    best = dict(map(tuple, alone["plain"]["observed"]["validation"]))[alone["plain"]["result"]["best_step"]]
    assert alone["reload"]["loss"] == pytest.approx(best, abs=1e-6)
    config = json.loads(alone["reload"]["config"])
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"].startswith("sha256:")
    assert "/" not in alone["reload"]["config"]


def test_an_offline_tracker_run_is_whole_after_a_resume_and_moves_nothing(lab: Lab, alone: Outcomes) -> None:
    """S2.6, S2.26: W&B as a sink; each offline run holds every step from the first and the digests that tie it to the result."""
    outcome = alone["wandb-2"]
    assert alone["wandb-1"]["status"] == "preempted"
    assert outcome["result"] == alone["plain"]["result"]
    assert "tracker_failure" not in outcome["observed"]
    (name, blob), *others = outcome["observed"]["tracking"].items()
    assert not others
    assert name.startswith("train-")
    data = lab.store.get_bytes(blob["sha256"])
    assert data.count(b"gradient_norm") >= 12
    assert outcome["result"]["tensors"].encode() in data


def test_events_tell_the_story_in_order(lab: Lab, alone: Outcomes) -> None:
    events = labs.events(lab, "plain")
    kinds = [event["kind"] for event in events]
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    assert [event["step"] for event in events if event["kind"] == "validation"] == [3, 6, 9, 12]
    steps = [event for event in events if event["kind"] == "step"]
    assert steps[-1]["step"] == 12
    assert {"loss", "learning_rate", "tokens_per_second", "eta_seconds"} <= set(steps[-1])
