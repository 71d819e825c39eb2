"""Supervision of real processes: no process is left, and TERM reaches the right ones."""

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.processes import command_of

PYTHON = sys.executable
# Each fake process prints its role on the tree's shared stdout, so a test waits for it instead of sleeping.
SAY = "import os, signal, subprocess, sys\ndef say(*words): os.write(1, (' '.join(map(str, words)) + '\\n').encode())\n"


class Tree:
    """A supervised process tree: its supervisor (or the parent of it) and the output of its members."""

    def __init__(self, command, **options):
        self.root = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
        )
        self.lines = []
        self.members = {}

    def wait_for(self, word, times=1):
        """Read until `word` was printed `times` times; return the processes that printed it."""
        found = []
        while len(found) < times:
            line = self.root.stdout.readline()
            assert line, f"ended before {word!r}: {self.lines}"
            self.lines.append(line.strip())
            if line.startswith(f"{word} "):
                found.append(psutil.Process(int(line.split()[1])))
        return found

    def finish(self):
        """Return the exit code after every member has closed the tree's stdout."""
        self.lines += self.root.stdout.read().splitlines()
        return self.root.wait(30)


@pytest.fixture
def script(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SAY + textwrap.dedent(text))
        return str(path)

    return write


@pytest.fixture
def supervise(tmp_path):
    trees = []

    def start(*command, grace=30, leader=None, by=(), record="stage.exit.json", **options):
        arguments = ["--record", str(tmp_path / record)]
        arguments += [] if grace is None else ["--grace", str(grace)]
        arguments += ["--leader", str(leader)] if leader else []
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("env", {})}
        full = [*by, PYTHON, "-m", "ropeway.runtime.supervise", *arguments, "--", *map(str, command)]
        trees.append(Tree(full, cwd=tmp_path, env=env, **options))
        return trees[-1]

    yield start
    for tree in trees:
        tree.root.kill()
        tree.root.wait()
        tree.root.stdout.close()


@pytest.fixture
def record(tmp_path):
    return lambda: json.loads((tmp_path / "stage.exit.json").read_text())


def alive(processes):
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def await_end(processes):
    for process in processes:
        with suppress(ProcessLookupError):
            end = os.pidfd_open(process.pid)  # readable at its death, reaped or not
            assert select.select([end], [], [], 20)[0], f"still alive: {process}"
            os.close(end)


FAMILY = """
    grandchild = "import os, signal; os.write(1, f'member {os.getpid()}\\\\n'.encode()); signal.pause()"
    subprocess.Popen([sys.executable, "-c", grandchild], start_new_session=True)
    say("member", os.getpid())
    signal.pause()
"""


@pytest.mark.parametrize(
    ("code", "died_of"), [(0, None), (1, None), (64, None), (75, None), (255, None), (247, "SIGKILL")]
)
def test_the_exit_code_of_the_command_is_passed_on_and_recorded(supervise, record, code, died_of):
    assert supervise(PYTHON, "-c", f"raise SystemExit({code})").finish() == code
    found = record()
    assert (found["stage"], found["code"], found["signal"], found["why"]) == ("stage", code, died_of, None)


def test_a_command_killed_by_a_signal_is_recorded_with_the_signal(supervise, record):
    assert supervise(PYTHON, "-c", "import os; os.kill(os.getpid(), 9)").finish() == 137
    assert record()["signal"] == "SIGKILL"


def test_a_command_that_does_not_exist_is_a_config_error(supervise):
    tree = supervise("no-such-command")
    assert tree.finish() == 64
    assert "no-such-command: command not found" in tree.lines[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_ends_the_whole_tree_including_other_sessions(supervise, script, record, number):
    tree = supervise(PYTHON, script("family.py", FAMILY))
    members = tree.wait_for("member", times=2)
    tree.root.send_signal(number)
    assert tree.root.wait(20) == 128 + number
    assert not alive(members)
    assert record()["why"] == f"received {number.name}"


def test_a_process_that_ignores_term_is_killed_after_the_grace_period(supervise, script):
    ignores_term = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay('member', os.getpid())\nwhile True: signal.pause()"
    )
    tree = supervise(PYTHON, script("ignores_term.py", ignores_term), grace=0.5)
    members = tree.wait_for("member")
    tree.root.terminate()
    assert tree.root.wait(20) == 143
    assert not alive(members)


def test_leftover_processes_are_ended_after_the_command_exits(supervise, script, record):
    exits_first = FAMILY.replace("signal.pause()\n", "sys.exit(7)\n")
    tree = supervise(PYTHON, script("exits_first.py", exits_first))
    assert tree.finish() == 7  # stdout is closed: the grandchild, which held it open, has exited
    assert record()["code"] == 7


