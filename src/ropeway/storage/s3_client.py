"""The door to S3's wire: a client made from the environment, `s3://` taken apart, boto's errors turned into decisions.

Where and as whom is environment (STYLE.md 7), by the names that every AWS tool reads:

AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL    another server than Amazon's; https, or http on loopback
AWS_REGION, AWS_DEFAULT_REGION           the region; else the profile's, else us-east-1
AWS_PROFILE, AWS_ACCESS_KEY_ID, …        credentials, as boto3 finds them
AWS_REQUEST_CHECKSUM_CALCULATION,        `when_required` for old servers that do not know boto3's default checksums
AWS_RESPONSE_CHECKSUM_VALIDATION         (boto/boto3#4398)
AWS_MAX_ATTEMPTS                         tries per request on 5xx, throttling and timeouts, with backoff; else 6
AWS_CA_BUNDLE                            the certificate of a server of your own
ROPEWAY_S3_TIMEOUT_SECONDS               how long a connection may be silent; else 60
ROPEWAY_S3_ALLOW_HTTP=1                  allow http to another machine: what is sent can be read on the way
"""

import ipaddress
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from ropeway.runtime.errors import AbsentError, ConfigError, RopewayError, TemporaryError

if TYPE_CHECKING:  # botocore is a slow import
    from botocore.client import BaseClient

MAX_CONNECTIONS = 16  # boto's pool; more threads than that would wait for one another
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_CODE = re.compile(r"[A-Za-z0-9.]{1,60}")
# Source: Amazon S3 API reference, "List of error codes"; what a later try can fix.
_RETRYABLE_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestTimeoutException", "InternalError",
    "ServiceUnavailable", "RequestLimitExceeded", "BandwidthLimitExceeded", "ConditionalRequestConflict",
    "OperationAborted", "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody",
}  # fmt: skip
_CLOCK_SKEW_CODES = {"RequestTimeTooSkewed", "RequestExpired"}
_CREDENTIAL_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}


class S3Location(NamedTuple):
    """`s3://bucket/prefix` taken apart; the prefix has no slash at either end and may be empty."""

    bucket: str
    prefix: str


def split_url(url: str) -> S3Location:
    """Return the bucket and the prefix (or key) of an `s3://` URL; raise ConfigError when it is none.

    >>> split_url("s3://models/team/registry/")
    S3Location(bucket='models', prefix='team/registry')
    """
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.removesuffix("/")
    strange = any(not part or part in (".", "..") for part in prefix.split("/")) if prefix else False
    if scheme != "s3" or not _BUCKET.fullmatch(bucket) or strange or not prefix.isprintable():
        # What stands before an @ may be a secret: it is not repeated.
        raise ConfigError(
            f"{url.rpartition('@')[2][:200]!r}: expected s3://bucket/prefix, the bucket of a-z 0-9 . -, 3 to 63 "
            "characters; keys and endpoint come from AWS_… variables (AWS_ENDPOINT_URL_S3 for another server)"
        )
    return S3Location(bucket, prefix)


def make_client() -> "BaseClient":
    """Return a boto3 S3 client, which threads may share; raise ConfigError when the environment does not make one."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    timeout_seconds = _read_number("ROPEWAY_S3_TIMEOUT_SECONDS", 60)
    config = Config(
        connect_timeout=min(10, timeout_seconds),
        read_timeout=timeout_seconds,
        retries={"mode": "standard", "total_max_attempts": _read_number("AWS_MAX_ATTEMPTS", 6)},
        max_pool_connections=MAX_CONNECTIONS,
        # What we send carries its SHA-256 as a signed header: signing the body hashes it once more for nothing.
        s3={"payload_signing_enabled": False},
        user_agent_extra="ropeway",
    )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        _check_endpoint(endpoint)
    try:
        session = boto3.Session()
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        return session.client("s3", endpoint_url=endpoint or None, region_name=region, config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"S3: no client can be made ({type(error).__name__}). Correct AWS_PROFILE, AWS_REGION and the files "
            "they name"
        ) from None


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Translate what boto raises about an object, e.g. `s3://bucket/prefix: key`, into decisions.

    No word of the server's or of a request gets into a message.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        raise translate(error, what) from None
    except (BotoCoreError, HTTPError, OSError) as error:
        raise _translate_transport(error, what) from None


def error_code(error: Exception) -> tuple[str, int]:
    """Return a ClientError's code, cleaned, and its HTTP status (0 if unknown)."""
    response = getattr(error, "response", {})
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return code if _CODE.fullmatch(code) else "unknown", int(status)


