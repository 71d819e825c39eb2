"""Files behind https:// (http:// on loopback): asked by HEAD, read with Range; redirects never leave https."""

import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO
from urllib.parse import SplitResult, urlsplit

from ropeway.config.addresses import shown
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.stages.fetch.remote import Readable, Remote
from ropeway.storage.s3_client import is_loopback

_TIMEOUT_SECONDS = 20  # of silence
_GET_INSTEAD = {*range(400, 500), 501} - {408, 425, 429}
_LATER = {408, 425, 429}


def look_up(address: str) -> Remote:
    """Return what is behind an address now.

    Raises:
        ConfigError: The address is not plain https, is not there, or its server tells no version of it.
        TemporaryError: The server does not answer.
    """
    _check(address)
    name = shown(address)
    headers, part = _ask(address)
    version = _version(headers)
    if not version:
        raise ConfigError(
            f"sources: {name}: its server sends neither ETag nor Last-Modified, so new data could not be noticed; "
            "download it and name the file in `paths`"
        )
    whole = headers.get("Content-Range", "").partition("/")[2]  # of an answer to a ranged request
    length = whole or ("" if part else headers.get("Content-Length", ""))
    size_bytes = int(length) if length.isdigit() else None

    @contextmanager
    def open_from(start: int) -> Iterator[tuple[Readable, int]]:
        validator = version.get("etag", version.get("modified", ""))
        resumable = start and not validator.startswith("W/")  # RFC 9110: If-Range takes strong validators only
        asked = {"Range": f"bytes={start}-", "If-Range": validator} if resumable else {}
        with _open(address, "GET", asked) as answer:
            if _version(answer.headers) != version:
                raise TemporaryError(f"sources: {name} changed while it was being fetched; run it again")
            goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            begin = start if answer.status == http.client.PARTIAL_CONTENT and goes_on else 0
            yield _Whole(answer, name, None if size_bytes is None else size_bytes - begin), begin

    return Remote(name, {**version, "bytes": size_bytes}, size_bytes, open_from)


class _Whole:
    """An answer's body that ends with an error where it ends before its announced length."""

    def __init__(self, answer: http.client.HTTPResponse, name: str, expected: int | None) -> None:
        """Compare what is announced now with what was announced before.

        Raises:
            ConfigError: The server announces no end, so a cut answer would look whole.
            TemporaryError: It announces another length than before.
        """
        self._answer, self._name, self._expected = answer, name, expected
        announced = answer.length
        if announced is None and not answer.chunked and expected is None:
            raise ConfigError(
                f"sources: {name}: its server states no length, so a cut download would be taken for whole; "
                "download it and name the file in `paths`"
            )
        if None not in (announced, expected) and announced != expected:
            raise TemporaryError(
                f"sources: {name}: its server announced {expected:,} bytes and now {announced:,}; run it again"
            )

    def read(self, size: int) -> bytes:
        """Return the next bytes, none at the end.

        Raises:
            TemporaryError: The connection ended before the announced length.
        """
        block = self._answer.read(size)
        if not block and self._answer.length and self._expected is None:  # else `download` says it, with both sizes
            raise TemporaryError(
                f"sources: {self._name}: the connection ended {self._answer.length:,} bytes too early. Run it again"
            )
        return block


def _ask(address: str) -> tuple[http.client.HTTPMessage, bool]:
    """Return the headers of an address, and whether they are of a part: by HEAD; where that is refused, GET of a byte.

    An address that was signed for GET alone answers HEAD with 403 (Amazon S3), other servers with 400, 404, 405 or 501.
    """
    try:
        with _open(address, "HEAD", {}) as answer:
            return answer.headers, False
    except _NoHeadError:
        with _open(address, "GET", {"Range": "bytes=0-0"}) as answer:
            return answer.headers, answer.status == http.client.PARTIAL_CONTENT


def _check(address: str) -> SplitResult:
    parts = urlsplit(address)
    if parts.username or parts.password or "@" in parts.netloc:
        raise ConfigError(
            f"sources: {parts.scheme}://…@{parts.hostname}: a name or password does not belong into params.yaml; use "
            "s3:// or the Hub, whose keys come from the environment, or copy the file below the workspace"
        )
    if not parts.hostname or parts.scheme not in ("http", "https"):
        raise ConfigError(f"sources: {shown(address)}: expected https://host/path")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ConfigError(f"sources: {shown(address)}: http can be changed on the way; use https")
    return parts


class _NoHeadError(Exception):
    """The server answers GET only."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """As urllib's, but a HEAD stays one (Python before 3.13 makes it a GET), and http is never gone down to."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Return the request to make instead, or None for urllib's error."""
        new, old = _check(newurl), urlsplit(req.full_url)
        if new.scheme == "http" and old.scheme == "https":
            raise ConfigError(f"sources: {shown(req.full_url)} leads to http, which can be changed on the way")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            request.method = req.get_method()
        return request


@contextmanager
def _open(address: str, method: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
    """Yield the answer; translate what goes wrong, also while it is read, into decisions."""
    name = shown(address)
    handlers: list[urllib.request.BaseHandler] = [_Redirects()]
    if is_loopback(urlsplit(address).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))
    wanted = {"Accept-Encoding": "identity", "User-Agent": "ropeway", **headers}
    request = urllib.request.Request(address, method=method, headers=wanted)  # noqa: S310 - the scheme was checked
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT_SECONDS) as answer:
            if (coding := answer.headers.get("Content-Encoding", "identity")) not in ("identity", "") and not (
                coding in ("gzip", "x-gzip") and name.partition("?")[0].endswith(".gz")
            ):
                raise ConfigError(f"sources: {name}: its server sends it as {coding} unasked; download it and name it")
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        if method == "HEAD" and error.code in _GET_INSTEAD:
            raise _NoHeadError from None
        if error.code in _LATER or error.code >= http.client.INTERNAL_SERVER_ERROR:
            raise TemporaryError(f"sources: {name}: its server answers {error.code}; try again later") from None
        raise ConfigError(
            f"sources: {name}: its server answers {error.code}; correct `paths`, or, where a login is wanted, download "
            "it yourself and name the file"
        ) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            text = (
                f"its certificate is not trusted ({error.reason.verify_message}); SSL_CERT_FILE names another authority"
            )
            raise ConfigError(f"sources: {name}: {text}") from None
        raise TemporaryError(
            f"sources: {name}: cannot be reached ({type(error.reason).__name__}); try again where there is a network"
        ) from None
    except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise TemporaryError(
            f"sources: {name}: the connection ended early ({type(error).__name__}). Run it again: it goes on from there"
        ) from None


def _version(headers: http.client.HTTPMessage) -> dict[str, str]:
    found = {"etag": headers.get("ETag"), "modified": headers.get("Last-Modified")}
    return {key: value for key, value in found.items() if value}
