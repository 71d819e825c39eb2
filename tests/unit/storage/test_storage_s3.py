"""Behavior of the S3 store: resumed uploads, network and server faults, stores that ignore preconditions."""

import hashlib
import logging
import os
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore import auth
from botocore.exceptions import ClientError

from ropeway.registry import Registry
from ropeway.runtime.errors import ConfigError, DataError, RopewayError, TemporaryError
from ropeway.storage import Store, multipart, open_store
from ropeway.storage.multipart import is_same_part
from tests.support.fake_s3 import fake_s3
from tests.support.fault_proxy import Fault, fault_proxy
from tests.support.registry_world import make_package, put
from tests.support.s3_server import SECRET

PART = 5 << 20  # the minimum of S3


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(multipart, "PART_BYTES", PART)


@pytest.fixture
def large(tmp_path) -> Path:
    """Create a file of four full parts and a short one."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(4 * PART + 1000))
    return path


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def count_calls(store, monkeypatch, operation: str) -> list[dict]:
    calls: list[dict] = []
    real = getattr(store.client, operation)
    monkeypatch.setattr(store.client, operation, lambda **options: calls.append(options) or real(**options))
    return calls


@contextmanager
def at(endpoint: str, monkeypatch, *, tries: int = 3, timeout_seconds: int = 2):
    """Set another endpoint, few attempts and a short timeout."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", str(tries))
    monkeypatch.setenv("ROPEWAY_S3_TIMEOUT_SECONDS", str(timeout_seconds))
    yield


@pytest.mark.usefixtures("small_parts")
def test_a_large_file_is_uploaded_in_parts_and_read_back(s3_url, large, monkeypatch):
    store = open_store(s3_url)
    sent = count_calls(store, monkeypatch, "upload_part")
    told = []
    store.on_bytes = told.append
    assert store.put_if_absent("blob", large, sha256=sha256_of(large))
    assert len(sent) == 1 + 5  # the part of the probe, then ours
    assert all("ChecksumCRC32" in part for part in sent[1:])
    assert sum(told) == large.stat().st_size
    with store.open_stream("blob") as stream:
        assert hashlib.sha256(stream.read()).hexdigest() == sha256_of(large)
    with store.open_stream("blob", start_byte=3 * PART + 7) as stream:
        assert stream.read() == large.read_bytes()[3 * PART + 7 :]
    assert not store.put_if_absent("blob", large)
    assert store.list_incomplete_uploads() == []


@pytest.mark.usefixtures("small_parts")
def test_only_missing_parts_are_uploaded_after_a_crash(s3_url, large, monkeypatch):
    store = open_store(s3_url)
    to = multipart.Destination(store.client, *store._place("blob"))
    upload, _ = multipart.find_or_create_upload(to)
    data = large.read_bytes()
    for number in (1, 3):
        body = data[(number - 1) * PART : number * PART]
        store.client.upload_part(**to.where, UploadId=upload, PartNumber=number, Body=body, ChecksumAlgorithm="CRC32")
    other = b"x" * PART  # of another file
    store.client.upload_part(**to.where, UploadId=upload, PartNumber=2, Body=other, ChecksumAlgorithm="CRC32")
    assert [upload.name for upload in store.list_incomplete_uploads()] == ["blob"]
    store.put_if_absent("small", b"")  # the probe has run
    sent = count_calls(store, monkeypatch, "upload_part")
    store._probed.add("complete")
    assert store.put_if_absent("blob", large, sha256=sha256_of(large))
    assert sorted(part["PartNumber"] for part in sent) == [2, 4, 5]
    with store.open_stream("blob") as stream:
        assert stream.read() == data
    assert store.list_incomplete_uploads() == []


@pytest.mark.usefixtures("small_parts")
def test_the_upload_of_a_changed_large_file_is_aborted(s3_url, large):
    store = open_store(s3_url)
    with pytest.raises(DataError, match="expected 000000000000"):
        store.put_if_absent("blob", large, sha256="0" * 64)
    assert not store.exists("blob")
    assert store.list_incomplete_uploads() == []


