"""The whole chain for real, small: two instances agree, a reproduction certifies, a forgery does not, a release can be rolled back."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from repro_assets import reproducing
from repro_assets.documents import KINDS
from repro_assets.releases import Releases
from repro_assets.shelf import SHARED_ASSETS, folder
from repro_assets.stage import NO_MEMO
from repro_assets.terminal import FINDING, GOOD, WRONG_USE
from repro_assets.trust.blob import Blob
from repro_assets.trust.certificates import Difference
from repro_assets.trust.hardware import hardware_class
from repro_assets.trust.statements import CERTIFICATE
from repro_assets.trust.verification import encode_trust, load_trust, verify
from repro_assets_tests.graph import RECIPE, Graph, jsonl, tickets
from repro_assets_tests.world import Prepared, apart, prepared, repro
from resources.settings import Connections

CHAIN = tuple(asset for asset in KINDS if asset not in SHARED_ASSETS)


@pytest.fixture(scope="module")
def world(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with prepared(servers, tmp_path_factory.mktemp("whole"), CHAIN) as made:
        yield made


def digests(graph: Graph, key: str) -> dict[str, str]:
    return {asset: graph.document(key, asset).digest for asset in CHAIN}


def test_two_instances_give_equal_contents_and_different_observations(
    world: Prepared, servers: Connections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0.1, S0.4, S2.4: another repository, other buckets, keys, hosts' clocks and a fresh Dagster: the same digests, stage by stage."""
    first = {asset: world.graph.document(world.key, asset) for asset in CHAIN}
    other = Graph.make(apart(servers, tmp_path), tmp_path / "graph", monkeypatch)
    recipe = other.recipe()
    key = other.import_({"a.jsonl": jsonl(tickets(60))})
    for ran in (other.run(None, recipe=recipe), other.run(key, CHAIN, recipe)):
        assert ran.success, ran.failure
    second = {asset: other.document(key, asset) for asset in CHAIN}
    assert key != world.key
    assert {asset: document.digest for asset, document in second.items()} == {asset: document.digest for asset, document in first.items()}
    for asset in CHAIN:
        assert second[asset].beside() != first[asset].beside(), f"{asset} observed exactly the same twice"


def test_a_reproduction_with_another_number_of_ranks_earns_r4_and_leaves_the_snapshot_as_it_was(world: Prepared) -> None:
    """S0.45, S3.16: executed again without the memo, every digest compared, signed."""
    was = digests(world.graph, world.key)
    bench = world.graph.bench(world.recipe)
    answer = repro("reproduce", "-s", world.key, "--ranks", "2")
    assert answer.code == GOOD, answer
    said = re.search(
        r"^data: (\d+) digests compared, 0 differ\ntraining: (\d+) digests compared, 0 differ\ncertificate R4: ([0-9a-f]{64})$",
        answer.out,
        re.MULTILINE,
    )
    assert said is not None, answer.out
    assert digests(world.graph, world.key) == was
    statement = verify(
        bench.blobs.store.get_bytes(said[3]),
        trust=bench.signing.trust,
        role="builder",
        predicate_type=CERTIFICATE,
        subjects=was["qlora_checkpoint"],
    )
    assert statement["predicate"]["grade"] == "R4"
    assert [str(part["compared"]) for part in statement["predicate"]["parts"]] == [said[1], said[2]]
    assert (statement["predicate"]["original"]["world_size"], statement["predicate"]["reexecution"]["world_size"]) == (1, 2)
    verified = {item["what"]: item for item in repro("verify", "-s", world.key, "--json").json["findings"]}
    found = verified[f"certificates/{said[3][:12]}/certificate.dsse.json"]
    assert found["good"]
    assert found["seen"].startswith(
        "grade R4: whole training bit-equal with another world size, backend or hardware; signed for 8 documents"
    )
    assert not list(bench.lake.client.branches("scratch-", hidden=True))


