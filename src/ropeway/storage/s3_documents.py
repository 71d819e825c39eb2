"""Reads of many small objects: one signed GET each, without the cost per request of boto3's GetObject.

On two cores with SeaweedFS on loopback, a document of 3 kB takes 0.5 ms of processor time here and 1.4 ms in boto3
(2026-11-30, 1,200 documents), which decides how long a log of 1,000 events or a garbage collection takes.

Only a plain success is used: status 200, the stated length, and the SHA-256 that the server stored with the object, if
it sends one. After anything else the caller reads with boto3, which retries, follows redirects and names the cause:
that one object if it does not exist, else all further ones too.
"""

import base64
import hashlib
from functools import cached_property
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError, HTTPClientError
from urllib3.exceptions import HTTPError

from ropeway.storage.bounded_session import BoundedSession
from ropeway.storage.credentials import credentials_of

_ANY_NAME = "name"


class DocumentReader:
    """Reads documents of one bucket with the settings and the credentials of a client. Shared by threads."""

    def __init__(self, client: BaseClient, bucket: str) -> None:
        """Read from `bucket`; the first read opens connections of its own."""
        self._client, self._bucket = client, bucket
        self._is_usable = True

    def read(self, path: str, *, max_bytes: int) -> bytes | None:
        """Return the bytes of the object at `path`; None if this read did not plainly succeed."""
        if not self._is_usable:
            return None
        try:
            response = self._send(path)
            size = int(response.headers["Content-Length"])
            is_plain = response.status_code == HTTPStatus.OK and size <= max_bytes
            data = bytes(response.content) if is_plain else response.raw.close() or b""
            expected = response.headers.get("x-amz-checksum-sha256")
            is_right = expected in (None, base64.b64encode(hashlib.sha256(data).digest()).decode())
            if is_plain and len(data) == size and is_right:
                return data
            self._is_usable = response.status_code == HTTPStatus.NOT_FOUND
        except (BotoCoreError, HTTPClientError, HTTPError, OSError, ValueError, KeyError):
            self._is_usable = False
        return None

    def _send(self, path: str) -> Any:  # noqa: ANN401 - botocore has no types
        headers = {"User-Agent": self._client.meta.config.user_agent}
        if self._client.meta.config.response_checksum_validation == "when_supported":
            headers["x-amz-checksum-mode"] = "ENABLED"
        request = AWSRequest("GET", self._folder_url + quote(path, safe="/~"), headers=headers, stream_output=True)
        request.context["client_config"] = self._client.meta.config
        credentials = credentials_of(self._client).get_frozen_credentials()
        S3SigV4Auth(credentials, "s3", self._client.meta.region_name).add_auth(request)
        return self._session.send(request.prepare())

    @cached_property
    def _folder_url(self) -> str:
        """The URL of the bucket, as boto3 addresses it: by host or by path."""
        place = {"Bucket": self._bucket, "Key": _ANY_NAME}
        url = str(self._client.generate_presigned_url("get_object", Params=place)).partition("?")[0]
        return url.removesuffix(_ANY_NAME)

    @cached_property
    def _session(self) -> BoundedSession:
        return BoundedSession(self._client)
