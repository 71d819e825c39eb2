"""Test ids and parameters are the same in every process; else pytest-xdist refuses to run the suite.

Slow: xdist itself compares the ids of its two processes in each `make test`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Parameters are compared by value as far as plain data goes; of other objects only the type is stable.
PLUGIN = """
import json
import os
from pathlib import Path


def plain(value):
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return [[plain(key), plain(one)] for key, one in value.items()]
    is_data = value is None or isinstance(value, str | bytes | bool | int | float)
    return repr(value) if is_data else type(value).__qualname__


def pytest_collection_finish(session):
    found = [[item.nodeid, plain(getattr(getattr(item, "callspec", None), "params", {}))] for item in session.items]
    Path(os.environ["COLLECTED"]).write_text(json.dumps(found))
"""


def collect(folder, seed):
    """Return [id, parameters] of every test as a new process collects them."""
    (folder / "collected_plugin.py").write_text(PLUGIN)
    out = folder / f"collected-{seed}.json"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "COLLECTED": str(out), "PYTHONPATH": str(folder)}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "collected_plugin",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_processes_collect_the_same_tests_whatever_clock_and_hash_seed(tmp_path):
    first, began = collect(tmp_path, "1"), time.time()
    time.sleep(max(0.0, began + 1.1 - time.time()))  # a clock of whole seconds has moved on
    second = collect(tmp_path, "2")
    assert [one for one in zip(first, second, strict=False) if one[0] != one[1]] == []
    assert len(first) == len(second) > 1000
