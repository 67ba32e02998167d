"""What can go wrong with lakeFS and S3, as types a caller can act on. Every message names the thing, the reason and the remedy.

A blob that is missing or damaged is `BlobMissing` / `BlobDamaged` of repro_assets.trust.blob, because pure code meets those too.
"""


class StorageError(Exception):
    """lakeFS or S3 did not do what was asked."""


class NotFound(StorageError):
    """No such repository, branch, commit, path, bucket or key."""


class Conflict(StorageError):
    """The name is taken by something else, or other writers kept changing the same paths."""


class NothingToCommit(StorageError):
    """The branch holds no staged change."""


class Uncommitted(StorageError):
    """The branch holds staged objects that somebody has to commit or drop first."""


class Gone(StorageError):
    """The entry exists but its bytes were removed from the object store."""


class Unavailable(StorageError):
    """The server could not be reached, stalled or kept failing within the time allowed."""


class Denied(StorageError):
    """The credentials, a branch protection rule or a hook forbid it."""


class Refused(StorageError):
    """The server understood the request and calls it invalid; repeating it unchanged gives the same answer."""


class DiskFull(StorageError):
    """No space left where bytes had to be written; nothing half-written was left behind."""
