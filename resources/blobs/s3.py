"""How S3 is spoken to: one client with timeouts and retries, and its failures as typed errors. What is stored is in the modules beside."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from urllib.parse import urlsplit

import boto3
import urllib3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)

from resources.errors import Denied, NotFound, Refused, Unavailable

if TYPE_CHECKING:
    from resources.settings import Connections

CHUNK: Final = 1 << 20
CONNECTIONS: Final = 32
BROKEN_BODY: Final = (HTTPClientError, IncompleteReadError, urllib3.exceptions.HTTPError, OSError)
RESUMES: Final = 4
DENIED: Final = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AuthorizationHeaderMalformed"})


def make_client(connections: "Connections", *, connect_timeout: float = 5.0, read_timeout: float = 60.0, attempts: int = 5) -> Any:
    """A boto3 S3 client for `connections`, for up to 32 threads. No call is made."""
    endpoint = connections.s3_endpoint
    local = endpoint is not None and urlsplit(endpoint).hostname in ("127.0.0.1", "localhost", "::1")
    config = Config(
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        s3={"addressing_style": "path" if endpoint else "auto"},
        # Our own SHA-256 is sent and checked; the CRC trailers that boto3 adds unasked are refused by older S3 servers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        proxies={} if local else None,  # an HTTP_PROXY in the shell must not catch the servers on this machine
    )
    # A session of its own: boto3's default one is shared, and making clients from it is not safe in threads.
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name=connections.s3_region,
        aws_access_key_id=connections.s3_access_key,
        aws_secret_access_key=connections.s3_secret_key,
        aws_session_token=connections.s3_session_token,
        config=config,
    )


def code_of(error: ClientError) -> str:
    """The S3 error code; for HEAD, which has no body, the HTTP status as text."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """The HTTP status of the answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def typed_errors(client: Any, what: str) -> Iterator[None]:
    """Turns what boto3 raises inside into the types of resources.errors; `what` names the call."""
    try:
        yield
    except ClientError as error:
        raise _typed(client, what, error) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise Denied(f"S3 at {endpoint_of(client)}: cannot {what}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except (BotoCoreError, urllib3.exceptions.HTTPError) as error:
        raise unavailable(client, what, error) from error


def unavailable(client: Any, what: str, error: Exception) -> Unavailable:
    """The typed error for a server that cannot be reached, stalls or breaks off."""
    return Unavailable(
        f"S3 at {endpoint_of(client)} did not {what}: {type(error).__name__}: {error}. `repro status` shows whether the servers run, "
        "`repro up` starts the embedded ones; then do the same again: blobs that arrived are kept and not sent twice"
    )


def endpoint_of(client: Any) -> str:
    """The address the client speaks to."""
    return str(client.meta.endpoint_url)


def _typed(client: Any, what: str, error: ClientError) -> Exception:
    code, status = code_of(error), status_of(error)
    message = error.response.get("Error", {}).get("Message", "")
    failed = f"S3 at {endpoint_of(client)} did not {what}: {code} {message} (HTTP {status})"
    if code == "NoSuchBucket":
        return NotFound(f"{failed}; `repro up` makes the embedded buckets, elsewhere create it or correct the REPRO_*_BUCKET variable")
    if code in DENIED or status in (401, 403):
        return Denied(f"{failed}; check the S3 credentials and what they are allowed to do")
    if status == 404:
        return NotFound(f"{failed}; check the key and the bucket")
    if status >= 500 or status in (408, 429) or code in ("SlowDown", "RequestTimeout"):
        return Unavailable(f"{failed}; look at the server's log and its free disk space, then do the same again")
    return Refused(f"{failed}; the same request will fail again")


def store_once(send: Callable[[], Any], there: Callable[[], bool]) -> bool:
    """Make a conditional (If-None-Match) request; False when the object is there already and was left alone.

    True or False may both follow a lost answer: what counts is that exactly one object stays.
    """
    for wait in (0.1, 0.4, 1.6, None):
        try:
            send()
            return True
        except ClientError as error:
            if status_of(error) == 412:
                return False
            if code_of(error) != "ConditionalRequestConflict" or wait is None:
                raise
        time.sleep(wait)  # AWS: another conditional request for this key is under way
        if there():
            return False
    raise AssertionError("unreachable: the last attempt returns or raises")


class Body:
    """The bytes of one object in order; a dropped connection is taken up again at the byte where it broke."""

    def __init__(self, client: Any, bucket: str, key: str) -> None:
        self._client, self._bucket, self._key = client, bucket, key
        self._offset, self._faults = 0, 0
        answer = self._start()
        self._stream: BinaryIO = answer["Body"]
        self.size = int(answer["ContentLength"])

    def _start(self) -> Any:
        options = {"Range": f"bytes={self._offset}-"} if self._offset else {}
        return self._client.get_object(Bucket=self._bucket, Key=self._key, **options)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes (all that is left for -1), empty at the end."""
        if size < 0:
            return b"".join(iter(lambda: self.read(CHUNK), b""))
        while True:
            try:
                data = self._stream.read(size)
            except BROKEN_BODY as error:
                if self._faults == RESUMES:
                    raise unavailable(self._client, f"send s3://{self._bucket}/{self._key} beyond byte {self._offset}", error) from error
                time.sleep(0.1 * 2**self._faults)
                self._faults += 1
                with typed_errors(self._client, f"go on with s3://{self._bucket}/{self._key}"):
                    self._stream = self._start()["Body"]
                continue
            self._offset += len(data)
            return data

    def close(self) -> None:
        """Gives the connection up."""
        self._stream.close()
