"""What must exist before anything is written: three buckets and the lakeFS repository. Makes them when missing, on any servers.

Branches and their protection belong to resources.lake.
"""

import base64
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from resources.servers.state import ServerError
from resources.settings import Connections

SECONDS = 30
OTHER_SECONDS = 3.0
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_proxied = urllib.request.build_opener()


def is_loopback(endpoint: str | None) -> bool:
    """A server on this machine: HTTP_PROXY of the user's shell must not be asked for it (boto3 and urllib both would)."""
    return urllib.parse.urlsplit(endpoint or "").hostname in ("127.0.0.1", "localhost", "::1")


def ensure_storage(connections: Connections) -> None:
    """Make the buckets and the repository (default branch main) that are missing. Idempotent and safe to run twice at once.

    Raises ServerError: unreachable, denied, a bucket of somebody else, a namespace that lakeFS refuses.
    """
    client = _client(connections)
    for variable, bucket in (
        ("REPRO_LAKE_BUCKET", connections.lake_bucket),
        ("REPRO_BLOBS_BUCKET", connections.blobs_bucket),
        ("REPRO_JOBS_BUCKET", connections.jobs_bucket),
    ):
        _ensure_bucket(client, connections, variable, bucket)
    _ensure_repository(client, connections)


def _client(connections: Connections) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=connections.s3_endpoint,
        region_name=connections.s3_region,
        aws_access_key_id=connections.s3_access_key,
        aws_secret_access_key=connections.s3_secret_key,
        aws_session_token=connections.s3_session_token,
        config=Config(
            connect_timeout=5,
            read_timeout=SECONDS,
            retries={"mode": "standard", "max_attempts": 3},
            s3={"addressing_style": "path"} if connections.s3_endpoint else {},
            proxies={} if is_loopback(connections.s3_endpoint) else None,
        ),
    )


def _ensure_bucket(client: Any, connections: Connections, variable: str, bucket: str) -> None:
    where = connections.s3_endpoint or f"AWS S3 ({connections.s3_region})"
    try:
        try:
            client.head_bucket(Bucket=bucket)
            return
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status != 404:
                raise ServerError(
                    f"bucket {bucket} at {where} answers {status}: it belongs to somebody else or the key may not use it. "
                    f"Choose another name with {variable}, or correct AWS_ACCESS_KEY_ID and its secret"
                ) from error
        place = {} if connections.s3_region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": connections.s3_region}}
        client.create_bucket(Bucket=bucket, **place)
    except ClientError as error:
        if error.response["Error"]["Code"] == "BucketAlreadyOwnedByYou":
            return
        raise ServerError(
            f"cannot make bucket {bucket} at {where} ({error.response['Error'].get('Code')}): make it yourself, or choose "
            f"another with {variable}"
        ) from error
    except BotoCoreError as error:
        raise ServerError(
            f"S3 at {where} cannot be used: {error}. Check AWS_ENDPOINT_URL_S3 and the credentials, or run `repro up`"
        ) from error


def _ensure_repository(client: Any, connections: Connections) -> None:
    name = connections.repository
    body = {"name": name, "storage_namespace": connections.namespace, "default_branch": "main"}
    status, message = _call(connections, "GET", f"/repositories/{name}")
    if status == 404:
        status, message = _call(connections, "POST", "/repositories", body)
        if status in (400, 409):
            status, message = _await_other(connections, status, message)
        if status == 400 and not connections.external and _forget_half_made(client, connections):
            status, message = _call(connections, "POST", "/repositories", body)
    if status in (200, 201):
        return
    if status in (401, 403):
        raise ServerError(
            f"lakeFS at {connections.lakefs_endpoint} denies repository {name} ({status} {message}): check "
            "LAKECTL_CREDENTIALS_ACCESS_KEY_ID, its secret, and that its policy allows fs:ReadRepository and fs:CreateRepository"
        )
    raise ServerError(
        f"lakeFS at {connections.lakefs_endpoint} does not make repository {name} in {connections.namespace} ({status} {message}): "
        "choose other names with REPRO_REPOSITORY and REPRO_NAMESPACE; a namespace can be used only once"
    )


def _await_other(connections: Connections, status: int, message: str) -> tuple[int, str]:
    """A process beside us may be faster: lakeFS marks the namespace first (then we get 400) and shows the repository a moment later."""
    deadline = time.monotonic() + OTHER_SECONDS
    while time.monotonic() < deadline:
        found, _ = _call(connections, "GET", f"/repositories/{connections.repository}")
        if found == 200:
            return 200, ""
        time.sleep(0.1)
    return status, message


def _forget_half_made(client: Any, connections: Connections) -> bool:
    """A kill between lakeFS's mark and its repository would block the namespace for ever. Only on the embedded servers, whose home is
    locked by now, is it certain that a namespace with nothing but the mark is nobody else's."""
    bucket, _, prefix = connections.namespace.removeprefix("s3://").partition("/")
    mark = f"{prefix}/_lakefs/dummy".lstrip("/")
    found = client.list_objects_v2(Bucket=bucket, Prefix=prefix and f"{prefix}/", MaxKeys=2).get("Contents", [])
    if [item["Key"] for item in found] != [mark]:
        return False
    client.delete_object(Bucket=bucket, Key=mark)
    return True


def _call(connections: Connections, method: str, path: str, body: dict[str, str] | None = None) -> tuple[int, str]:
    """Two plain calls need no generated client, which takes a second to import."""
    secret = base64.b64encode(f"{connections.lakefs_access_key}:{connections.lakefs_secret_key}".encode()).decode()
    request = urllib.request.Request(
        f"{connections.lakefs_endpoint}/api/v1{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Basic {secret}", "Content-Type": "application/json"},
    )
    try:
        opener = _direct if is_loopback(connections.lakefs_endpoint) else _proxied
        with opener.open(request, timeout=SECONDS) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        text = error.read(4096).decode("utf-8", "replace")
        try:
            return error.code, str(json.loads(text)["message"])
        except (ValueError, KeyError, TypeError):
            return error.code, text.strip()
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ServerError(
            f"lakeFS at {connections.lakefs_endpoint} cannot be reached ({reason}): check LAKECTL_SERVER_ENDPOINT_URL, or run `repro up`"
        ) from error
