"""The embedded lakeFS and S3 servers: `up`, `down`, `status`; `connect` for either kind; `ensure_storage` for external ones.

No Dagster, and no client for reading or writing data, belongs here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resources.servers.embedded import ServerStatus, connect, down, status, up
    from resources.servers.state import ServerError
    from resources.servers.storage import ensure_storage

__all__ = ["ServerError", "ServerStatus", "connect", "down", "ensure_storage", "status", "up"]

# On first use: `python3 -m resources.servers.binaries` builds the servers while boto3 and psutil are still being installed.
_MODULES = {
    "ServerError": "state",
    "ServerStatus": "embedded",
    "connect": "embedded",
    "down": "embedded",
    "ensure_storage": "storage",
    "status": "embedded",
    "up": "embedded",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
