"""Conditional S3 requests (`If-None-Match`): retry on 409, raise on 412, reject stores that ignore preconditions.

Source: Amazon S3 user guide, "Conditional writes": 412 means the object exists, 409 that a concurrent write was running
and the request can be retried. rclone's `serve s3` (1.75.2) ignores preconditions: 16 of 16 concurrent puts succeeded.
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
_BODY = b"Ropeway uses this object to test whether the store supports If-None-Match. Do not delete it.\n"


class PreconditionFailedError(Exception):
    """The object exists. After a retry (`repeated`) it can be the object of this writer. Internal to this package."""

    def __init__(self, *, repeated: bool) -> None:
        """Store whether the request was retried."""
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
    """Sleep with exponential backoff and full jitter, 3 s at most."""
    time.sleep(random.uniform(0, min(3, 0.05 * 2**attempt)))


def check_conditional_put(client: BaseClient, bucket: str, path: str, url: str) -> None:
    """Raise ConfigError unless a second conditional put of a key fails; the object stays, so a later probe is one put.

    `path` is the key of the probe, which the store does not list; `url` is the store in the message.
    """
    for _ in range(2):
        try:
            send_conditional(lambda: client.put_object(Bucket=bucket, Key=path, Body=_BODY, IfNoneMatch="*"))
        except PreconditionFailedError:
            return
    raise _precondition_ignored_error(url, "If-None-Match on PutObject")


def check_conditional_complete(client: BaseClient, bucket: str, path: str, url: str) -> None:
    """Raise ConfigError unless completing a multipart upload to the existing probe key fails."""
    where = {"Bucket": bucket, "Key": path}
    where["UploadId"] = client.create_multipart_upload(**where)["UploadId"]
    part = client.upload_part(**where, PartNumber=1, Body=_BODY)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    try:
        send_conditional(lambda: client.complete_multipart_upload(**where, MultipartUpload=parts, IfNoneMatch="*"))
    except PreconditionFailedError:
        with suppress(ClientError):  # garbage collection removes it
            client.abort_multipart_upload(**where)
        return
    raise _precondition_ignored_error(url, "If-None-Match on CompleteMultipartUpload")


def _precondition_ignored_error(url: str, condition: str) -> ConfigError:
    return ConfigError(
        f"{url}: the store ignores {condition}, so concurrent writers would overwrite versions and aliases. Nothing "
        "was published. Use a store that supports it (Amazon S3, SeaweedFS), or a folder (file:///…)"
    )
