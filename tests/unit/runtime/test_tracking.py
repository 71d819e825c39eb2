"""Whatever W&B does, training neither waits nor fails; what was lost is counted and no key is written."""

import json
import subprocess
import sys
import textwrap
import threading
import types

import pytest

from ropeway.runtime import tracking
from ropeway.runtime.tracking import TrackedRun, Tracker, choose_modes, open_tracker

KEY = "0123456789abcdef0123456789abcdef01234567"


class FakeRun:
    """A W&B run; `log_does` may raise or wait."""

    def __init__(self, log_does=lambda: None):
        self.url, self.dir = "https://wandb.example/run/1", "/somewhere/offline-run-1/files"
        self.lines, self.finished, self.log_does = [], False, log_does

    def log(self, data, *, step):
        self.log_does()
        self.lines.append((step, data))

    def finish(self):
        self.finished = True


def lines(count, begin=1):
    return [{"step": step, "loss": 1 / step, "mfu": None} for step in range(begin, begin + count)]


@pytest.fixture
def fake(monkeypatch):
    """Put a fake module in W&B's place; `fake.runs` are what `init` gives, an error among them is raised."""
    module = types.ModuleType("wandb")
    module.runs, module.asked = [], []

    def init(**options):
        module.asked.append(options)
        given = module.runs.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    module.init, module.Settings = init, lambda **options: options
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return module


def opened(tmp_path):
    return open_tracker(TrackedRun(tmp_path / "work", "tiny-log-finetuned", "fingerprint", {"learning_rate": 1e-3}))


def test_lines_arrive_in_order_in_a_run_of_the_fingerprints_group(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = FakeRun()
    fake.runs = [run]
    tracker = opened(tmp_path)
    for line in lines(3):
        tracker.log(line)
    assert tracker.finish() == {"mode": "online", "link": run.url, "sent": 3, "dropped": 0, "trouble": []}
    assert run.lines == [(step, {"step": step, "loss": 1 / step}) for step in (1, 2, 3)]
    assert run.finished
    asked = fake.asked[0]
    assert (asked["group"], asked["project"]) == ("fingerprint", "supervised-finetuning")
    assert KEY not in json.dumps(asked)


def test_no_network_falls_back_to_offline_and_the_key_is_not_told(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = FakeRun()
    fake.runs = [TimeoutError(f"no answer to {KEY} within 20 s"), run]
    tracker = opened(tmp_path)
    tracker.log(lines(1)[0])
    facts = tracker.finish()
    assert (facts["mode"], facts["link"], facts["sent"]) == ("offline", "/somewhere/offline-run-1", 1)
    assert facts["trouble"] == ["online: TimeoutError: no answer to *** within 20 s"]


def test_a_core_that_died_opens_the_breaker_and_the_rest_is_counted(fake, tmp_path):
    def dead():
        raise ConnectionResetError("wandb-core is gone")

    fake.runs = [FakeRun(dead)]
    tracker = opened(tmp_path)
    for line in lines(10):
        tracker.log(line)
    facts = tracker.finish()
    assert (facts["sent"], facts["dropped"]) == (0, 10)
    assert facts["trouble"] == ["offline: ConnectionResetError: wandb-core is gone"]
    tracker.log(lines(1, begin=11)[0])


def test_a_disk_that_is_full_for_a_moment_loses_those_lines_only(fake, tmp_path):
    count = iter(range(100))

    def full():
        if next(count) in (1, 2):
            raise OSError(28, "No space left on device")

    fake.runs = [FakeRun(full)]
    tracker = opened(tmp_path)
    for line in lines(6):
        tracker.log(line)
    facts = tracker.finish()
    assert (facts["sent"], facts["dropped"], facts["trouble"]) == (4, 2, [])


def test_calls_that_hang_are_not_waited_for_and_the_oldest_lines_give_way(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_WAITING_LINES", 5)
    release, inside = threading.Event(), threading.Event()

    def hang():
        inside.set()
        release.wait(60)

    run = FakeRun(hang)
    fake.runs = [run]
    tracker = opened(tmp_path)
    tracker.log(lines(1)[0])
    assert inside.wait(30)
    for line in lines(8, begin=2):  # the thread holds line 1: five of these may wait
        tracker.log(line)
    facts = tracker.finish(seconds=0.01)
    assert tracker.is_stuck
    assert facts["dropped"] == 3 + 5
    assert facts["trouble"] == ["it did not finish within 0.01 s"]
    release.set()
    tracker._thread.join(30)
    assert [step for step, _ in run.lines] == [1, 5, 6, 7, 8, 9]


def test_nothing_is_started_where_it_is_switched_off(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = opened(tmp_path)
    tracker.log(lines(1)[0])
    assert tracker.finish() == {"mode": "off", "link": None, "sent": 0, "dropped": 1, "trouble": []}
    assert fake.asked == []


@pytest.mark.parametrize(
    ("environment", "modes"),
    [
        ({}, ("offline",)),
        ({"WANDB_API_KEY": KEY}, ("online", "offline")),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, ("offline",)),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, ()),
        ({"WANDB_MODE": "online"}, ("offline",)),
    ],
)
def test_it_goes_online_only_with_a_key(environment, modes, tmp_path):
    assert choose_modes(environment, home=tmp_path) == modes


def test_a_key_in_netrc_is_a_key(tmp_path):
    path = tmp_path / ".netrc"
    path.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    path.chmod(0o600)
    assert choose_modes({}, home=tmp_path) == ("online", "offline")


def test_the_real_thing_offline_survives_the_death_of_its_core(tmp_path):
    """One real W&B run: lines are on the disk, its core is killed, and the caller only learns of it in the end."""
    script = """
        import json, sys, time
        from pathlib import Path
        import psutil
        from ropeway.runtime.tracking import TrackedRun, open_tracker
        tracker = open_tracker(TrackedRun(Path(sys.argv[1]), "tiny", "group", {"a": 1}))
        tracker.log({"step": 1, "loss": 2.0})
        while not tracker._sent:
            time.sleep(0.01)
        for child in psutil.Process().children(recursive=True):
            child.kill()
            child.wait(10)
        for step in range(2, 8):
            tracker.log({"step": step, "loss": 1.0})
        print(json.dumps(tracker.finish()))
        sys.stdout.flush()
        import os; os._exit(0)
    """
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "work")],
        check=False, capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["sent"], facts["dropped"]) == (1, 6)
    assert facts["trouble"]
    assert list((tmp_path / "work" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_tracker_without_modes_has_nothing_to_wait_for():
    assert not Tracker(lambda _: FakeRun(), ()).is_stuck