RANK = """
    import os, signal, sys
    def ask(*_):
        os.write(1, f"saved {os.getpid()}\\n".encode())
        os._exit(75)
    signal.signal(signal.SIGTERM, ask)
    os.write(1, f"rank {os.getpid()}\\n".encode())
    while True: signal.pause()
"""
LAUNCHER = """
    def ask(*_):
        say("launcher-received-term", os.getpid())
    signal.signal(signal.SIGTERM, ask)
    ranks = [subprocess.Popen([sys.executable, "-u", "-m", "ropeway.stages.train.rank", "/root"]) for _ in range(2)]
    say("launcher", os.getpid())
    sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.fixture
def launcher(script, tmp_path):
    for part in ("ropeway/__init__.py", "ropeway/stages/__init__.py", "ropeway/stages/train/__init__.py"):
        script(f"fake/{part}", "")
    (tmp_path / "fake/ropeway/stages/train/rank.py").write_text(textwrap.dedent(RANK))
    path = script("launcher.py", f"os.chdir({str(tmp_path / 'fake')!r})\n" + textwrap.dedent(LAUNCHER))
    # Like DeepSpeed's launcher, it has the module of the ranks on its command line.
    return [PYTHON, path, "--module", "ropeway.stages.train.rank"]


def test_only_ranks_receive_term_and_their_code_75_is_passed_on(supervise, launcher, record):
    tree = supervise(*launcher)
    ranks = tree.wait_for("rank", times=2)
    tree.root.terminate()
    assert tree.finish() == 75
    assert not alive(ranks)
    assert sum(line.startswith("saved") for line in tree.lines) == 2
    assert not any(line.startswith("launcher-received-term") for line in tree.lines)
    assert record()["code"] == 75


REMOTE = """
    import time
    from pathlib import Path
    from ropeway.runtime.grace import StopFiles
    signal.signal(signal.SIGTERM, lambda *_: (say("launcher-received-term", os.getpid()), os._exit(1)))
    files = StopFiles(Path(), "stage")
    files.open()
    files.write_seconds(float(sys.argv[1]))
    say("launcher", os.getpid())
    while sys.argv[2] == "hangs" or not files.is_stop_requested():
        time.sleep(0.02)
    sys.exit(75)
