"""`Objects`: small mutable objects by key in a bucket of their own: `jobs/<key>/...`, `memo/...`. Content that must stay is a blob."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from resources.blobs.s3 import code_of, make_client, status_of, typed_errors
from resources.errors import NotFound

if TYPE_CHECKING:
    from resources.settings import Connections


class Objects:
    """One bucket. Whole objects in memory; safe for many threads."""

    def __init__(self, bucket: str, client: Any) -> None:
        self.bucket, self._client = bucket, client

    @classmethod
    def connect(cls, connections: "Connections", client: Any = None) -> "Objects":
        """The jobs bucket of `connections`."""
        return cls(connections.jobs_bucket, client or make_client(connections))

    def put(self, key: str, data: bytes, if_absent: bool = False) -> bool:
        """Write `data`. With `if_absent` an object that is there stays, and False says so: one of many racing writers gets True.

        An attempt whose answer was lost counts as somebody else's: compare what is there before acting on False.
        """
        options = {"IfNoneMatch": "*"} if if_absent else {}
        with typed_errors(self._client, f"write s3://{self.bucket}/{key}"):
            try:
                self._client.put_object(Bucket=self.bucket, Key=key, Body=data, **options)
            except ClientError as error:
                if if_absent and status_of(error) == 412:
                    return False
                if if_absent and code_of(error) == "ConditionalRequestConflict":  # AWS: another put of this key is under way
                    return not self.exists(key) and self.put(key, data, if_absent=True)
                raise
        return True

    def get(self, key: str) -> bytes:
        """The object's bytes; NotFound when there is none."""
        with typed_errors(self._client, f"read s3://{self.bucket}/{key}"):
            data: bytes = self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            with typed_errors(self._client, f"look for s3://{self.bucket}/{key}"):
                self._client.head_object(Bucket=self.bucket, Key=key)
        except NotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Sequence[str]:
        """The keys that start with `prefix`, sorted."""
        with typed_errors(self._client, f"list s3://{self.bucket}/{prefix}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))

    def delete(self, key: str) -> None:
        """There is no such object afterwards. For a job's scratch only: what others may have read is never deleted."""
        with typed_errors(self._client, f"delete s3://{self.bucket}/{key}"):
            self._client.delete_object(Bucket=self.bucket, Key=key)
