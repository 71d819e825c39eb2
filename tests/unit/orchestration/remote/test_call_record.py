"""What a run that follows a stage in a work pool writes for `ropeway status`."""

import json
from types import SimpleNamespace
from uuid import UUID

import pytest

from ropeway.orchestration.remote.pool_caller import _Follower, call_record
from ropeway.orchestration.status import read_running
from ropeway.runtime.lock import workspace_lock

RUN = UUID(int=7)


@pytest.fixture
def follow(tmp_path):
    """Return a function that passes on a sign of life of the worker, which is the text of an artifact."""
    (tmp_path / ".work").mkdir()
    signs = []
    client = SimpleNamespace(read_artifacts=lambda **_: [SimpleNamespace(data=sign) for sign in signs[-1:]])
    follower = _Follower(client, tmp_path, "gpu", "train", RUN, print, is_retry=False)
    follower.record_call()

    def pass_on(sign):
        signs.append(sign)
        follower._pass_progress()

    return pass_on


def test_worker_and_sign_of_life_are_recorded_beside_when_the_stage_was_called(follow, tmp_path):
    before = json.loads(call_record(tmp_path, "train").read_bytes())
    assert (before["pool"], before["flow_run"], before["worker"], before["sign_at"]) == ("gpu", str(RUN), None, None)
    sign = {"at": "2026-11-30T15:00:00+00:00", "host": "node7", "progress": {"step": 5, "total_steps": 40}}
    follow(f"`{json.dumps(sign)}`")
    after = json.loads(call_record(tmp_path, "train").read_bytes())
    assert after == before | {"worker": "node7", "sign_at": "2026-11-30T15:00:00+00:00"}
    with workspace_lock(tmp_path, command="ropeway run", profile="laptop"):
        found = read_running(tmp_path)
    assert (found.pool, found.worker, found.step) == ("gpu", "node7", 5)


def test_a_sign_that_is_no_json_is_passed_over(follow, tmp_path):
    follow("`{`")
    assert json.loads(call_record(tmp_path, "train").read_bytes())["worker"] is None
