"""Why an asset would be made again, verification of a snapshot, health: each finds what was planted and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import msgspec
import pytest
from botocore.config import Config

from repro_assets.documents import Records
from repro_assets.health import examine
from repro_assets.inspecting import Inspector, code_of
from repro_assets.shelf import MissingDocument, folder
from repro_assets.trust.canonical import canonical
from repro_assets.trust.verification import encode_trust, load_trust
from repro_assets.verifying import Verifier
from repro_assets_tests.graph import RECIPE
from repro_assets_tests.test_shelf import gateway
from repro_assets_tests.world import SIGNED, Prepared, prepared
from resources.lake import COMMIT
from resources.settings import Connections


@pytest.fixture(scope="module")
def made(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with prepared(servers, tmp_path_factory.mktemp("inspected"), SIGNED) as found:
        yield found


def why(made: Prepared, asset: str, recipe: Path | None = None) -> list[str]:
    return Inspector(made.graph.bench(recipe)).why(asset, made.key)


def bad(made: Prepared, deep: bool = False) -> dict[str, str]:
    found = list(Verifier(made.graph.bench(), made.key).findings(deep))
    assert found
    return {item.what: item.seen for item in found if not item.good}


def s3(connections: Connections) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=connections.s3_endpoint,
        aws_access_key_id=connections.s3_access_key,
        aws_secret_access_key=connections.s3_secret_key,
        region_name=connections.s3_region,
        config=Config(s3={"addressing_style": "path"}),
    )


@contextmanager
def overwritten(connections: Connections, bucket: str, key: str, data: bytes) -> Iterator[None]:
    """An object with other bytes while the block runs."""
    client = s3(connections)
    was = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.put_object(Bucket=bucket, Key=key, Body=data)
    try:
        yield
    finally:
        client.put_object(Bucket=bucket, Key=key, Body=was)


# ---- snapshots and documents


def test_snapshots_say_what_became_of_them(made: Prepared) -> None:
    (row,) = Inspector(made.graph.bench()).snapshots()
    assert COMMIT.fullmatch(row.pop("raw_commit"))
    assert row == {"snapshot": made.key, "assets": len(SIGNED), "decision": "", "release": None}


def test_a_document_that_was_never_made_names_the_command_that_makes_it(made: Prepared) -> None:
    with pytest.raises(MissingDocument, match=f"repro materialize --snapshot {made.key} --select promotion"):
        Inspector(made.graph.bench()).show("promotion", made.key)


# ---- why


@pytest.mark.parametrize("asset", SIGNED)
def test_nothing_differs_right_after_an_asset_was_made(made: Prepared, asset: str) -> None:
    assert why(made, asset) == []


def test_a_changed_recipe_key_is_named_with_both_values_where_it_matters(made: Prepared) -> None:
    other = made.graph.recipe("small-changed", RECIPE.replace("{name}", "small").replace("max_tokens: 128", "max_tokens: 64"))
    assert why(made, "records", other) == []
    assert why(made, "shards", other) == ["shards: section.max_tokens 128 -> 64"]
    assert why(made, "validation_report", other) == ["shards: section.max_tokens 128 -> 64"]  # what it stands on, first


def test_changed_code_is_named_by_its_module(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    now = code_of("shards")
    changed = msgspec.structs.replace(
        now, digest="f" * 64, sources={**now.sources, "repro_assets.data.sharding": "0" * 64, "new": "1" * 64}
    )
    monkeypatch.setattr("repro_assets.inspecting.code_of", lambda asset: changed if asset == "shards" else code_of(asset))
    assert why(made, "shards") == ["shards: code of new is reached now", "shards: code of repro_assets.data.sharding changed"]
    newer = msgspec.structs.replace(now, libraries={**now.libraries, "tokenizers": "99.0"})
    monkeypatch.setattr("repro_assets.inspecting.code_of", lambda asset: newer if asset == "shards" else code_of(asset))
    assert why(made, "shards") == [f"shards: libraries.tokenizers {now.libraries['tokenizers']} -> 99.0"]


def test_a_changed_input_is_named(made: Prepared) -> None:
    other = made.graph.recipe(
        "small-stricter", RECIPE.replace("{name}", "small").replace("split: {{validation: 0.1}}", "split: {{validation: 0.3}}")
    )
    made.graph.monkeypatch.setenv("REPRO_RECIPE", str(other))
    try:
        assert made.graph.run(made.key, ("records",), other).success
        differs = why(made, "shards", other)
        assert len(differs) == 1
        assert differs[0].startswith("shards: inputs.records ")
    finally:
        made.graph.monkeypatch.setenv("REPRO_RECIPE", str(made.recipe))
        assert made.graph.run(made.key, ("records",), made.recipe).success
    assert why(made, "shards") == []


# ---- verify


def test_a_snapshot_as_it_was_made_verifies_to_the_last_byte(made: Prepared) -> None:
    """S0.18: recompute, assert equal to the manifest."""
    found = list(Verifier(made.graph.bench(), made.key).findings(deep=True))
    assert [item.what for item in found] == [*SIGNED, "training_bundle: signature", "base_model", "eval_suites", "raw"]
    assert all(item.good for item in found), found


def test_a_flipped_byte_is_found_whatever_the_cache_holds(made: Prepared) -> None:
    document = made.graph.document(made.key, "records")
    name, blob = next((name, blob) for name, blob in document.files().items() if name.startswith("leaves/"))
    data = made.graph.bench().blobs.store.get_bytes(blob.sha256)  # now it is in the local cache
    where = made.graph.connections
    with overwritten(where, where.blobs_bucket, f"sha256/{blob.sha256[:2]}/{blob.sha256}", bytes([data[0] ^ 1]) + data[1:]):
        found = bad(made)
    assert list(found) == [f"records/{name}"]
    assert blob.sha256 in found[f"records/{name}"]
    assert bad(made) == {}


def test_a_lost_blob_is_found(made: Prepared) -> None:
    blob = made.graph.document(made.key, "shards").files()
    name, lost = next(iter(blob.items()))
    where, key = made.graph.connections, f"sha256/{lost.sha256[:2]}/{lost.sha256}"
    client = s3(where)
    was = client.get_object(Bucket=where.blobs_bucket, Key=key)["Body"].read()
    client.delete_object(Bucket=where.blobs_bucket, Key=key)
    try:
        assert list(bad(made)) == [f"shards/{name}"]
    finally:
        client.put_object(Bucket=where.blobs_bucket, Key=key, Body=was)


def test_a_document_forged_by_hand_is_found(made: Prepared) -> None:
    """Attack: whoever may write to lakeFS writes a document that is right in every form, with another result."""
    bench, key = made.graph.bench(), made.key
    lake, blobs = bench.lake.client, bench.blobs.store
    true = made.graph.document(key, "records")
    forged = msgspec.structs.replace(true, result=msgspec.structs.replace(true.result, reasons={"nothing to see": 0}))
    assert isinstance(forged.result, Records)
    content, beside = blobs.put_many([forged.content(), forged.beside()])

    def write(document: Any, content: Any, beside: Any) -> None:
        files = {**document.files(), "document.json": content, "observed.json": beside}
        lake.write(f"snapshot-{key}", folder(key, "small", "records"), files, message="x", metadata={})

    write(forged, content, beside)
    try:
        found = bad(made)
    finally:
        write(true, *blobs.put_many([true.content(), true.beside()]))
    assert "the document is forged" in found["records: origin"]
    assert f"was made from records {true.digest[:12]}, but records is {forged.digest[:12]}" in found["shards"]
    assert bad(made) == {}


def test_a_name_that_leads_to_other_bytes_is_found(made: Prepared) -> None:
    where, key = made.graph.connections, made.key
    lake = made.graph.bench().lake.client
    place = f"{folder(key, 'small', 'raw_snapshot')}/manifest.json"
    before = lake.head(f"snapshot-{key}")
    gateway(where).put_object(Bucket=where.repository, Key=f"snapshot-{key}/{place}", Body=b"[]")
    lake.commit_staged(f"snapshot-{key}", "by hand", {})
    found = bad(made)
    assert list(found) == ["raw_snapshot/manifest.json"]
    assert "another tool's object" in found["raw_snapshot/manifest.json"]
    blob = made.graph.document(key, "raw_snapshot").result.manifest
    lake.write(f"snapshot-{key}", folder(key, "small", "raw_snapshot"), {"manifest.json": blob}, message="x", metadata={}, replace=False)
    assert bad(made) == {}
    assert lake.head(f"snapshot-{key}") != before


def test_a_bundle_of_a_key_that_is_not_trusted_is_found(made: Prepared) -> None:
    """S0.42: which keys are trusted comes from configuration."""
    signing = made.graph.bench().signing
    trust = load_trust(signing.trust_file)
    others = {key_id: key for key_id, key in trust.keys.items() if "builder" not in key.roles}
    signing.trust_file.write_bytes(encode_trust(msgspec.structs.replace(trust, keys=others)))
    try:
        found = bad(made)
    finally:
        signing.trust_file.write_bytes(encode_trust(trust))
    assert list(found) == ["training_bundle: signature"]
    assert "trust" in found["training_bundle: signature"]


def test_another_bundles_envelope_is_found(made: Prepared) -> None:
    """A true signature on another statement: the document points to an envelope of somebody's other bundle."""
    bench, key = made.graph.bench(), made.key
    true = made.graph.document(key, "training_bundle")
    other = bench.blobs.store.put_bytes(canonical({"payload": "", "payloadType": "x", "signatures": []}))
    swapped = msgspec.structs.replace(true, observed=msgspec.structs.replace(true.observed, envelope=other))

    def write(document: Any) -> None:
        content, beside = bench.blobs.store.put_many([document.content(), document.beside()])
        files = {**document.files(), "document.json": content, "observed.json": beside}
        bench.lake.client.write(f"snapshot-{key}", folder(key, "small", "training_bundle"), files, message="x", metadata={})

    write(swapped)
    try:
        assert list(bad(made)) == ["training_bundle: signature"]
    finally:
        write(true)
    assert bad(made) == {}


