"""How the embedded S3 server (versitygw on a plain folder) is configured and started.

Clients and buckets are not made here.
"""

import contextlib
import os
from pathlib import Path

from resources.servers.state import Credentials, Layout

HEALTH = "/_health"  # no bucket name may begin with an underscore, so the path is free


def prepare(layout: Layout, port: int, region: str) -> list[str]:
    """Make the folders and return the arguments after the program's name."""
    first = not layout.s3_objects.exists()
    layout.s3_objects.mkdir(mode=0o700, parents=True, exist_ok=True)
    if first and not has_attributes(layout.s3_objects):
        layout.s3_sidecar.mkdir(mode=0o700)
    # where object metadata lives was decided when the folder was made: changing it later would lose every ETag and content type
    sidecar = ["--sidecar", str(layout.s3_sidecar)] if layout.s3_sidecar.exists() else []
    common = ["--port", f"127.0.0.1:{port}", "--region", region, "--health", HEALTH, "--quiet", "--keep-alive"]
    return [*common, "posix", *sidecar, "--dir-perms", "0700", "--file-perms", "0600", str(layout.s3_objects)]


def environment(credentials: Credentials) -> dict[str, str]:
    """The root identity, by environment because everybody can read a command line."""
    return {"ROOT_ACCESS_KEY": credentials.s3_access_key, "ROOT_SECRET_KEY": credentials.s3_secret_key}


def has_attributes(folder: Path) -> bool:
    """Whether the file system keeps extended attributes, where versitygw stores an object's metadata."""
    if not hasattr(os, "setxattr"):
        return True  # macOS: APFS and HFS+ have them, Python has no call for them
    probe = folder / ".attributes"
    try:
        probe.touch()
        os.setxattr(probe, "user.repro", b"1")
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
