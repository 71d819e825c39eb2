"""Refuses addresses of other machines whose connections are not encrypted, unless the environment allows them."""

import ipaddress
import os
from urllib.parse import urlsplit

from ropeway.runtime.errors import ConfigError

ALLOW = "ROPEWAY_ALLOW_HTTP"
# Schemes of HTTP clients, git and DVC without encryption. Source: git 2.47 `git-clone`, dvc 3.67 `dvc remote add`.
_PLAIN = ("http", "git", "ftp", "webdav", "webhdfs")


def check_encrypted(address: str, *, what: str, remedy: str = "Use https") -> None:
    """Raise ConfigError if the scheme of an address is one without encryption and its host is another machine.

    Args:
        address: A URL, or what is none, e.g. a path.
        what: What has this address, for the message; the address can have a password and is not shown.
        remedy: What to use instead.
    """
    if "://" not in address:  # a path, or HOST:PATH of ssh
        return
    try:
        parts = urlsplit(address)
        scheme, host = parts.scheme, parts.hostname or ""
    except ValueError:
        raise ConfigError(f"{what}: not a valid address") from None
    if scheme in _PLAIN and not is_loopback(host) and os.environ.get(ALLOW) != "1":
        raise ConfigError(
            f"{what}: {scheme}://{host} is not encrypted. {remedy}, or set {ALLOW}=1 on a trusted network"
        )


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
