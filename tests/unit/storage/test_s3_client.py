from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ssl import SSLCertVerificationError, SSLEOFError

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, SSLError
from botocore.utils import parse_timestamp

from ropeway.runtime.errors import ConfigError, NotFoundError, TemporaryError
from ropeway.storage.s3_client import S3Location, make_client, parse_time, split_url, translate_errors
from tests.support.s3_server import SECRET


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-30T18:49:50.000Z",
        "2026-11-30T18:49:50+00:00",
        "Mon, 30 Nov 2026 18:49:50 GMT",
        "1796064590",
        "20261130T184950Z",
    ],
)
def test_the_time_of_a_response_is_that_of_botocore(text):
    assert parse_time(text) == parse_timestamp(text) == datetime(2026, 11, 30, 18, 49, 50, tzinfo=UTC)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Remove the user's AWS settings and set a secret that must not appear in any message."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return monkeypatch


def test_split_url_returns_bucket_and_prefix():
    assert split_url("s3://models") == split_url("s3://models/") == S3Location("models", "")
    assert split_url("s3://my.models-1/a/b c.jsonl") == S3Location("my.models-1", "a/b c.jsonl")


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "s3://A/x", "s3://ab", "s3://abc//x", "s3://abc/../x", "s3://abc/a\nb", "http://abc/x",
            f"s3://KEY:{SECRET}@abc/x"],
)  # fmt: skip
def test_malformed_urls_are_rejected_without_showing_a_secret(url):
    with pytest.raises(ConfigError, match="expected s3://bucket/prefix") as caught:
        split_url(url)
    assert SECRET not in str(caught.value)


def test_the_default_endpoint_is_amazon_s3_over_https(environment):
    assert make_client().meta.endpoint_url == "https://s3.amazonaws.com"
    environment.setenv("AWS_REGION", "eu-central-1")
    client = make_client()
    assert client.meta.endpoint_url == "https://s3.eu-central-1.amazonaws.com"
    assert client.meta.config.retries["total_max_attempts"] == 6
    assert client.meta.config.read_timeout == 60