"""


def test_ranks_of_other_machines_are_asked_through_the_file_and_their_launcher_is_not(supervise, script, record):
    # Like DeepSpeed's runner and srun, it has the command line of a rank as its arguments.
    rank = [PYTHON, "-m", "ropeway.stages.train.rank", "/root"]
    tree = supervise(PYTHON, script("remote.py", REMOTE), 513, "saves", "env", *rank, grace=None)
    tree.wait_for("launcher")
    tree.root.terminate()
    assert tree.finish() == 75
    assert not any(line.startswith("launcher-received-term") for line in tree.lines)
    assert any("grace period 513 s" in line for line in tree.lines)
    assert (record()["code"], record()["why"]) == (75, "received SIGTERM")


def test_a_launcher_whose_remote_ranks_do_not_end_receives_term_after_the_grace_period(supervise, script):
    tree = supervise(PYTHON, script("remote.py", REMOTE), 60, "hangs", grace=0.5)
    tree.wait_for("launcher")
    tree.root.terminate()
    assert tree.finish() == 143
    assert any(line.startswith("launcher-received-term") for line in tree.lines)


def test_what_an_earlier_attempt_recorded_does_not_count(supervise, script, tmp_path):
    (tmp_path / "stage.grace.json").write_text('{"seconds": 513}')
    (tmp_path / "stage.stop").write_text("")
    tree = supervise(PYTHON, script("family.py", FAMILY), grace=None, env={"ROPEWAY_GRACE_SECONDS": "33"})
    members = tree.wait_for("member", times=2)
    assert not (tmp_path / "stage.stop").exists()
    tree.root.terminate()
    assert tree.finish() == 143
    assert any("grace period 33 s" in line for line in tree.lines)
    assert not alive(members)


def test_a_grace_period_that_is_no_number_ends_before_the_command_starts(supervise):
    tree = supervise(PYTHON, "-c", "print('started')", grace=None, env={"ROPEWAY_GRACE_SECONDS": "a minute"})
    assert tree.finish() == 64
    assert "ROPEWAY_GRACE_SECONDS" in tree.lines[-1]


@pytest.mark.parametrize(
    ("line", "is_rank"),
    [
        ("/e/bin/python -m ropeway.stages.train.rank /w tiny abc 0", True),
        ("/e/bin/python -u -m ropeway.stages.train.rank /w tiny abc 0", True),
        ("/e/bin/python -m deepspeed.launcher.launch --module ropeway.stages.train.rank /w", False),
        ("/e/bin/python -m deepspeed.launcher.runner env /e/bin/python -m ropeway.stages.train.rank /w", False),
        ("pdsh -S -w a,b /e/bin/python -u -m deepspeed.launcher.launch env python -m ropeway.stages.train.rank", False),
        ("srun --ntasks=16 --export=ALL /e/bin/python -m ropeway.stages.train.rank /w", False),
        ("/e/bin/python", False),
        ("", False),
    ],
)
def test_a_launcher_that_has_a_rank_s_command_line_as_argument_is_no_rank(line, is_rank):
    from ropeway.runtime.supervise import runs_rank

    assert runs_rank(line.split()) == is_rank


@pytest.fixture
def fake_dvc(script):
    """A program named `dvc` that runs a command through a shell and sets DVC_STAGE."""
    text = """
        os.environ["DVC_STAGE"] = "stage"
        shell = subprocess.Popen(["sh", "-c", sys.argv[1] + "; exit $?"], start_new_session=False)
        say("dvc", os.getpid())
        sys.exit(shell.wait())
    """
    return script("bin/dvc", text)


@pytest.mark.parametrize("victim", ["dvc", "sh"])
def test_after_dvc_or_its_shell_is_killed_the_ranks_save_and_exit(launcher, fake_dvc, tmp_path, record, victim):
    inner = f"{PYTHON} -m ropeway.runtime.supervise --record {tmp_path / 'stage.exit.json'} -- {' '.join(launcher)}"
    tree = Tree([PYTHON, fake_dvc, inner], cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    ranks = tree.wait_for("rank", times=2)
    dvc = psutil.Process(tree.root.pid)
    everyone = dvc.children(recursive=True)
    (dvc if victim == "dvc" else dvc.children()[0]).kill()
    await_end(everyone)
    tree.finish()
    assert not alive(ranks)
    assert sum(line.startswith("saved") for line in tree.lines) == 2
    assert record()["code"] == 75
    assert "died" in record()["why"]
    tree.root.stdout.close()


def test_of_two_nested_supervisors_the_inner_one_stops_the_ranks(supervise, launcher, fake_dvc, tmp_path):
    inner = f"{PYTHON} -m ropeway.runtime.supervise --record {tmp_path / 'inner.exit.json'} -- {' '.join(launcher)}"
    tree = supervise(PYTHON, fake_dvc, inner)
    tree.wait_for("rank", times=2)
    everyone = psutil.Process(tree.root.pid).children(recursive=True)
    tree.root.terminate()
    assert tree.root.wait(20) == 143
    assert not alive(everyone)
    tree.finish()
    assert sum(line.startswith("saved") for line in tree.lines) == 2
    assert not any(line.startswith("launcher-received-term") for line in tree.lines)
    assert json.loads((tmp_path / "inner.exit.json").read_text())["code"] == 75


def test_after_the_inner_supervisor_is_killed_no_process_is_left(supervise, script, fake_dvc, tmp_path):
    family = script("family.py", FAMILY)
    inner = f"{PYTHON} -m ropeway.runtime.supervise --record {tmp_path / 'inner.exit.json'} -- {PYTHON} {family}"
    tree = supervise(PYTHON, fake_dvc, inner)
    members = tree.wait_for("member", times=2)
    dvc = psutil.Process(tree.root.pid).children()[0]
    next(p for p in dvc.children(recursive=True) if "ropeway.runtime.supervise" in command_of(p)).kill()
    assert tree.root.wait(20) == 137
    assert not alive(members)
    tree.finish()


def test_the_command_ends_when_its_supervisor_is_killed(supervise, script):
    tree = supervise(PYTHON, script("one.py", "say('member', os.getpid())\nsignal.pause()"))
    members = tree.wait_for("member")
    tree.root.kill()
    await_end(members)


LEADER = """
    arguments = [sys.executable, "-m", "ropeway.runtime.supervise", "--record", "stage.exit.json", *sys.argv[1:]]
    arguments[5:5] = ["--leader", str(os.getpid())] if os.environ.get("LEADS") else []
    subprocess.Popen(arguments)
    signal.pause()
