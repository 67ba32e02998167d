"""Where lakeFS and S3 are, and as whom we speak to them: one frozen value, read from the environment or the embedded servers' state.

No client is made here and nothing is started; resources.servers starts servers, resources.lake and resources.blobs talk to them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_REGION = "us-east-1"
DEFAULT_CACHE_BYTES = 20 * 1024**3


class SettingsError(ValueError):
    """A variable is missing, half set or malformed; the message names it and the remedy."""


@dataclass(frozen=True)
class Connections:
    """Addresses, credentials and names of one lakeFS repository and its three buckets. Secrets never appear in repr.

    `s3_endpoint` None means AWS; `s3_access_key` None means the usual AWS credential chain. `external` is False for the
    embedded servers of `home`.
    """

    home: Path
    lakefs_endpoint: str
    lakefs_access_key: str
    lakefs_secret_key: str = field(repr=False)
    repository: str = "repro"
    namespace: str = ""
    s3_endpoint: str | None = None
    s3_region: str = DEFAULT_REGION
    s3_access_key: str | None = None
    s3_secret_key: str | None = field(default=None, repr=False)
    s3_session_token: str | None = field(default=None, repr=False)
    lake_bucket: str = "repro-lake"
    blobs_bucket: str = "repro-blobs"
    jobs_bucket: str = "repro-jobs"
    cache: Path = Path()
    cache_bytes: int = DEFAULT_CACHE_BYTES
    external: bool = True

    def __post_init__(self) -> None:
        if not self.namespace:
            object.__setattr__(self, "namespace", f"s3://{self.lake_bucket}/{self.repository}")
        if self.cache == Path():
            object.__setattr__(self, "cache", self.home / "cache")
        if not self.namespace.startswith("s3://"):
            raise SettingsError(f"REPRO_NAMESPACE is {self.namespace!r}: it must start with s3:// (lakeFS keeps its own objects there)")
        names = {"REPRO_LAKE_BUCKET": self.lake_bucket, "REPRO_BLOBS_BUCKET": self.blobs_bucket, "REPRO_JOBS_BUCKET": self.jobs_bucket}
        if len(set(names.values())) < len(names):
            raise SettingsError(f"lake, blobs and jobs need three different buckets, got {names}: they belong to three identities")

    @classmethod
    def from_environment(cls, home: Path | str | None = None, environ: Mapping[str, str] | None = None) -> "Connections":
        """External servers when LAKECTL_SERVER_ENDPOINT_URL is set, else the embedded servers that run under `home`.

        Raises SettingsError for half-set variables, and ServerError with `repro up` as the remedy when nothing runs.
        """
        values = {name: value for name, value in (os.environ if environ is None else environ).items() if value}
        folder = home_folder(home, values)
        if "LAKECTL_SERVER_ENDPOINT_URL" in values:
            return cls(home=folder, external=True, **_external(values), **_names(values))
        refuse_half_external(values)
        # here and not above: resources.servers needs this module
        from resources.servers.state import running_servers

        return cls.embedded(folder, running_servers(folder), values)

    @classmethod
    def embedded(cls, home: Path, servers: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> "Connections":
        """The embedded servers of `home`, whose addresses and keys are in `servers` (the field names of this class)."""
        values = {name: value for name, value in (os.environ if environ is None else environ).items() if value}
        return cls(home=home, external=False, **servers, **_names(values))

    def environment(self) -> dict[str, str]:
        """The variables that make `from_environment` give this value again; lakectl and the AWS CLI read the same ones."""
        values: dict[str, str | None] = {
            "LAKECTL_SERVER_ENDPOINT_URL": self.lakefs_endpoint,
            "LAKECTL_CREDENTIALS_ACCESS_KEY_ID": self.lakefs_access_key,
            "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY": self.lakefs_secret_key,
            "REPRO_REPOSITORY": self.repository,
            "REPRO_NAMESPACE": self.namespace,
            "REPRO_LAKE_BUCKET": self.lake_bucket,
            "REPRO_HOME": str(self.home),
            **self.node_environment(),
            "REPRO_CACHE": str(self.cache),
            "REPRO_CACHE_BYTES": str(self.cache_bytes),
        }
        return {name: value for name, value in values.items() if value is not None}

    def node_environment(self) -> dict[str, str]:
        """What a training or scoring node needs: S3 and the names of its two buckets. No lakeFS credentials, no local folders."""
        values: dict[str, str | None] = {
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
            "AWS_REGION": self.s3_region,
            "AWS_DEFAULT_REGION": self.s3_region,  # boto3 reads this one, the AWS CLI the other
            "AWS_ACCESS_KEY_ID": self.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret_key,
            "AWS_SESSION_TOKEN": self.s3_session_token,
            "REPRO_BLOBS_BUCKET": self.blobs_bucket,
            "REPRO_JOBS_BUCKET": self.jobs_bucket,
        }
        return {name: value for name, value in values.items() if value is not None}


def home_folder(home: Path | str | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The absolute home folder: the argument, else REPRO_HOME, else ./.repro."""
    values = os.environ if environ is None else environ
    return Path(home or values.get("REPRO_HOME") or ".repro").expanduser().absolute()


