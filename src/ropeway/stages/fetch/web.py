"""Look up https:// files (http:// on loopback only) with HEAD and read them with Range; redirects must stay https."""

import http.client
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast
from urllib.parse import SplitResult, urlsplit

from ropeway.config.addresses import strip_signature
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.least_rate import LeastRateSocket, SlowTransferError
from ropeway.runtime.plain_http import is_loopback
from ropeway.runtime.tls import find_tls_fault
from ropeway.stages.fetch.remote import Readable, Remote

_TIMEOUT_SECONDS = 20  # without a byte from the server
_HEAD_REFUSED = {*range(400, 500), 501} - {408, 425, 429}
_RETRYABLE = {408, 425, 429}


def look_up(address: str) -> Remote:
    """Return the current version of the file at a URL.

    Raises:
        ConfigError: The URL is not https, does not exist, or its server states no version of the file.
        TemporaryError: The server does not respond.
    """
    _check_address(address)
    name = strip_signature(address)
    headers, part = _request_headers(address)
    version = _version(headers)
    if not version:
        raise ConfigError(
            f"sources: {name}: the server sends neither ETag nor Last-Modified, so new data would go undetected; "
            "download it and name the file in `paths`"
        )
    whole = headers.get("Content-Range", "").partition("/")[2]  # of the response to a Range request
    length = whole or ("" if part else headers.get("Content-Length", ""))
    size_bytes = int(length) if length.isdigit() else None

    @contextmanager
    def open_from(start: int) -> Iterator[tuple[Readable, int]]:
        validator = version.get("etag", version.get("modified", ""))
        resumable = start and not validator.startswith("W/")  # RFC 9110: If-Range takes strong validators only
        asked = {"Range": f"bytes={start}-", "If-Range": validator} if resumable else {}
        with _open_response(address, "GET", asked) as response:
            if _version(response.headers) != version:
                raise TemporaryError(f"sources: {name} changed during the download; run the same command again")
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            begin = start if response.status == http.client.PARTIAL_CONTENT and resumed else 0
            yield _CheckedBody(response, name, None if size_bytes is None else size_bytes - begin), begin

    return Remote(name, {**version, "bytes": size_bytes}, size_bytes, open_from)


class _CheckedBody:
    """A response body that raises an error if it ends before its announced length."""

    def __init__(self, response: http.client.HTTPResponse, name: str, expected: int | None) -> None:
        """Compare the announced length with the expected one.

        Raises:
            ConfigError: The server announces no length, so a truncated response would look complete.
            TemporaryError: The announced length differs from the expected one.
        """
        self._response, self._name, self._expected = response, name, expected
        announced = response.length
        if announced is None and not response.chunked and expected is None:
            raise ConfigError(
                f"sources: {name}: the server states no length, so a truncated download would look complete; "
                "download it and name the file in `paths`"
            )
        if None not in (announced, expected) and announced != expected:
            raise TemporaryError(
                f"sources: {name}: the server announced {expected:,} bytes first and {announced:,} bytes now; run the "
                "same command again"
            )

    def read(self, size: int) -> bytes:
        """Return the next bytes; empty at the end.

        Raises:
            TemporaryError: The connection ended before the announced length.
        """
        block = self._response.read(size)
        if (
            not block and self._response.length and self._expected is None
        ):  # otherwise `download` raises, with both sizes
            raise TemporaryError(
                f"sources: {self._name}: the connection ended {self._response.length:,} bytes too early. Run the "
                "same command again"
            )
        return block


def _request_headers(address: str) -> tuple[http.client.HTTPMessage, bool]:
    """Return a URL's headers by HEAD, or by GET of one byte if HEAD is refused; and whether they are of a part.

    A URL that is signed for GET only refuses HEAD with 403 (Amazon S3); other servers with 400, 404, 405 or 501.
    """
    try:
        with _open_response(address, "HEAD", {}) as response:
            return response.headers, False
    except _HeadRefusedError:
        with _open_response(address, "GET", {"Range": "bytes=0-0"}) as response:
            return response.headers, response.status == http.client.PARTIAL_CONTENT


