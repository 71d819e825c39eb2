"""The flow with a DVC remote, in a folder and on a real S3 server: nothing is made twice, no bad byte gets in."""

import shutil
import subprocess
import uuid
from pathlib import Path

import boto3
import pytest

from ropeway.orchestration.sequence import run_retrain
from ropeway.runtime.errors import ConfigError

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)
STAGES = ["fetch", "train", "evaluate", "package"]


class Remote:
    """Where DVC pushes to: its address, and its objects as a user with write access sees them."""

    def __init__(self, url):
        self.url = url

    def keys(self):
        if not self.url.startswith("s3://"):
            return sorted(path.relative_to(self.url).as_posix() for path in Path(self.url).rglob("*") if path.is_file())
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        found = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        return sorted(one["Key"].removeprefix(f"{prefix}/") for one in found)

    def damage(self, key):
        """Flip a bit of an object, its length and name left as they are."""
        if not self.url.startswith("s3://"):
            path = Path(self.url) / key
            data = bytearray(path.read_bytes())
            path.chmod(0o644)
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            return
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        client = boto3.client("s3")
        data = bytearray(client.get_object(Bucket=bucket, Key=f"{prefix}/{key}")["Body"].read())
        data[len(data) // 2] ^= 1
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=bytes(data))


# What DVC does with a remote is the same code for both: S3 is seen to work here, the rest of it in `make test-slow`.
ON_S3_SLOW_IN_A_FOLDER = pytest.mark.parametrize(
    "remote", [pytest.param("folder", marks=pytest.mark.slow), "s3"], indirect=True
)
EACH_SLOW_ON_S3 = pytest.mark.parametrize(
    "remote", ["folder", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture
def remote(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return Remote(str(tmp_path / "remote"))
    server = request.getfixturevalue("s3_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return Remote(f"s3://{request.getfixturevalue('s3_bucket')}/dvc-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def shared(made_workspace, remote):
    """A finished workspace whose remote is configured, verified and in its git history."""
    made_workspace.dvc("remote", "add", "--default", "store", remote.url)
    made_workspace.dvc("remote", "modify", "store", "verify", "true")
    made_workspace.git("commit", "-q", "-am", "a remote")
    return made_workspace


def run(workspace):
    return run_retrain(workspace.root, use_prefect=False)


def clone(workspace, target):
    workspace.git("add", "dvc.lock")
    workspace.git("commit", "-q", "-m", "lock")
    subprocess.run(["git", "clone", "-q", workspace.root, target], check=True)
    return type(workspace)(target)


@ON_S3_SLOW_IN_A_FOLDER
def test_flow_pushes_and_a_second_clone_restores_everything_with_the_same_digest(shared, remote, tmp_path, capsys):
    first = run(shared)
    assert "push: Completed, outputs and run-cache are on the remote" in capsys.readouterr().out
    assert any(key.startswith("files/md5/") for key in remote.keys())  # noqa: SIM118 - no mapping
    assert any(key.startswith("runs/") for key in remote.keys())  # noqa: SIM118

    other = clone(shared, tmp_path / "somewhere" / "else")
    second = run(other)
    assert "pull: Completed, pulled from the remote" in capsys.readouterr().out
    assert other.calls() == []
    assert second.stages == dict.fromkeys(["identity", *STAGES], "Unchanged")
    assert second.publication.digest == first.publication.digest
    assert second.publication.state == "Published"  # its registry is another folder


@EACH_SLOW_ON_S3
def test_flow_restores_an_old_result_from_the_remotes_run_cache(shared, tmp_path):
    run(shared)
    shared.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 4e-3")
    shared.git("commit", "-q", "-am", "another rate")
    shared.calls()
    run(shared)
    assert shared.calls() == ["train", "evaluate", "package"]
    other = clone(shared, tmp_path / "elsewhere")
    other.edit("params.yaml", "learning_rate: 4e-3", "learning_rate: 2e-3")
    back = run(other)
    assert other.calls() == []
    assert back.stages["train"] == "Restored"


@EACH_SLOW_ON_S3
def test_flow_refuses_a_byte_that_the_remote_changed(shared, remote, tmp_path):
    first = run(shared)
    weights = (shared.root / "runs" / "laptop" / "model" / "weights.json").read_bytes()
    lock = (shared.root / "dvc.lock").read_text()
    for key in remote.keys():  # noqa: SIM118 - no mapping
        name = key.removeprefix("files/md5/").replace("/", "")
        if key.startswith("files/md5/") and not name.endswith(".dir") and name in _digests(shared, "model"):
            remote.damage(key)
            break
    else:
        pytest.fail(f"no weights on the remote: {remote.keys()}")
    other = clone(shared, tmp_path / "elsewhere")
    second = run(other)
    assert (other.root / "runs" / "laptop" / "model" / "weights.json").read_bytes() == weights
    assert "train" in other.calls()
    assert second.publication.digest == first.publication.digest
    assert (other.root / "dvc.lock").read_text() == lock


def _digests(workspace, output):
    import hashlib

    files = (workspace.root / "runs" / "laptop" / output).rglob("*")
    return {hashlib.md5(path.read_bytes()).hexdigest() for path in files if path.is_file()}  # noqa: S324 - as DVC names


def test_flow_refuses_a_remote_without_verify_before_any_stage(made_workspace, tmp_path):
    made_workspace.dvc("remote", "add", "--default", "store", str(tmp_path / "remote"))
    with pytest.raises(ConfigError, match="dvc remote modify store verify true"):
        run(made_workspace)
    assert made_workspace.calls() == []
    assert not (tmp_path / "remote").exists()


@pytest.mark.parametrize("remote", ["folder"], indirect=True)  # an S3 server that is away costs botocore's retries
def test_flow_continues_without_an_unreachable_remote_and_reports_what_was_not_pushed(shared, remote, capsys):
    Path(remote.url).write_text("not a folder")
    shutil.rmtree(shared.root / "runs")
    result = run(shared)
    said = capsys.readouterr().out
    assert "run `dvc push` again" in said
    assert result.publication.state == "Unchanged"
