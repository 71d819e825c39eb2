"""Look up s3:// objects and globs of keys with HEAD, and read them with Range and If-Match."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import IO

from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.stages.fetch.patterns import MAGIC, is_glob, match_names
from ropeway.stages.fetch.remote import Remote
from ropeway.storage.s3_client import error_code, make_client, split_url, translate_errors


def look_up(address: str) -> list[Remote]:
    """Return the current objects of an address or a glob of keys, sorted by key.

    Raises:
        ConfigError: There is no such object, or access is denied.
        TemporaryError: The server does not response.
    """
    bucket, pattern = split_url(address)
    client = _Bucket(bucket)
    keys = client.list_keys(pattern) if is_glob(pattern) else [pattern]
    if not keys or not keys[0]:
        raise ConfigError(f"sources: '{address}' matches no object; upload it or correct `paths`")
    return [client.look_up(key) for key in keys]


class _Bucket:
    """Looks up the objects of one bucket."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._client = make_client()

    def list_keys(self, pattern: str) -> list[str]:
        fixed = pattern[: min(pattern.index(sign) for sign in MAGIC if sign in pattern)]
        with translate_errors(f"sources: s3://{self._name}/{pattern}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name, Prefix=fixed)
            keys = [one["Key"] for page in pages for one in page.get("Contents", []) if not one["Key"].endswith("/")]
        return sorted(match_names([pattern], keys)[pattern])

    def look_up(self, key: str) -> Remote:
        from botocore.exceptions import ClientError

        name = f"s3://{self._name}/{key}"
        with translate_errors(f"sources: {name}"):
            try:
                head = self._client.head_object(Bucket=self._name, Key=key)
            except ClientError as error:
                if error_code(error)[1] == HTTPStatus.NOT_FOUND:
                    raise ConfigError(f"sources: {name} does not exist; upload it or correct `paths`") from None
                raise
        etag, size = head["ETag"], int(head["ContentLength"])

        @contextmanager
        def open_from(start: int) -> Iterator[tuple[IO[bytes], int]]:
            ranged = {"Range": f"bytes={start}-"} if start else {}
            with translate_errors(f"sources: {name}"):
                try:
                    response = self._client.get_object(Bucket=self._name, Key=key, IfMatch=etag, **ranged)
                except ClientError as error:
                    if error_code(error)[1] in (HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED):
                        raise TemporaryError(
                            f"sources: {name} changed during the download; run the same command again"
                        ) from None
                    raise
                with response["Body"] as body:
                    yield body, start if "ContentRange" in response else 0

        modified = head["LastModified"].isoformat()
        return Remote(name, {"etag": etag, "modified": modified, "bytes": size}, size, open_from)
