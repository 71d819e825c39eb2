"""A large file into S3 in parts: each with its SHA-256, several at a time, resumed after a death, completed once.

What `upload_file` cannot do (boto/boto3#4366): a conditional Complete, and going on with what a killed process left.
"""

import base64
import hashlib
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from botocore.client import BaseClient
from botocore.exceptions import ClientError

from ropeway.runtime.errors import TemporaryError
from ropeway.storage.conditional_requests import PreconditionFailedError, send_conditional, sleep_with_backoff
from ropeway.storage.interface import wrong_hash
from ropeway.storage.s3_client import error_code

PART_BYTES = 16 << 20  # x 10,000 parts, S3's limit = 156 GiB; the rules allow 64 GiB per file
WORKERS = 4
WRITE_ID_KEY = "ropeway-write"  # metadata: which write made the object, so that a lost answer can be recognised
_MAX_ATTEMPTS = 4
_UPLOAD_GONE_CODES = {"NoSuchUpload"}
_RESTART_UPLOAD_CODES = {"ConditionalRequestConflict", "InvalidPart", "InvalidPartOrder", "OperationAborted"}

Part = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a file goes: a client, a bucket and the whole key in it."""

    client: BaseClient
    bucket: str
    path: str

    @property
    def where(self) -> dict[str, str]:
        """Return the arguments that every request has."""
        return {"Bucket": self.bucket, "Key": self.path}


def put_file(to: Destination, file: Path, sha256: str | None, on_bytes: Callable[[int], None]) -> bool:
    """Return True when this call created the object, False when somebody else did.

    Raises:
        DataError: The file hashes to something else than `sha256`; its upload is aborted.
        TemporaryError: Others kept ending this upload.
        ClientError: What the server said otherwise; the parts that arrived stay for the next call.
    """
    for attempt in range(_MAX_ATTEMPTS):
        upload, mark = find_upload(to)
        try:
            parts, found = _send_parts(to, upload, file, on_bytes)
            if sha256 is not None and found != sha256:
                _abort(to, upload)
                raise wrong_hash(file, found, sha256)
            options = {"UploadId": upload, "MultipartUpload": {"Parts": parts}, "IfNoneMatch": "*"}
            send_conditional(partial(to.client.complete_multipart_upload, **to.where, **options))
        except PreconditionFailedError:
            _abort(to, upload)
            return False
        except ClientError as error:
            code = error_code(error)[0]
            if code not in _UPLOAD_GONE_CODES | _RESTART_UPLOAD_CODES:
                raise
            if code in _RESTART_UPLOAD_CODES:  # after a conflict S3 wants the whole upload anew
                _abort(to, upload)
            elif (theirs := find_write_id(to)) is not None:  # completed by another publisher, or the answer got lost
                return theirs == mark
            sleep_with_backoff(attempt)
        else:
            return True
    raise TemporaryError(
        f"s3://{to.bucket}/{to.path}: its upload was ended by others {_MAX_ATTEMPTS} times. Repeat the command"
    )


def find_upload(to: Destination) -> tuple[str, str | None]:
    """Return the newest unfinished upload of this key, else a new one; and the mark of a new one."""
    pages = to.client.get_paginator("list_multipart_uploads").paginate(Bucket=to.bucket, Prefix=to.path)
    unfinished = [item for page in pages for item in page.get("Uploads", []) if item["Key"] == to.path]
    if unfinished:
        return str(max(unfinished, key=lambda item: item["Initiated"])["UploadId"]), None
    mark = uuid.uuid4().hex
    made = to.client.create_multipart_upload(**to.where, ChecksumAlgorithm="SHA256", Metadata={WRITE_ID_KEY: mark})
    return str(made["UploadId"]), mark


def _send_parts(to: Destination, upload: str, file: Path, on_bytes: Callable[[int], None]) -> tuple[list[Part], str]:
    """Return every part as Complete wants it, and the whole file's sha256; parts that are there are not sent again."""
    pages = to.client.get_paginator("list_parts").paginate(**to.where, UploadId=upload)
    there = {int(part["PartNumber"]): part for page in pages for part in page.get("Parts", [])}
    whole, parts = hashlib.sha256(), list[Part]()
    pending: deque[Future[Part]] = deque()
    pool = ThreadPoolExecutor(WORKERS)
    try:
        with file.open("rb") as source:
            number = 0
            while body := source.read(PART_BYTES):
                number += 1
                pending.append(pool.submit(_send_part, to, upload, number, body, there.get(number)))
                whole.update(body)  # beside the sending threads: hashing releases the interpreter's lock
                on_bytes(len(body))
                if len(pending) > WORKERS:  # bounds memory to six parts
                    parts.append(pending.popleft().result())
        parts += [future.result() for future in pending]
    finally:
        pool.shutdown(cancel_futures=True)
    return parts, whole.hexdigest()


def _send_part(to: Destination, upload: str, number: int, body: bytes, there: Part | None) -> Part:
    sha256 = base64.b64encode(hashlib.sha256(body).digest()).decode()
    if there is not None and is_same_part(there, body, sha256):
        etag = there["ETag"]
    else:
        sent = to.client.upload_part(**to.where, UploadId=upload, PartNumber=number, Body=body, ChecksumSHA256=sha256)
        etag = sent["ETag"]
    return {"PartNumber": number, "ETag": etag, "ChecksumSHA256": sha256}


def is_same_part(there: Part, body: bytes, sha256: str) -> bool:
    """Return whether a part the server lists has these bytes: by its SHA-256, else by its ETag, which is an MD5.

    Source: SeaweedFS 4.48 lists no checksum per part; a part's ETag is its MD5 on every server but with KMS keys, where
    it never matches and the part is sent again.
    """
    if there.get("Size") != len(body):
        return False
    if "ChecksumSHA256" in there:
        return bool(there["ChecksumSHA256"] == sha256)
    return bool(there.get("ETag", "").strip('"') == hashlib.md5(body, usedforsecurity=False).hexdigest())


def find_write_id(to: Destination) -> str | None:
    """Return the mark of the object if there is one; an empty text when another tool wrote it."""
    try:
        head = to.client.head_object(**to.where)
    except ClientError as error:
        if error_code(error)[1] == HTTPStatus.NOT_FOUND:
            return None
        raise
    return str(head.get("Metadata", {}).get(WRITE_ID_KEY, ""))


def _abort(to: Destination, upload: str) -> None:
    with suppress(ClientError):  # the collector finds what stays
        to.client.abort_multipart_upload(**to.where, UploadId=upload)
