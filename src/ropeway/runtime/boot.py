"""Which start of the machine this is: what a program wrote without a flush can be lost only in another one."""

from contextlib import suppress
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def read_boot() -> str:
    """Return what tells this start of the machine from others; empty where the system does not say (no Linux)."""
    with suppress(OSError):
        return _BOOT.read_text(encoding="ascii").strip()
    return ""