def test_a_planted_one_byte_forgery_gets_no_certificate_and_is_named_down_to_the_tensor(world: Prepared) -> None:
    """A released adapter that the bundle did not make is found by executing again."""
    bench = world.graph.bench(world.recipe)
    store, lake = bench.blobs.store, bench.lake.client
    document = world.graph.document(world.key, "qlora_checkpoint")
    name = "adapter_model.safetensors"
    data = bytearray(store.get_bytes(document.result.adapter[name].sha256))
    data[-1] ^= 1
    forged: dict[str, Blob] = {**document.result.adapter, name: store.put_bytes(bytes(data))}
    fake = msgspec.structs.replace(document, result=msgspec.structs.replace(document.result, adapter=forged))
    place = folder(world.key, "small", "qlora_checkpoint")
    branch = f"snapshot-{world.key}"

    def commit(what: Any) -> None:
        content, beside = store.put_many([what.content(), what.beside()])
        files = {**what.files(), "document.json": content, "observed.json": beside}
        lake.write(branch, place, files, message="planted", metadata={}, keep=("checkpoints",))

    commit(fake)
    try:
        answer = repro("reproduce", "-s", world.key, "--ranks", "1", "--json")
    finally:
        commit(document)
    assert answer.code == FINDING, answer
    assert "error" not in answer.json, answer.err
    assert set(answer.json) == {"grade", "parts", "first", "first_in_words", "certificate", "commit", "run", "was", "now"}
    assert answer.json["grade"] is None
    assert answer.json["first_in_words"].startswith(answer.json["first"]["name"])
    differing = [msgspec.convert(found, Difference) for part in answer.json["parts"] for found in part["differences"]]
    assert "tensor base_model" in reproducing.explain(store, next(d for d in differing if d.name == f"qlora_checkpoint/adapter/{name}"))
    said = {item["what"]: item["seen"] for item in repro("verify", "-s", world.key, "--json").json["findings"]}
    assert "the re-execution differs" in said[f"certificates/{answer.json['certificate']['sha256'][:12]}/certificate.dsse.json"]


def test_the_release_on_main_holds_adapter_chain_and_signed_decision_and_a_second_run_adds_none(world: Prepared) -> None:
    """S3.18: from the released model to every digest it came from."""
    bench = world.graph.bench(world.recipe)
    releases = Releases(bench.lake.client, bench.blobs.store)
    (release,) = releases.all()
    assert release.documents == {
        **{asset: value for asset, value in digests(world.graph, world.key).items() if asset != "promotion"},
        **{asset: world.graph.document(world.key, "training_bundle").inputs[asset] for asset in SHARED_ASSETS},
    }
    paths = {entry.path for entry in bench.lake.client.list(bench.lake.client.head("main"), "releases/1/")}
    assert {"releases/1/adapter/adapter_config.json", "releases/1/adapter/adapter_model.safetensors", "releases/1/release.json"} <= paths
    assert {f"releases/1/statements/{name}.dsse.json" for name in ("bundle", "checkpoint", "evaluation", "decision")} <= paths
    assert bench.lake.client.tagged("release-1")
    ran = world.graph.run(world.key, ("promotion",), world.recipe)
    assert ran.success
    assert ran.assets["promotion"]["done"] == "already release 1; nothing written"
    assert len(releases.all()) == 1


def test_a_checkpoint_is_a_lakefs_commit_each_and_the_head_links_the_last_and_the_best(world: Prepared) -> None:
    """S2.33, S2.36, S2.39: every N steps, the best kept apart, earlier ones in the history."""
    document = world.graph.document(world.key, "qlora_checkpoint")
    steps = [point.step for point in document.result.checkpoints]
    assert steps == [3, 6]
    lake = world.graph.bench().lake.client
    assert set(document.observed.commits) == {"3", "6"}
    place = f"{folder(world.key, 'small', 'qlora_checkpoint')}/checkpoints"
    for step in steps:
        commit = document.observed.commits[str(step)]
        manifest = lake.stat(commit, f"{place}/step-{step:06d}/manifest.json").sha256
        assert manifest == next(point.manifest.sha256 for point in document.result.checkpoints if point.step == step)
    kept = {entry.path.split("/")[5] for entry in lake.list(world.graph.head(world.key), f"{place}/")}
    assert kept == {f"step-{step:06d}" for step in {6, document.result.best_step}}


