"""What tests ask of a branch as a whole: its bytes, its hidden transactions, and a foreign tool that writes to it. No tests."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from repro_assets.trust.blob import Blob
from resources.blobs import Blobs
from resources.lake import Lake
from resources.servers import ensure_storage
from resources.settings import Connections


def own_repository(servers: Connections, folder: Path) -> Connections:
    """Like the fixture `connections`, for fixtures that outlive one test."""
    name = f"t-{secrets.token_hex(5)}"
    buckets = {"lake_bucket": f"{name}-lake", "blobs_bucket": f"{name}-blobs", "jobs_bucket": f"{name}-jobs"}
    fresh = replace(servers, repository=name, namespace="", home=folder, cache=folder / "cache", external=True, **buckets)
    ensure_storage(fresh)
    return fresh


def stored(blobs: Blobs, files: Mapping[str, bytes]) -> dict[str, Blob]:
    return {name: blobs.put_bytes(data) for name, data in files.items()}


def contents(lake: Lake, commit: str, prefix: str = "") -> dict[str, bytes]:
    return {entry.path: lake.read(commit, entry.path) for entry in lake.list(commit, prefix)}


def digests(lake: Lake, commit: str, prefix: str = "") -> dict[str, str | None]:
    return {entry.path: entry.sha256 for entry in lake.list(commit, prefix)}


def placed(prefix: str, files: Mapping[str, Blob]) -> dict[str, str | None]:
    """What `digests` finds when `prefix` holds exactly `files`."""
    return {f"{prefix}/{name}": blob.sha256 for name, blob in sorted(files.items())}


def transactions(lake: Lake) -> list[str]:
    return [name for name, _ in lake.branches("tx-", hidden=True)]


def gateway(connections: Connections) -> Any:
    """boto3 through lakeFS's S3 gateway: how any other tool reads and writes the tree."""
    return boto3.client(
        "s3",
        endpoint_url=connections.lakefs_endpoint,
        aws_access_key_id=connections.lakefs_access_key,
        aws_secret_access_key=connections.lakefs_secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, proxies={}),
    )
