import errno

import numpy as np
import pytest

from ropeway.runtime.errors import TemporaryError, full_disk_explained, is_disk_full


def test_a_short_write_of_numpy_is_a_full_disk_though_it_has_no_number():
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="written") as caught:  # noqa: PTH123
        np.zeros(1 << 16).tofile(full)
    assert is_disk_full(caught.value)


@pytest.mark.parametrize(("error", "full"), [(OSError(errno.ENOSPC, "x"), True), (OSError(errno.EIO, "x"), False)])
def test_any_other_error_is_told_by_its_number(error, full):
    assert is_disk_full(error) is full


def test_what_is_kept_is_said(tmp_path):
    with pytest.raises(TemporaryError, match="units stay"), full_disk_explained(tmp_path, kept="units stay"):
        raise OSError("100 requested and 20 written")