@pytest.mark.usefixtures("small_parts")
def test_an_existing_object_is_kept_by_a_second_upload(s3_url, large, monkeypatch):
    store, other = open_store(s3_url), open_store(s3_url)
    monkeypatch.setattr(store, "exists", lambda _: False)
    assert other.put_if_absent("blob", b"theirs")
    assert not store.put_if_absent("blob", large)
    assert store.get("blob") == b"theirs"
    assert store.list_incomplete_uploads() == []


@pytest.mark.usefixtures("small_parts")
def test_an_upload_aborted_by_another_writer_is_restarted(s3_url, large, monkeypatch):
    store = open_store(s3_url)
    real = store.client.complete_multipart_upload

    def ended(**options):
        monkeypatch.setattr(store.client, "complete_multipart_upload", real)
        if options["Key"].endswith("blob"):
            store.client.abort_multipart_upload(**{key: options[key] for key in ("Bucket", "Key", "UploadId")})
        return real(**options)

    store.put_if_absent("small", b"")
    store._probed.add("complete")
    monkeypatch.setattr(store.client, "complete_multipart_upload", ended)
    assert store.put_if_absent("blob", large, sha256=sha256_of(large))
    assert store.size("blob") == large.stat().st_size


def test_a_part_is_compared_by_crc32_or_etag():
    body, crc32 = b"abc", "right"
    md5 = '"900150983cd24fb0d6963f7d28e17f72"'
    assert is_same_part({"Size": 3, "ChecksumCRC32": "right", "ETag": "x"}, body, crc32)
    assert not is_same_part({"Size": 3, "ChecksumCRC32": "wrong", "ETag": md5}, body, crc32)
    assert is_same_part({"Size": 3, "ETag": md5}, body, crc32)
    assert not is_same_part({"Size": 3, "ETag": '"x"'}, body, crc32)
    assert not is_same_part({"Size": 4, "ETag": md5}, body, crc32)


def test_the_server_refuses_a_part_whose_bytes_are_not_those_of_its_crc32(s3_url):
    store = open_store(s3_url)
    to = multipart.Destination(store.client, *store._place("blob"))
    upload, _ = multipart.find_or_create_upload(to)
    with pytest.raises(ClientError):
        store.client.upload_part(
            **to.where, UploadId=upload, PartNumber=1, Body=b"damaged on the way", ChecksumCRC32="AAAAAA=="
        )


def test_an_upload_with_checksums_of_another_kind_is_not_resumed(s3_url, monkeypatch):
    store = open_store(s3_url)
    to = multipart.Destination(store.client, *store._place("blob"))
    first, _ = multipart.find_or_create_upload(to)
    assert multipart.find_or_create_upload(to) == (first, None)
    upload = {"Key": to.path, "UploadId": first, "Initiated": 1, "ChecksumAlgorithm": "SHA256"}  # as AWS lists it
    pages = [{"Uploads": [upload]}]
    monkeypatch.setattr(store.client, "get_paginator", lambda _: SimpleNamespace(paginate=lambda **_: pages))
    second, write_id = multipart.find_or_create_upload(to)
    assert second != first
    assert write_id


# Stores that ignore preconditions


def test_a_store_that_ignores_preconditions_is_rejected_before_any_write(s3_url, monkeypatch, large):
    with fake_s3(honours_put=False) as server, at(server.endpoint, monkeypatch):
        store = open_store(s3_url)
        for data in (b"x", large):
            with pytest.raises(ConfigError, match=r"If-None-Match on PutObject"):
                store.put_if_absent("key", data)
        assert [path.rpartition("/")[2] for path in server.objects] == [".probe"]


def test_a_store_that_ignores_them_on_complete_is_rejected_for_large_files(s3_url, monkeypatch, large):
    with fake_s3(honours_complete=False) as server, at(server.endpoint, monkeypatch):
        store = open_store(s3_url)
        assert store.put_if_absent("key", b"small")
        with pytest.raises(ConfigError, match="If-None-Match on CompleteMultipartUpload"):
            store.put_if_absent("large", large)
        assert len(server.objects) == 2


def test_a_store_is_probed_once(s3_url, monkeypatch):
    with fake_s3() as server, at(server.endpoint, monkeypatch):
        store = open_store(s3_url)
        for key in ("a", "b"):
            store.put_if_absent(key, b"")
        open_store(s3_url).put_if_absent("c", b"")
        assert sum(".probe" in request for request in server.requests) == 3  # created, failed; then one failed put


