"""Reads from S3: whole documents, and streams of parallel ranges that resume after a broken connection."""

import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError, ClientError, ReadTimeoutError
from urllib3.exceptions import HTTPError

from ropeway.runtime.errors import TemporaryError
from ropeway.storage.conditional_requests import sleep_with_backoff
from ropeway.storage.s3_client import error_code, translate_errors, translate_transport

RANGE_BYTES = 16 << 20
WORKERS = 4  # with one range queued: at most 80 MiB of read-ahead
_PIECE_BYTES, _SMALL_PIECE_BYTES = 256 << 10, 64 << 10  # a broken read loses its piece, so use small ones after a break
MAX_FAILED_READS = 5  # consecutive reads of a range without progress


def read_whole(client: BaseClient, bucket: str, path: str, *, max_bytes: int) -> bytes | None:
    """Return the bytes of an object, or None if it is larger than `max_bytes`."""
    response = client.get_object(Bucket=bucket, Key=path)
    size = int(response["ContentLength"])
    if size > max_bytes:
        response["Body"].close()
        return None
    return b"".join(_read_range(client, bucket, path, range(size), response))


def open_object(client: BaseClient, bucket: str, path: str, start_byte: int, url: str) -> "S3Stream":
    """Return a stream of an object from `start_byte`; raises ClientError 404 if it does not exist."""
    size = int(client.head_object(Bucket=bucket, Key=path)["ContentLength"])
    return S3Stream(client, bucket, path, range(start_byte, size), url)


def read_span(client: BaseClient, bucket: str, path: str, start_byte: int, count: int) -> bytes:
    """Return `count` bytes from `start_byte`, fewer at the end of the object."""
    response = client.get_object(Bucket=bucket, Key=path, Range=f"bytes={start_byte}-{start_byte + count - 1}")
    length = int(response["ContentLength"])
    return b"".join(_read_range(client, bucket, path, range(start_byte, start_byte + length), response))


class S3Stream(io.RawIOBase):
    """A readable stream that prefetches ranges, so that hashing and downloads overlap."""

    def __init__(self, client: BaseClient, bucket: str, path: str, span: range, url: str) -> None:
        """Read `span` of an object; the first read starts the downloads."""
        super().__init__()
        self._object = (client, bucket, path)
        self._url = url
        self._starts = iter(range(span.start, span.stop, RANGE_BYTES))
        self._stop = span.stop
        self._pool = ThreadPoolExecutor(WORKERS)
        self._pending: deque[Future[list[bytes]]] = deque()
        self._pieces: deque[bytes] = deque()  # downloaded, not joined, to avoid a copy

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 - Buffer has a name from Python 3.12 on
        """Fill `buffer` from the current piece; return the number of bytes, 0 at the end."""
        target = memoryview(buffer).cast("B")
        data = self.read(len(target))
        target[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        """Return at most `size` bytes of the current piece; without a size, all remaining bytes."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(RANGE_BYTES), b""))
        self._fill()
        if not self._pieces:
            return b""
        piece = self._pieces.popleft()
        if len(piece) > size:
            self._pieces.appendleft(piece[size:])
            return piece[:size]
        return piece

    def close(self) -> None:
        """Cancel the pending downloads."""
        self._pool.shutdown(wait=not self._pending, cancel_futures=True)
        super().close()

    def _fill(self) -> None:
        """Keep the prefetch queue full; wait for the next piece unless the end is reached."""
        while len(self._pending) <= WORKERS and (start := next(self._starts, None)) is not None:
            span = range(start, min(start + RANGE_BYTES, self._stop))
            self._pending.append(self._pool.submit(_read_range, *self._object, span))
        if not self._pieces and self._pending:
            with translate_errors(f"{self._url}: {self._object[2]}"):
                self._pieces.extend(self._pending.popleft().result())


def _read_range(
    client: BaseClient, bucket: str, path: str, span: range, response: dict[str, Any] | None = None
) -> list[bytes]:
    """Return the bytes of a span in pieces; a retry requests only the missing bytes."""
    pieces, filled, failures, size = list[bytes](), 0, 0, _PIECE_BYTES
    while filled < len(span):
        before, kind = filled, "too few bytes"
        try:
            if response is None:
                response = client.get_object(
                    Bucket=bucket, Key=path, Range=f"bytes={span.start + filled}-{span.stop - 1}"
                )
            while block := response["Body"].read(size):
                if filled + len(block) > len(span):
                    raise TemporaryError(
                        f"s3://{bucket}/{path}: the server returned more bytes than requested. Run the command again"
                    )
                pieces.append(block)
                filled += len(block)
        except ClientError as error:
            past_end = error_code(error)[1] == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            if not past_end or failures == MAX_FAILED_READS:
                raise
        except (BotoCoreError, HTTPError, OSError) as error:
            kind = _retryable_kind(error)
        # A server that stalls counts although it sent something, else one byte per minute would go on for days.
        progressed = filled > before and kind != ReadTimeoutError.__name__
        response, size, failures = None, _SMALL_PIECE_BYTES, 0 if progressed else failures + 1
        if failures >= MAX_FAILED_READS:
            raise TemporaryError(
                f"s3://{bucket}/{path}: the connection broke {failures} times at byte {span.start + filled:,} "
                f"({kind}). Run the command again; it resumes"
            )
        if filled < len(span):
            sleep_with_backoff(failures)
    return pieces


def _retryable_kind(error: Exception) -> str:
    """Return the kind of an error that a retry can help; raise one of credentials or of a certificate."""
    if not isinstance(translate_transport(error, ""), TemporaryError):
        raise error
    return type(error).__name__
