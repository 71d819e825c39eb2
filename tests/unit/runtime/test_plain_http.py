"""What is sent to another machine without encryption is refused, unless the environment allows it."""

import pytest

from ropeway.runtime.errors import ConfigError
from ropeway.runtime.plain_http import ALLOW, check_encrypted

PLAIN = ["http://data.example/x", "HTTP://data.example", "git://data.example/x", "webdav://data.example", "http://"]
OTHERS = [
    "https://data.example/x", "http://127.0.0.1:9000", "http://localhost", "http://[::1]:80/x", "ssh://git@data.example/x",
    "git@data.example:team/x", "git:team/x", "s3://bucket/x", "/data/x", "../x", "",
]  # fmt: skip


@pytest.mark.parametrize("address", PLAIN)
def test_an_address_of_another_machine_without_encryption_is_refused(address, monkeypatch):
    monkeypatch.delenv(ALLOW, raising=False)
    with pytest.raises(ConfigError, match=ALLOW):
        check_encrypted(address, what="x")
    monkeypatch.setenv(ALLOW, "1")
    check_encrypted(address, what="x")


@pytest.mark.parametrize("address", OTHERS)
def test_other_addresses_are_accepted(address, monkeypatch):
    monkeypatch.delenv(ALLOW, raising=False)
    check_encrypted(address, what="x")


def test_a_password_in_an_address_is_not_shown(monkeypatch):
    monkeypatch.delenv(ALLOW, raising=False)
    with pytest.raises(ConfigError) as caught:
        check_encrypted("http://me:canary@data.example/x?canary=1", what="x")
    assert "canary" not in str(caught.value)
