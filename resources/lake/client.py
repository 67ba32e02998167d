"""How one call to lakeFS is made: timeouts, which failures are retried and for how long, and typed errors.

The generated SDK is used here and in this package only. What the calls mean together is in lake.py and transaction.py.
"""

import io
import json
import random
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar
from urllib.parse import quote

import msgspec
import urllib3
from lakefs_sdk import ApiClient, Configuration
from lakefs_sdk.api.branches_api import BranchesApi
from lakefs_sdk.api.commits_api import CommitsApi
from lakefs_sdk.api.objects_api import ObjectsApi
from lakefs_sdk.api.refs_api import RefsApi
from lakefs_sdk.api.repositories_api import RepositoriesApi
from lakefs_sdk.api.staging_api import StagingApi
from lakefs_sdk.api.tags_api import TagsApi
from lakefs_sdk.exceptions import ApiException

from resources.errors import Conflict, Denied, Gone, NotFound, NothingToCommit, Refused, StorageError, Unavailable, Uncommitted

T = TypeVar("T")

# 423 and 429: the branch moved under ten server-side tries. 500: lakeFS also says this for "branch is currently locked".
RETRIED: Final = frozenset({408, 423, 429, 500, 502, 503, 504})
CONNECTIONS: Final = 32
READ: Final = 256 << 10


