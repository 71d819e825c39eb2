"""Remove signatures and credentials from URLs before they are displayed or recorded.

A signature grants access to a file, so it is a secret. It does not identify the file: the same file can be signed again
with another signature. So signatures are not part of a run's record.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import parse_qsl, urlencode

# Query parameters of signed URLs. Source: Amazon S3 (signature versions 2 and 4) and CloudFront, Google Cloud Storage,
# Azure Storage (shared access signatures), Alibaba OSS, and common names of plain access tokens.
_SIGNING = ("x-amz-", "x-goog-", "x-oss-")
_SIGNATURES = frozenset((
    "awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "signature", "expires", "key-pair-id", "policy", "sig",
    "token", "access_token", "auth_token", "security-token", "hmac", "api_key", "apikey", "api-key", "jwt", "__token__",
    "secret", "password", "x-api-key",
))  # fmt: skip
_AZURE = frozenset((
    "sv", "ss", "srt", "sp", "se", "st", "spr", "sr", "sip", "sdd", "skoid", "sktid", "skt", "ske", "sks", "skv",
))  # fmt: skip

_PARAMETER = re.compile(r"(?<=[?&;#])([\w.-]+)=[^\s&\"'\\<>,\[\]{}#]+")
_USER = re.compile(r"://[^\s/?#\"'<>]+@")  # a password may have an @


def strip_signature(address: str) -> str:
    """Return a URL without its signature; the other query parameters are replaced by a digest of 8 hex digits.

    >>> strip_signature("https://host/a.jsonl?file=2&X-Amz-Signature=secret&X-Amz-Expires=60")
    'https://host/a.jsonl?77b583d4'
    >>> strip_signature("https://host/a.jsonl?sig=1")
    'https://host/a.jsonl'
    """
    plain, mark, query = address.partition("?")
    if "://" not in plain or not mark:
        return address
    parts = parse_qsl(query, keep_blank_values=True)
    signed = any(name.lower() == "sig" for name, _ in parts)
    kept = urlencode([(name, value) for name, value in sorted(parts) if not _is_signature(name.lower(), azure=signed)])
    return plain + (f"?{hashlib.sha256(kept.encode()).hexdigest()[:8]}" if kept else "")


def _is_signature(name: str, *, azure: bool) -> bool:
    """Return whether a query parameter belongs to the signature or its expiry, and not to the file's name."""
    return name.startswith(_SIGNING) or name in _SIGNATURES or (azure and name in _AZURE)


def without_signatures(text: str) -> str:
    """Return a text with the values of signature parameters, user names and passwords in URLs replaced by `-`.

    >>> without_signatures("# last week: https://host/a,b?files=[1]&sig=1, by https://me:pass@host/b?page=2")
    '# last week: https://host/a,b?files=[1]&sig=-, by https://-@host/b?page=2'
    """
    text = _PARAMETER.sub(
        lambda found: f"{found[1]}=-" if _is_signature(found[1].lower(), azure=False) else found[0], text
    )
    return _USER.sub("://-@", text)


def find_secrets(block: Mapping[str, object]) -> dict[str, str]:
    """Return the URLs of a profile's sources that contain a signature or query: URL -> URL without signature."""
    return {path: strip_signature(path) for path in _addresses(block) if strip_signature(path) != path}


def _addresses(block: Mapping[str, object]) -> Iterator[str]:
    sources = block.get("sources")
    for source in sources.values() if isinstance(sources, Mapping) else ():
        paths = source.get("paths") if isinstance(source, Mapping) else None
        yield from (path for path in (paths if isinstance(paths, list) else []) if isinstance(path, str))


def without_secrets(block: Mapping[str, object]) -> dict[str, object]:
    """Return a profile's block with the signatures removed from the URLs of its sources."""
    if not find_secrets(block):
        return dict(block)
    return {**block, "sources": map_addresses(block["sources"], strip_signature)}


def map_addresses(sources: object, change: Callable[[str], str]) -> dict[str, object]:
    """Return the sources of a profile with `change` applied to each of their paths and URLs."""
    return {
        name: {**one, "paths": [change(path) for path in one["paths"]]} if one.get("paths") else one
        for name, one in (sources.items() if isinstance(sources, Mapping) else ())
    }
