"""Deaths and races. Children are started as `python -m tests.support.registry_world ROLE …`; each has one role."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ropeway.registry import Registry
from tests.support.registry_chaos import kill_publishes
from tests.support.registry_world import PROMOTIONS, make_package, put, tiny

ROOT = Path(__file__).parents[2]
PROCESSES, PUBLISHERS = 6, 8


def start(role: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.registry_world", role, *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdin=pipe, stdout=pipe, text=True
    )


def race(children: list[subprocess.Popen[str]]) -> list[list]:
    """Let children go together once all are ready; return what each reported."""
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    reports = [json.loads(child.communicate(timeout=500)[0]) for child in children]
    assert [child.returncode for child in children] == [0] * len(children)
    return reports


def test_thirty_racing_promotions_are_thirty_events_in_one_chain(store, tmp_path):
    digests = [put(store, make_package(tmp_path / f"p{n}", b"%d" % n)).digest for n in range(2)]
    reports = race([start("promote", store.url, *digests) for _ in range(PROCESSES)])
    events = tiny(store).alias("candidate").events
    assert store.list_keys("models/tiny/aliases/candidate/") == [
        f"models/tiny/aliases/candidate/{n:08d}.json" for n in range(1, PROCESSES * PROMOTIONS + 1)
    ]
    assert sorted(number for numbers in reports for number in numbers) == list(range(1, PROCESSES * PROMOTIONS + 1))
    assert [event["prev"] for event in events] == [None, *(event["digest"] for event in events[:-1])]


def test_eight_publishers_of_one_package_make_one_version(store, tmp_path):
    package = make_package(tmp_path / "package", os.urandom(1 << 20))
    reports = race([start("publish", store.url, str(package)) for _ in range(PUBLISHERS)])
    assert len({digest for digest, _, _ in reports}) == 1
    assert [number for _, number, _ in reports] == [1] * PUBLISHERS
    assert sum(created for _, _, created in reports) == 1
    assert store.list_keys("intents/") == []
    assert Registry(store).version("tiny@v1").verify().files == 4


def test_publishers_of_different_packages_get_different_numbers(store, tmp_path):
    packages = [make_package(tmp_path / f"p{n}", b"%d" % n) for n in range(4)]
    reports = race([start("publish", store.url, str(package)) for package in packages])
    assert sorted(number for _, number, _ in reports) == [1, 2, 3, 4]


@pytest.mark.parametrize("act", ["publish", "pull"])
def test_a_kill_before_any_disk_write_leaves_nothing_dangling_and_a_retry_completes(act, tmp_path):
    child = start(f"sweep-{act}", str(tmp_path))
    moments = json.loads(child.communicate(timeout=500)[0])
    assert child.returncode == 0
    assert moments >= {"publish": 30, "pull": 8}[act]


def test_killed_publishes_complete_and_upload_only_what_is_missing(store, tmp_path):
    outcome = kill_publishes(store.url, tmp_path / "packages", kills=3, seed=0)
    assert outcome.faults == []
    assert outcome.kills == 3
    assert outcome.looks > 0