def test_deep_finds_a_raw_object_that_changed_under_its_address(made: Prepared) -> None:
    blob = made.graph.document(made.key, "raw_snapshot").result.files_listed[0]
    where = made.graph.connections
    data = made.graph.bench().blobs.store.get_bytes(blob.sha256)
    with overwritten(where, where.blobs_bucket, f"sha256/{blob.sha256[:2]}/{blob.sha256}", data.replace(b"parcel", b"PARCEL")):
        assert bad(made) == {}
        found = bad(made, deep=True)
    assert list(found) == ["raw tickets/a.jsonl"]
    assert f"the snapshot says {blob.sha256}" in found["raw tickets/a.jsonl"]


def test_a_snapshot_nothing_was_made_of_does_not_verify(made: Prepared) -> None:
    other = made.graph.recipe("never-used")
    (found,) = Verifier(made.graph.bench(other), made.key).findings()
    assert not found.good
    assert f"repro materialize --snapshot {made.key}" in found.seen


# ---- doctor


def test_the_doctor_looks_at_everything_and_tells_what_is_wrong(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {item.what: item for item in examine(made.graph.bench())}
    assert list(good) == ["recipe", "lakeFS", "S3", "raw", "keys", "disk", "hardware", "lock", "git"]
    assert all(item.good for item in good.values()), good
    where = made.graph.connections
    gateway(where).put_object(Bucket=where.repository, Key="raw/loose", Body=b"x")
    try:
        assert [item.what for item in examine(made.graph.bench()) if not item.good] == ["raw"]
    finally:
        gateway(where).delete_object(Bucket=where.repository, Key="raw/loose")
    monkeypatch.setenv("REPRO_RECIPE", "/nowhere/recipe.yaml")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    ill = {item.what: (item.code, item.seen) for item in examine(made.graph.bench()) if not item.good}
    assert {what: code for what, (code, _seen) in ill.items()} == {"recipe": 2, "S3": 3}
    assert "/nowhere/recipe.yaml" in ill["recipe"][1]