def translate(error: Exception, what: str) -> RopewayError:  # noqa: PLR0911 - one line per decision
    """Return the error of ours that a server's answer means."""
    code, status = error_code(error)
    said = f"{what}: the server says {status} {code}"
    if code in _CLOCK_SKEW_CODES:
        return ConfigError(f"{said}: this machine's clock and the server's differ by too much. Set the clock right")
    if code in _RETRYABLE_CODES or status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return TemporaryError(f"{said}, also when asked again. Repeat the command later; it resumes")
    if code == "NoSuchBucket":
        return ConfigError(f"{said}. Create the bucket, or correct the URL or AWS_ENDPOINT_URL_S3")
    if status == HTTPStatus.NOT_FOUND:
        return AbsentError(f"{what}: nothing is there (404)")
    if code in _CREDENTIAL_CODES or status == HTTPStatus.UNAUTHORIZED:
        return ConfigError(
            f"{said}: these credentials are not accepted. Correct AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret"
        )
    if status == HTTPStatus.FORBIDDEN:
        return ConfigError(f"{said}: these credentials may not do that. Ask for read, write and list on this prefix")
    if code == "AuthorizationHeaderMalformed" or status in range(300, 400):
        return ConfigError(f"{said}: the bucket is in another region. Set AWS_REGION to the bucket's")
    return ConfigError(f"{said}. Correct the URL and the AWS_… variables; is it an S3 server?")


def _translate_transport(error: Exception, what: str) -> RopewayError:
    from botocore import exceptions as boto

    kind = type(error).__name__
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return ConfigError(f"{what}: no credentials. Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, boto.SSLError):
        return ConfigError(f"{what}: the server's certificate is not trusted. Set AWS_CA_BUNDLE to its authority's")
    if isinstance(error, boto.ParamValidationError | boto.InvalidRegionError | boto.UnsupportedSignatureVersionError):
        return ConfigError(f"{what}: boto refuses the request ({kind}). Correct the URL and the AWS_… variables")
    return TemporaryError(
        f"{what}: the connection failed ({kind}), also when tried again. Repeat the command; it resumes"
    )


def _check_endpoint(endpoint: str) -> None:
    """Raise ConfigError unless an endpoint is a plain https URL, or http where nobody can listen."""
    try:
        parts = urlsplit(endpoint)
        host, plain = parts.hostname or "", not (parts.username or parts.password or parts.query or parts.fragment)
    except ValueError:
        host, plain, parts = "", False, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or not plain:
        raise ConfigError(
            "AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL: expected https://host:port and no more; keys do not belong there"
        )
    if parts.scheme == "http" and not is_loopback(host) and os.environ.get("ROPEWAY_S3_ALLOW_HTTP") != "1":
        raise ConfigError(
            f"AWS_ENDPOINT_URL_S3: http://{host} can be read on the way. Use https, or set ROPEWAY_S3_ALLOW_HTTP=1 on "
            "a network that you trust"
        )


def is_loopback(host: str) -> bool:
    """Return whether what is sent to a host stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_number(name: str, otherwise: int) -> int:
    """Return a variable's whole number above 0; raise ConfigError when it says something else."""
    text = os.environ.get(name) or str(otherwise)
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        raise ConfigError(f"{name}: expected a whole number above 0, found {text[:20]!r}")
    return int(text)
