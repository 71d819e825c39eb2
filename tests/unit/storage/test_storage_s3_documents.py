"""Many documents are read with one plain signed request each; whatever is not a plain success is left to boto3."""

import types
from pathlib import Path

import pytest
from botocore.exceptions import HTTPClientError

from ropeway.runtime.errors import NotFoundError
from ropeway.storage import MAX_DOCUMENT_BYTES, Store, open_store
from ropeway.storage.s3_documents import DocumentReader
from tests.support.fake_s3 import fake_s3
from tests.support.registry_world import count_requests

NAMES = [f"folder/{number:08d}.json" for number in range(20)]
SHA256 = "x-amz-checksum-sha256"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch):
    """A store in memory with twenty documents."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with fake_s3() as server:
        server.objects = {f"/bucket/registry/{name}": name.encode() for name in NAMES}
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        yield server


@pytest.fixture
def documents(fake) -> Store:
    """The store of `fake`."""
    assert len(fake.objects) == len(NAMES)
    return open_store("s3://bucket/registry")


def answer(monkeypatch: pytest.MonkeyPatch, **changed: object) -> None:
    """Change what each plain read is answered with."""
    real = DocumentReader._send

    def send(reader, path):
        response = real(reader, path)
        facts = {"status_code": response.status_code, "headers": dict(response.headers), "content": response.content}
        facts["headers"] |= changed.pop("headers", {})
        return types.SimpleNamespace(**{**facts, **changed}, raw=response.raw)

    monkeypatch.setattr(DocumentReader, "_send", send)


def test_each_document_is_one_request(fake, documents):
    assert documents.get_many(NAMES) == [name.encode() for name in NAMES]
    assert sorted(fake.requests) == [f"GET /bucket/registry/{name}" for name in NAMES]


def test_a_real_server_accepts_the_signature_whatever_the_prefix(s3_url):
    store = open_store(f"{s3_url}/a b+c(d)ä~")
    store.run_each(lambda name: store.put_if_absent(name, name.encode()), NAMES)
    with count_requests(store) as requests:
        assert store.get_many(NAMES) == [name.encode() for name in NAMES]
    assert requests == {"GetObject": len(NAMES)}
    assert store._documents._is_usable
    with pytest.raises(NotFoundError, match="no object folder/none"):
        store.get_many([*NAMES, "folder/none"])


@pytest.mark.parametrize(
    "changed",
    [
        {"status_code": 301},
        {"status_code": 403},
        {"status_code": 503},
        {"content": b"short"},
        {"headers": {SHA256: "0" * 44}},
        {"headers": {"Content-Length": "many"}},
        {"headers": {"Content-Length": str(MAX_DOCUMENT_BYTES + 1)}},
    ],
    ids=["redirect", "refused", "busy", "short", "other bytes", "no length", "too large"],
)
def test_an_answer_that_is_not_a_plain_success_is_not_used(documents, monkeypatch, changed):
    answer(monkeypatch, **changed)
    assert documents._documents.read("registry/" + NAMES[0], max_bytes=MAX_DOCUMENT_BYTES) is None
    assert not documents._documents._is_usable
    assert documents.get_many(NAMES) == [name.encode() for name in NAMES]


def test_a_broken_connection_is_left_to_boto(documents, monkeypatch):
    def fail(_reader, _path):
        raise HTTPClientError(error="reset")

    monkeypatch.setattr(DocumentReader, "_send", fail)
    assert documents.get_many(NAMES) == [name.encode() for name in NAMES]
    assert not documents._documents._is_usable


def test_a_missing_document_does_not_end_the_plain_reads(fake, documents):
    with pytest.raises(NotFoundError):
        documents.get_many([*NAMES, "folder/none"])
    assert documents._documents._is_usable
    assert fake.requests.count("GET /bucket/registry/folder/none") == 2


def test_without_credentials_boto_explains(documents, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert documents._documents.read("registry/" + NAMES[0], max_bytes=MAX_DOCUMENT_BYTES) is None
