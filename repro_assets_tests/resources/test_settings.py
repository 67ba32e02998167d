"""Connections: what the environment says, what is refused, and that secrets stay secret. Real servers are in servers/."""

from dataclasses import fields
from pathlib import Path

import pytest

from resources.servers import ServerError
from resources.settings import DEFAULT_CACHE_BYTES, Connections, SettingsError, home_folder

LAKEFS = {
    "LAKECTL_SERVER_ENDPOINT_URL": "https://lake.example.org",
    "LAKECTL_CREDENTIALS_ACCESS_KEY_ID": "AKIALAKE",
    "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY": "lake-secret",
}
S3 = {
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000",
    "AWS_REGION": "eu-central-1",
    "AWS_ACCESS_KEY_ID": "AKIAS3",
    "AWS_SECRET_ACCESS_KEY": "s3-secret",
    "AWS_SESSION_TOKEN": "s3-token",
}
NAMES = {
    "REPRO_REPOSITORY": "other",
    "REPRO_NAMESPACE": "s3://elsewhere/prefix",
    "REPRO_LAKE_BUCKET": "a-lake",
    "REPRO_BLOBS_BUCKET": "a-blobs",
    "REPRO_JOBS_BUCKET": "a-jobs",
    "REPRO_HOME": "/srv/repro",
    "REPRO_CACHE": "/srv/cache",
    "REPRO_CACHE_BYTES": "12345",
}


def test_every_variable_is_read_into_its_field() -> None:
    assert Connections.from_environment(environ={**LAKEFS, **S3, **NAMES}) == Connections(
        home=Path("/srv/repro"),
        lakefs_endpoint="https://lake.example.org",
        lakefs_access_key="AKIALAKE",
        lakefs_secret_key="lake-secret",
        repository="other",
        namespace="s3://elsewhere/prefix",
        s3_endpoint="http://127.0.0.1:9000",
        s3_region="eu-central-1",
        s3_access_key="AKIAS3",
        s3_secret_key="s3-secret",
        s3_session_token="s3-token",
        lake_bucket="a-lake",
        blobs_bucket="a-blobs",
        jobs_bucket="a-jobs",
        cache=Path("/srv/cache"),
        cache_bytes=12345,
        external=True,
    )


def test_lakefs_variables_alone_mean_aws_with_its_own_credential_chain_and_the_default_names() -> None:
    found = Connections.from_environment("/srv/repro", LAKEFS)
    assert (found.s3_endpoint, found.s3_region, found.s3_access_key, found.s3_secret_key) == (None, "us-east-1", None, None)
    assert (found.repository, found.namespace) == ("repro", "s3://repro-lake/repro")
    assert (found.lake_bucket, found.blobs_bucket, found.jobs_bucket) == ("repro-lake", "repro-blobs", "repro-jobs")
    assert (found.cache, found.cache_bytes) == (Path("/srv/repro/cache"), DEFAULT_CACHE_BYTES)


@pytest.mark.parametrize("environ", [LAKEFS, {**LAKEFS, **S3}, {**LAKEFS, **S3, **NAMES}], ids=["aws", "own S3", "all"])
def test_environment_gives_back_the_same_connections(environ: dict[str, str]) -> None:
    found = Connections.from_environment(environ=environ)
    assert Connections.from_environment(environ=found.environment()) == found


def test_a_node_gets_s3_and_its_two_buckets_but_no_lakefs_credentials_and_no_local_folders() -> None:
    """A training node holds no lakeFS credentials (design section 7)."""
    given = Connections.from_environment(environ={**LAKEFS, **S3, **NAMES}).node_environment()
    assert given == {**S3, "AWS_DEFAULT_REGION": "eu-central-1", "REPRO_BLOBS_BUCKET": "a-blobs", "REPRO_JOBS_BUCKET": "a-jobs"}


