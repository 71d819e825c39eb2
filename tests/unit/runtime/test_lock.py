import os
import select
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest

from ropeway.runtime.errors import TemporaryError
from ropeway.runtime.lock import workspace_lock

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


def take(root):
    with workspace_lock(root, command="ropeway run"):
        pass


def enter(root, **environment):
    """Try the lock in a child of this process; return what it printed."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom ropeway.runtime.lock import workspace_lock\n"
        f"with workspace_lock(Path({str(root)!r}), command='ropeway stage train') as held: print(held.handle is None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr.splitlines()[-1]


def test_a_second_process_is_told_who_holds_the_workspace(tmp_path):
    with holder(tmp_path) as process, pytest.raises(TemporaryError) as error:
        take(tmp_path)
    words = str(error.value)
    assert f"held by pid {process.pid}, `ropeway run` of profile laptop, since " in words
    assert "wait for it or stop it" in words
    assert error.value.exit_code == 75


def test_a_lock_ends_with_its_block_and_with_its_process(tmp_path):
    take(tmp_path)
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        take(tmp_path)  # what the killed holder wrote is stale


def test_stages_of_the_holder_enter_under_it(tmp_path):
    with workspace_lock(tmp_path, command="ropeway run") as held:
        assert held.environment == {"ROPEWAY_LOCK_HELD": str(os.getpid())}
        assert enter(tmp_path, **held.environment) == "True"
        assert "TemporaryError" in enter(tmp_path)


def test_a_variable_that_names_no_living_ancestor_opens_nothing(tmp_path):
    with holder(tmp_path) as process:  # lives and holds, but is no ancestor of who asks
        assert "TemporaryError" in enter(tmp_path, ROPEWAY_LOCK_HELD=str(process.pid))
    with workspace_lock(tmp_path, command="ropeway run") as held:
        other = tmp_path / "other"
        other.mkdir()
        assert enter(other, **held.environment) == "False"  # another workspace has its own lock
    assert enter(tmp_path, ROPEWAY_LOCK_HELD="not a pid") == "False"


def test_a_killed_holder_s_lock_lasts_while_what_it_started_still_works(tmp_path):
    with holder(tmp_path, "share") as process:
        (stage,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        with pytest.raises(TemporaryError, match="it was killed and its stages are still saving"):
            take(tmp_path)
        end = os.pidfd_open(stage.pid)
        process.stdin.close()  # `cat` ends
        assert select.select([end], [], [], 20)[0]
        os.close(end)
        take(tmp_path)


def test_a_holder_that_has_not_written_its_name_yet_still_turns_others_away(tmp_path):
    with holder(tmp_path):
        (tmp_path / ".work" / "lock").write_text("")
        with pytest.raises(TemporaryError, match="held by another process"):
            take(tmp_path)
