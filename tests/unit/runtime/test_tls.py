"""A server whose certificate is wrong is refused by every client, at once, with the fault and its remedy."""

import ssl

import httpx
import pytest

from ropeway.orchestration.alert_sender import AlertSender
from ropeway.orchestration.alerts import Alert, AlertLimits
from ropeway.orchestration.serving_check import check_server
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.tls import find_tls_fault
from ropeway.stages.fetch import objects, web
from ropeway.storage import open_store
from tests.support.fake_s3 import fake_s3
from tests.support.tls import FAULTS, Authority

ALERT = Alert("1", "failed", "text", "", "")
WORDS = {
    "self-signed": "not trusted",
    "unknown CA": "not trusted",
    "expired": "has expired",
    "not yet valid": "not valid yet",
    "other host": "of another host",
    "plain HTTP": "does not speak TLS",
}


@pytest.fixture
def authority(tmp_path, monkeypatch):
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Authority.make(tmp_path)


@pytest.fixture
def server(authority, monkeypatch, request):
    """A server with the fault that the test names, none by default; clients trust its CA, unless that is the fault."""
    fault = getattr(request, "param", "")
    with fake_s3() as running:
        if fault != "plain HTTP":
            running.socket = authority.server_context(fault).wrap_socket(running.socket, server_side=True)
        running.scheme = "https"
        if fault != "unknown CA":
            monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.file))
            monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.endpoint)
        running.fault = fault
        yield running


faulty = pytest.mark.parametrize("server", FAULTS, indirect=True)


@faulty
def test_s3_is_refused_without_retries(server):
    store = open_store("s3://bucket/registry")
    with pytest.raises(ConfigError, match=WORDS[server.fault]) as caught:
        store.put_if_absent("key", b"x")
    assert ("AWS_CA_BUNDLE" in str(caught.value)) == (WORDS[server.fault] == "not trusted")
    with pytest.raises(ConfigError, match=WORDS[server.fault]):
        store.get_many(["a"] * 20)
    with pytest.raises(ConfigError, match=WORDS[server.fault]):
        objects.look_up("s3://bucket/data.jsonl")
    assert server.requests == []
    assert server.connections < 40  # of 22 requests


@faulty
def test_a_source_is_refused(server):
    with pytest.raises(ConfigError, match=WORDS[server.fault]) as caught:
        web.look_up(f"{server.endpoint}/data.jsonl")
    assert ("SSL_CERT_FILE" in str(caught.value)) == (WORDS[server.fault] == "not trusted")
    assert server.connections == 1


@faulty
def test_a_serving_engine_is_refused(server):
    with pytest.raises(ConfigError, match=WORDS[server.fault]):
        check_server(server.endpoint, [])
    assert server.connections == 1


@faulty
def test_a_receiver_of_alerts_is_named_with_its_fault(server, tmp_path):
    sender = AlertSender(tmp_path, "http://127.0.0.1:1", f"{server.endpoint}/canary-path", AlertLimits(24, 30))
    fault = sender._post(ALERT)
    assert WORDS[server.fault] in fault.words
    assert "canary" not in fault.words


def test_a_server_with_a_certificate_of_the_named_authority_is_used(server, tmp_path):
    store = open_store("s3://bucket/registry")
    assert store.put_if_absent("key", b"x")
    assert store.get_many(["key"] * 20) == [b"x"] * 20
    assert web.look_up(f"{server.endpoint}/bucket/registry/key").size_bytes == 1
    sender = AlertSender(tmp_path, "http://127.0.0.1:1", server.endpoint, AlertLimits(24, 30))
    assert "TLS" not in sender._post(ALERT).words


def test_other_errors_have_no_fault_of_a_certificate():
    for error in (httpx.ReadTimeout("x"), ssl.SSLEOFError(8, "end"), ConnectionResetError(), TemporaryError("x")):
        assert find_tls_fault(error, "X") is None
