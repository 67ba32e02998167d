"""Servers that somebody else runs: the same code, told by environment variables alone, starts nothing and reads and writes through both."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from resources.servers import ServerError, binaries, ensure_storage, lakefs, process, s3
from resources.servers.state import Credentials, Layout, choose_port
from resources.settings import Connections

PROGRAM = """
import json, sys
import boto3
from botocore.config import Config
from lakefs_sdk.client import LakeFSClient
from lakefs_sdk.configuration import Configuration
from lakefs_sdk.models.commit_creation import CommitCreation
from resources.servers import connect
from resources.settings import Connections

c = connect()
assert c == Connections.from_environment()
s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))  # nothing but the environment, as any AWS tool
s3.put_object(Bucket=c.blobs_bucket, Key="k", Body=b"through S3")
lake = LakeFSClient(Configuration(host=c.lakefs_endpoint, username=c.lakefs_access_key, password=c.lakefs_secret_key))
lake.objects_api.upload_object(c.repository, "main", "p/q", content=b"through lakeFS")
commit = lake.commits_api.commit(c.repository, "main", CommitCreation(message="m"))
stat = lake.objects_api.stat_object(c.repository, commit.id, "p/q", presign=False)
bucket, _, key = stat.physical_address.removeprefix("s3://").partition("/")
print(json.dumps({
    "external": c.external,
    "blob": s3.get_object(Bucket=c.blobs_bucket, Key="k")["Body"].read().decode(),
    "object": bytes(lake.objects_api.get_object(c.repository, commit.id, "p/q")).decode(),
    "stored": s3.get_object(Bucket=bucket, Key=key)["Body"].read().decode(),
    "address": stat.physical_address,
}))
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Both servers started by this test, not by `up`; yields the only thing users get to know: variables."""
    layout = Layout(tmp_path_factory.mktemp("foreign"))
    credentials = Credentials.generate()
    found = binaries.find_all()
    ports = {name: choose_port(set()) for name in ("s3", "lakefs")}
    started = []
    try:
        for name, arguments, environment, health in (
            ("s3", s3.prepare(layout, ports["s3"], "us-east-1"), s3.environment(credentials), s3.HEALTH),
            ("lakefs", lakefs.prepare(layout, credentials, ports["lakefs"], ports["s3"], "us-east-1"), {}, lakefs.HEALTH),
        ):
            started.append(process.launch(found[name], arguments, environment, layout.working(name), layout.log(name), ports[name]))
            process.wait_ready(started[-1], health, name, layout.log(name), 0)
        yield {
            "LAKECTL_SERVER_ENDPOINT_URL": f"http://127.0.0.1:{ports['lakefs']}",
            "LAKECTL_CREDENTIALS_ACCESS_KEY_ID": credentials.lakefs_access_key,
            "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY": credentials.lakefs_secret_key,
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{ports['s3']}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": credentials.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.s3_secret_key,
        }
    finally:
        for item in reversed(started):
            process.stop(item)


def run(variables: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    source = str(Path(__file__).resolve().parents[3])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**clean, "PYTHONPATH": source, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_variables_alone_are_enough_to_write_and_read_through_both(foreign: dict[str, str], tmp_path: Path) -> None:
    """S0.12, S0.13: the same code on an external lakeFS and an external S3."""
    names = {
        "REPRO_REPOSITORY": "team",
        "REPRO_LAKE_BUCKET": "team-lake",
        "REPRO_BLOBS_BUCKET": "team-blobs",
        "REPRO_JOBS_BUCKET": "team-jobs",
    }
    answer = run({**foreign, **names}, tmp_path)
    assert answer.returncode == 0, answer.stderr
    seen = json.loads(answer.stdout)
    assert seen.pop("address").startswith("s3://team-lake/team/")
    assert seen == {"external": True, "blob": "through S3", "object": "through lakeFS", "stored": "through lakeFS"}
    assert list(tmp_path.iterdir()) == [], "external servers need no home folder and no server of ours"


def test_storage_is_made_once_and_found_again(foreign: dict[str, str], tmp_path: Path) -> None:
    connections = Connections.from_environment(tmp_path, {**foreign, "REPRO_REPOSITORY": "twice", "REPRO_LAKE_BUCKET": "twice-lake"})
    ensure_storage(connections)
    ensure_storage(connections)


def test_storage_made_eight_times_at_once_is_made_once(foreign: dict[str, str], tmp_path: Path) -> None:
    names = {
        "REPRO_REPOSITORY": "race",
        "REPRO_LAKE_BUCKET": "race-lake",
        "REPRO_BLOBS_BUCKET": "race-blobs",
        "REPRO_JOBS_BUCKET": "race-jobs",
    }
    connections = Connections.from_environment(tmp_path, {**foreign, **names})
    with ThreadPoolExecutor(8) as pool:
        assert [future.result() for future in [pool.submit(ensure_storage, connections) for _ in range(8)]] == [None] * 8


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"lakefs_secret_key": "wrong"},
            r"lakeFS at http://127.0.0.1:\d+ denies repository other \(401 .*LAKECTL_CREDENTIALS_ACCESS_KEY_ID",
        ),
        ({"s3_secret_key": "wrong"}, r"bucket repro-lake at http://127.0.0.1:\d+ answers 403.*REPRO_LAKE_BUCKET.*AWS_ACCESS_KEY_ID"),
        ({"lakefs_endpoint": "http://127.0.0.1:9"}, r"lakeFS at http://127.0.0.1:9 cannot be reached .*refused.*`repro up`"),
        ({"s3_endpoint": "http://127.0.0.1:9"}, r"S3 at http://127.0.0.1:9 cannot be used.*AWS_ENDPOINT_URL_S3.*`repro up`"),
        ({"namespace": "s3://no-such-bucket/x"}, r"does not make repository other in s3://no-such-bucket/x.*REPRO_NAMESPACE"),
        ({"blobs_bucket": "NOT_A_BUCKET"}, r"bucket NOT_A_BUCKET.*REPRO_BLOBS_BUCKET"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_external_servers_refuse_is_named_with_its_variable(
    foreign: dict[str, str], tmp_path: Path, change: dict[str, str], complaint: str
) -> None:
    connections = Connections.from_environment(tmp_path, {**foreign, "REPRO_REPOSITORY": "other"})
    ensure_storage(replace(connections, repository="repro"))
    with pytest.raises(ServerError, match=complaint):
        ensure_storage(replace(connections, **change))