def test_client_settings_come_from_the_environment(environment):
    settings = {
        "AWS_ENDPOINT_URL": "https://ignored.example",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:8333",
        "AWS_MAX_ATTEMPTS": "2",
        "ROPEWAY_S3_TIMEOUT_SECONDS": "7",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    for name, value in settings.items():
        environment.setenv(name, value)
    client = make_client()
    assert client.meta.endpoint_url == "http://127.0.0.1:8333"
    assert client.meta.config.retries["total_max_attempts"] == 2
    assert client.meta.config.read_timeout == 7
    assert client.meta.config.request_checksum_calculation == "when_required"


@pytest.mark.parametrize(
    "endpoint", [f"https://KEY:{SECRET}@host", "ftp://host", "host:9000", "https://", f"https://host?{SECRET}", "http://["],
)  # fmt: skip
def test_an_invalid_endpoint_is_rejected_without_showing_it(environment, endpoint):
    environment.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(ConfigError, match="expected https://host:port") as caught:
        make_client()
    assert SECRET not in str(caught.value)


def test_http_to_another_machine_needs_an_explicit_setting(environment):
    environment.setenv("AWS_ENDPOINT_URL_S3", "http://store.example:9000")
    with pytest.raises(ConfigError, match="ROPEWAY_ALLOW_HTTP=1"):
        make_client()
    environment.setenv("ROPEWAY_ALLOW_HTTP", "1")
    assert make_client().meta.endpoint_url == "http://store.example:9000"


def test_http_to_another_machine_is_also_refused_if_the_aws_configuration_names_it(environment, tmp_path):
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://store.example:9000\n")
    environment.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(ConfigError, match="ROPEWAY_ALLOW_HTTP=1"):
        make_client()
    environment.setenv("ROPEWAY_ALLOW_HTTP", "1")
    assert make_client().meta.endpoint_url == "http://store.example:9000"


def test_an_unknown_profile_and_an_invalid_number_are_named(environment):
    environment.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="AWS_PROFILE"):
        make_client()
    environment.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(ConfigError, match="AWS_MAX_ATTEMPTS: expected a positive integer"):
        make_client()


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (403, "AccessDenied", ConfigError, "permission"),
        (403, "SignatureDoesNotMatch", ConfigError, "AWS_PROFILE"),
        (403, "InvalidAccessKeyId", ConfigError, "AWS_PROFILE"),
        (403, "RequestTimeTooSkewed", ConfigError, "Correct this machine's clock"),
        (404, "NoSuchKey", NotFoundError, "404"),
        (404, "404", NotFoundError, "404"),
        (404, "NoSuchBucket", ConfigError, "Create the bucket"),
        (301, "PermanentRedirect", ConfigError, "AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", ConfigError, "AWS_REGION"),
        (409, "ConditionalRequestConflict", TemporaryError, "resumes"),
        (503, "SlowDown", TemporaryError, "resumes"),
        (500, "InternalError", TemporaryError, "resumes"),
        (429, "odd", TemporaryError, "resumes"),
        (418, f"<{SECRET}>", ConfigError, "418 unknown"),
    ],
)
def test_an_error_response_is_translated_without_its_text(status, code, error, words):
    response = {"Error": {"Code": code, "Message": SECRET}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(error, match=words) as caught, translate_errors("s3://bucket/x: key"):
        raise ClientError(response, "PutObject")
    assert str(caught.value).startswith("s3://bucket/x: key: ")
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "error", "words"),
    [
        (NoCredentialsError(), ConfigError, "no AWS credentials"),
        (SSLError(endpoint_url="https://x", error=SSLCertVerificationError(1, "bad")), ConfigError, "AWS_CA_BUNDLE"),
        (SSLError(endpoint_url="https://x", error=SSLEOFError(8, "end")), TemporaryError, "resumes"),
        (EndpointConnectionError(endpoint_url=f"https://{SECRET}"), TemporaryError, "resumes"),
        (ConnectionResetError(), TemporaryError, "ConnectionResetError"),
    ],
)
def test_a_connection_error_is_translated(raised, error, words):
    with pytest.raises(error, match=words) as caught, translate_errors("s3://bucket/x"):
        raise raised
    assert SECRET not in str(caught.value)


def test_a_real_server_stores_and_returns_an_object(s3_url):
    client, place = make_client(), split_url(s3_url)
    with translate_errors(s3_url):
        client.put_object(Bucket=place.bucket, Key=f"{place.prefix}/a", Body=b"abc")
        assert client.get_object(Bucket=place.bucket, Key=f"{place.prefix}/a")["Body"].read() == b"abc"
    with pytest.raises(NotFoundError), translate_errors(s3_url):
        client.get_object(Bucket=place.bucket, Key=f"{place.prefix}/b")


def test_a_wrong_secret_is_reported_without_showing_it(s3_url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    client, place = make_client(), split_url(s3_url)
    with pytest.raises(ConfigError, match="AWS_PROFILE") as caught, translate_errors(s3_url):
        client.put_object(Bucket=place.bucket, Key="a", Body=b"abc")
    assert "another-secret" not in str(caught.value)


@pytest.mark.parametrize("years", [1, -1])
def test_a_request_that_is_refused_without_a_reason_by_a_server_of_another_time_names_the_clock(years):
    date = format_datetime(datetime.now(UTC) + timedelta(days=365 * years), usegmt=True)
    for date_then, words in ((date, "clock"), (format_datetime(datetime.now(UTC), usegmt=True), "permission")):
        facts = {"HTTPStatusCode": 403, "HTTPHeaders": {"date": date_then}}
        with pytest.raises(ConfigError, match=words), translate_errors("s3://bucket/x: key"):
            raise ClientError({"Error": {"Code": "403"}, "ResponseMetadata": facts}, "HeadObject")
