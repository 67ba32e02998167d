"""The life of an asset on real servers: pinned inputs, memo, references, refusals, the check `reproduces`."""

import base64
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from repro_assets.data import records as build_records
from repro_assets.shelf import folder
from repro_assets.stage import NO_MEMO, REFRESH
from repro_assets_tests.graph import RECIPE, Graph, jsonl, suite, tickets
from repro_assets_tests.resources.trees import gateway

DATA = ("raw_snapshot", "records", "shards")


def prepared(graph: Graph, recipe: Path | None = None) -> str:
    """A snapshot of 60 tickets with its data stages made."""
    assert graph.run(None, recipe=recipe).success
    key = graph.import_({"a.jsonl": jsonl(tickets(60))})
    ran = graph.run(key, DATA, recipe)
    assert ran.success, ran.failure
    return key


def commits(graph: Graph, key: str) -> int:
    return sum(1 for _ in graph.bench().lake.client.log(f"snapshot-{key}"))


def test_a_second_run_recalls_every_asset_and_writes_no_commit(graph: Graph) -> None:
    key = prepared(graph)
    before = commits(graph, key)
    again = graph.run(key, DATA)
    assert again.success
    assert {name: told["executed"] for name, told in again.assets.items()} == dict.fromkeys(DATA, "no, recalled from the memo")
    assert commits(graph, key) == before


def test_a_renamed_recipe_recalls_the_same_results_under_its_own_name(graph: Graph) -> None:
    """Identities hold what was chosen, never the recipe's name; two recipes live side by side on one snapshot."""
    key = prepared(graph)
    other = graph.recipe("other")
    assert graph.run(None, recipe=other).success
    again = graph.run(key, DATA, other)
    assert again.success
    assert {name: told["executed"] for name, told in again.assets.items()} == dict.fromkeys(DATA, "no, recalled from the memo")
    for asset in DATA:
        assert graph.document(key, asset, "other").digest == graph.document(key, asset, "small").digest


def test_a_changed_section_makes_another_document_and_leaves_the_other_recipe_alone(graph: Graph) -> None:
    key = prepared(graph)
    was = {asset: graph.document(key, asset).digest for asset in DATA}
    shorter = graph.recipe("shorter", RECIPE.replace("max_tokens: 128", "max_tokens: 20"))
    assert graph.run(None, recipe=shorter).success
    assert graph.run(key, DATA, shorter).success
    assert graph.document(key, "records", "shorter").digest == was["records"]
    assert graph.document(key, "shards", "shorter").digest != was["shards"]
    assert graph.document(key, "shards", "shorter").result.truncated_records > 0
    assert {asset: graph.document(key, asset).digest for asset in DATA} == was


def test_an_upstream_document_of_another_recipe_is_refused_with_field_and_remedy(graph: Graph) -> None:
    key = prepared(graph)
    changed = graph.recipe("small", quarantine=0.5)
    ran = graph.run(key, ("shards",), changed)
    assert not ran.success
    assert "quarantine_limit 0.05 -> 0.5" in ran.failure
    assert f"repro materialize --snapshot {key} --select records" in ran.failure


def test_an_upstream_document_made_from_older_inputs_is_refused(graph: Graph) -> None:
    key = prepared(graph)
    changed = graph.recipe("small", quarantine=0.5)
    assert graph.run(key, ("records",), changed).success
    ran = graph.run(key, ("validation_report",), changed)
    assert not ran.success
    assert "shards of snapshot" in ran.failure
    assert "was made from records" in ran.failure


def test_a_missing_upstream_or_shared_asset_is_refused_with_the_command_that_makes_it(graph: Graph) -> None:
    key = graph.import_({"a.jsonl": jsonl(tickets(20))})
    assert "--select raw_snapshot" in graph.run(key, ("records",)).failure
    assert graph.run(key, ("raw_snapshot",)).success
    assert "repro materialize --select base_model,eval_suites" in graph.run(key, ("records",)).failure