def test_repr_shows_no_secret() -> None:
    text = repr(Connections.from_environment(environ={**LAKEFS, **S3}))
    assert "AKIALAKE" in text and "AKIAS3" in text
    assert not [secret for secret in ("lake-secret", "s3-secret", "s3-token") if secret in text]
    assert {item.name for item in fields(Connections) if not item.repr} == {"lakefs_secret_key", "s3_secret_key", "s3_session_token"}


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"LAKECTL_SERVER_ENDPOINT_URL": "http://h"}, "LAKECTL_CREDENTIALS_ACCESS_KEY_ID"),
        ({**LAKEFS, "LAKECTL_CREDENTIALS_ACCESS_KEY_ID": ""}, "LAKECTL_CREDENTIALS_ACCESS_KEY_ID"),
        ({**LAKEFS, "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY": ""}, "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY"),
        ({**LAKEFS, "LAKECTL_SERVER_ENDPOINT_URL": ""}, "LAKECTL_SERVER_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL_S3": "http://h"}, "LAKECTL_SERVER_ENDPOINT_URL"),
        ({**LAKEFS, "AWS_ACCESS_KEY_ID": "a"}, "AWS_SECRET_ACCESS_KEY"),
        ({**LAKEFS, "AWS_SECRET_ACCESS_KEY": "a"}, "AWS_ACCESS_KEY_ID"),
    ],
)
def test_half_set_variables_name_the_missing_one(given: dict[str, str], missing: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=rf"{missing} is not( set|:)"):
        Connections.from_environment(tmp_path, given)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"LAKECTL_SERVER_ENDPOINT_URL": "lake.example.org"}, "LAKECTL_SERVER_ENDPOINT_URL is 'lake.example.org': it must start with http"),
        ({"AWS_ENDPOINT_URL_S3": "127.0.0.1:9000"}, "AWS_ENDPOINT_URL_S3 is '127.0.0.1:9000': it must start with http"),
        ({"REPRO_CACHE_BYTES": "20GB"}, "REPRO_CACHE_BYTES is '20GB': it must be a whole number"),
        ({"REPRO_NAMESPACE": "local://x"}, "REPRO_NAMESPACE is 'local://x': it must start with s3://"),
        ({"REPRO_BLOBS_BUCKET": "repro-lake"}, "three different buckets"),
    ],
)
def test_malformed_values_are_refused_by_name(given: dict[str, str], complaint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Connections.from_environment(environ={**LAKEFS, **given})
    assert complaint in str(caught.value)


@pytest.mark.parametrize("address", ["http://h:8000", "http://h:8000/", "http://h:8000/api/v1", "http://h:8000/api/v1/"])
def test_the_address_may_be_written_as_lakectl_allows(address: str) -> None:
    assert Connections.from_environment(environ={**LAKEFS, "LAKECTL_SERVER_ENDPOINT_URL": address}).lakefs_endpoint == "http://h:8000"


def test_the_s3_address_of_its_own_wins_over_the_general_one() -> None:
    general = {**LAKEFS, "AWS_ENDPOINT_URL": "http://general"}
    assert Connections.from_environment(environ=general).s3_endpoint == "http://general"
    assert Connections.from_environment(environ={**general, "AWS_ENDPOINT_URL_S3": "http://s3"}).s3_endpoint == "http://s3"


def test_a_session_token_without_a_key_is_left_to_the_credential_chain() -> None:
    assert Connections.from_environment(environ={**LAKEFS, "AWS_SESSION_TOKEN": "t"}).s3_session_token is None


def test_without_servers_the_error_says_repro_up(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no servers run.*`repro up`"):
        Connections.from_environment(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_ordinary_aws_credentials_of_a_developer_do_not_turn_the_embedded_servers_off(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="`repro up`"):
        Connections.from_environment(tmp_path, {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "eu-west-1"})


def test_the_home_is_the_argument_then_the_variable_then_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert home_folder(None, {}) == tmp_path / ".repro"
    assert home_folder(None, {"REPRO_HOME": "elsewhere"}) == tmp_path / "elsewhere"
    assert home_folder("given", {"REPRO_HOME": "elsewhere"}) == tmp_path / "given"
