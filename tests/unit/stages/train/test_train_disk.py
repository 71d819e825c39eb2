"""The disk check before step 1 states every size; a failed save names the last intact checkpoint."""

import errno

import pytest

from ropeway.planning.memory import stored_bytes
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.stages.train import checkpoints
from ropeway.stages.train.disk import check_disk, explain_failed_save
from tests.support.committed import commit

GIB = 2**30


def test_a_checkpoint_of_the_published_run_takes_170_gib():
    one = stored_bytes(13_016_028_160, 13_016_028_160, number_bytes=2, stage=2)
    assert one == pytest.approx(170 * GIB, rel=0.01)


def test_too_small_a_disk_is_refused_with_every_number(tmp_path):
    with pytest.raises(ConfigError) as caught:
        check_disk(tmp_path, checkpoint_bytes=10 * GIB, keep=4, export_bytes=2 * GIB, free_bytes=30 * GIB)
    said = str(caught.value)
    for number in (
        "(4 + 1) checkpoints of 10.0 GiB",
        "a model of 2.0 GiB",
        "52.1 GiB needed, 30.0 GiB free",
        "22.1 GiB",
    ):
        assert number in said


def test_existing_checkpoints_are_not_counted_twice(tmp_path):
    (tmp_path / "state").write_bytes(bytes(5000))
    said = check_disk(tmp_path, checkpoint_bytes=2500, keep=1, export_bytes=0, free_bytes=70 << 20)
    assert "64.0 MiB needed" in said


def save(root, step):
    (checkpoints.partial_folder(root, step) / checkpoints.STATE).mkdir(parents=True)
    return commit(root, step, [], {"ranks": 2})


def test_a_full_disk_is_temporary_and_names_the_intact_checkpoint(tmp_path):
    save(tmp_path, 20)
    told = explain_failed_save(OSError(errno.ENOSPC, "No space left on device"), tmp_path, 40)
    assert isinstance(told, TemporaryError)
    assert "saving step 40 failed: the disk is full" in str(told)
    assert "step-000020 is intact" in str(told)


def test_a_folder_without_write_permission_is_not_retried(tmp_path):
    told = explain_failed_save(PermissionError(errno.EACCES, "Permission denied"), tmp_path, 0)
    assert isinstance(told, ConfigError)
    assert "no earlier checkpoint" in str(told)


def test_an_error_of_torch_on_a_full_disk_is_recognized_by_the_free_space(tmp_path, monkeypatch):
    hidden = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert explain_failed_save(hidden, tmp_path, 3) is None
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert isinstance(explain_failed_save(hidden, tmp_path, 3), TemporaryError)
