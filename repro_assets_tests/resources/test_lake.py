"""What `resources.lake` promises, on the real lakeFS server: branches, pinned reads, writes, tags, pins, staged data, errors.

Concurrent writers, killed writers and faulty networks have files of their own beside this one.
"""

import hashlib
import time

import pytest
from botocore.exceptions import ClientError

from repro_assets.trust.blob import Blob, BlobDamaged
from repro_assets_tests.resources.trees import contents, gateway, stored, transactions
from resources.blobs import Blobs
from resources.errors import Conflict, Denied, NotFound, NothingToCommit, Refused, StorageError, Unavailable, Uncommitted
from resources.lake import DAGSTER_LINK, Entry, Lake, Patience, Placement
from resources.lake.values import content_type
from resources.settings import Connections

ROOT = "snapshots/k/demo/records"


@pytest.fixture
def blobs(connections: Connections) -> Blobs:
    return Blobs.connect(connections)


@pytest.fixture
def lake(connections: Connections) -> Lake:
    """A lake with the branches of a fresh repository and a snapshot branch to write on."""
    lake = Lake.connect(connections, owner="tester")
    lake.ensure()
    lake.ensure_branch("snapshot-k", "raw")
    return lake


def test_ensure_makes_the_branches_from_mains_first_commit_and_may_be_repeated(lake: Lake, blobs: Blobs) -> None:
    first = lake.head("main")
    assert lake.head("raw") == lake.head("shared") == first
    lake.write("raw", "a", stored(blobs, {"x": b"1"}), message="m", metadata={})
    raw = lake.head("raw")
    lake.ensure()
    assert (lake.head("main"), lake.head("raw"), lake.head("shared")) == (first, raw, first)
    assert [name for name, _ in lake.branches()] == ["main", "raw", "shared", "snapshot-k"]


def test_main_takes_no_direct_write_but_takes_a_transaction(lake: Lake, blobs: Blobs, connections: Connections) -> None:
    before = lake.head("main")
    with pytest.raises(ClientError, match="ErrWriteToProtectedBranch"):
        gateway(connections).put_object(Bucket=connections.repository, Key="main/direct", Body=b"x")
    assert lake.head("main") == before
    written = lake.write("main", "releases/1", stored(blobs, {"document.json": b"{}"}), message="release 1", metadata={})
    assert lake.head("main") == written.commit
    assert contents(lake, written.commit) == {"releases/1/document.json": b"{}"}
    with pytest.raises(Denied, match="protected"):
        lake.commit_staged("main", "m", {})


def test_a_write_is_one_commit_whose_bytes_every_client_reads(lake: Lake, blobs: Blobs, connections: Connections) -> None:
    """S0.8, S0.16, S2.41: bytes under their digest in object storage, the tree in lakeFS, readable by any S3 tool."""
    files = {"document.json": b'{"a":1}', "leaves/0 ü.arrow": b"\x00" * 5000, "empty": b""}
    metadata = {"asset": "records", DAGSTER_LINK: "http://127.0.0.1:3000/runs/1"}
    base = lake.head("snapshot-k")
    written = lake.write("snapshot-k", ROOT, stored(blobs, files), message="records of k", metadata=metadata)
    assert written.created
    assert lake.head("snapshot-k") == written.commit
    info = lake.commit_info(written.commit)
    assert info.parents == (base,)
    assert info.message == "records of k"
    assert metadata.items() <= info.metadata.items()
    assert abs(info.created - time.time()) < 60
    assert contents(lake, written.commit) == {f"{ROOT}/{name}": data for name, data in files.items()}
    entry = lake.stat(written.commit, f"{ROOT}/leaves/0 ü.arrow")
    blob = Blob(hashlib.sha256(files["leaves/0 ü.arrow"]).hexdigest(), 5000)
    assert entry == Entry(entry.path, 5000, f"sha256:{blob.sha256}", blobs.address(blob), "application/vnd.apache.arrow.file")
    assert entry.sha256 == blob.sha256
    times = {stats.mtime for stats in lake.client.objects.list_objects(connections.repository, written.commit).results}
    assert times == {0}, "the time of linking is part of no tree"
    through = gateway(connections).get_object(Bucket=connections.repository, Key=f"{written.commit}/{ROOT}/leaves/0 ü.arrow")
    assert through["Body"].read() == files["leaves/0 ü.arrow"]
    assert transactions(lake) == []
    assert contents(lake, base) == {}


