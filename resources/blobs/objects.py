"""`Objects`: small mutable objects by key in a bucket of their own: `jobs/<key>/...`, `memo/...`. Content that must stay is a blob."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resources.blobs.s3 import make_client, store_once, typed_errors
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
        where = {"Bucket": self.bucket, "Key": key, "Body": data}
        with typed_errors(self._client, f"write s3://{self.bucket}/{key}"):
            if if_absent:
                return store_once(lambda: self._client.put_object(**where, IfNoneMatch="*"), lambda: self.exists(key))
            self._client.put_object(**where)
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
