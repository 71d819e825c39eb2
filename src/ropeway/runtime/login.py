"""Who uses this process, as the operating system knows it."""

import os
import pwd
from typing import Literal

Identity = Literal["authenticated", "claimed"]


def identity_of(name: str) -> Identity:
    """Return whether a person's name is that of the account that runs this process, which has logged in.

    The account is that of the kernel, not of LOGNAME, which anybody sets. Root is nobody in particular. Call this only
    where the person runs this process; a form on a server is filled in by somebody else.
    """
    try:
        account = pwd.getpwuid(os.getuid())
    except KeyError:  # a user without a name, as in some containers
        return "claimed"
    return "authenticated" if account.pw_uid != 0 and account.pw_name == name else "claimed"