def test_a_write_replaces_its_own_prefix_and_nothing_else(lake: Lake, blobs: Blobs) -> None:
    first = stored(blobs, {"document.json": b"1", "old": b"o", "checkpoints/1/a": b"c", "same": b"s"})
    lake.write("snapshot-k", ROOT, first, message="m", metadata={})
    lake.write("snapshot-k", ROOT + "-other", stored(blobs, {"x": b"x"}), message="m", metadata={})
    second = stored(blobs, {"document.json": b"2", "new": b"n", "same": b"s"})
    written = lake.write("snapshot-k", ROOT, second, message="m", metadata={}, keep=("checkpoints",))
    assert contents(lake, written.commit) == {
        f"{ROOT}-other/x": b"x",
        f"{ROOT}/checkpoints/1/a": b"c",
        f"{ROOT}/document.json": b"2",
        f"{ROOT}/new": b"n",
        f"{ROOT}/same": b"s",
    }
    changes = {(change.path, change.kind) for change in lake.diff(written.commit, lake.commit_info(written.commit).parents[0], ROOT)}
    assert changes == {(f"{ROOT}/document.json", "changed"), (f"{ROOT}/new", "removed"), (f"{ROOT}/old", "added")}
    without = lake.write("snapshot-k", ROOT, second, message="m", metadata={})
    assert f"{ROOT}/checkpoints/1/a" not in contents(lake, without.commit)


def test_a_repeated_write_changes_nothing_and_names_the_commit_that_holds_it(lake: Lake, blobs: Blobs) -> None:
    """S0.4: the same inputs give the same artifact, so the same write gives the same commit."""
    files = stored(blobs, {"document.json": b"1"})
    first = lake.write("snapshot-k", ROOT, files, message="m", metadata={"run": "1"})
    lake.write("snapshot-k", "elsewhere", files, message="m", metadata={})
    head = lake.head("snapshot-k")
    again = lake.write("snapshot-k", ROOT, files, message="m", metadata={"run": "2"})
    assert (again.commit, again.created) == (first.commit, False)
    assert lake.head("snapshot-k") == head
    assert transactions(lake) == []


def test_several_prefixes_go_into_one_commit(lake: Lake, blobs: Blobs) -> None:
    one, two = stored(blobs, {"a": b"1"}), stored(blobs, {"b": b"2"})
    base = lake.head("snapshot-k")
    written = lake.write_all("snapshot-k", [Placement("p/one", one), Placement("p/two", two)], message="m", metadata={})
    assert lake.commit_info(written.commit).parents == (base,)
    assert contents(lake, written.commit) == {"p/one/a": b"1", "p/two/b": b"2"}
    again = lake.write_all("snapshot-k", [Placement("p/one", one), Placement("p/two", two)], message="m", metadata={})
    assert again.commit == written.commit
    assert not again.created
    with pytest.raises(ValueError, match="'p/' would replace what the same write puts under 'p/two/'"):
        lake.write_all("snapshot-k", [Placement("p", one), Placement("p/two", two)], message="m", metadata={})


def test_an_import_adds_files_beside_what_is_there(lake: Lake, blobs: Blobs) -> None:
    """S0.50: raw data arrives as one commit, whatever else lies on the branch."""
    lake.write("raw", "", stored(blobs, {"a/1.jsonl": b"1", "z.jsonl": b"z"}), message="m", metadata={}, replace=False)
    more = stored(blobs, {"a/2.jsonl": b"2", "a/1.jsonl": b"1b", "b.jsonl": b"b"})
    written = lake.write("raw", "", more, message="m", metadata={}, replace=False)
    assert contents(lake, written.commit) == {"a/1.jsonl": b"1b", "a/2.jsonl": b"2", "b.jsonl": b"b", "z.jsonl": b"z"}
    again = lake.write("raw", "", more, message="m", metadata={}, replace=False)
    assert (again.commit, again.created) == (written.commit, False)
    with pytest.raises(ValueError, match="replacing the whole branch"):
        lake.write("raw", "/", more, message="m", metadata={})


def test_a_thousand_files_and_a_second_page_arrive_whole(lake: Lake, blobs: Blobs) -> None:
    blob = blobs.put_bytes(b"x")
    files = {f"leaf-{number:05}": blob for number in range(1005)}
    written = lake.write("snapshot-k", ROOT, files, message="m", metadata={})
    assert [entry.path for entry in lake.list(written.commit, ROOT + "/")] == [f"{ROOT}/{name}" for name in files]
    emptied = lake.write("snapshot-k", ROOT, {"leaf-00000": blob}, message="m", metadata={})
    assert [entry.path for entry in lake.list(emptied.commit, ROOT + "/")] == [f"{ROOT}/leaf-00000"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("_lakefs_actions/hook.yaml", "_lakefs"),
        ("_lakefs/x", "_lakefs"),
        ("a//b", "empty parts"),
        ("../b", r"'\.\.'"),
        ("a/./b", r"'\.'"),
        ("a/", "either end"),
        ("a\nb", "control character"),
        ("a\udc80", "Unicode"),
        ("x" * 1025, "1025 bytes"),
    ],
)
def test_a_path_that_must_not_be_written_is_named_and_nothing_is_written(lake: Lake, blobs: Blobs, path: str, reason: str) -> None:
    head = lake.head("raw")
    with pytest.raises(ValueError, match=reason):
        lake.write("raw", "", {"good": blobs.put_bytes(b""), path: blobs.put_bytes(b"x")}, message="m", metadata={}, replace=False)
    assert lake.head("raw") == head
    assert transactions(lake) == []


