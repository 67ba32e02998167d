"""Where documents lie and how they are read, on the real servers."""

import boto3
import pytest
from botocore.config import Config

from repro_assets.partitions import BadKey, key_of
from repro_assets.shelf import MissingDocument, Shelf, UncommittedRaw, folder
from repro_assets_tests.graph import Graph, jsonl, tickets
from resources.settings import Connections


def gateway(connections: Connections):  # type: ignore[no-untyped-def]
    """lakeFS's own S3 gateway: how any other tool writes to raw."""
    return boto3.client(
        "s3",
        endpoint_url=connections.lakefs_endpoint,
        aws_access_key_id=connections.lakefs_access_key,
        aws_secret_access_key=connections.lakefs_secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


def shelf_of(graph: Graph) -> Shelf:
    bench = graph.bench()
    return Shelf(bench.lake.client, bench.blobs.store)


def test_every_raw_commit_that_brought_data_is_a_snapshot_newest_first(graph: Graph) -> None:
    """S0.10: one immutable state of the raw data, one key."""
    shelf = shelf_of(graph)
    assert list(shelf.raw_commits()) == []
    keys = [graph.import_({f"{name}.jsonl": jsonl(tickets(2, start))}) for name, start in (("a", 0), ("b", 2))]
    found = list(shelf.raw_commits())
    assert [key for key, _commit in found] == keys[::-1]
    for key, commit in found:
        assert key == key_of(commit, shelf.lake.commit_info(commit).created)


def test_a_snapshot_keeps_its_commit_when_the_branch_raw_goes_away(graph: Graph) -> None:
    key = graph.import_({"a.jsonl": jsonl(tickets(2))})
    shelf = shelf_of(graph)
    snapshot = shelf.snapshot(key)
    assert dict(shelf.lake.branches("pin-", hidden=True)) == {f"pin-{key}": snapshot.commit}
    assert shelf.lake.head(f"snapshot-{key}") == snapshot.commit
    shelf.lake.delete_branch("raw")
    assert shelf.snapshot(key) == snapshot


def test_a_key_that_no_raw_commit_made_is_refused_and_leaves_no_branch(graph: Graph) -> None:
    """The right commit under a wrong time is no snapshot either; a text that is no key never reaches a branch name."""
    shelf = shelf_of(graph)
    made = graph.import_({"a.jsonl": jsonl(tickets(2))})
    branches = dict(shelf.lake.branches(hidden=True))
    for key in ("20260101-000000-0123456789ab", f"20000101-000000-{made.rsplit('-', 1)[1]}"):
        with pytest.raises(MissingDocument, match=r"no raw commit made the snapshot .*repro snapshots"):
            shelf.snapshot(key)
    for key in ("", "a,b", "UPPER", "../main", "x\ny", "no-commit-here"):
        with pytest.raises(BadKey, match="repro snapshots"):
            shelf.snapshot(key)
    assert dict(shelf.lake.branches(hidden=True)) == branches


def test_objects_that_nobody_committed_are_refused_with_the_remedy(graph: Graph) -> None:
    shelf = shelf_of(graph)
    client = gateway(graph.connections)
    for index in range(7):
        client.put_object(Bucket=graph.connections.repository, Key=f"raw/loose/{index}.jsonl", Body=b"{}\n")
    with pytest.raises(UncommittedRaw, match=r"7 objects .*'loose/0.jsonl'.* and 2 more.*repro commit-raw"):
        shelf.refuse_uncommitted()


def test_documents_are_found_by_place_and_by_digest(graph: Graph) -> None:
    shelf = shelf_of(graph)
    with pytest.raises(
        MissingDocument, match=r"repro materialize --select base_model,eval_suites`, then `repro materialize --snapshot some-key"
    ):
        shelf.shared("small", "base_model", "some-key")
    assert graph.run(None).success
    key = graph.import_({"a.jsonl": jsonl(tickets(20))})
    head = graph.head(key)
    assert shelf.read(head, key, "small", "raw_snapshot") is None
    assert shelf.digest_at(head, key, "small", "raw_snapshot") is None
    assert graph.run(key, ("raw_snapshot",)).success
    document = graph.document(key, "raw_snapshot")
    head = graph.head(key)
    assert shelf.digest_at(head, key, "small", "raw_snapshot") == document.digest
    inputs, result = shelf.by_digest(document.digest, type(document.result))
    assert (inputs, result) == (document.inputs, document.result)
    assert shelf.recipes(head, key) == ["small"]
    assert folder(key, "small", "records") == f"snapshots/{key}/small/records"
    assert folder(key, "small", "base_model") == "shared/small/base_model"