def test_training_is_recalled_when_only_the_bundle_is_new(world: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """S0.28: another image is another bundle; training's memo key is made of shards, section, code and lock, so nothing is trained again."""
    was = world.graph.document(world.key, "training_bundle").digest
    monkeypatch.setenv("REPRO_IMAGE", f"repro@sha256:{'ab' * 32}")
    ran = world.graph.run(world.key, ("training_bundle", "qlora_checkpoint"), world.recipe)
    assert ran.success, ran.failure
    assert world.graph.document(world.key, "training_bundle").digest != was
    assert ran.assets["qlora_checkpoint"]["executed"] == "no, recalled from the memo"


def test_results_and_memo_keys_name_the_hardware_alike(world: Prepared) -> None:
    """S0.28: what the programs say they ran on is what a later run looks up."""
    for asset in ("qlora_checkpoint", "eval_results"):
        document = world.graph.document(world.key, asset)
        assert document.result.hardware == document.made.components["hardware"] == hardware_class()


def test_a_rollback_is_a_new_release_that_restores_an_earlier_one(world: Prepared) -> None:
    """S1.54, S1.55: main only moves forward; what is restored is verified anew, and an older snapshot never replaces a newer release."""
    bench = world.graph.bench(world.recipe)
    releases = Releases(bench.lake.client, bench.blobs.store)
    for number, words in ((1, "in force already"), (7, "there is no release 7; releases: 1")):
        answer = repro("rollback", number, "-m", "because", "--json")
        assert answer.code == WRONG_USE
        assert words in answer.json["error"]
    newer = world.graph.import_({"b.jsonl": jsonl(tickets(30, start=900))})
    ran = world.graph.run(newer, CHAIN, world.recipe)
    assert ran.success, ran.failure
    assert ran.assets["promotion"]["done"] == "released as release 2"
    older = world.graph.run(world.key, ("eval_results", "promotion"), world.recipe)
    assert older.assets["promotion"]["done"].startswith(
        ("already release 1", "would promote; not released: release 2 is of the newer snapshot")
    )
    trust = load_trust(bench.signing.trust_file)
    keys = {key_id: key for key_id, key in trust.keys.items() if "approver" not in key.roles}
    bench.signing.trust_file.write_bytes(encode_trust(msgspec.structs.replace(trust, keys=keys)))
    try:
        answer = repro("rollback", 1, "-m", "answers got worse", "--json")
    finally:
        bench.signing.trust_file.write_bytes(encode_trust(trust))
    assert answer.code == FINDING, "the decision of release 1 no longer verifies"
    assert "not in the trust configuration" in answer.json["error"]
    assert len(releases.all()) == 2
    answer = repro("rollback", 1, "-m", "answers got worse", "--json")
    assert answer.code == GOOD, answer
    release = releases.get(3)
    assert (release.number, release.kind, release.restores, release.reason) == (3, "rollback", 1, "answers got worse")
    assert answer.json == {**msgspec.to_builtins(release), "commit": bench.lake.client.head("main")}
    assert releases.in_force("small") == release
    assert release.adapter == releases.get(1).adapter != releases.get(2).adapter
    answer = repro("rollback", 2, "-m", "it was right after all")
    assert answer.out == f"release 4 restores release 2; commit {bench.lake.client.head('main')[:12]} on main\n"
    kinds = [row["kind"] for row in repro("releases", "--json").json["releases"]]
    assert kinds == ["promotion", "promotion", "rollback to 1", "rollback to 2"]


def test_no_memo_trains_again_and_finds_the_same_adapter(world: Prepared) -> None:
    """R3 by the check `reproduces`, and a re-execution never collects the original's job."""
    was = world.graph.document(world.key, "qlora_checkpoint")
    ran = world.graph.run(world.key, ("qlora_checkpoint",), world.recipe, tags={NO_MEMO: "true"})
    assert ran.success, ran.failure
    assert not ran.failed_checks
    now = world.graph.document(world.key, "qlora_checkpoint")
    assert now.digest == was.digest
    assert now.observed.job != was.observed.job


def test_a_gate_that_refuses_ends_materialize_with_a_finding(world: Prepared) -> None:
    """The run did its work, the decision is hold: exit code 1 with the gate's reason, for whoever scripts it."""
    demanding = RECIPE.replace("{name}", "small").replace("margin: 0.2", "margin: 0.2, minimum: 1.0")
    answer = repro("materialize", "-s", world.key, "--select", "promotion", "-r", world.graph.recipe("demanding", demanding), "--json")
    assert answer.code == FINDING, answer
    (ran,) = answer.json["runs"]
    assert ran["success"]
    assert ran["failed_checks"][0].startswith("promotion: gates_pass: ")
    assert world.graph.document(world.key, "promotion").result.decision == "hold"