def test_unicode_spaces_and_percent_signs_in_paths_come_back_as_they_went(lake: Lake, blobs: Blobs) -> None:
    names = ["ein Ordner/größe 100%.txt", "日本語/файл+1.txt", "a&b=c?d#e;f.txt", "e\u0301 and é", "%41"]
    written = lake.write("snapshot-k", "p", stored(blobs, {name: name.encode() for name in names}), message="m", metadata={})
    assert contents(lake, written.commit) == {f"p/{name}": name.encode() for name in names}
    assert lake.stat(written.commit, f"p/{names[0]}").content_type == content_type("x.txt")


def test_reads_are_pinned_to_commit_ids(lake: Lake, blobs: Blobs) -> None:
    """S0.10: a branch that moves on does not move what was read from it."""
    first = lake.write("snapshot-k", ROOT, stored(blobs, {"d": b"1"}), message="m", metadata={})
    lake.write("snapshot-k", ROOT, stored(blobs, {"d": b"2"}), message="m", metadata={})
    assert lake.read(first.commit, f"{ROOT}/d") == b"1"
    with lake.open(first.commit, f"{ROOT}/d") as stream:
        assert stream.read() == b"1"
    for read in (lake.read, lake.open, lake.stat):
        with pytest.raises(ValueError, match="'snapshot-k' is no commit id"):
            read("snapshot-k", f"{ROOT}/d")
    with pytest.raises(NotFound, match="nothing-here"):
        lake.read(first.commit, "nothing-here")
    with pytest.raises(NotFound, match="nothing-here"):
        lake.stat(first.commit, "nothing-here")


def test_a_changed_byte_behind_lakefs_is_found_and_named(lake: Lake, blobs: Blobs, connections: Connections) -> None:
    """S0.18: bytes are hashed again when read."""
    blob = blobs.put_bytes(b"right")
    written = lake.write("snapshot-k", ROOT, {"d": blob}, message="m", metadata={})
    key = blobs.address(blob).removeprefix(f"s3://{connections.blobs_bucket}/")
    blobs._client.put_object(Bucket=connections.blobs_bucket, Key=key, Body=b"wrong")
    with pytest.raises(BlobDamaged) as caught:
        lake.read(written.commit, f"{ROOT}/d")
    for part in (f"{ROOT}/d", blob.sha256, hashlib.sha256(b"wrong").hexdigest(), blobs.address(blob)):
        assert part in str(caught.value)


def test_the_log_tells_who_changed_what_below_a_prefix(lake: Lake, blobs: Blobs) -> None:
    """S0.3: every write is one commit with its actor, and the log of a prefix finds it."""
    commits = [
        lake.write("snapshot-k", prefix, stored(blobs, {"d": data}), message=message, metadata={"actor": message}).commit
        for prefix, data, message in [("a", b"1", "one"), ("b", b"1", "two"), ("a", b"2", "three")]
    ]
    assert [info.id for info in lake.log("snapshot-k", "a/")] == [commits[2], commits[0]]
    assert [info.metadata["actor"] for info in lake.log(commits[1], "b/", page=1)] == ["two"]
    whole = [info.message for info in lake.log("snapshot-k", page=2)]
    assert whole[:3] == ["three", "two", "one"]
    assert len(whole) == 4


def test_tags_never_move_and_pins_hold_one_commit(lake: Lake, blobs: Blobs) -> None:
    one = lake.write("snapshot-k", "a", stored(blobs, {"d": b"1"}), message="m", metadata={}).commit
    two = lake.write("snapshot-k", "a", stored(blobs, {"d": b"2"}), message="m", metadata={}).commit
    lake.tag("release-1", one)
    lake.tag("release-1", one)
    assert lake.tagged("release-1") == lake.commit_info("release-1").id == one
    with pytest.raises(Conflict, match="never move"):
        lake.tag("release-1", two)
    assert lake.tagged("release-1") == one
    lake.pin("k", one)
    lake.pin("k", one)
    with pytest.raises(Conflict, match="already keeps"):
        lake.pin("k", two)
    assert "pin-k" not in dict(lake.branches())
    assert dict(lake.branches(hidden=True))["pin-k"] == one
    lake.unpin("k")
    lake.unpin("k")
    assert "pin-k" not in dict(lake.branches(hidden=True))
    with pytest.raises(NotFound):
        lake.tagged("release-2")


