"""The store for `s3://bucket/prefix`: conditional puts, verified parts, reads that resume after a broken connection.

Objects up to 16 MiB are one put with `If-None-Match: *` and SHA-256; larger ones are sent in parts (`multipart.py`).
"""

import base64
import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from botocore.client import BaseClient

from ropeway.runtime.errors import ConfigError, DataError, NotFoundError
from ropeway.storage.conditional_requests import (
    PreconditionFailedError,
    check_conditional_complete,
    check_conditional_put,
    send_conditional,
)
from ropeway.storage.interface import (
    MAX_DOCUMENT_BYTES,
    IncompleteUpload,
    Item,
    Result,
    Store,
    StoredObject,
    check_key,
    check_prefix,
    hash_mismatch_error,
)
from ropeway.storage.multipart import WRITE_ID_KEY, Destination, find_write_id, put_file
from ropeway.storage.s3_client import MAX_CONNECTIONS, make_client, parse_time, split_url, translate_errors
from ropeway.storage.s3_documents import DocumentReader
from ropeway.storage.s3_stream import open_object, read_span, read_whole

ONE_PUT_BYTES = 16 << 20
_READERS = MAX_CONNECTIONS  # each mostly waits for the server
_MANY = 16  # documents from which a second way to read them is worth its start


class S3Store(Store):
    """A store under a prefix of a bucket. The first request creates the client from the environment."""

    def __init__(self, url: str) -> None:
        """Store objects under `url`; raise ConfigError unless it is `s3://bucket/prefix`."""
        self._bucket, prefix = split_url(url)
        self._root = f"{prefix}/" if prefix else ""
        self.url = f"s3://{self._bucket}/{prefix}".removesuffix("/")
        self._probed: set[str] = set()

    @cached_property
    def client(self) -> BaseClient:
        """The boto3 client, shared by all threads."""
        return make_client()

    @cached_property
    def _documents(self) -> DocumentReader:
        return DocumentReader(self.client, self._bucket)

    def put_if_absent(self, key: str, data: bytes | Path, *, sha256: str | None = None) -> bool:
        """Probe the store once, then put. A kill at any time leaves at most an incomplete upload."""
        check_key(key)
        if isinstance(data, Path):
            if not data.is_file():
                raise DataError(f"{data}: expected a file to store as {key}, found none. Create it again")
            if self.exists(key):
                return False  # skip reading and uploading it
            if data.stat().st_size > ONE_PUT_BYTES:
                return self._put_large(key, data, sha256)
        body = data if isinstance(data, bytes) else data.read_bytes()
        digest = hashlib.sha256(body)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise hash_mismatch_error(data if isinstance(data, Path) else key, digest.hexdigest(), sha256)
        with self._translate_errors(key):
            self._probe("put")
            created = self._put_small(key, body, digest.digest())
        self.on_bytes(len(body))
        return created

    def get(self, key: str) -> bytes:
        """Read a document, with retries if the connection breaks."""
        with self._translate_errors(key):
            data = read_whole(self.client, self._bucket, self._path(key), max_bytes=MAX_DOCUMENT_BYTES)
        if data is None:
            raise DataError(f"{self.url}: {key} is larger than a document can be, {MAX_DOCUMENT_BYTES:,} bytes")
        return data

    def get_many(self, keys: Sequence[str]) -> list[bytes]:
        """Read several documents in parallel; many of them without boto3's cost per request (`s3_documents.py`)."""
        return self.run_each(self._get_document if len(keys) >= _MANY else self.get, keys)

    def run_each(self, act: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Run in `_READERS` threads."""
        if len(items) <= 1:
            return [act(item) for item in items]
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(act, items))

    def open_stream(self, key: str, *, start_byte: int = 0) -> BinaryIO:
        """Open a stream that reads ahead in parallel ranges; a range is retried if its connection breaks."""
        with self._translate_errors(key):
            return cast("BinaryIO", open_object(self.client, self._bucket, self._path(key), start_byte, self.url))

    def read_range(self, key: str, start_byte: int, count: int) -> bytes:
        """Send GetObject with a range, one request; the stream would read ahead."""
        if count <= 0:
            return b""
        with self._translate_errors(key):
            return read_span(self.client, self._bucket, self._path(key), start_byte, count)

    def exists(self, key: str) -> bool:
        """Send HeadObject."""
        try:
            self.size(key)
        except NotFoundError:
            return False
        return True

    def size(self, key: str) -> int:
        """Send HeadObject."""
        with self._translate_errors(key):
            return int(self.client.head_object(Bucket=self._bucket, Key=self._path(key))["ContentLength"])

    def modified_at(self, key: str) -> datetime:
        """Send HeadObject."""
        with self._translate_errors(key):
            found: datetime = self.client.head_object(Bucket=self._bucket, Key=self._path(key))["LastModified"]
            return found

    def now(self) -> datetime:
        """Return the `Date` of a response; the clock of this machine is not read."""
        with self._translate_errors("its clock"):
            answer = self.client.list_objects_v2(Bucket=self._bucket, Prefix=self._root, MaxKeys=1)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            raise ConfigError(
                f"{self.url}: the server's responses have no Date, so the age of objects is unknown. Use an S3 server "
                "that sends it"
            )
        return parse_time(date)

    def list_entries(self, prefix: str) -> list[StoredObject]:
        """Read every page of the listing. Names that start with a dot (`.probe`) are not keys."""
        found = [
            StoredObject(self._key(item["Key"]), int(item["Size"]), item["LastModified"])
            for page in self._pages("list_objects_v2", prefix)
            for item in page.get("Contents", [])
        ]
        return sorted((entry for entry in found if _is_key(entry.key)), key=lambda entry: entry.key)

    def list_names(self, prefix: str, start: str) -> list[str]:
        """List the keys that begin with `prefix` and `start`, grouped by folder."""
        check_prefix(prefix)
        pages = self._pages("list_objects_v2", prefix, start, Delimiter="/")
        keys = (self._key(item["Key"]) for page in pages for item in page.get("Contents", []))
        return sorted(key.removeprefix(prefix) for key in keys if _is_key(key))

    def first_key(self, prefix: str) -> str | None:
        """List with `MaxKeys=1`."""
        check_prefix(prefix)
        with self._translate_errors(prefix):
            answer = self.client.list_objects_v2(Bucket=self._bucket, Prefix=self._root + prefix, MaxKeys=1)
        keys = (self._key(item["Key"]) for item in answer.get("Contents", []))
        return next((key for key in keys if _is_key(key)), None)

    def list_folders(self, prefix: str) -> list[str]:
        """List with a delimiter, so that the server groups keys by folder."""
        pages = self._pages("list_objects_v2", prefix, Delimiter="/")
        found = {self._key(item["Prefix"]).rstrip("/") for page in pages for item in page.get("CommonPrefixes", [])}
        return sorted(name.removeprefix(prefix) for name in found if _is_key(name))

    def delete(self, key: str) -> None:
        """Send DeleteObject, which does not report whether the object existed."""
        path = self._path(key)
        with self._translate_errors(key):
            self.client.delete_object(Bucket=self._bucket, Key=path)

    def list_incomplete_uploads(self) -> list[IncompleteUpload]:
        """List incomplete multipart uploads under the prefix: no other listing shows them, and S3 bills them."""
        found = [
            IncompleteUpload(self._key(item["Key"]), item["Initiated"], item["UploadId"])
            for page in self._pages("list_multipart_uploads", "")
            for item in page.get("Uploads", [])
        ]
        return sorted(found, key=lambda upload: upload.started_at)

    def remove_incomplete_upload(self, upload: IncompleteUpload) -> None:
        """Abort the multipart upload; ignore one that has ended."""
        try:
            with self._translate_errors(upload.name):
                path = self._root + upload.name
                self.client.abort_multipart_upload(Bucket=self._bucket, Key=path, UploadId=upload.token)
        except NotFoundError:
            return

    def _put_small(self, key: str, body: bytes, digest: bytes) -> bool:
        path, write_id = self._path(key), uuid.uuid4().hex
        try:
            send_conditional(
                lambda: self.client.put_object(
                    Bucket=self._bucket,
                    Key=path,
                    Body=body,
                    ChecksumSHA256=base64.b64encode(digest).decode(),
                    IfNoneMatch="*",
                    Metadata={WRITE_ID_KEY: write_id},
                )
            )
        except PreconditionFailedError as failed:
            # A retry after a lost response fails because of our own object.
            return failed.repeated and find_write_id(Destination(self.client, self._bucket, path)) == write_id
        return True

    def _put_large(self, key: str, file: Path, sha256: str | None) -> bool:
        with self._translate_errors(key):
            self._probe("put")
            self._probe("complete")
            return put_file(Destination(self.client, *self._place(key)), file, sha256, self.on_bytes)

    def _probe(self, operation: str) -> None:
        """Raise ConfigError if the store ignores preconditions on `put` or `complete`; test each operation once."""
        if operation not in self._probed:
            check = {"put": check_conditional_put, "complete": check_conditional_complete}[operation]
            check(self.client, self._bucket, f"{self._root}.probe", self.url)
            self._probed.add(operation)

    def _get_document(self, key: str) -> bytes:
        data = self._documents.read(self._path(key), max_bytes=MAX_DOCUMENT_BYTES)
        return self.get(key) if data is None else data

    def _pages(self, operation: str, prefix: str, start: str = "", **options: str) -> Iterator[dict[str, Any]]:
        check_prefix(prefix)
        with self._translate_errors(prefix or "keys"):
            pages = self.client.get_paginator(operation)
            yield from pages.paginate(Bucket=self._bucket, Prefix=self._root + prefix + start, **options)

    def _place(self, key: str) -> tuple[str, str]:
        return self._bucket, self._path(key)

    def _path(self, key: str) -> str:
        check_key(key)
        return self._root + key

    def _key(self, path: str) -> str:
        return path.removeprefix(self._root)

    @contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        try:
            with translate_errors(f"{self.url}: {key}"):
                yield
        except NotFoundError:
            raise NotFoundError(f"{self.url}: no object {key}") from None


def _is_key(text: str) -> bool:
    try:
        check_key(text)
    except DataError:
        return False
    return True
