"""A home of its own for each test of the servers' life, and one way of writing and reading through both servers."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from lakefs_sdk.client import LakeFSClient
from lakefs_sdk.configuration import Configuration
from lakefs_sdk.models.commit_creation import CommitCreation

from resources.servers import down
from resources.settings import Connections


@dataclass(frozen=True)
class Written:
    """One object put into the blobs bucket, and one uploaded to lakeFS and committed."""

    key: str
    content: bytes
    commit: str


def write(connections: Connections) -> Written:
    key, content = f"k/{secrets.token_hex(4)}", secrets.token_bytes(2000)
    _s3(connections).put_object(Bucket=connections.blobs_bucket, Key=key, Body=content)
    lake = _lake(connections)
    lake.objects_api.upload_object(connections.repository, "main", key, content=content, _request_timeout=(3, 20))
    commit = lake.commits_api.commit(connections.repository, "main", CommitCreation(message=key), _request_timeout=(3, 20))
    return Written(key, content, commit.id)


def read(connections: Connections, written: Written) -> tuple[bytes, bytes]:
    """What S3 and lakeFS (by the commit) hold now."""
    direct = _s3(connections).get_object(Bucket=connections.blobs_bucket, Key=written.key)["Body"].read()
    lake = _lake(connections).objects_api.get_object(connections.repository, written.commit, written.key, _request_timeout=(3, 20))
    return direct, bytes(lake)


def _s3(connections: Connections):  # type: ignore[no-untyped-def]
    return boto3.client(
        "s3",
        endpoint_url=connections.s3_endpoint,
        region_name=connections.s3_region,
        aws_access_key_id=connections.s3_access_key,
        aws_secret_access_key=connections.s3_secret_key,
        config=Config(s3={"addressing_style": "path"}, proxies={}),
    )


def _lake(connections: Connections) -> LakeFSClient:
    return LakeFSClient(
        Configuration(host=connections.lakefs_endpoint, username=connections.lakefs_access_key, password=connections.lakefs_secret_key)
    )


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home folder nobody uses; whatever was started for it is stopped."""
    folder = tmp_path / ".repro"
    yield folder
    down(folder)


@pytest.fixture
def both() -> tuple:  # type: ignore[type-arg]
    """(write, read): through S3 and through lakeFS, as any client would."""
    return write, read