def test_a_conflict_is_retried_and_a_denied_request_is_not(s3_url, monkeypatch):
    with fake_s3() as server, at(server.endpoint, monkeypatch):
        store = open_store(s3_url)
        store.put_if_absent("first", b"")
        server.answers = [(409, "ConditionalRequestConflict")] * 3
        assert store.put_if_absent("key", b"x")
        server.requests.clear()
        server.answers = [(403, "AccessDenied")] * 3
        with pytest.raises(ConfigError, match="403 AccessDenied"):
            store.put_if_absent("other", b"x")
        assert len(server.requests) == 1


def test_a_retried_put_that_lost_to_a_deleted_object_returns_false(s3_url, monkeypatch):
    with fake_s3() as server, at(server.endpoint, monkeypatch):
        store = open_store(s3_url)
        store.put_if_absent("first", b"")
        server.answers = [(409, "ConditionalRequestConflict"), (412, "PreconditionFailed")]
        assert not store.put_if_absent("key", b"x")


# Network and server faults, by a proxy before a real server


@pytest.fixture
def proxied(s3_server, s3_url, monkeypatch):
    with fault_proxy(s3_server.endpoint) as proxy, at(proxy.endpoint, monkeypatch):
        store = open_store(s3_url)
        store.put_if_absent("there", bytes(range(256)) * 2000)
        yield proxy, store


@pytest.mark.parametrize("kind", ["500", "503"])
def test_temporary_server_errors_are_retried(proxied, kind):
    proxy, store = proxied
    proxy.faults = [Fault(kind, "PUT", "key", 2), Fault(kind, "GET", "there", 2)]
    assert store.put_if_absent("key", b"x")
    assert len(store.get("there")) == 512_000


@pytest.mark.parametrize("kind", ["500", "503"])
def test_persistent_server_errors_are_temporary_errors(proxied, kind):
    proxy, store = proxied
    proxy.faults = [Fault(kind, "PUT", "key", 99), Fault(kind, "GET", "there", 99)]
    for act in (lambda: store.put_if_absent("key", b"x"), lambda: store.get("there")):
        with pytest.raises(TemporaryError, match=f"the server returned {kind}"):
            act()


@pytest.mark.parametrize("kind", ["reset", "truncated", "stall"])
def test_a_broken_read_resumes_where_it_stopped(proxied, kind):
    proxy, store = proxied
    for read in (store.get, lambda key: store.open_stream(key).read()):
        proxy.faults = [Fault(kind, "GET", "there", 1)]
        assert read("there") == bytes(range(256)) * 2000
    if kind == "truncated":  # each stall costs a timeout, and a reset loses the bytes received
        proxy.faults = [Fault(kind, "GET", "there", 8)]
        assert store.get("there") == bytes(range(256)) * 2000


def test_reads_without_progress_fail_with_the_offset(proxied):
    proxy, store = proxied
    store.put_if_absent("byte", b"x")
    proxy.faults = [Fault("reset", "GET", "byte", 99)]
    with pytest.raises(TemporaryError, match="broke 5 times at byte 0 "):
        store.get("byte")


def test_bytes_changed_during_an_upload_are_rejected_by_the_server(proxied):
    proxy, store = proxied
    proxy.faults = [Fault("wrong-up", "PUT", "key", 99)]
    with pytest.raises(RopewayError, match="key: the server returned 400"):
        store.put_if_absent("key", b"x" * 100)
    proxy.faults = []
    assert not store.exists("key")


def test_a_lost_put_response_still_counts_as_created(proxied):
    proxy, store = proxied
    proxy.faults = [Fault("lost", "PUT", "key", 1)]
    assert store.put_if_absent("key", b"x")
    # Retried at least once; on a loaded machine a further attempt can time out.
    assert sum("PUT" in request and "key" in request for request in proxy.requests) >= 2
    assert not store.put_if_absent("key", b"x")


@pytest.mark.usefixtures("small_parts")
def test_a_lost_complete_response_is_no_failure(proxied, large):
    proxy, store = proxied
    proxy.faults = [Fault("lost", "POST", "blob.*uploadId", 1)]
    store.put_if_absent("blob", large, sha256=sha256_of(large))
    with store.open_stream("blob") as stream:
        assert stream.read() == large.read_bytes()
    assert store.list_incomplete_uploads() == []


