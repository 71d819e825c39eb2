"""Credentials that expire during a publish or pull: with newer ones it goes on, without them it ends with 64."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from ropeway.registry import Registry
from ropeway.registry.layout import versions_log
from ropeway.registry.log import read_events
from ropeway.runtime.errors import ConfigError
from ropeway.storage import TRANSFER_BYTES, open_store
from tests.support.fake_s3 import fake_s3
from tests.support.registry_world import make_package, put
from tests.support.web import serve_files

SECRET = "canary-4f0c1d"  # noqa: S105 - no message may have it
LARGE = b"w" * (17 << 20)  # two parts
FILE_ALONE = pytest.mark.parametrize("source", ["shared file"], indirect=True)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """No credentials but those of the test."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return monkeypatch


@pytest.fixture
def server(environment):
    with fake_s3() as running:
        environment.setenv("AWS_ENDPOINT_URL_S3", running.endpoint)
        yield running


def keys(name: str, seconds: float | None = None) -> dict[str, object]:
    """Return credentials as a process or an endpoint answers them; they expire so many seconds from now."""
    found = {"Version": 1, "AccessKeyId": name, "SecretAccessKey": SECRET, "SessionToken": "t", "Token": "t"}
    if seconds is None:
        return found
    return {**found, "Expiration": (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()}


@pytest.fixture(params=["shared file", "credential_process", "container endpoint"])
def source(request, environment, tmp_path):
    """Yield a function that replaces the keys at their source."""
    if request.param == "shared file":

        def write(name, _seconds=None):
            lines = ["[default]", f"aws_access_key_id={name}", f"aws_secret_access_key={SECRET}"]
            (tmp_path / "credentials").write_text("\n".join(lines))

        yield write
        return
    files = {}
    document = tmp_path / "keys.json"

    def replace(name, seconds=None):
        files["keys"] = json.dumps(keys(name, seconds or 3600)).encode()
        document.write_bytes(files["keys"])

    replace("OLD")
    if request.param == "credential_process":
        (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {document}\n")
        yield replace
        return
    with serve_files(files) as address:
        environment.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{address}/keys")
        yield replace


def expire_at(server, method: str, number: int, renew) -> None:
    """Have the old keys expire at the request of this number and method, and newer ones appear."""
    left = number

    def count(found, _path):
        nonlocal left
        left -= found == method
        if left == 0 and found == method:
            server.expired = {"OLD"}
            renew()

    server.on_request = count


@pytest.mark.parametrize(("method", "number"), [("PUT", 4), ("HEAD", 5)])
def test_a_publish_goes_on_with_newer_keys(server, source, tmp_path, method, number):
    source("OLD")
    package = make_package(tmp_path / "package", LARGE)
    expire_at(server, method, number, lambda: source("NEW"))
    done = put(open_store("s3://bucket/registry"), package)
    assert server.expired == {"OLD"}
    assert Registry.open("s3://bucket/registry").version("tiny@v1").verify().digest == done.digest
    assert not [path for path in server.objects if "/intents/" in path]


@FILE_ALONE
@pytest.mark.parametrize(("method", "number"), [("GET", 3), ("POST", 1)])
def test_any_request_of_a_publish_can_be_the_refused_one(server, source, tmp_path, method, number):
    source("OLD")
    expire_at(server, method, number, lambda: source("NEW"))
    assert put(open_store("s3://bucket/registry"), make_package(tmp_path / "package", LARGE)).number == 1


@FILE_ALONE
@pytest.mark.parametrize("number", [1, 5])
def test_a_pull_goes_on_with_newer_keys(server, source, tmp_path, number):
    source("OLD")
    store = open_store("s3://bucket/registry")
    put(store, make_package(tmp_path / "package"))
    expire_at(server, "GET", number, lambda: source("NEW"))
    assert Registry(store).version("tiny@v1").pull(tmp_path / "pulled").created
    assert server.expired == {"OLD"}


@FILE_ALONE
def test_many_documents_are_read_with_newer_keys(server, source):
    source("OLD")
    store = open_store("s3://bucket/registry")
    names = [f"folder/{number}.json" for number in range(40)]
    for name in names:
        store.put_if_absent(name, name.encode())
    expire_at(server, "GET", 9, lambda: source("NEW"))
    assert store.get_many(names) == [name.encode() for name in names]


def test_a_store_that_is_open_for_long_follows_the_keys(server, source):
    store = open_store("s3://bucket/registry")
    for number in range(3):
        source(f"K{number}")
        server.expired = {f"K{other}" for other in range(3) if other != number}
        assert store.put_if_absent(f"key{number}", b"x")
        assert store.get(f"key{number}") == b"x"


def test_keys_that_say_that_they_expired_are_refreshed(server, environment, tmp_path):
    document = tmp_path / "keys.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {document}\n")
    document.write_text(json.dumps(keys("OLD", 3600)))
    store = open_store("s3://bucket/registry")
    store.put_if_absent("a", b"x")
    from ropeway.storage.credentials import credentials_of

    credentials_of(store.client)._found._expiry_time = datetime.now(UTC) - timedelta(days=365)
    document.write_text(json.dumps(keys("NEW", 3600)))
    server.expired = {"OLD"}
    server.requests.clear()
    assert store.get("a") == b"x"
    assert len(server.requests) == 1
    assert environment


@FILE_ALONE
@pytest.mark.parametrize(("method", "number"), [("PUT", 4), ("HEAD", 5), ("GET", 3)])
def test_a_publish_without_newer_keys_ends_and_can_be_repeated(server, source, tmp_path, method, number):
    source("OLD")
    package = make_package(tmp_path / "package")
    expire_at(server, method, number, lambda: None)
    with pytest.raises(ConfigError, match=r"expired|400") as caught:
        put(open_store("s3://bucket/registry"), package)
    assert caught.value.exit_code == 64
    assert SECRET not in str(caught.value)
    refused = len(server.requests)
    server.expired, server.on_request = set(), lambda *_: None
    store = open_store("s3://bucket/registry")
    assert read_events(store, versions_log("tiny")).digests == []
    assert refused < 60, "it is not repeated for long"
    assert put(store, package).number == 1
    assert Registry(store).version("tiny@v1").verify().files == 4


@pytest.mark.parametrize("answer", ["expired", "broken", "gone"])
def test_a_source_of_keys_that_fails_midway_is_named(server, environment, tmp_path, answer):
    document = tmp_path / "keys.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {document}\n")
    document.write_text(json.dumps(keys("OLD", 3600)))
    package = make_package(tmp_path / "package")

    def fail():
        document.unlink() if answer == "gone" else document.write_text(
            json.dumps(keys("LATE", -60)) if answer == "expired" else "{"
        )

    expire_at(server, "PUT", 3, fail)
    with pytest.raises(ConfigError, match="credentials") as caught:
        put(open_store("s3://bucket/registry"), package)
    assert SECRET not in str(caught.value)
    assert not [path for path in server.objects if "/versions/" in path]
    assert environment


def test_a_stream_ends_at_once_when_no_keys_are_left(server, environment, tmp_path):
    document = tmp_path / "keys.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {document}\n")
    document.write_text(json.dumps(keys("OLD", 3600)))
    store = open_store("s3://bucket/registry")
    store.put_if_absent("large", b"x" * (1 << 20))
    server.expired = {"OLD"}
    document.write_text("{")
    with pytest.raises(ConfigError, match="credentials"), store.open_stream("large") as stream:
        stream.read(TRANSFER_BYTES)
    assert environment
