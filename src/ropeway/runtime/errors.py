"""The errors that this package raises on purpose: one class per decision that the caller can make.

RopewayError            exit 1    any other expected error; the message says what to do
├── ConfigError         exit 64   fix params.yaml, a DeepSpeed JSON, an option or the machine; a retry does not help
├── DataError           exit 65   a record, shard, manifest or package is invalid or damaged: fix or recreate it
├── TemporaryError      exit 75   a lock, the network or a signal: run the same command again; it resumes
├── RegistryError       exit 1    the registry refused a change: choose another version, digest or alias
│   └── NotFoundError   exit 1    the registry or its store has no entry with this name
└── TrainingError       exit 1    training diverged (no step applied, loss not finite): the message names
                                  the last good checkpoint
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager


class RopewayError(Exception):
    """Base class of every error raised on purpose; any other exception is a bug."""

    exit_code = 1


class ConfigError(RopewayError):
    """The configuration or command line is invalid. Source of the code: sysexits.h EX_USAGE."""

    exit_code = 64


class DataError(RopewayError):
    """Data on disk does not match its manifest or format. Source: sysexits.h EX_DATAERR."""

    exit_code = 65


class TemporaryError(RopewayError):
    """A temporary failure: the same command resumes. Source: sysexits.h EX_TEMPFAIL."""

    exit_code = 75


class RegistryError(RopewayError):
    """The registry refused a change or has no such entry."""


def error_class(exit_code: int) -> type[RopewayError]:
    """Return the class of the error that a process with this exit code ended with.

    >>> error_class(65).__name__, error_class(1).__name__
    ('DataError', 'RopewayError')
    """
    classes: tuple[type[RopewayError], ...] = (ConfigError, DataError, TemporaryError)
    return next((one for one in classes if one.exit_code == exit_code), RopewayError)


class NotFoundError(RegistryError):
    """The registry or its store has no entry with this name."""


class TrainingError(RopewayError):
    """Training diverged or applied no step; the files are intact."""


@contextmanager
def full_disk_explained(where: object, *, kept: str = "nothing was written under its final name") -> Iterator[None]:
    """Raise TemporaryError if the block fails because the disk is full, ConfigError if a file may not be that large.

    Args:
        where: The file or folder that the block writes.
        kept: Phrase for the message: what the next run of the command can use.
    """
    try:
        yield
    except RopewayError:
        raise
    except Exception as error:
        if _error_number(error) == errno.EFBIG:
            raise ConfigError(
                f"{where}: a file would be larger than the shell's limit (`ulimit -f`) or the file system allows "
                f"({error}); {kept}. Raise the limit and run the same command again"
            ) from error
        if not is_disk_full(error):
            raise
        raise TemporaryError(
            f"{where}: the disk is full ({error}); {kept}. Free space and run the same command again"
        ) from error


def disk_error(error: OSError) -> RopewayError | None:
    """Return the error that tells a user that a disk failed, and what to do; None if it is another kind of failure."""
    what = f"{error.filename or 'a file'}: {error.strerror or error}"
    if is_disk_full(error):
        return TemporaryError(f"{what}: the disk is full. Free space and run the same command again")
    if error.errno == errno.EROFS:
        return ConfigError(
            f"{what}. Linux mounts a disk read-only when it fails: look at `dmesg`, make the folder writable, then run "
            "the same command"
        )
    if error.errno in (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO):
        return ConfigError(
            f"{what}: the disk does not read or write. Look at `dmesg`. Nothing incomplete is used: when the disk "
            "works, run the same command"
        )
    return None


def is_disk_full(error: Exception) -> bool:
    """Return whether an error means that the disk or the user's quota is full."""
    if _error_number(error) in (errno.ENOSPC, errno.EDQUOT):
        return True
    # numpy 2 reports a short write as "N requested and M written", without a number
    return isinstance(error, OSError) and "requested and" in str(error) and str(error).endswith("written")


def _error_number(error: Exception) -> int | None:
    """Return the operating system's number of an error; safetensors, written in Rust, has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
