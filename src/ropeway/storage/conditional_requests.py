"""Conditional writes: told whether they lost, repeated on a conflict, and refused on a store that ignores them.

Source: Amazon S3 user guide, "Conditional writes": 412 the object exists, 409 another write was under way, try again.
rclone's `serve s3` (1.75.2) ignores preconditions: 16 of 16 racers won.
"""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import TypeVar

from botocore.client import BaseClient
from botocore.exceptions import ClientError

from ropeway.runtime.errors import ConfigError
from ropeway.storage.s3_client import error_code

MAX_CONFLICT_ATTEMPTS = 8
T = TypeVar("T")
_BODY = b"Ropeway asks here whether this store honours If-None-Match. Leave it.\n"


class PreconditionFailedError(Exception):
    """The object was there. `repeated` requests may have met this very writer's object. Never leaves this package."""

    def __init__(self, *, repeated: bool) -> None:
        """Keep whether it was repeated."""
        super().__init__()
        self.repeated = repeated


def send_conditional(request: Callable[[], T]) -> T:
    """Return the response to a conditional request; retry 409 with backoff, raise PreconditionFailedError on 412."""
    for attempt in range(MAX_CONFLICT_ATTEMPTS):
        try:
            return request()
        except ClientError as error:
            status = error_code(error)[1]
            if status == HTTPStatus.PRECONDITION_FAILED:
                repeats = error.response["ResponseMetadata"].get("RetryAttempts", 0)
                raise PreconditionFailedError(repeated=attempt + repeats > 0) from None
            if status != HTTPStatus.CONFLICT or attempt == MAX_CONFLICT_ATTEMPTS - 1:
                raise
        sleep_with_backoff(attempt)
    raise AssertionError


def sleep_with_backoff(attempt: int) -> None:
    """Wait a random while, longer each time, 3 s at most: racers must not meet again."""
    time.sleep(random.uniform(0, min(3, 0.05 * 2**attempt)))


def check_conditional_put(client: BaseClient, bucket: str, path: str, url: str) -> None:
    """Raise ConfigError unless a second conditional put of one key loses. The key stays: later probes need one request.

    `path` is the probe's key, outside what a store lists; `url` names the store in the message.
    """
    for _ in range(2):
        try:
            send_conditional(lambda: client.put_object(Bucket=bucket, Key=path, Body=_BODY, IfNoneMatch="*"))
        except PreconditionFailedError:
            return
    raise _refused(url, "If-None-Match on PutObject")


def check_conditional_complete(client: BaseClient, bucket: str, path: str, url: str) -> None:
    """Raise ConfigError unless a multipart upload to the probe's key, which exists, cannot be completed."""
    where = {"Bucket": bucket, "Key": path}
    where["UploadId"] = client.create_multipart_upload(**where)["UploadId"]
    part = client.upload_part(**where, PartNumber=1, Body=_BODY)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    try:
        send_conditional(lambda: client.complete_multipart_upload(**where, MultipartUpload=parts, IfNoneMatch="*"))
    except PreconditionFailedError:
        with suppress(ClientError):  # the collector finds it
            client.abort_multipart_upload(**where)
        return
    raise _refused(url, "If-None-Match on CompleteMultipartUpload")


def _refused(url: str, what: str) -> ConfigError:
    return ConfigError(
        f"{url}: this store ignores {what}: of two writers both would win, and versions and aliases would be lost. "
        "Nothing was published. Use a store that honours it (Amazon S3, SeaweedFS), or a folder, file:///…"
    )