"""


def test_the_death_of_the_leader_ends_the_tree(script, tmp_path):
    env = {**os.environ, "LEADS": "1"}
    tree = Tree([PYTHON, script("leader.py", LEADER), "--", PYTHON, script("f.py", FAMILY)], cwd=tmp_path, env=env)
    members = tree.wait_for("member", times=2)
    tree.root.kill()
    await_end(members)
    tree.finish()
    tree.root.stdout.close()


def test_without_leader_and_dvc_the_tree_outlives_its_parent(script, tmp_path):
    tree = Tree([PYTHON, script("leader.py", LEADER), "--", PYTHON, script("f.py", FAMILY)], cwd=tmp_path)
    members = tree.wait_for("member", times=2)
    supervisor = next(
        p for p in psutil.Process(tree.root.pid).children() if "ropeway.runtime.supervise" in command_of(p)
    )
    tree.root.kill()
    tree.root.wait()
    with pytest.raises(psutil.TimeoutExpired):
        supervisor.wait(0.7)  # it polls every 0.5 s
    assert len(alive(members)) == 2
    supervisor.terminate()
    await_end([supervisor, *members])
    tree.root.stdout.close()


def test_under_nohup_sighup_is_ignored(supervise, script):
    tree = supervise(PYTHON, script("family.py", FAMILY), by=["nohup"])
    members = tree.wait_for("member", times=2)
    tree.root.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        tree.root.wait(0.7)
    assert len(alive(members)) == 2
    tree.root.terminate()
    assert tree.root.wait(20) == 143


@pytest.mark.parametrize("how", ["leader", "dvc"])
def test_a_command_whose_leader_died_before_it_is_not_started(supervise, record, tmp_path, how):
    dead = subprocess.Popen(["true"])
    dead.wait()
    touch = f"open({str(tmp_path / 'ran')!r}, 'w')"
    if how == "leader":
        tree = supervise(PYTHON, "-c", touch, leader=dead.pid)
        assert tree.finish() == 143
    else:  # an orphan with DVC's environment: adopted by pid 1 before it reads its ancestors
        code = f"import os, time, sys\nwhile os.getppid() != 1: time.sleep(0.01)\nos.execv({PYTHON!r}, sys.argv[1:])"
        arguments = [
            PYTHON,
            "-m",
            "ropeway.runtime.supervise",
            "--record",
            "stage.exit.json",
            "--",
            PYTHON,
            "-c",
            touch,
        ]
        mother = f"import subprocess, sys; subprocess.Popen([{PYTHON!r}, '-c', {code!r}, *sys.argv[1:]])"
        env = {**os.environ, "DVC_STAGE": "stage"}
        tree = Tree([PYTHON, "-c", mother, *arguments], cwd=tmp_path, env=env)
        tree.finish()
        tree.root.stdout.close()
    assert not (tmp_path / "ran").exists()
    assert record()["code"] == 143


def test_an_earlier_exit_record_is_removed_before_the_command_starts(supervise, tmp_path):
    path = tmp_path / "stage.exit.json"
    path.write_text("{}")
    look = f"import pathlib, sys; sys.exit(pathlib.Path({str(path)!r}).exists())"
    assert supervise(PYTHON, "-c", look).finish() == 0


@pytest.mark.parametrize("code", [0, 3, 75])
def test_a_record_that_cannot_be_written_does_not_change_how_the_command_ended(supervise, script, tmp_path, code):
    folder = tmp_path / "work"
    folder.mkdir()
    path = script("command.py", f"os.rmdir({str(folder)!r})\nopen({str(folder)!r}, 'w').close()\nsys.exit({code})\n")
    tree = supervise(PYTHON, path, record="work/train.exit.json")
    assert tree.finish() == code
    assert not any("Traceback" in line for line in tree.lines)
    assert any("record was not written" in line for line in tree.lines)


def test_the_supervisor_imports_no_heavy_package():
    # Every stage pays for these imports; the supervisor's start takes 0.07 s in all.
    heavy = "{'torch', 'pydantic', 'prefect', 'dvc'}"
    code = f"import ropeway.runtime.supervise, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([PYTHON, "-c", code], check=False, cwd=Path(__file__).parent).returncode == 0


def test_a_zombie_leader_that_cannot_be_reaped_yet_is_waited_for(monkeypatch):
    from ropeway.runtime import supervise as module

    class Child:
        pid, returncode = 1, None

    class FakePipe:
        waits = 0

        def wait(self, _seconds):
            self.waits += 1
            if self.waits == 2:
                Child.returncode = -15

    monkeypatch.setattr(module, "_tree", lambda _child: [])
    pipe = FakePipe()
    module._end_tree(Child, pipe, 30)
    assert (pipe.waits, Child.returncode) == (2, -15)