def refuse_half_external(environ: Mapping[str, str]) -> None:
    """SettingsError when variables of external servers are set without the one that turns them on: data would go elsewhere unseen.

    Keys and regions of AWS alone are no such sign, many shells have them.
    """
    for name in ("LAKECTL_CREDENTIALS_ACCESS_KEY_ID", "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3"):
        if environ.get(name) and not environ.get("LAKECTL_SERVER_ENDPOINT_URL"):
            raise SettingsError(
                f"{name} is set but LAKECTL_SERVER_ENDPOINT_URL is not: set it to use external servers, or unset {name} to use the "
                "embedded ones"
            )


def _names(values: Mapping[str, str]) -> dict[str, Any]:
    variables = {
        "repository": "REPRO_REPOSITORY",
        "namespace": "REPRO_NAMESPACE",
        "lake_bucket": "REPRO_LAKE_BUCKET",
        "blobs_bucket": "REPRO_BLOBS_BUCKET",
        "jobs_bucket": "REPRO_JOBS_BUCKET",
    }
    found: dict[str, Any] = {name: values[variable] for name, variable in variables.items() if variable in values}
    if "REPRO_CACHE" in values:
        found["cache"] = Path(values["REPRO_CACHE"]).expanduser().absolute()
    if "REPRO_CACHE_BYTES" in values:
        text = values["REPRO_CACHE_BYTES"]
        if not text.isdecimal():
            raise SettingsError(f"REPRO_CACHE_BYTES is {text!r}: it must be a whole number of bytes (0 turns the cache off)")
        found["cache_bytes"] = int(text)
    return found


def _external(values: Mapping[str, str]) -> dict[str, Any]:
    for name in ("LAKECTL_CREDENTIALS_ACCESS_KEY_ID", "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY"):
        if name not in values:
            raise SettingsError(f"{name} is not set, but LAKECTL_SERVER_ENDPOINT_URL is: external servers need both lakeFS credentials")
    for name, other in (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")):
        if name in values and other not in values:
            raise SettingsError(f"{other} is not set, but {name} is: set both, or neither to use the AWS credential chain")
    return {
        "lakefs_endpoint": _url("LAKECTL_SERVER_ENDPOINT_URL", values["LAKECTL_SERVER_ENDPOINT_URL"]).removesuffix("/api/v1"),
        "lakefs_access_key": values["LAKECTL_CREDENTIALS_ACCESS_KEY_ID"],
        "lakefs_secret_key": values["LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY"],
        "s3_endpoint": next((_url(name, values[name]) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if name in values), None),
        "s3_region": values.get("AWS_REGION") or values.get("AWS_DEFAULT_REGION") or DEFAULT_REGION,
        "s3_access_key": values.get("AWS_ACCESS_KEY_ID"),
        "s3_secret_key": values.get("AWS_SECRET_ACCESS_KEY"),
        "s3_session_token": values.get("AWS_SESSION_TOKEN") if "AWS_ACCESS_KEY_ID" in values else None,
    }


def _url(name: str, value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise SettingsError(f"{name} is {value!r}: it must start with http:// or https://")
    return value.rstrip("/")
