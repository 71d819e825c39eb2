import errno

import numpy as np
import pytest
from safetensors import SafetensorError

from ropeway.runtime.errors import ConfigError, TemporaryError, disk_error, full_disk_explained, is_disk_full


def test_a_short_write_of_numpy_without_errno_is_a_full_disk():
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="written") as caught:  # noqa: PTH123
        np.zeros(1 << 16).tofile(full)
    assert is_disk_full(caught.value)


@pytest.mark.parametrize(("error", "full"), [(OSError(errno.ENOSPC, "x"), True), (OSError(errno.EIO, "x"), False)])
def test_other_errors_are_classified_by_errno(error, full):
    assert is_disk_full(error) is full


def test_the_message_says_what_is_kept(tmp_path):
    with pytest.raises(TemporaryError, match="units stay"), full_disk_explained(tmp_path, kept="units stay"):
        raise OSError("100 requested and 20 written")


def test_a_file_beyond_the_shell_limit_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"ulimit -f.*units stay"), full_disk_explained(tmp_path, kept="units stay"):
        raise OSError(errno.EFBIG, "File too large")


@pytest.mark.parametrize(("number", "expected"), [(28, TemporaryError), (27, ConfigError)])
def test_an_error_of_the_system_that_only_stands_in_a_text_is_recognized(tmp_path, number, expected):
    """safetensors raises its own class, with the number in the text."""
    with pytest.raises(expected, match=f"os error {number}"), full_disk_explained(tmp_path):
        raise SafetensorError(f"Error while serializing: I/O error: x (os error {number})")
    with pytest.raises(SafetensorError), full_disk_explained(tmp_path):
        raise SafetensorError("header too large")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, TemporaryError),
        (errno.EDQUOT, TemporaryError),
        (errno.EROFS, ConfigError),
        (errno.EIO, ConfigError),
        (errno.ESTALE, ConfigError),
        (errno.EPERM, None),
    ],
)
def test_a_disk_that_fails_is_told_from_other_failures_and_its_file_is_named(number, kind):
    told = disk_error(OSError(number, "why", "/data/a"))
    assert type(told) is (kind or type(None))
    if told:
        assert "/data/a: why" in str(told)
