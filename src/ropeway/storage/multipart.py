"""Multipart uploads to S3: parallel parts with a CRC32, resumable after a crash, completed conditionally.

boto3's `upload_file` supports neither a conditional Complete nor a resume (boto/boto3#4366). The server checks the
CRC32 of each part; the SHA-256 of the file is compared before Complete, and by every read (docs/decisions/0031).
"""

import base64
import hashlib
import uuid
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
from ropeway.storage.interface import hash_mismatch_error
from ropeway.storage.s3_client import error_code

PART_BYTES = 16 << 20  # times 10,000 parts, the S3 limit, is 156 GiB; registry/rules.py allows 64 GiB per file
WORKERS = 8  # at most ten parts in memory, 160 MiB
WRITE_ID_KEY = (
    "ropeway-write"  # object metadata: the id of the write, to recognize our own object after a lost response
)
_CHECKSUM = "CRC32"
_MAX_ATTEMPTS = 4
_UPLOAD_GONE_CODES = {"NoSuchUpload"}
_RESTART_UPLOAD_CODES = {"ConditionalRequestConflict", "InvalidPart", "InvalidPartOrder", "OperationAborted"}

Part = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Destination:
    """The target of an upload: client, bucket and full key."""

    client: BaseClient
    bucket: str
    path: str

    @property
    def where(self) -> dict[str, str]:
        """The arguments of every request."""
        return {"Bucket": self.bucket, "Key": self.path}


def put_file(to: Destination, file: Path, sha256: str | None, on_bytes: Callable[[int], None]) -> bool:
    """Upload a file; return True if this call created the object, False if another writer did.

    Raises:
        DataError: The file does not match `sha256`; the upload is aborted.
        TemporaryError: Other writers ended the upload repeatedly.
        ClientError: Any other server error; uploaded parts stay, and the next call resumes from them.
    """
    for attempt in range(_MAX_ATTEMPTS):
        upload, write_id = find_or_create_upload(to)
        try:
            parts, found = _send_parts(to, upload, file, on_bytes)
            if sha256 is not None and found != sha256:
                _abort(to, upload)
                raise hash_mismatch_error(file, found, sha256)
            options = {"UploadId": upload, "MultipartUpload": {"Parts": parts}, "IfNoneMatch": "*"}
            send_conditional(partial(to.client.complete_multipart_upload, **to.where, **options))
        except PreconditionFailedError:
            _abort(to, upload)
            return False
        except ClientError as error:
            code = error_code(error)[0]
            if code not in _UPLOAD_GONE_CODES | _RESTART_UPLOAD_CODES:
                raise
            if code in _RESTART_UPLOAD_CODES:  # after a conflict S3 requires a new upload
                _abort(to, upload)
            elif (stored := find_write_id(to)) is not None:  # completed by another writer, or the response was lost
                return stored == write_id
            sleep_with_backoff(attempt)
        else:
            return True
    raise TemporaryError(
        f"s3://{to.bucket}/{to.path}: other writers ended the upload {_MAX_ATTEMPTS} times. Run the command again"
    )


def find_or_create_upload(to: Destination) -> tuple[str, str | None]:
    """Return the id of the newest incomplete upload of the key and None, or of a new upload and its write id."""
    pages = to.client.get_paginator("list_multipart_uploads").paginate(Bucket=to.bucket, Prefix=to.path)
    incomplete = [
        item
        for page in pages
        for item in page.get("Uploads", [])
        if item["Key"] == to.path and item.get("ChecksumAlgorithm", _CHECKSUM) == _CHECKSUM  # an older Ropeway: SHA256
    ]
    if incomplete:
        return str(max(incomplete, key=lambda item: item["Initiated"])["UploadId"]), None
    write_id = uuid.uuid4().hex
    created = to.client.create_multipart_upload(
        **to.where, ChecksumAlgorithm=_CHECKSUM, Metadata={WRITE_ID_KEY: write_id}
    )
    return str(created["UploadId"]), write_id


def _send_parts(to: Destination, upload: str, file: Path, on_bytes: Callable[[int], None]) -> tuple[list[Part], str]:
    """Upload the missing parts; return all parts for Complete, and the sha256 of the file."""
    pages = to.client.get_paginator("list_parts").paginate(**to.where, UploadId=upload)
    uploaded = {int(part["PartNumber"]): part for page in pages for part in page.get("Parts", [])}
    whole, sent = hashlib.sha256(), list[Future[Part]]()
    pending: set[Future[Part]] = set()
    pool = ThreadPoolExecutor(WORKERS)
    try:
        with file.open("rb") as source:
            number = 0
            while body := source.read(PART_BYTES):
                number += 1
                sent.append(pool.submit(_send_part, to, upload, number, body, uploaded.get(number)))
                pending.add(sent[-1])
                whole.update(body)  # parallel to the uploads: hashing releases the GIL
                on_bytes(len(body))
                if len(pending) > WORKERS:  # limits memory; any part may be the next to end, so a slow one stops none
                    ended, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in ended:
                        future.result()  # raises its error
        parts = [future.result() for future in sent]
    finally:
        pool.shutdown(cancel_futures=True)
    return parts, whole.hexdigest()


def _send_part(to: Destination, upload: str, number: int, body: bytes, uploaded: Part | None) -> Part:
    crc32 = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
    if uploaded is not None and is_same_part(uploaded, body, crc32):
        etag = uploaded["ETag"]
    else:
        sent = to.client.upload_part(**to.where, UploadId=upload, PartNumber=number, Body=body, ChecksumCRC32=crc32)
        etag = sent["ETag"]
    return {"PartNumber": number, "ETag": etag, "ChecksumCRC32": crc32}


def is_same_part(uploaded: Part, body: bytes, crc32: str) -> bool:
    """Return whether an uploaded part has these bytes: by its CRC32, or by its ETag (MD5) if none is listed.

    Source: SeaweedFS 4.48 lists no checksum per part. The ETag of a part is its MD5 except with KMS keys, where it does
    not match and the part is uploaded again.
    """
    if uploaded.get("Size") != len(body):
        return False
    if "ChecksumCRC32" in uploaded:
        return bool(uploaded["ChecksumCRC32"] == crc32)
    return bool(uploaded.get("ETag", "").strip('"') == hashlib.md5(body, usedforsecurity=False).hexdigest())


def find_write_id(to: Destination) -> str | None:
    """Return the write id of an object, None if there is no object, an empty string if another tool wrote it."""
    try:
        head = to.client.head_object(**to.where)
    except ClientError as error:
        if error_code(error)[1] == HTTPStatus.NOT_FOUND:
            return None
        raise
    return str(head.get("Metadata", {}).get(WRITE_ID_KEY, ""))


def _abort(to: Destination, upload: str) -> None:
    with suppress(ClientError):  # garbage collection removes it
        to.client.abort_multipart_upload(**to.where, UploadId=upload)
