"""W&B never blocks or fails training; dropped steps are counted and the API key is never written."""

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
    """A W&B run; `on_log` may raise or block."""

    def __init__(self, on_log=lambda: None):
        self.url, self.dir = "https://wandb.example/run/1", "/somewhere/offline-run-1/files"
        self.lines, self.finished, self.on_log = [], False, on_log

    def log(self, data, *, step):
        self.on_log()
        self.lines.append((step, data))

    def finish(self):
        self.finished = True


def lines(count, begin=1):
    return [{"step": step, "loss": 1 / step, "mfu": None} for step in range(begin, begin + count)]


@pytest.fixture
def fake(monkeypatch):
    """Replace wandb by a fake module whose `init` returns the next of `fake.runs`, or raises it if it is an error."""
    module = types.ModuleType("wandb")
    module.runs, module.calls = [], []

    def init(**options):
        module.calls.append(options)
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


def test_steps_are_logged_in_order_in_the_group_of_the_fingerprint(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = FakeRun()
    fake.runs = [run]
    tracker = opened(tmp_path)
    for line in lines(3):
        tracker.log(line)
    assert tracker.finish() == {"mode": "online", "link": run.url, "sent": 3, "dropped": 0, "trouble": []}
    assert run.lines == [(step, {"step": step, "loss": 1 / step}) for step in (1, 2, 3)]
    assert run.finished
    options = fake.calls[0]
    assert (options["group"], options["project"]) == ("fingerprint", "supervised-finetuning")
    assert KEY not in json.dumps(options)


def test_without_network_it_falls_back_to_offline_and_masks_the_key(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = FakeRun()
    fake.runs = [TimeoutError(f"no answer to {KEY} within 20 s"), run]
    tracker = opened(tmp_path)
    tracker.log(lines(1)[0])
    facts = tracker.finish()
    assert (facts["mode"], facts["link"], facts["sent"]) == ("offline", "/somewhere/offline-run-1", 1)
    assert facts["trouble"] == ["online: TimeoutError: no answer to *** within 20 s"]


def test_a_dead_wandb_core_opens_the_breaker_and_steps_are_counted(fake, tmp_path):
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


def test_a_briefly_full_disk_drops_only_the_steps_of_that_time(fake, tmp_path):
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


def test_hanging_calls_do_not_block_and_the_oldest_steps_are_dropped(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_QUEUE_LINES", 5)
    release, inside = threading.Event(), threading.Event()

    def hang():
        inside.set()
        release.wait(60)

    run = FakeRun(hang)
    fake.runs = [run]
    tracker = opened(tmp_path)
    tracker.log(lines(1)[0])
    assert inside.wait(30)
    for line in lines(8, begin=2):  # the thread holds step 1: the queue keeps five of these
        tracker.log(line)
    facts = tracker.finish(seconds=0.01)
    assert tracker.is_stuck
    assert facts["dropped"] == 3 + 5
    assert facts["trouble"] == ["W&B did not finish within 0.01 s"]
    release.set()
    tracker._thread.join(30)
    assert [step for step, _ in run.lines] == [1, 5, 6, 7, 8, 9]


def test_wandb_mode_disabled_starts_no_run(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = opened(tmp_path)
    tracker.log(lines(1)[0])
    assert tracker.finish() == {"mode": "off", "link": None, "sent": 0, "dropped": 1, "trouble": []}
    assert fake.calls == []


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


def test_a_key_in_netrc_enables_online_mode(tmp_path):
    path = tmp_path / ".netrc"
    path.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    path.chmod(0o600)
    assert choose_modes({}, home=tmp_path) == ("online", "offline")


def test_a_real_offline_run_survives_the_death_of_wandb_core(tmp_path):
    """In a real W&B run whose core is killed, logged steps stay on disk and only the final result shows the loss."""
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


def test_a_tracker_without_modes_is_not_stuck():
    assert not Tracker(lambda _: FakeRun(), ()).is_stuck
