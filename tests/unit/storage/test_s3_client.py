import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, SSLError

from ropeway.runtime.errors import AbsentError, ConfigError, TemporaryError
from ropeway.storage.s3_client import S3Location, make_client, split_url, translate_errors
from tests.support.s3_server import SECRET


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """No setting of the person's own; a secret that nothing may repeat."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return monkeypatch


def test_a_url_is_taken_apart():
    assert split_url("s3://models") == split_url("s3://models/") == S3Location("models", "")
    assert split_url("s3://my.models-1/a/b c.jsonl") == S3Location("my.models-1", "a/b c.jsonl")


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "s3://A/x", "s3://ab", "s3://abc//x", "s3://abc/../x", "s3://abc/a\nb", "http://abc/x",
            f"s3://KEY:{SECRET}@abc/x"],
)  # fmt: skip
def test_urls_of_another_form_are_refused_and_a_secret_in_one_is_not_repeated(url):
    with pytest.raises(ConfigError, match="expected s3://bucket/prefix") as caught:
        split_url(url)
    assert SECRET not in str(caught.value)


def test_amazon_over_tls_is_what_an_empty_environment_means(environment):
    assert make_client().meta.endpoint_url == "https://s3.amazonaws.com"
    environment.setenv("AWS_REGION", "eu-central-1")
    client = make_client()
    assert client.meta.endpoint_url == "https://s3.eu-central-1.amazonaws.com"
    assert client.meta.config.retries["total_max_attempts"] == 6
    assert client.meta.config.read_timeout == 60


def test_endpoint_region_tries_timeout_and_checksums_come_from_the_environment(environment):
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
def test_an_endpoint_that_is_none_is_refused_without_repeating_it(environment, endpoint):
    environment.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(ConfigError, match="expected https://host:port") as caught:
        make_client()
    assert SECRET not in str(caught.value)


def test_http_to_another_machine_has_to_be_asked_for(environment):
    environment.setenv("AWS_ENDPOINT_URL_S3", "http://store.example:9000")
    with pytest.raises(ConfigError, match="can be read on the way"):
        make_client()
    environment.setenv("ROPEWAY_S3_ALLOW_HTTP", "1")
    assert make_client().meta.endpoint_url == "http://store.example:9000"


def test_a_profile_that_does_not_exist_and_a_number_that_is_none_are_named(environment):
    environment.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="AWS_PROFILE"):
        make_client()
    environment.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(ConfigError, match="AWS_MAX_ATTEMPTS: expected a whole number"):
        make_client()


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (403, "AccessDenied", ConfigError, "may not do that"),
        (403, "SignatureDoesNotMatch", ConfigError, "not accepted"),
        (403, "InvalidAccessKeyId", ConfigError, "not accepted"),
        (403, "RequestTimeTooSkewed", ConfigError, "Set the clock right"),
        (404, "NoSuchKey", AbsentError, "nothing is there"),
        (404, "404", AbsentError, "nothing is there"),
        (404, "NoSuchBucket", ConfigError, "Create the bucket"),
        (301, "PermanentRedirect", ConfigError, "another region"),
        (400, "AuthorizationHeaderMalformed", ConfigError, "another region"),
        (409, "ConditionalRequestConflict", TemporaryError, "resumes"),
        (503, "SlowDown", TemporaryError, "resumes"),
        (500, "InternalError", TemporaryError, "resumes"),
        (429, "odd", TemporaryError, "resumes"),
        (418, f"<{SECRET}>", ConfigError, "418 unknown"),
    ],
)
def test_a_servers_answer_becomes_a_decision_without_its_words(status, code, error, words):
    response = {"Error": {"Code": code, "Message": SECRET}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(error, match=words) as caught, translate_errors("s3://bucket/x: key"):
        raise ClientError(response, "PutObject")
    assert str(caught.value).startswith("s3://bucket/x: key: ")
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "error", "words"),
    [
        (NoCredentialsError(), ConfigError, "no credentials"),
        (SSLError(endpoint_url="https://x", error="bad"), ConfigError, "AWS_CA_BUNDLE"),
        (EndpointConnectionError(endpoint_url=f"https://{SECRET}"), TemporaryError, "resumes"),
        (ConnectionResetError(), TemporaryError, "ConnectionResetError"),
    ],
)
def test_a_failed_connection_becomes_a_decision(raised, error, words):
    with pytest.raises(error, match=words) as caught, translate_errors("s3://bucket/x"):
        raise raised
    assert SECRET not in str(caught.value)


def test_a_real_server_is_written_to_and_read(s3_url):
    client, place = make_client(), split_url(s3_url)
    with translate_errors(s3_url):
        client.put_object(Bucket=place.bucket, Key=f"{place.prefix}/a", Body=b"abc")
        assert client.get_object(Bucket=place.bucket, Key=f"{place.prefix}/a")["Body"].read() == b"abc"
    with pytest.raises(AbsentError), translate_errors(s3_url):
        client.get_object(Bucket=place.bucket, Key=f"{place.prefix}/b")


def test_a_wrong_secret_is_said_so_and_not_repeated(s3_url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    client, place = make_client(), split_url(s3_url)
    with pytest.raises(ConfigError, match="not accepted") as caught, translate_errors(s3_url):
        client.put_object(Bucket=place.bucket, Key="a", Body=b"abc")
    assert "another-secret" not in str(caught.value)
