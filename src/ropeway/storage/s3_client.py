"""S3 client: created from the environment, `s3://` URLs parsed, boto errors translated into Ropeway errors.

Endpoint and credentials come from the environment, by the standard AWS variables:

AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL    endpoint of a server other than Amazon S3; https, or http on loopback
AWS_REGION, AWS_DEFAULT_REGION           region; default: the region of the profile, else us-east-1
AWS_PROFILE, AWS_ACCESS_KEY_ID, …        credentials, as boto3 finds them; found again when they expire
AWS_REQUEST_CHECKSUM_CALCULATION,        `when_required` for servers without support for boto3's default checksums
AWS_RESPONSE_CHECKSUM_VALIDATION         (boto/boto3#4398)
AWS_MAX_ATTEMPTS                         attempts per request on 5xx, throttling and timeouts, with backoff; default: 6
AWS_CA_BUNDLE                            CA certificates of a private server
ROPEWAY_S3_TIMEOUT_SECONDS               read timeout of a connection in seconds; default: 60
ROPEWAY_ALLOW_HTTP=1                     allow unencrypted http to another machine
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from ropeway.runtime.errors import ConfigError, NotFoundError, RopewayError, TemporaryError
from ropeway.runtime.least_rate import LEAST_BYTES_PER_SECOND, WINDOW_SECONDS
from ropeway.runtime.plain_http import check_encrypted
from ropeway.runtime.tls import find_tls_fault

if TYPE_CHECKING:  # botocore is a slow import
    from botocore.client import BaseClient

MAX_CONNECTIONS = 16  # size of boto's connection pool; more threads than this would wait
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_CODE = re.compile(r"[A-Za-z0-9.]{1,60}")
# Source: Amazon S3 API reference, "List of error codes"; errors that a later retry can fix.
_RETRYABLE_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestTimeoutException", "InternalError",
    "ServiceUnavailable", "RequestLimitExceeded", "BandwidthLimitExceeded", "ConditionalRequestConflict",
    "OperationAborted", "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody",
}  # fmt: skip
_MAX_CLOCK_SKEW = timedelta(minutes=15)  # of Amazon S3
_CLOCK_SKEW_CODES = {"RequestTimeTooSkewed", "RequestExpired"}
_CREDENTIAL_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
}
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}


class S3Location(NamedTuple):
    """A parsed `s3://bucket/prefix` URL; the prefix has no leading or trailing slash and can be empty."""

    bucket: str
    prefix: str


def split_url(url: str) -> S3Location:
    """Return the bucket and the prefix (or key) of an `s3://` URL; raise ConfigError if it is malformed.

    >>> split_url("s3://models/team/registry/")
    S3Location(bucket='models', prefix='team/registry')
    """
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.removesuffix("/")
    invalid = any(not part or part in (".", "..") for part in prefix.split("/")) if prefix else False
    if scheme != "s3" or not _BUCKET.fullmatch(bucket) or invalid or not prefix.isprintable():
        # The part before an @ can be a secret, so it is not shown.
        raise ConfigError(
            f"{url.rpartition('@')[2][:200]!r}: expected s3://bucket/prefix, with a bucket of 3 to 63 characters of "
            "a-z 0-9 . -. Set credentials and endpoint by AWS_… variables (AWS_ENDPOINT_URL_S3 for another server)"
        )
    return S3Location(bucket, prefix)


def make_client() -> "BaseClient":
    """Return a thread-safe boto3 S3 client; raise ConfigError if the environment is not valid."""
    import boto3
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    from ropeway.storage import bounded_session, credentials

    timeout_seconds = _read_number("ROPEWAY_S3_TIMEOUT_SECONDS", 60)
    config = Config(
        connect_timeout=min(10, timeout_seconds),
        read_timeout=timeout_seconds,
        retries={"mode": "standard", "total_max_attempts": _read_number("AWS_MAX_ATTEMPTS", 6)},
        max_pool_connections=MAX_CONNECTIONS,
        # Uploads have their SHA-256 in a signed header, so payload signing would only hash them again.
        s3={"payload_signing_enabled": False},
        user_agent_extra="ropeway",
    )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        _check_endpoint(endpoint)
    try:
        library = botocore.session.get_session()
        library.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_time)
        provider = credentials.use_renewed(library)
        session = boto3.Session(botocore_session=library)
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        client = session.client("s3", endpoint_url=endpoint or None, region_name=region, config=config)
        credentials.attach(client, provider)
        client.meta.events.register_first("needs-retry.s3", _raise_tls_fault)
        session_of_client = bounded_session.BoundedSession(client)
        client.meta.events.register("before-send.s3", lambda request, **_: session_of_client.send(request))
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"S3: cannot create a client ({type(error).__name__}). Correct AWS_PROFILE, AWS_REGION and the AWS "
            "configuration files"
        ) from None
    _check_endpoint(client.meta.endpoint_url)  # without a variable, the AWS configuration can name one
    return client


def find_endpoint(stated: str | None, profile: str | None, config_file: str | None, *, use_ssl: bool) -> str:
    """Return the address of the S3 server that boto3 would use with these settings of a DVC remote.

    Raises:
        ConfigError: The configuration cannot be read.
    """
    import botocore.session
    from botocore.exceptions import BotoCoreError

    try:
        library = botocore.session.Session(profile=profile)
        if config_file:
            library.set_config_variable("config_file", config_file)
        client = library.create_client("s3", region_name="us-east-1", endpoint_url=stated, use_ssl=use_ssl)
        return str(client.meta.endpoint_url)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"S3: cannot read the AWS configuration ({type(error).__name__}). Correct the DVC remote (`dvc config "
            "--list`), AWS_PROFILE and the AWS configuration files"
        ) from None


def _raise_tls_fault(caught_exception: Exception | None, **_: object) -> None:
    """End a request whose server has no valid certificate; botocore would repeat it for half a minute."""
    if caught_exception is not None and find_tls_fault(caught_exception, "AWS_CA_BUNDLE"):
        raise caught_exception


def parse_time(text: str) -> datetime:
    """Return the time in a response. botocore's parser takes 46 of the 63 ms of a listing of 1,000 keys.

    >>> parse_time("2026-11-30T18:49:50.000Z") == parse_time("Mon, 30 Nov 2026 18:49:50 GMT")
    True
    """
    from botocore.utils import parse_timestamp

    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            found = parse(text)
        except (TypeError, ValueError):
            continue
        if found.tzinfo is not None:
            return found
    other: datetime = parse_timestamp(text)
    return other


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Translate boto errors about `what`, e.g. `s3://bucket/prefix: key`, into Ropeway errors.

    Messages never include text of a response or request, which can have credentials.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        raise translate(error, what) from None
    except (BotoCoreError, HTTPError, OSError) as error:
        raise translate_transport(error, what) from None


def error_code(error: Exception) -> tuple[str, int]:
    """Return the sanitized code and the HTTP status (0 if unknown) of a ClientError."""
    response = getattr(error, "response", {})
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return code if _CODE.fullmatch(code) else "unknown", int(status)


def translate(error: Exception, what: str) -> RopewayError:  # noqa: PLR0911 - one line per error
    """Return the Ropeway error for an error response of the server."""
    code, status = error_code(error)
    response = f"{what}: the server returned {status} {code}"
    if code in _CLOCK_SKEW_CODES or (status == HTTPStatus.FORBIDDEN and _is_clock_wrong(error)):
        return ConfigError(
            f"{response}: the clocks of this machine and the server differ too much. Correct this machine's clock"
        )
    if code in _RETRYABLE_CODES or status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return TemporaryError(f"{response}, also after retries. Run the command again later; it resumes")
    if code == "NoSuchBucket":
        return ConfigError(f"{response}. Create the bucket, or correct the URL or AWS_ENDPOINT_URL_S3")
    if status == HTTPStatus.NOT_FOUND:
        return NotFoundError(f"{what}: no such object (404)")
    if code in EXPIRED_CODES:
        return ConfigError(
            f"{response}: the credentials have expired, and AWS_PROFILE or the AWS_… variables give no newer ones. "
            "Renew them (e.g. `aws sso login`), then run the command again; it resumes"
        )
    if code in _CREDENTIAL_CODES or status == HTTPStatus.UNAUTHORIZED:
        return ConfigError(
            f"{response}: the credentials are not valid. Correct AWS_PROFILE, or AWS_ACCESS_KEY_ID and its secret"
        )
    if status == HTTPStatus.FORBIDDEN:
        return ConfigError(f"{response}: the credentials have no permission. Grant read, write and list on this prefix")
    if code == "AuthorizationHeaderMalformed" or status in range(300, 400):
        return ConfigError(f"{response}: the bucket is in another region. Set AWS_REGION to the region of the bucket")
    return ConfigError(f"{response}. Check that the URL and AWS_ENDPOINT_URL_S3 name an S3 server")


def _is_clock_wrong(error: Exception) -> bool:
    """Return whether this machine's clock differs too much from the response's Date; HEAD is refused without a code."""
    headers = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        return abs(datetime.now(UTC) - parse_time(headers["date"])) > _MAX_CLOCK_SKEW
    except (KeyError, ValueError):
        return False


def translate_transport(error: Exception, what: str) -> RopewayError:
    """Return the Ropeway error for a request without a response: ConfigError unless a retry can help."""
    from botocore import exceptions as boto
    from urllib3.exceptions import ReadTimeoutError

    kind = type(error).__name__
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return ConfigError(
            f"{what}: no AWS credentials found. Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    failed_sources = (
        boto.CredentialRetrievalError, boto.MetadataRetrievalError, boto.TokenRetrievalError, boto.SSOError,
        boto.InvalidConfigError, boto.ProfileNotFound,
    )  # fmt: skip
    if isinstance(error, failed_sources):
        source = str(error.kwargs.get("provider") or "the source of the credentials")
        return ConfigError(
            f"{what}: no valid AWS credentials ({kind}): {source} gave none, or expired ones. Renew them (e.g. `aws "
            "sso login`), or correct their source, then run the command again; it resumes"
        )
    if fault := find_tls_fault(error, "AWS_CA_BUNDLE"):
        return ConfigError(f"{what}: {fault}")
    if isinstance(error, boto.ReadTimeoutError | ReadTimeoutError):
        return TemporaryError(
            f"{what}: the server sent nothing for the time in ROPEWAY_S3_TIMEOUT_SECONDS, or less than "
            f"{LEAST_BYTES_PER_SECOND:,} bytes/s for {WINDOW_SECONDS:g} s, also after retries. Run the command again; "
            "it resumes"
        )
    if isinstance(error, boto.ParamValidationError | boto.InvalidRegionError | boto.UnsupportedSignatureVersionError):
        return ConfigError(f"{what}: boto3 rejects the request ({kind}). Correct the URL and the AWS_… variables")
    return TemporaryError(
        f"{what}: the connection failed ({kind}), also after retries. Run the command again; it resumes"
    )


def _check_endpoint(endpoint: str) -> None:
    """Raise ConfigError unless an endpoint is a plain https URL, or http on loopback or allowed explicitly."""
    try:
        parts = urlsplit(endpoint)
        host, plain = parts.hostname or "", not (parts.username or parts.password or parts.query or parts.fragment)
    except ValueError:
        host, plain, parts = "", False, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or not plain:
        raise ConfigError(
            "AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or endpoint_url of the AWS configuration: expected "
            "https://host:port, without credentials or a query"
        )
    check_encrypted(endpoint, what="AWS_ENDPOINT_URL_S3, or endpoint_url of the AWS configuration")


def _read_number(name: str, default: int) -> int:
    """Return the positive integer in an environment variable; raise ConfigError if it is not one."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        raise ConfigError(f"{name}: expected a positive integer, found {text[:20]!r}")
    return int(text)
