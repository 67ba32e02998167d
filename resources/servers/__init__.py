"""The embedded lakeFS and S3 servers: `up`, `down`, `status`; `connect` for either kind; `ensure_storage` for external ones.

No Dagster, and no client for reading or writing data, belongs here.
"""

from resources.servers.embedded import ServerStatus, connect, down, status, up
from resources.servers.state import ServerError
from resources.servers.storage import ensure_storage

__all__ = ["ServerError", "ServerStatus", "connect", "down", "ensure_storage", "status", "up"]
