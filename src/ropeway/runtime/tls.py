"""Why a TLS connection was refused, in words: which fault the server's certificate has, and what to do about it."""

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime

# Source: X509_V_ERR_* of OpenSSL's x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_NAME = (62, 64)  # host name, IP address
# What OpenSSL makes of an answer in plain HTTP; the name depends on its version.
_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
    "UNKNOWN_PROTOCOL",
)
_OTHER_HOST = (
    "the server's TLS certificate is of another host ({found}). Correct the host name in the address, or have a "
    "certificate issued for it"
)
_DEPTH = 8  # of errors within errors


def find_tls_fault(error: BaseException, ca_variable: str) -> str | None:
    """Return the fault of a certificate and its remedy; None if a retry could help, or if it is no error of TLS.

    Args:
        error: The error of an HTTP client; the error of `ssl` can be inside it.
        ca_variable: The environment variable with the file of CA certificates, for the remedy.
    """
    for one in _within(error, _DEPTH):
        if isinstance(one, ssl.SSLCertVerificationError):
            return _describe_certificate(one, ca_variable)
        if type(one).__name__ == "CertificateError":  # urllib3's own comparison of the host, which botocore enables
            return _OTHER_HOST.format(found=str(one))
        if isinstance(one, ssl.SSLError) and any(name in str(getattr(one, "reason", None) or one) for name in _NOT_TLS):
            return (
                "the server does not speak TLS on this port, expected https. Correct the port, or use an http:// "
                "address where that is allowed"
            )
    return None


def _describe_certificate(error: ssl.SSLCertVerificationError, ca_variable: str) -> str:
    code, found = getattr(error, "verify_code", None), getattr(error, "verify_message", "no details")
    if code in (_EXPIRED, _NOT_YET_VALID):
        state = "certificate has expired" if code == _EXPIRED else "certificate is not valid yet"
        return (
            f"the server's TLS {state}; this machine's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Have the "
            "certificate renewed, or correct the clock"
        )
    if code in _OTHER_NAME:
        return _OTHER_HOST.format(found=found)
    return (
        f"the server's TLS certificate is not trusted ({found}). Set {ca_variable} to the file of the "
        "CA's certificates that signed it"
    )


def _within(error: BaseException, depth: int) -> Iterator[BaseException]:
    """Yield an error and those inside it, as urllib, urllib3, botocore and httpx wrap them."""
    yield error
    if depth:
        inner = (*error.args, getattr(error, "reason", None), getattr(error, "kwargs", {}).get("error"))
        for one in (*inner, error.__cause__, error.__context__):
            if isinstance(one, BaseException):
                yield from _within(one, depth - 1)
