"""Objects behind s3:// addresses, globs among them: looked up by HEAD, read with Range and If-Match."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.stages.fetch.globs import MAGIC, is_glob, match_names
from ropeway.stages.fetch.remote import Remote
from ropeway.storage.s3_client import error_code, explained, make_client, split_url


def look_up(address: str) -> list[Remote]:
    """Return the objects that an address or a glob of keys names now, sorted by key.

    Raises:
        ConfigError: No such object, or no access to it.
        TemporaryError: The server does not answer.
    """
    bucket, pattern = split_url(address)
    client = make_client()
    keys = _list_keys(client, bucket, pattern) if is_glob(pattern) else [pattern]
    if not keys or not keys[0]:
        raise ConfigError(f"sources: '{address}' names no object; put it there or mend `paths`")
    return [_look_up_one(client, bucket, key) for key in keys]


def _look_up_one(client: Any, bucket: str, key: str) -> Remote:  # noqa: ANN401 - boto3 makes its classes at run time
    from botocore.exceptions import ClientError

    name = f"s3://{bucket}/{key}"
    with explained(f"sources: {name}"):
        try:
            head = client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error_code(error)[1] == 404:  # noqa: PLR2004 - HTTP
                raise ConfigError(f"sources: {name} is not there; put it there or mend `paths`") from None
            raise
    etag, size = head["ETag"], int(head["ContentLength"])

    @contextmanager
    def open_from(start: int) -> Iterator[tuple[IO[bytes], int]]:
        ranged = {"Range": f"bytes={start}-"} if start else {}
        with explained(f"sources: {name}"):
            try:
                answer = client.get_object(Bucket=bucket, Key=key, IfMatch=etag, **ranged)
            except ClientError as error:
                if error_code(error)[1] in (404, 412):
                    raise TemporaryError(f"sources: {name} changed while it was being fetched; run it again") from None
                raise
            with answer["Body"] as body:
                yield body, start if "ContentRange" in answer else 0

    return Remote(name, {"etag": etag, "modified": head["LastModified"].isoformat(), "bytes": size}, size, open_from)


def _list_keys(client: Any, bucket: str, pattern: str) -> list[str]:  # noqa: ANN401
    fixed = pattern[: min(pattern.index(sign) for sign in MAGIC if sign in pattern)]
    with explained(f"sources: s3://{bucket}/{pattern}"):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=fixed)
        keys = [one["Key"] for page in pages for one in page.get("Contents", []) if not one["Key"].endswith("/")]
    return sorted(match_names([pattern], keys)[pattern])
