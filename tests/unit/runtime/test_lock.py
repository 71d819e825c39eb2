import os
import select
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest

from ropeway.runtime.errors import TemporaryError
from ropeway.runtime.lock import is_held, read_last_holder, workspace_lock

HOLD = """
import os, subprocess, sys
from pathlib import Path
from ropeway.runtime.lock import workspace_lock
with workspace_lock(Path(sys.argv[1]), command="ropeway run", profile="laptop") as held:
    if sys.argv[2:] == ["share"]:
        subprocess.Popen(["cat"], pass_fds=[held.handle])
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(root, *arguments):
    command = [sys.executable, "-c", HOLD, str(root), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def acquire(root):
    with workspace_lock(root, command="ropeway run"):
        pass


def acquire_in_child(root, **environment):
    """Acquire the lock in a child process; return its output or the last line of its error."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom ropeway.runtime.lock import workspace_lock\n"
        f"with workspace_lock(Path({str(root)!r}), command='ropeway stage train') as held: print(held.handle is None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr.splitlines()[-1]


def test_the_error_of_a_second_process_names_the_holder(tmp_path):
    with holder(tmp_path) as process, pytest.raises(TemporaryError) as error:
        acquire(tmp_path)
    message = str(error.value)
    assert f"held by pid {process.pid}, `ropeway run` of profile laptop, since " in message
    assert "or stop it" in message
    assert error.value.exit_code == 75


def test_the_lock_is_released_with_its_block_and_with_its_process(tmp_path):
    acquire(tmp_path)
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        acquire(tmp_path)  # the record of the killed holder is stale


def test_stages_of_the_holder_do_not_acquire_the_lock_again(tmp_path):
    with workspace_lock(tmp_path, command="ropeway run") as held:
        assert held.environment == {"ROPEWAY_LOCK_HELD": str(os.getpid())}
        assert acquire_in_child(tmp_path, **held.environment) == "True"
        assert "TemporaryError" in acquire_in_child(tmp_path)


def test_a_pid_that_is_not_a_living_ancestor_grants_nothing(tmp_path):
    with holder(tmp_path) as process:  # alive and holds the lock, but not an ancestor of the child
        assert "TemporaryError" in acquire_in_child(tmp_path, ROPEWAY_LOCK_HELD=str(process.pid))
    with workspace_lock(tmp_path, command="ropeway run") as held:
        other = tmp_path / "other"
        other.mkdir()
        assert acquire_in_child(other, **held.environment) == "False"  # another workspace has its own lock
    assert acquire_in_child(tmp_path, ROPEWAY_LOCK_HELD="not a pid") == "False"


def test_the_lock_of_a_killed_holder_lasts_until_its_stages_exit(tmp_path):
    with holder(tmp_path, "share") as process:
        (stage,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        with pytest.raises(TemporaryError, match=f"pid {process.pid}.*killed.*Run again"):
            acquire(tmp_path)
        end = os.pidfd_open(stage.pid)
        process.stdin.close()  # `cat` ends
        assert select.select([end], [], [], 20)[0]
        os.close(end)
        acquire(tmp_path)


def test_a_holder_without_a_record_yet_still_keeps_the_lock(tmp_path):
    with holder(tmp_path):
        (tmp_path / ".work" / "lock").write_text("")
        with pytest.raises(TemporaryError, match="another process"):
            acquire(tmp_path)


def test_the_holder_is_read_without_touching_the_lock(tmp_path):
    assert read_last_holder(tmp_path) is None
    with holder(tmp_path) as process:
        found = read_last_holder(tmp_path)
        assert (found.pid, found.command, found.profile, found.holds) == (process.pid, "ropeway run", "laptop", True)
    assert not read_last_holder(tmp_path).holds


def test_a_process_that_released_the_lock_and_still_runs_does_not_hold_it(tmp_path):
    with workspace_lock(tmp_path, command="ropeway run"):
        assert read_last_holder(tmp_path).holds
    assert read_last_holder(tmp_path).pid == os.getpid()
    assert not read_last_holder(tmp_path).holds


def test_whether_a_lock_is_held_can_be_asked_without_taking_it(tmp_path):
    assert not is_held(tmp_path)
    with workspace_lock(tmp_path, command="c"):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
