"""Which data of DVC's cache `ropeway clean` keeps for the versions of a registry."""

import pytest

from ropeway.orchestration.cleanup import _data_of_versions, plan_work
from ropeway.registry import Registry
from ropeway.registry.layout import blob_key
from ropeway.runtime.errors import DataError
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.workspace import Workspace
from tests.support.registry_world import make_package

LOCK = "schema: '2.0'\nstages:\n  fetch:\n    cmd: x\n    outs:\n    - {{path: runs/tiny/raw, md5: {md5}}}\n"


@pytest.fixture
def published(tmp_path):
    """A registry of two versions, with the blob of the first one's dvc.lock removed, as `gc --withdrawn` does."""
    registry = Registry.open((tmp_path / "registry").as_uri())
    for number in (1, 2):
        lock = tmp_path / "dvc.lock"
        lock.write_text(LOCK.format(md5=str(number) * 32))
        package = make_package(tmp_path / f"package-{number}", b"%d" % number)
        registry.artifact("tiny").publish(package, provenance={}, attachments={"dvc.lock": lock})
    (file,) = registry.version("tiny@v1").attachments
    registry.store.delete(blob_key(file.sha256))
    return registry


def test_a_withdrawn_version_whose_files_were_collected_keeps_no_data_and_stops_nothing(published):
    published.version("tiny@v1").withdraw(by="ana", reason="retired")
    assert list(_data_of_versions(published)) == ["2" * 32]


def test_a_version_that_lost_its_lock_otherwise_is_an_error(published):
    with pytest.raises(DataError, match=r"dvc\.lock"):
        list(_data_of_versions(published))


def test_a_clone_in_which_a_reproduction_runs_is_kept(tmp_path):
    clone = tmp_path / ".work" / "reproduce" / "laptop-v1"
    with workspace_lock(clone / "folder", command="ropeway reproduce"):
        assert list(plan_work(Workspace(tmp_path, ""), set())) == []
    assert [one.path for one in plan_work(Workspace(tmp_path, ""), set())] == [clone]
