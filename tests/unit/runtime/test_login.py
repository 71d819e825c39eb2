"""A name is authenticated only if it is that of the account that runs this process."""

import os
import pwd

import pytest

from ropeway.runtime.login import identity_of


@pytest.mark.parametrize(
    ("number", "name", "expected"),
    [(1000, "maria", "authenticated"), (1000, "other", "claimed"), (0, "maria", "claimed"), (1000, None, "claimed")],
)
def test_the_account_of_the_process_is_authenticated_unless_it_is_root(monkeypatch, number, name, expected):
    def account(_number):
        if name is None:
            raise KeyError
        return pwd.struct_passwd((name, "x", number, number, "", "/", "/bin/sh"))

    monkeypatch.setattr(os, "getuid", lambda: number)
    monkeypatch.setattr(pwd, "getpwuid", account)
    monkeypatch.setenv("LOGNAME", "maria")
    assert identity_of("maria") == expected
