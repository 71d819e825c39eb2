"""Reading from S3: whole documents, and streams of parallel ranges that go on where a connection broke."""

import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from ropeway.runtime.errors import TemporaryError
from ropeway.storage.conditional_requests import sleep_with_backoff
from ropeway.storage.s3_client import error_code, translate_errors

RANGE_BYTES = 16 << 20
WORKERS = 4  # one range more is waiting: 80 MiB ahead at most
_PIECE_BYTES, _SMALL_PIECE_BYTES = 256 << 10, 64 << 10  # a read that breaks loses what it had: small ones after a break
MAX_FAILED_READS = 5  # of one range without a single byte more


def read_whole(client: BaseClient, bucket: str, path: str, *, max_bytes: int) -> bytes | None:
    """Return an object's bytes, or None when there are more than `max_bytes`."""
    answer = client.get_object(Bucket=bucket, Key=path)
    size = int(answer["ContentLength"])
    if size > max_bytes:
        answer["Body"].close()
        return None
    return b"".join(_read_range(client, bucket, path, range(size), answer))


def open_object(client: BaseClient, bucket: str, path: str, start_byte: int, url: str) -> "S3Stream":
    """Return a stream from `start_byte` on; raises ClientError 404 when nothing is there."""
    size = int(client.head_object(Bucket=bucket, Key=path)["ContentLength"])
    return S3Stream(client, bucket, path, range(start_byte, size), url)


class S3Stream(io.RawIOBase):
    """A readable stream that fetches a few ranges ahead, so that hashing and the network overlap."""

    def __init__(self, client: BaseClient, bucket: str, path: str, span: range, url: str) -> None:
        """Read `span` of an object; nothing is fetched before the first read."""
        super().__init__()
        self._object = (client, bucket, path)
        self._url = url
        self._starts = iter(range(span.start, span.stop, RANGE_BYTES))
        self._stop = span.stop
        self._pool = ThreadPoolExecutor(WORKERS)
        self._pending: deque[Future[list[bytes]]] = deque()
        self._pieces: deque[bytes] = deque()  # at hand, as they came from the network: not copied into one

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 - Buffer has a name from Python 3.12 on
        """Fill from the piece at hand; 0 at the end."""
        target = memoryview(buffer).cast("B")
        data = self.read(len(target))
        target[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        """Return at most `size` bytes of the piece at hand; with no size, all that is left."""
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
        """Stop fetching."""
        self._pool.shutdown(wait=not self._pending, cancel_futures=True)
        super().close()

    def _fill(self) -> None:
        """Keep the readers busy, and have a piece at hand unless the end is reached."""
        while len(self._pending) <= WORKERS and (start := next(self._starts, None)) is not None:
            span = range(start, min(start + RANGE_BYTES, self._stop))
            self._pending.append(self._pool.submit(_read_range, *self._object, span))
        if not self._pieces and self._pending:
            with translate_errors(f"{self._url}: {self._object[2]}"):
                self._pieces.extend(self._pending.popleft().result())


def _read_range(
    client: BaseClient, bucket: str, path: str, span: range, answer: dict[str, Any] | None = None
) -> list[bytes]:
    """Return the bytes of a span, in pieces; after a break only the rest is asked for."""
    pieces, filled, failures, size = list[bytes](), 0, 0, _PIECE_BYTES
    while filled < len(span):
        before, kind = filled, "too few bytes"
        try:
            if answer is None:
                answer = client.get_object(
                    Bucket=bucket, Key=path, Range=f"bytes={span.start + filled}-{span.stop - 1}"
                )
            while block := answer["Body"].read(size):
                if filled + len(block) > len(span):
                    raise TemporaryError(f"s3://{bucket}/{path}: more bytes than were asked for. Repeat the command")
                pieces.append(block)
                filled += len(block)
        except ClientError as error:
            past_end = error_code(error)[1] == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            if not past_end or failures == MAX_FAILED_READS:
                raise
        except (BotoCoreError, HTTPError, OSError) as error:
            kind = type(error).__name__
        answer, size, failures = None, _SMALL_PIECE_BYTES, 0 if filled > before else failures + 1
        if failures >= MAX_FAILED_READS:
            raise TemporaryError(
                f"s3://{bucket}/{path}: the connection broke {failures} times at byte {span.start + filled:,} "
                f"({kind}). Repeat the command; it resumes"
            )
        if filled < len(span):
            sleep_with_backoff(failures)
    return pieces