def test_data_that_other_tools_staged_is_listed_and_committed_by_itself(lake: Lake, blobs: Blobs, connections: Connections) -> None:
    other_tool = gateway(connections)
    other_tool.put_object(Bucket=connections.repository, Key="raw/in/a b.jsonl", Body=b"{}")
    assert list(lake.uncommitted("raw")) == ["in/a b.jsonl"]
    with pytest.raises(Uncommitted, match="commit-raw"):
        lake.write("raw", "x", stored(blobs, {"d": b"1"}), message="m", metadata={})
    assert list(lake.uncommitted("raw")) == ["in/a b.jsonl"]
    assert transactions(lake) == []
    commit = lake.commit_staged("raw", "by boto3", {"actor": "me"})
    assert lake.head("raw") == commit
    assert contents(lake, commit) == {"in/a b.jsonl": b"{}"}
    assert lake.commit_info(commit).metadata["actor"] == "me"
    assert list(lake.uncommitted("raw")) == []
    assert lake.stat(commit, "in/a b.jsonl").sha256 is None
    with pytest.raises(NothingToCommit):
        lake.commit_staged("raw", "again", {})


def test_a_staged_hook_is_refused_by_name(lake: Lake, connections: Connections) -> None:
    gateway(connections).put_object(Bucket=connections.repository, Key="raw/_lakefs_actions/evil.yaml", Body=b"x")
    head = lake.head("raw")
    with pytest.raises(Refused, match=r"_lakefs_actions/evil\.yaml"):
        lake.commit_staged("raw", "m", {})
    assert lake.head("raw") == head


def test_clean_removes_dead_transactions_by_owner_and_age_only(lake: Lake, connections: Connections) -> None:
    now = int(time.time())
    mine, old, other = f"tx-tester-{now}-{'0' * 12}", f"tx-tester-{now - 7200}-{'1' * 12}", f"tx-else-{now - 7200}-{'2' * 12}"
    for name in (mine, old, other, "tx-by-hand"):
        lake.ensure_branch(name, "raw", hidden=True)
    assert list(lake.clean(owner="tester", older_than=3600)) == [old]
    assert list(lake.clean(older_than=3600)) == [other]
    assert transactions(lake) == ["tx-by-hand", mine]
    assert list(Lake.connect(connections, owner="else").clean(owner="tester", older_than=0)) == [mine]


def test_the_owner_of_a_transaction_may_hold_any_characters(lake: Lake, blobs: Blobs, connections: Connections) -> None:
    odd = Lake.connect(connections, owner="host.name/run-1 ü")
    odd.write("snapshot-k", "a", stored(blobs, {"d": b"1"}), message="m", metadata={})
    lake.ensure_branch(f"tx-{odd.owner}-1-{'0' * 12}", "raw", hidden=True)
    assert len(lake.clean(owner="host.name/run-1 ü")) == 1


def test_names_and_metadata_that_lakefs_cannot_hold_are_refused_before_any_call(lake: Lake) -> None:
    with pytest.raises(ValueError, match="no branch name"):
        lake.head("a/b")
    with pytest.raises(ValueError, match="no tag name"):
        lake.tag("a b", "0" * 64)
    with pytest.raises(TypeError, match="step"):
        lake.write("raw", "a", {}, message="m", metadata={"step": 1})  # type: ignore[dict-item]


def test_errors_are_typed_and_say_what_to_do(lake: Lake, blobs: Blobs, connections: Connections) -> None:
    with pytest.raises(NotFound, match="no-such-branch"):
        lake.write("no-such-branch", "a", stored(blobs, {"d": b"1"}), message="m", metadata={})
    stranger = Lake.connect(connections)
    stranger.client = type(lake.client)(connections.lakefs_endpoint, connections.lakefs_access_key, "wrong")
    with pytest.raises(Denied, match="LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY"):
        stranger.head("main")
    nowhere = Lake.connect(connections)
    nowhere.client = type(lake.client)("http://127.0.0.1:9", "a", "b", Patience(attempts=3, first_wait=0.01))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9.*3 attempts.*repro up"):
        nowhere.head("main")
    assert issubclass(Unavailable, StorageError)
