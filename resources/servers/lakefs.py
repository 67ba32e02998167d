"""How the embedded lakeFS is configured and started: its private YAML, its command line, its address of health.

Nothing here speaks lakeFS's API; that is resources.lake.
"""

import json

from resources.servers.state import Credentials, Layout, write_private

HEALTH = "/_health"  # answers only after the administrator of the configuration exists


def configuration(layout: Layout, credentials: Credentials, port: int, s3_port: int, region: str) -> dict[str, object]:
    """Everything lakeFS is told. Each switch that is off would call out of the machine, run code from data, or eat a laptop's memory."""
    data = layout.data("lakefs")
    return {
        "listen_address": f"127.0.0.1:{port}",
        "logging": {"level": "ERROR", "format": "json", "output": ["="]},
        "database": {"type": "local", "local": {"path": str(data / "metadata")}},
        "blockstore": {
            "type": "s3",
            "signing": {"secret_key": credentials.lakefs_signing_secret},
            "s3": {
                "region": region,
                "endpoint": f"http://127.0.0.1:{s3_port}",
                "force_path_style": True,
                "discover_bucket_region": False,
                "credentials": {"access_key_id": credentials.s3_access_key, "secret_access_key": credentials.s3_secret_key},
            },
        },
        "committed": {
            "local_cache": {"dir": str(data / "cache"), "size_bytes": 256 * 1024**2},
            "sstable": {"memory": {"cache_size_bytes": 64 * 1024**2}},
        },
        "auth": {"encrypt": {"secret_key": credentials.lakefs_encrypt_secret}},
        "installation": {
            "user_name": "repro",
            "access_key_id": credentials.lakefs_access_key,
            "secret_access_key": credentials.lakefs_secret_key,
        },
        "actions": {"enabled": False},  # raw data must never become a hook
        "stats": {"enabled": False},
        # the audit call has no switch of its own: only an empty address in the file stops it, an empty variable is ignored
        "security": {"check_latest_version": False, "audit_check_url": ""},
        "email_subscription": {"enabled": False},
    }


def prepare(layout: Layout, credentials: Credentials, port: int, s3_port: int, region: str) -> list[str]:
    """Write the configuration (mode 0600) and return the arguments after the program's name."""
    data = layout.data("lakefs")
    for folder in (data / "metadata", data / "cache"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # JSON is YAML; without --config a config.yaml in the working directory would be read as lakeFS's own
    write_private(layout.lakefs_config, json.dumps(configuration(layout, credentials, port, s3_port, region), indent=1))
    return ["--config", str(layout.lakefs_config), "run"]
