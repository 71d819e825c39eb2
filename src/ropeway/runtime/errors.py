"""Every error this package raises on purpose: one class per decision the caller can make.

RopewayError            exit 1    something else failed on purpose; the message says what to do
├── ConfigError         exit 64   fix params.yaml, a DeepSpeed JSON, an option or the machine; a retry cannot help
├── DataError           exit 65   a record, shard, manifest or package is not what it says it is: fix or re-make it
├── TemporaryError      exit 75   a lock, a network, a signal: run the same command again, it resumes
├── RegistryError       exit 1    the registry refused a change: choose another version, digest or alias
│   └── NotFoundError   exit 1    the registry or its store holds nothing under that name
└── TrainingError       exit 1    the numbers went wrong (no step applied, loss not finite): the last good
                                  checkpoint is named
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class RopewayError(Exception):
    """Base of every error raised on purpose; anything else that escapes is a bug."""

    exit_code = 1


class ConfigError(RopewayError):
    """What was asked for cannot be run as written. Source of the code: sysexits.h EX_USAGE."""

    exit_code = 64


class DataError(RopewayError):
    """Bytes on disk are not what their manifest or format promises. Source: sysexits.h EX_DATAERR."""

    exit_code = 65


class TemporaryError(RopewayError):
    """Nothing is wrong with the run: start it again and it resumes. Source: sysexits.h EX_TEMPFAIL."""

    exit_code = 75


class RegistryError(RopewayError):
    """The registry refused a change or does not hold what was asked for."""


class NotFoundError(RegistryError):
    """The registry or its store holds nothing under that name."""


class TrainingError(RopewayError):
    """Training ended because its numbers were wrong, not its files."""


@contextmanager
def full_disk_explained(where: object, *, kept: str = "nothing was written under its final name") -> Iterator[None]:
    """Turn a full disk under a writer into a TemporaryError.

    Args:
        where: What was being written, e.g. a folder.
        kept: What the same command finds when it is run again.
    """
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise TemporaryError(
            f"{where}: the disk is full ({error.strerror}); {kept}. Free space and run the same command again"
        ) from error


def is_disk_full(error: OSError) -> bool:
    """Return whether an error says that there is no room: the disk is full, or this user's share of it."""
    if error.errno is None:  # numpy 2's own error of a short write: "N requested and M written", without a number
        return "requested and" in str(error) and str(error).endswith("written")
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
