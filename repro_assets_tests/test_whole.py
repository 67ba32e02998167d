"""The whole chain for real, small: two instances agree, a reproduction certifies, a forgery does not, a release can be rolled back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from repro_assets import promoting, reproducing
from repro_assets.documents import KINDS
from repro_assets.releases import ReleaseError, Releases
from repro_assets.shelf import SHARED_ASSETS, folder
from repro_assets.stage import NO_MEMO
from repro_assets.trust.blob import Blob
from repro_assets.trust.statements import CERTIFICATE
from repro_assets.trust.verification import verify
from repro_assets_tests.graph import Graph, jsonl, tickets
from repro_assets_tests.world import Prepared, apart, prepared
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
    proof = reproducing.reproduce(world.graph.instance, bench, world.key, recipe=str(world.recipe), ranks=2)
    assert proof.first_in_words == ""
    assert proof.grade == "R4"
    assert {part.scope: len(part.differences) for part in proof.parts} == {"data": 0, "training": 0}
    assert proof.was is not None
    assert proof.now is not None
    assert (proof.was.world_size, proof.now.world_size) == (1, 2)
    assert digests(world.graph, world.key) == was
    statement = verify(
        bench.blobs.store.get_bytes(proof.certificate.sha256),
        trust=bench.signing.trust,
        role="builder",
        predicate_type=CERTIFICATE,
        subjects=was["qlora_checkpoint"],
    )
    assert statement["predicate"]["grade"] == "R4"
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
        proof = reproducing.reproduce(world.graph.instance, bench, world.key, recipe=str(world.recipe), ranks=1)
    finally:
        commit(document)
    assert proof.grade is None
    assert proof.first is not None
    assert any("adapter_model.safetensors" in difference.name for part in proof.parts for difference in part.differences)
    assert "tensor base_model" in reproducing.explain(
        store, next(d for part in proof.parts for d in part.differences if d.name == f"qlora_checkpoint/adapter/{name}")
    )


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


def test_a_rollback_is_a_new_release_that_restores_an_earlier_one(world: Prepared) -> None:
    """S1.54, S1.55: main only moves forward; what is restored is verified anew, and an older snapshot never replaces a newer release."""
    bench = world.graph.bench(world.recipe)
    releases = Releases(bench.lake.client, bench.blobs.store)
    with pytest.raises(ReleaseError, match="in force already"):
        promoting.roll_back(releases, bench.signing, 1, "because")
    with pytest.raises(ReleaseError, match="there is no release 7; releases: 1"):
        promoting.roll_back(releases, bench.signing, 7, "because")
    newer = world.graph.import_({"b.jsonl": jsonl(tickets(30, start=900))})
    ran = world.graph.run(newer, CHAIN, world.recipe)
    assert ran.success, ran.failure
    assert ran.assets["promotion"]["done"] == "released as release 2"
    older = world.graph.run(world.key, ("eval_results", "promotion"), world.recipe)
    assert older.assets["promotion"]["done"].startswith(
        ("already release 1", "would promote; not released: release 2 is of the newer snapshot")
    )
    release, commit = promoting.roll_back(releases, bench.signing, 1, "answers got worse")
    assert (release.number, release.kind, release.restores) == (3, "rollback", 1)
    assert releases.in_force("small") == release
    assert release.adapter == releases.get(1).adapter != releases.get(2).adapter
    assert bench.lake.client.head("main") == commit


def test_no_memo_trains_again_and_finds_the_same_adapter(world: Prepared) -> None:
    """R3 by the check `reproduces`, and a re-execution never collects the original's job."""
    was = world.graph.document(world.key, "qlora_checkpoint")
    ran = world.graph.run(world.key, ("qlora_checkpoint",), world.recipe, tags={NO_MEMO: "true"})
    assert ran.success, ran.failure
    assert not ran.failed_checks
    now = world.graph.document(world.key, "qlora_checkpoint")
    assert now.digest == was.digest
    assert now.observed.job != was.observed.job
