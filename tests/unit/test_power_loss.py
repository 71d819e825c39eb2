"""What the disk of `make chaos-power` holds after a power loss, for a record that is written down here."""

import random

import pytest

from tests.support.power_loss import Disk

RECORD = [
    ("fsyncdir", 0),
    ("add", 0, "kept", 1, "file", None),
    ("write", 1, 0, b"old"),
    ("fsync", 1),
    ("fsyncdir", 0),
    ("add", 0, "new", 2, "file", None),
    ("write", 2, 0, b"new"),
    ("fsync", 2),
    ("add", 0, "torn", 3, "file", None),
    ("write", 3, 0, b"torn"),
    ("rename", 0, "new", 0, "kept", 2),
]


@pytest.fixture
def disk():
    made = Disk()
    for operation in RECORD:
        made.apply(operation)
    return made


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_later_changes_only_flushed_names_and_bytes_are_there(disk, tmp_path):
    disk.write(tmp_path / "d", "lost", random.Random(0))
    assert read(tmp_path / "d") == {"kept": b"old"}


def test_names_can_be_there_without_their_data(disk, tmp_path):
    disk.write(tmp_path / "d", "names", random.Random(0))
    found = read(tmp_path / "d")
    assert found.keys() == {"kept", "torn"}
    assert found["kept"] == b"new"
    assert found["torn"] in (b"", bytes(4))


def test_some_changes_are_there_and_a_rename_is_one_of_them(disk, tmp_path):
    seen = set()
    for seed in range(40):
        disk.write(tmp_path / str(seed), "some", random.Random(seed))
        found = read(tmp_path / str(seed))
        assert ("new" in found) == (found["kept"] == b"old" and len(found) > 1)
        seen.add(tuple(sorted(found.items())))
    assert (("kept", b"old"),) in seen
    assert (("kept", b"new"), ("torn", b"torn")) in seen


def test_what_was_made_durable_stays_whatever_is_lost(disk, tmp_path):
    disk.sync()
    for state in ("lost", "names", "some"):
        disk.write(tmp_path / state, state, random.Random(1))
        assert read(tmp_path / state) == {"kept": b"new", "torn": b"torn"}