@pytest.mark.usefixtures("small_parts")
def test_failed_parts_are_retried(proxied, large):
    proxy, store = proxied
    proxy.faults = [Fault("503", "PUT", "blob.*partNumber", 2), Fault("500", "POST", "blob.*uploads", 1)]
    assert store.put_if_absent("blob", large, sha256=sha256_of(large))
    with store.open_stream("blob") as stream:
        assert stream.read() == large.read_bytes()


def test_clock_skew_is_a_config_error(proxied):
    proxy, store = proxied
    proxy.faults = [Fault("skew", "GET", "there", 99)]
    with pytest.raises(ConfigError, match="Correct this machine's clock"):
        store.get("there")


def test_corrupt_downloads_are_rejected_and_the_next_pull_succeeds(proxied, tmp_path):
    proxy, store = proxied
    put(store, make_package(tmp_path / "package", os.urandom(100_000)))
    proxy.faults = [Fault("wrong", "GET", "blobs", 1)]
    with pytest.raises(DataError, match=r"blob of .* does not match"):
        Registry(store).version("tiny@v1").pull(tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    proxy.faults = [Fault("wrong", "GET", "manifests", 1)]
    with pytest.raises(DataError, match="hashes to"):
        Registry(store).version("tiny@v1").pull(tmp_path / "pulled")
    assert Registry(store).version("tiny@v1").pull(tmp_path / "pulled").created


@pytest.mark.parametrize("kind", ["500", "503", "reset", "truncated", "stall"])
def test_publish_and_pull_survive_temporary_faults(proxied, tmp_path, kind):
    proxy, store = proxied
    package = make_package(tmp_path / "package", os.urandom(100_000))
    proxy.faults = [Fault(kind, "PUT", "blobs|manifests|versions", 2 if kind in "500 503" else 0)]
    assert put(store, package).created
    proxy.faults = [Fault(kind, "GET", "blobs", 1), Fault(kind, "GET", "manifests", 1)]
    assert Registry(store).version("tiny@v1").pull(tmp_path / "pulled").created
    assert (tmp_path / "pulled" / "model.safetensors").read_bytes() == (package / "model.safetensors").read_bytes()


def test_a_real_server_reports_clock_skew(s3_url, monkeypatch):
    real = auth.get_current_datetime
    monkeypatch.setattr(auth, "get_current_datetime", lambda *a, **k: real(*a, **k) - timedelta(hours=2))
    with pytest.raises(ConfigError, match="RequestTimeTooSkewed"):
        open_store(s3_url).put_if_absent("key", b"x")


def test_an_unreachable_server_is_a_temporary_error(s3_url, monkeypatch):
    with at("http://127.0.0.1:9", monkeypatch, tries=2):
        for act in (lambda s: s.get("key"), lambda s: s.put_if_absent("key", b"x"), lambda s: s.list_keys("")):
            with pytest.raises(TemporaryError, match="the connection failed"):
                act(open_store(s3_url))


def test_no_secret_is_in_a_message_a_log_or_the_store(proxied, s3_url, monkeypatch, caplog):
    proxy, store = proxied
    caplog.set_level(logging.INFO)
    failures = [_failure(store, proxy, kind) for kind in ("500", "503", "skew", "reset", "wrong-up")]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-canary")
    with pytest.raises(ConfigError, match=r"InvalidAccessKeyId|SignatureDoesNotMatch") as caught:
        open_store(s3_url).get("there")
    texts = [
        *failures,
        str(caught.value),
        caplog.text,
        *(store.get(key).decode("latin1") for key in store.list_keys("")),
    ]
    for secret in (SECRET, "another-canary", "canary-message", "AWS4-HMAC"):
        assert not [text for text in texts if secret in text]


def _failure(store: Store, proxy, kind: str) -> str:
    proxy.faults = [Fault(kind, method, "key|there", 20) for method in ("PUT", "GET")]
    try:
        store.put_if_absent("key", b"x" * 100)
        store.get("there")
    except RopewayError as error:
        return "".join(str(link) for link in (error, error.__cause__) if link)
    finally:
        proxy.faults = []
    return ""
