"""What `resources.blobs` promises, on the real S3 server: content addressing, verified reads, batches, parts, the cache, errors."""

import hashlib
import io
import multiprocessing
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from repro_assets.trust.blob import Blob, BlobDamaged, BlobMissing, BlobStore, ordered
from repro_assets.trust.canonical import sha256
from repro_assets_tests.resources import proxy as faults
from repro_assets_tests.resources.proxy import Proxy
from resources.blobs import Blobs, Cache, Objects, make_client, store
from resources.errors import Denied, DiskFull, NotFound, Unavailable
from resources.lake import Lake
from resources.settings import Connections


@pytest.fixture
def client(connections: Connections) -> Any:
    return make_client(connections)


@pytest.fixture
def blobs(connections: Connections, client: Any) -> Blobs:
    """The store without its cache: what these tests ask is what the server does."""
    return Blobs(client, connections.blobs_bucket)


@pytest.fixture
def cached(blobs: Blobs, client: Any, tmp_path: Path) -> Blobs:
    return Blobs(client, blobs.bucket, Cache(tmp_path / "cache", 1 << 20))


@pytest.fixture
def proxy(connections: Connections) -> Iterator[Proxy]:
    assert connections.s3_endpoint is not None
    proxy = Proxy(connections.s3_endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def behind(proxy: Proxy, connections: Connections) -> Blobs:
    """The store behind a proxy that can fail."""
    client = make_client(replace(connections, s3_endpoint=proxy.endpoint), read_timeout=1)
    return Blobs(client, connections.blobs_bucket)


def key(digest: str) -> str:
    return f"sha256/{digest[:2]}/{digest}"


def flip(client: Any, blobs: Blobs, digest: str) -> str:
    """Change one byte of a blob on the server; the SHA-256 of what is there now."""
    data = bytearray(client.get_object(Bucket=blobs.bucket, Key=key(digest))["Body"].read())
    data[len(data) // 2] ^= 1
    client.put_object(Bucket=blobs.bucket, Key=key(digest), Body=bytes(data))
    return sha256(bytes(data))


def test_bytes_and_files_are_stored_under_their_digest(blobs: Blobs, client: Any, tmp_path: Path) -> None:
    """S0.15, S0.16: hash-based names, identical content is one object."""
    checked: BlobStore = blobs
    data = b"some bytes"
    (tmp_path / "file").write_bytes(data)
    blob = checked.put_bytes(data)
    assert blob == checked.put_file(tmp_path / "file") == Blob(hashlib.sha256(data).hexdigest(), len(data))
    assert blobs.address(blob) == f"s3://{blobs.bucket}/{key(blob.sha256)}"
    listed = client.list_objects_v2(Bucket=blobs.bucket)["Contents"]
    assert [(item["Key"], item["Size"]) for item in listed] == [(key(blob.sha256), len(data))]
    assert checked.get_bytes(blob.sha256) == data
    checked.get_file(blob.sha256, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert (tmp_path / "copy").stat().st_mode == (tmp_path / "file").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["copy", "file"]
    with checked.open(blob.sha256) as stream:
        assert (stream.read(4), stream.read(), stream.read()) == (b"some", b" bytes", b"")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_every_size_comes_back(blobs: Blobs, cached: Blobs, tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    blob = blobs.put_file(tmp_path / "file")
    assert blob == Blob(sha256(data), size) == blobs.put_bytes(data)
    for source in (blobs, cached, cached):
        assert source.get_bytes(blob.sha256) == data
        assert source.open(blob.sha256).read() == data


def test_a_blob_of_many_parts_is_stored_whole_or_not_at_all(blobs: Blobs, client: Any, tmp_path: Path) -> None:
    block = random.Random(0).randbytes(1 << 20)
    path = tmp_path / "big"
    with path.open("wb") as file:
        for number in range(70):
            file.write(number.to_bytes(4, "big") + block[4:])
    blob = blobs.put_file(path)
    assert blob.size == 70 << 20
    assert "-" in client.head_object(Bucket=blobs.bucket, Key=key(blob.sha256))["ETag"]
    blobs.get_file(blob.sha256, tmp_path / "back")
    with (tmp_path / "back").open("rb") as back:
        assert hashlib.file_digest(back, "sha256").hexdigest() == blob.sha256
    before = client.head_object(Bucket=blobs.bucket, Key=key(blob.sha256))["LastModified"]
    assert blobs.put_file(path) == blob
    assert client.head_object(Bucket=blobs.bucket, Key=key(blob.sha256))["LastModified"] == before
    assert flip(client, blobs, blob.sha256)
    with pytest.raises(BlobDamaged):
        blobs.get_file(blob.sha256, tmp_path / "damaged")
    assert sorted(os.listdir(tmp_path)) == ["back", "big"]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of S3's smallest size, so that a multipart upload is quick to make."""
    monkeypatch.setattr(store, "MULTIPART_FROM", 6 << 20)
    monkeypatch.setattr(store, "PART_SIZE", 5 << 20)


def test_a_file_that_changes_while_it_is_stored_is_refused(blobs: Blobs, client: Any, tmp_path: Path, small_parts: None) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * (11 << 20))

    blob = Blob(sha256(path.read_bytes()), 11 << 20)
    with pytest.raises(OSError, match="file changed while it was stored"):
        blobs._put_parts(blob, io.BytesIO(b"b" * (11 << 20)), "file")
    assert blobs.missing([blob.sha256]) == {blob.sha256}
    assert client.list_multipart_uploads(Bucket=blobs.bucket).get("Uploads", []) == []
    with pytest.raises(Exception, match=r"BadDigest|checksum|XAmzContentChecksumMismatch"):
        blobs._put_whole(Blob(sha256(b"a"), 1), b"b")
    assert not blobs.exists(sha256(b"a"))


def test_a_multipart_upload_that_fails_leaves_no_parts(behind: Blobs, proxy: Proxy, client: Any, small_parts: None) -> None:
    data = random.Random(1).randbytes(12 << 20)
    proxy.plan(2, faults.status(403))
    with pytest.raises(Denied, match="in parts"):
        behind.put_bytes(data)
    assert behind.missing([sha256(data)]) == {sha256(data)}
    assert client.list_multipart_uploads(Bucket=behind.bucket).get("Uploads", []) == []


@pytest.mark.parametrize("size", [10, 7 << 20])
def test_racing_writers_of_one_blob_all_succeed_and_one_object_stays(blobs: Blobs, client: Any, size: int, small_parts: None) -> None:
    data = random.Random(size).randbytes(size)
    gate = threading.Barrier(6)

    def write(_: int) -> Blob:
        gate.wait()
        blob = Blob(sha256(data), size)  # without the look first: every writer reaches the conditional request
        if size > store.MULTIPART_FROM:
            blobs._put_parts(blob, io.BytesIO(data), "data")
        else:
            blobs._put_whole(blob, data)
        return blob

    assert set(ordered(write, range(6), threads=6, ahead=2)) == {Blob(sha256(data), size)}
    assert blobs.get_bytes(sha256(data)) == data


CONFLICT = b"<Error><Code>ConditionalRequestConflict</Code><Message>injected</Message></Error>"


def test_a_conditional_request_that_meets_another_one_is_made_again(behind: Blobs, proxy: Proxy, connections: Connections) -> None:
    """AWS answers 409 while a conditional request for the same key is under way; versitygw never does."""

    def conflict(exchange: faults.Exchange) -> None:
        exchange.answer(409, [("Content-Type", "application/xml")], CONFLICT)

    objects = Objects(connections.jobs_bucket, behind._client)
    proxy.plan(0, conflict)
    assert behind.get_bytes(behind.put_bytes(b"x").sha256) == b"x"
    proxy.plan(0, conflict)
    assert objects.put("memo/x", b"1", if_absent=True)
    proxy.plan(0, conflict)
    assert not objects.put("memo/x", b"2", if_absent=True)
    assert objects.get("memo/x") == b"1"


def test_a_stored_blob_is_never_replaced(blobs: Blobs, client: Any) -> None:
    digest = blobs.put_bytes(b"right").sha256
    client.put_object(Bucket=blobs.bucket, Key=key(digest), Body=b"wrong")
    blobs.put_bytes(b"right")
    assert client.get_object(Bucket=blobs.bucket, Key=key(digest))["Body"].read() == b"wrong"


def test_a_flipped_byte_is_found_on_every_way_to_read_and_named(blobs: Blobs, cached: Blobs, client: Any, tmp_path: Path) -> None:
    """S0.18, S0.48: recompute and compare; the message names the blob, what is there and where."""
    digest = blobs.put_bytes(os.urandom(3 << 20)).sha256
    actual = flip(client, blobs, digest)
    for source in (blobs, cached):
        for read in (
            lambda source=source: source.get_bytes(digest),
            lambda source=source: source.get_file(digest, tmp_path / "out"),
            lambda source=source: list(source.get_many([digest])),
            lambda source=source: source.open(digest).read(),
        ):
            with pytest.raises(BlobDamaged) as caught:
                read()
            for part in (digest, actual, f"s3://{blobs.bucket}/{key(digest)}", "--no-memo"):
                assert part in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"] == []


def test_a_truncated_blob_is_damaged_too(blobs: Blobs, client: Any) -> None:
    digest = blobs.put_bytes(b"0123456789").sha256
    client.put_object(Bucket=blobs.bucket, Key=key(digest), Body=b"01234")
    with pytest.raises(BlobDamaged, match="holds 5 bytes"):
        blobs.get_bytes(digest)


def test_a_missing_blob_is_named_with_its_place_and_remedy(blobs: Blobs, tmp_path: Path) -> None:
    digest = "ab" * 32
    for read in (blobs.get_bytes, blobs.open, lambda digest: blobs.get_file(digest, tmp_path / "out")):
        with pytest.raises(BlobMissing, match=f"{digest} is not at s3://{blobs.bucket}/sha256/ab/{digest}.*--no-memo"):
            read(digest)
    assert list(tmp_path.glob("*out*")) == []
    for name in ("AB" * 32, "ab", "../../etc/passwd"):
        with pytest.raises(ValueError, match="not a lower-case hexadecimal SHA-256"):
            blobs.get_bytes(name)


def test_batches_keep_their_order_and_take_generators(blobs: Blobs, cached: Blobs, tmp_path: Path) -> None:
    items = [f"item {number}".encode() * (1 + number % 3) for number in range(120)]
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(path.name.encode())
    stored = blobs.put_many(item for item in [*items, *paths])
    assert stored == [Blob(sha256(data), len(data)) for data in [*items, b"a", b"b"]]
    digests = [blob.sha256 for blob in stored]
    assert list(blobs.get_many(iter(digests))) == [*items, b"a", b"b"] == list(cached.get_many(digests))
    assert blobs.missing([*digests, "00" * 32, "11" * 32]) == {"00" * 32, "11" * 32}
    assert blobs.missing([]) == set()


def test_a_batch_looks_only_so_far_ahead_and_stops_at_an_error() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = ordered(lambda number: number * 2, items(), threads=4, ahead=2)
    assert next(results) == 0
    assert len(taken) <= 8
    results.close()
    assert len(taken) <= 8

    def fail(number: int) -> int:
        if number == 3:
            raise KeyError(number)
        return number

    with pytest.raises(KeyError):
        list(ordered(fail, items(), threads=2, ahead=1))
    assert threading.active_count() < 30


def test_the_cache_serves_a_second_read_and_is_never_trusted(cached: Blobs, client: Any) -> None:
    assert cached.cache is not None
    digest = cached.put_bytes(b"bytes" * 1000).sha256
    assert cached.get_bytes(digest) == b"bytes" * 1000
    client.delete_object(Bucket=cached.bucket, Key=key(digest))
    assert cached.get_bytes(digest) == cached.open(digest).read() == b"bytes" * 1000
    assert cached.missing([digest]) == {digest}, "presence is asked of the server, never of the cache"
    with pytest.raises(BlobMissing):
        cached.without_cache().get_bytes(digest)
    cached.put_bytes(b"bytes" * 1000)
    for read in (cached.get_bytes, lambda digest: cached.open(digest).read()):
        cached.cache.path(digest).write_bytes(b"bytez" * 1000)
        assert read(digest) == b"bytes" * 1000
        assert cached.cache.path(digest).read_bytes() == b"bytes" * 1000, "the damaged copy was replaced"


def test_a_stream_that_is_read_to_its_end_fills_the_cache_and_others_leave_nothing(cached: Blobs, tmp_path: Path) -> None:
    assert cached.cache is not None
    digest = cached.put_bytes(os.urandom(300_000)).sha256
    with cached.open(digest) as stream:
        stream.read(10)
    assert list((tmp_path / "cache" / "sha256").rglob("*")) in ([], [cached.cache.path(digest).parent])
    cached.get_file(digest, tmp_path / "file")
    assert cached.cache.path(digest).read_bytes() == (tmp_path / "file").read_bytes()


def test_the_cache_keeps_its_cap_and_forgets_what_was_read_longest_ago(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100_000)
    names = [sha256(str(number).encode()) for number in range(300)]
    for number, name in enumerate(names):
        cache.put(name, bytes(1000))
        os.utime(cache.path(name), (number, number))
        if number % 5 == 0:
            file = cache.open(names[0])
            assert file is not None, f"read all the time, and yet evicted at {number}"
            file.close()
    held = [name for name in names if cache.path(name).exists()]
    assert 50 <= len(held) <= 100
    assert held[-1] == names[-1]
    assert held[0] == names[0]
    assert held[1:] == names[-len(held) + 1 :]
    cache.put(sha256(b"large"), bytes(60_000))
    assert not cache.path(sha256(b"large")).exists(), "one blob may not push all others out"


def fill(folder: str, seed: int) -> None:
    cache = Cache(Path(folder), 200_000)
    source = random.Random(seed)
    for _ in range(400):
        data = str(source.randrange(150)).encode() * 1000
        held = cache.read(sha256(data))
        assert held in (None, data)
        if held is None:
            cache.put(sha256(data), data)


def test_processes_share_one_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(str(tmp_path), seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    last = b"the next writer of any process brings the folder below its cap"
    Cache(tmp_path, 200_000).put(sha256(last), last)
    files = [path for path in (tmp_path / "sha256").rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 200_000
    assert all(sha256(path.read_bytes()) == path.name for path in files), "a part or a damaged file is left"


def test_parts_of_dead_processes_are_swept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    part = cache.begin("ab" * 32, 10)
    assert part is not None
    part.write(b"half")
    old = next((tmp_path / "sha256" / "ab").glob(".part-*"))
    os.utime(old, (time.time() - 7200,) * 2)
    young = cache.begin("ab" * 32, 10)
    cache.evict()
    assert young is not None
    assert not old.exists()
    assert len(list((tmp_path / "sha256" / "ab").iterdir())) == 1


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode != 0:
        pytest.skip("needs root to mount a file system of 1 MiB")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # lazy: a failed test may still hold a file open


def test_a_full_disk_is_said_and_nothing_half_written_stays(blobs: Blobs, client: Any, tiny_disk: Path) -> None:
    data = os.urandom(2 << 20)
    digest = blobs.put_bytes(data).sha256
    with pytest.raises(DiskFull, match=rf"no space left for blob {digest} at {tiny_disk}/out: [\d,]+ bytes are free in {tiny_disk}"):
        blobs.get_file(digest, tiny_disk / "out")
    assert list(tiny_disk.iterdir()) == []
    full = Blobs(client, blobs.bucket, Cache(tiny_disk, 1 << 30))
    assert full.get_bytes(digest) == data, "a full cache disk must not fail a read"
    assert full.open(digest).read() == data
    assert [path for path in tiny_disk.rglob("*") if path.is_file()] == []


def test_a_folder_that_does_not_exist_is_an_ordinary_error(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put_bytes(b"x").sha256
    with pytest.raises(FileNotFoundError):
        blobs.get_file(digest, tmp_path / "no" / "out")


def test_an_s3_that_is_not_there_is_unavailable_with_its_address(connections: Connections, tmp_path: Path) -> None:
    client = make_client(replace(connections, s3_endpoint="http://127.0.0.1:9"), attempts=2)
    away = Blobs(client, "blobs")
    objects = Objects("jobs", client)
    (tmp_path / "f").write_bytes(b"x" * (2 << 20))
    for call in (
        lambda: away.put_bytes(b"x"),
        lambda: away.put_file(tmp_path / "f"),
        lambda: away.get_bytes("ab" * 32),
        lambda: away.open("ab" * 32),
        lambda: away.missing(["ab" * 32]),
        lambda: objects.put("k", b""),
        lambda: objects.get("k"),
        lambda: objects.list("k"),
        lambda: objects.exists("k"),
    ):
        with pytest.raises(Unavailable, match=r"S3 at http://127\.0\.0\.1:9 did not .*repro up"):
            call()


def test_wrong_credentials_and_buckets_are_told_apart(connections: Connections, client: Any) -> None:
    stranger = Blobs(make_client(replace(connections, s3_secret_key="wrong")), connections.blobs_bucket)
    with pytest.raises(Denied, match="credentials"):
        stranger.put_bytes(b"x")
    nowhere = Blobs(client, "no-such-bucket")
    for call in (lambda: nowhere.put_bytes(b"x"), lambda: nowhere.get_bytes("ab" * 32)):
        with pytest.raises(NotFound, match=r"NoSuchBucket.*REPRO_"):
            call()


def test_a_server_that_goes_away_in_the_middle_is_waited_for_then_named(behind: Blobs, proxy: Proxy, tmp_path: Path) -> None:
    data = os.urandom(5 << 20)
    digest = behind.put_bytes(data).sha256
    proxy.plan(0, faults.cut_body(2_000_000), times=2)
    assert behind.get_bytes(digest) == data
    proxy.plan(0, faults.cut_body(2_000_000), times=2)
    assert behind.open(digest).read() == data
    proxy.plan(0, faults.status(503))
    assert behind.get_bytes(digest) == data
    proxy.plan(0, faults.drop_after)
    assert behind.put_bytes(data).sha256 == digest
    proxy.plan(0, faults.drop_after)
    assert behind.put_bytes(b"answer lost") == Blob(sha256(b"answer lost"), 11)
    proxy.plan(0, faults.stall(1.5))
    assert behind.get_bytes(digest) == data
    for read in (behind.get_bytes, lambda digest: behind.open(digest).read(), lambda digest: behind.get_file(digest, tmp_path / "out")):
        proxy.plan(0, faults.cut_body(100), times=1000)
        with pytest.raises(Unavailable, match=rf"{proxy.endpoint}.*repro up"):
            read(digest)
        proxy.clear()
    assert list(tmp_path.glob("*out*")) == []


def test_objects_are_plain_keys_with_one_winner(connections: Connections) -> None:
    objects = Objects.connect(connections)
    assert objects.put("jobs/k/a b ü.json", b"1")
    assert objects.put("jobs/k/a b ü.json", b"2")
    assert objects.get("jobs/k/a b ü.json") == b"2"
    assert list(ordered(lambda number: objects.put("memo/x", b"%d" % number, if_absent=True), range(12), 16, 2)).count(True) == 1
    winner = objects.get("memo/x")
    assert not objects.put("memo/x", b"later", if_absent=True)
    assert objects.get("memo/x") == winner
    for name in ("jobs/k/z", "jobs/k/10", "jobs/k/9", "jobs/other"):
        objects.put(name, b"")
    assert objects.list("jobs/k/") == ["jobs/k/10", "jobs/k/9", "jobs/k/a b ü.json", "jobs/k/z"]
    assert objects.exists("jobs/other")
    assert not objects.exists("jobs/nothing")
    objects.delete("jobs/other")
    objects.delete("jobs/other")
    assert not objects.exists("jobs/other")
    with pytest.raises(NotFound, match="jobs/other"):
        objects.get("jobs/other")


def test_a_proxy_in_the_shell_does_not_catch_the_servers_of_this_machine(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    blobs = Blobs.connect(connections)
    assert blobs.get_bytes(blobs.put_bytes(b"x").sha256) == b"x"
    assert Lake.connect(connections).exists("main")


def test_connect_takes_bucket_cache_and_cap_from_the_settings(connections: Connections) -> None:
    blobs = Blobs.connect(connections)
    digest = blobs.put_bytes(b"x").sha256
    assert blobs.get_bytes(digest) == b"x"
    assert (connections.cache / "sha256" / digest[:2] / digest).exists()
    assert Blobs.connect(replace(connections, cache_bytes=0)).cache is None