class Patience(msgspec.Struct, frozen=True):
    """Seconds. No new attempt starts once `total` has passed, so a call ends within about `total` plus one timeout."""

    connect: float = 5.0
    read: float = 30.0
    long_read: float = 300.0  # commit and merge: the server works before it answers
    total: float = 60.0
    attempts: int = 7
    first_wait: float = 0.1
    longest_wait: float = 5.0

    def wait(self, attempt: int) -> float:
        """Seconds before attempt number `attempt` + 1; random so that writers who met once do not meet again."""
        return min(self.longest_wait, self.first_wait * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


PATIENCE: Final = Patience()


class Client:
    """The SDK's API objects and the one way to call them. One client serves many threads, but belongs to one process."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str, patience: Patience = PATIENCE) -> None:
        self.endpoint = endpoint.rstrip("/").removesuffix("/api/v1")
        self.patience = patience
        configuration = Configuration(host=f"{self.endpoint}/api/v1", username=access_key, password=secret_key)
        configuration.retries = False  # urllib3 would repeat some methods, never POST, and hide how often: `call` does it for all
        configuration.connection_pool_maxsize = CONNECTIONS
        self._api = ApiClient(configuration)
        self._authorization = configuration.get_basic_auth_token()
        self.branches = BranchesApi(self._api)
        self.commits = CommitsApi(self._api)
        self.objects = ObjectsApi(self._api)
        self.refs = RefsApi(self._api)
        self.repositories = RepositoriesApi(self._api)
        self.staging = StagingApi(self._api)
        self.tags = TagsApi(self._api)

    def call(
        self,
        what: str,
        function: Callable[..., Any],
        *arguments: Any,
        slow: bool = False,
        settled: Callable[[], Any] | None = None,
        attempts: int | None = None,
        **options: Any,
    ) -> Any:
        """`function(*arguments, **options)` with a timeout, repeated while the failure may pass; other failures are typed.

        `what` names the call in messages. `settled` is asked before a repetition: when the lost attempt did take effect it
        returns the call's result, else None; calls that may simply be made twice need none.
        """
        timeout = (self.patience.connect, self.patience.long_read if slow else self.patience.read)
        return self._persist(what, lambda: function(*arguments, **options, _request_timeout=timeout), settled, attempts)

    def stream(self, what: str, repository: str, commit: str, path: str, offset: int = 0) -> urllib3.BaseHTTPResponse:
        """The object's bytes from `offset`, unread. The SDK itself would hold the whole body in memory, twice."""
        url = f"{self.endpoint}/api/v1/repositories/{quote(repository)}/refs/{quote(commit)}/objects?path={quote(path, safe='')}"
        headers = {"Authorization": self._authorization, "Accept": "application/octet-stream"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        timeout = urllib3.Timeout(connect=self.patience.connect, read=self.patience.read)

        def request() -> urllib3.BaseHTTPResponse:
            pool: urllib3.PoolManager = self._api.rest_client.pool_manager
            response = pool.request("GET", url, headers=headers, timeout=timeout, preload_content=False)
            if response.status not in (200, 206):
                body = response.read()
                response.release_conn()
                raise ApiException(status=response.status, reason=body.decode("utf-8", "replace"))
            return response

        return self._persist(what, request, None, None)

    def _persist(self, what: str, request: Callable[[], T], settled: Callable[[], T | None] | None, attempts: int | None) -> T:
        limit = attempts or self.patience.attempts
        started = time.monotonic()
        for attempt in range(1, limit + 1):
            try:
                return request()
            except ApiException as error:
                if error.status not in RETRIED:
                    raise self._typed(what, error) from error
                cause: Exception = error
                reason = f"HTTP {error.status}: {message_of(error)}"
            except urllib3.exceptions.HTTPError as error:
                cause = error
                reason = f"{type(error).__name__}: {error}"
            elapsed = time.monotonic() - started
            if attempt == limit or elapsed > self.patience.total:
                because = " because its object store failed" if "operation error S3" in reason else ""
                raise Unavailable(
                    f"lakeFS at {self.endpoint} did not {what}{because} ({attempt} attempts in {elapsed:.1f} s; last: {reason}). "
                    "`repro status` shows whether the servers run, `repro up` starts the embedded ones; then do the same again: "
                    "repeated writes are safe"
                ) from cause
            time.sleep(self.patience.wait(attempt))
            if settled is not None and (result := settled()) is not None:
                return result
        raise AssertionError("a call is allowed at least one attempt")

    def _typed(self, what: str, error: ApiException) -> StorageError:
        message = message_of(error)
        failed = f"lakeFS at {self.endpoint} did not {what}: {message} (HTTP {error.status})"
        match error.status:
            case 400 if "no changes" in message:
                return NothingToCommit(f"{failed}; nothing differs from the last commit, so there is nothing to do")
            case 400 if "uncommitted changes" in message:
                return Uncommitted(f"{failed}; commit the staged objects first (`repro commit-raw`, or `lakectl commit`), or drop them")
            case 401:
                return Denied(f"{failed}; check LAKECTL_CREDENTIALS_ACCESS_KEY_ID and LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY")
            case 403:
                return Denied(f"{failed}; a protected branch takes merges only (lake.write makes one), else ask for the permission")
            case 404:
                return NotFound(f"{failed}; check the name and the repository, `repro status` prints what is used")
            case 409:
                return Conflict(f"{failed}; look at what is there now, then choose another name or write again from the new head")
            case 410:
                return Gone(f"{failed}; the bytes were removed (garbage collection?): restore them from a copy of the bucket")
            case 412 if message == "Precondition failed":
                return Conflict(f"{failed}; somebody else changed it in between, read it and try again")
            case 412:
                return Denied(f"{failed}; a hook of this repository refused it, `lakectl actions runs list` shows which")
            case _:
                return Refused(f"{failed}; the same request will fail again")


def message_of(error: ApiException) -> str:
    """The server's own words, without the JSON around them."""
    body = error.body if error.body is not None else error.reason
    if isinstance(body, bytes):
        body = body.decode("utf-8", "replace")
    try:
        return str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(body or error.reason)[:500]


class ObjectStream(io.RawIOBase):
    """One object of one commit, read once from start to end. A dropped connection is taken up again where it broke.

    `checksum` is the entry's checksum as lakeFS knows it. The bytes are not verified here.
    """

    def __init__(self, client: Client, repository: str, commit: str, path: str) -> None:
        self._client, self._where = client, (repository, commit, path)
        self._what = f"read {path!r} at {commit[:12]}"
        self._offset = 0
        self._faults = 0
        self._response = client.stream(self._what, *self._where)
        self.checksum = self._response.headers.get("ETag", "").strip('"')

    def readable(self) -> bool:
        return True

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(READ), b""))  # io's own goes in steps of 8 KiB

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                data = self._response.read(min(len(buffer), READ))  # what a broken read had already received is lost
                break
            except urllib3.exceptions.HTTPError as error:
                self._resume(error)
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)

    def _resume(self, error: Exception) -> None:
        self._faults += 1
        self._response.close()
        if self._faults >= self._client.patience.attempts:
            raise Unavailable(
                f"lakeFS at {self._client.endpoint} did not {self._what}: the connection broke {self._faults} times, last at byte "
                f"{self._offset} ({type(error).__name__}: {error}); check the server's log, then read again"
            ) from error
        time.sleep(self._client.patience.wait(self._faults))
        self._response = self._client.stream(self._what, *self._where, offset=self._offset)

    def close(self) -> None:
        if not self.closed:
            self._response.close()
        super().close()