def test_a_forged_memo_entry_is_not_used_and_says_so(graph: Graph) -> None:
    """Attack 6: a valid-looking entry signed by nobody we trust."""
    key = prepared(graph)
    document = graph.document(key, "records")
    name = f"memo/{document.made.key}"
    objects = graph.bench().objects
    raw = msgspec.json.decode(objects.get(name))
    signature = bytearray(base64.b64decode(raw["signatures"][0]["sig"]))
    signature[5] ^= 1
    raw["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    objects.put(name, msgspec.json.encode(raw))
    other = graph.recipe("other")
    assert graph.run(None, recipe=other).success
    said: list[str] = []
    ran = graph.run(key, ("raw_snapshot", "records"), other, say=lambda asset, message: said.append(f"{asset}: {message}"))
    assert ran.success
    assert ran.assets["records"]["executed"] == "yes"
    assert any("memo entry is not used" in line and "signature" in line for line in said)
    assert graph.document(key, "records", "other").digest == document.digest


def test_a_memo_hit_whose_outputs_are_gone_is_made_again(graph: Graph) -> None:
    key = prepared(graph)
    lost = graph.document(key, "records").result.leaves[0].blob
    bench = graph.bench()
    bench.blobs.store._client.delete_object(Bucket=graph.connections.blobs_bucket, Key=f"sha256/{lost.sha256[:2]}/{lost.sha256}")
    other = graph.recipe("other")
    assert graph.run(None, recipe=other).success
    said: list[str] = []
    assert graph.run(key, ("raw_snapshot", "records"), other, say=lambda asset, message: said.append(message)).success
    assert any("remembered outputs are gone" in line for line in said)
    assert not bench.blobs.store.missing([lost.sha256])


def test_no_memo_executes_again_and_finds_the_same_content(graph: Graph) -> None:
    """S0.4, S0.18: the same inputs, recipe section and code give the same content."""
    key = prepared(graph)
    was = {asset: graph.document(key, asset).digest for asset in DATA}
    ran = graph.run(key, DATA, tags={NO_MEMO: "true"})
    assert ran.success
    assert not ran.failed_checks
    assert {asset: graph.document(key, asset).digest for asset in DATA} == was
    assert {graph.document(key, asset).made.run for asset in DATA} == {ran.run_id}


def test_a_stage_that_reads_the_clock_is_a_failed_check_named_after_what_differs(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """S0.46, S0.9: hidden randomness is found and named, and the branch keeps what it had."""
    key = prepared(graph)
    was = graph.document(key, "records").digest
    honest = build_records.build

    def clocked(*arguments: Any, **options: Any) -> Any:
        result, observed = honest(*arguments, **options)
        return msgspec.structs.replace(result, reasons={**result.reasons, "clock": time.time_ns() % 10**9}), observed

    monkeypatch.setattr(build_records, "build", clocked)
    ran = graph.run(key, ("records",), tags={NO_MEMO: "true"})
    assert not ran.success
    assert [check for check in ran.failed_checks if "records: reproduces: not deterministic" in check and "reasons.clock" in check]
    assert graph.document(key, "records").digest == was


def test_a_shared_asset_is_resolved_once_until_asked_to_look_again(graph: Graph) -> None:
    """A rebuild of an old snapshot uses the suites that it was first built with, whatever the newest are."""
    key = prepared(graph)
    first = graph.document(key, "records").inputs["eval_suites"]
    suite(graph.folder / "suite", items=40)
    assert graph.run(None).success
    assert graph.run(key, ("records",), tags={NO_MEMO: "true"}).success
    assert graph.document(key, "records").inputs["eval_suites"] == first
    assert graph.run(key, ("records",), tags={REFRESH: "true"}).success
    assert graph.document(key, "records").inputs["eval_suites"] != first


def test_uncommitted_objects_on_raw_are_refused_with_the_remedy(graph: Graph) -> None:
    key = prepared(graph)
    gateway(graph.connections).put_object(Bucket=graph.connections.repository, Key="raw/tickets/stray.jsonl", Body=b"{}\n")
    ran = graph.run(key, ("raw_snapshot",))
    assert not ran.success
    assert "'tickets/stray.jsonl'" in ran.failure
    assert "repro commit-raw" in ran.failure


def test_every_commit_says_what_it_is_and_which_run_made_it(graph: Graph) -> None:
    """S0.3, S0.23: who made what, when, in which run."""
    key = prepared(graph)
    info = graph.bench().lake.client.commit_info(f"snapshot-{key}")
    assert info.metadata["asset"] == "shards"
    assert info.metadata["snapshot"] == key
    assert info.metadata["document"] == graph.document(key, "shards").digest
    assert graph.instance.get_run_by_id(info.metadata["run"]) is not None
    assert len(info.metadata["code"]) == 64


def test_the_document_is_an_ordinary_lakefs_object_named_by_its_digest(graph: Graph) -> None:
    """S0.16: identical content, same artifact; any lakeFS client reads it."""
    key = prepared(graph)
    document = graph.document(key, "shards")
    lake = graph.bench().lake.client
    place = folder(key, "small", "shards")
    assert lake.read(graph.head(key), f"{place}/document.json") == document.content()
    assert lake.stat(graph.head(key), f"{place}/document.json").checksum == f"sha256:{document.digest}"