def _check_address(address: str) -> SplitResult:
    parts = urlsplit(address)
    if parts.username or parts.password or "@" in parts.netloc:
        raise ConfigError(
            f"sources: {parts.scheme}://…@{parts.hostname}: a user name or password must not be in params.yaml; use "
            "s3:// or the Hub, which read keys from the environment, or copy the file into the workspace"
        )
    if not parts.hostname or parts.scheme not in ("http", "https"):
        raise ConfigError(f"sources: {strip_signature(address)}: expected https://host/path")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ConfigError(f"sources: {strip_signature(address)}: http is not authenticated; use https")
    return parts


class _HeadRefusedError(Exception):
    """The server refuses HEAD."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib's handler, except that HEAD stays HEAD (Python before 3.13 makes it GET) and https never becomes http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Return the redirected request, or None to let urllib raise its error."""
        new, old = _check_address(newurl), urlsplit(req.full_url)
        if new.scheme == "http" and old.scheme == "https":
            raise ConfigError(f"sources: {strip_signature(req.full_url)} redirects to http, which is not authenticated")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            request.method = req.get_method()
        return request


class _Connection(http.client.HTTPConnection):
    """A connection with a least rate."""

    def connect(self) -> None:
        super().connect()
        self.sock = cast("socket.socket", LeastRateSocket(self.sock))


class _TlsConnection(http.client.HTTPSConnection):
    """A TLS connection with a least rate."""

    def connect(self) -> None:
        super().connect()
        self.sock = cast("socket.socket", LeastRateSocket(self.sock))


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_TlsConnection, req)


@contextmanager
def _open_response(address: str, method: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
    """Yield the response; translate errors, also those while it is read, into ConfigError or TemporaryError."""
    name = strip_signature(address)
    handlers: list[urllib.request.BaseHandler] = [_Redirects(), _Http(), _Https()]
    if is_loopback(urlsplit(address).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))
    wanted = {"Accept-Encoding": "identity", "User-Agent": "ropeway", **headers}
    request = urllib.request.Request(address, method=method, headers=wanted)  # noqa: S310 - the scheme was checked
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT_SECONDS) as response:
            if (coding := response.headers.get("Content-Encoding", "identity")) not in ("identity", "") and not (
                coding in ("gzip", "x-gzip") and name.partition("?")[0].endswith(".gz")
            ):
                raise ConfigError(
                    f"sources: {name}: the server sends Content-Encoding {coding}, expected identity; download the "
                    "file yourself and name it"
                )
            yield response
    except urllib.error.HTTPError as error:
        error.close()
        if method == "HEAD" and error.code in _HEAD_REFUSED:
            raise _HeadRefusedError from None
        if error.code in _RETRYABLE or error.code >= http.client.INTERNAL_SERVER_ERROR:
            raise TemporaryError(f"sources: {name}: the server responded {error.code}; try again later") from None
        raise ConfigError(
            f"sources: {name}: the server responded {error.code}; correct `paths`, or, if the URL needs a login, "
            "download the file yourself and name it"
        ) from None
    except urllib.error.URLError as error:
        raise _unreachable_error(name, error) from None
    except SlowTransferError as error:
        raise TemporaryError(
            f"sources: {name}: the server is too slow: {error}. Run the same command again; the download resumes"
        ) from None
    except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise TemporaryError(
            f"sources: {name}: the connection ended early ({type(error).__name__}). Run the same command again; the "
            "download resumes there"
        ) from None


def _unreachable_error(name: str, error: urllib.error.URLError) -> ConfigError | TemporaryError:
    """Return the error for a request that could not be sent."""
    if isinstance(error.reason, SlowTransferError):
        return TemporaryError(f"sources: {name}: the server is too slow: {error.reason}. Try again later")
    if fault := find_tls_fault(error, "SSL_CERT_FILE"):
        return ConfigError(f"sources: {name}: {fault}")
    return TemporaryError(
        f"sources: {name}: cannot be reached ({type(error.reason).__name__}); check the network and try again"
    )


def _version(headers: http.client.HTTPMessage) -> dict[str, str]:
    found = {"etag": headers.get("ETag"), "modified": headers.get("Last-Modified")}
    return {key: value for key, value in found.items() if value}
