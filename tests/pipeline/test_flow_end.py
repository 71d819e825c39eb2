"""A run's end: `ropeway run` ends soon after its result, whatever its server does, and says what the page lacks."""

import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from tests.support.processes import is_server, kill_all, read_until

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)
LINES = 10_000  # of 20,000 Prefect's own worker had thousands in its queue at the end


def chatty(lines):
    return f"for n in range({lines}): print(f'line {{n}} of a chatty stage')"


def run_command(workspace):
    """Start `ropeway run` as a person does."""
    command = [sys.executable, "-m", "ropeway.cli.main", "run"]
    return subprocess.Popen(command, cwd=workspace.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_chatty_stages_lines_are_on_its_page_or_said_to_be_missing(own_prefect):
    own_prefect.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    own_prefect.trouble("train", chatty(LINES))
    with run_command(own_prefect) as process:
        said = "".join(read_until(process, "laptop: Published in"))
        began = time.monotonic()
        said += process.stdout.read()
    assert time.monotonic() - began < 60
    assert process.returncode == 0
    missing = re.search(r"train: ([\d,]+) log lines did not reach", said)  # beside other work it may be too slow
    lacks = int(missing[1].replace(",", "")) if missing else 0
    import sqlite3

    with sqlite3.connect(own_prefect.root / ".prefect" / "prefect.db") as database:
        (count,) = database.execute("select count(*) from log where message like 'line % of a chatty stage'").fetchone()
    database.close()
    assert LINES - lacks <= count <= LINES  # a request without an answer may have arrived
    assert count > LINES // 2
    log = (own_prefect.root / ".work" / "logs" / "train.log").read_text()
    assert log.count("of a chatty stage") == LINES


@pytest.mark.parametrize("when", ["while lines come", "at the result"])
def test_a_frozen_server_does_not_delay_the_result(own_prefect, when):
    own_prefect.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    own_prefect.trouble("package", chatty(5_000) if when == "while lines come" else "")
    with run_command(own_prefect) as process:
        said = read_until(process, "line 10 of a" if when == "while lines come" else "publish: Published")
        below = psutil.Process(process.pid).children(recursive=True)
        servers = [one for one in below if is_server(one)]
        assert len(servers) == 1
        for one in servers:
            one.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        if when == "while lines come":
            said += read_until(process, "the Prefect server at")  # is away: what follows needs it, so the run waits
            for one in servers:
                one.send_signal(signal.SIGCONT)
            said += read_until(process, "laptop: Published in")
            began = time.monotonic()
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    text = "".join(said) + rest
    assert time.monotonic() - began < 60
    assert "laptop: Published in" in text
    if when == "at the result":
        assert "did not record the end of this run" in text
    _, alive = psutil.wait_procs(servers, timeout=120)
    kill_all(alive)
    assert alive == []


@pytest.fixture
def silent():
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/api"


@pytest.mark.parametrize("kind", ["silent", "closed"])
@pytest.mark.usefixtures("prefect_api")
def test_lines_no_server_accepts_are_counted_by_step_and_block_nothing(silent, monkeypatch, kind):
    from ropeway.orchestration.run_page import PageLog

    monkeypatch.setattr("ropeway.orchestration.run_page._MAX_QUEUED", 1000)
    log = PageLog(silent if kind == "silent" else "http://127.0.0.1:9/api")
    began = time.monotonic()
    for number in range(3000):
        log.add("train" if number < 2500 else "evaluate", f"line {number}", flow_run="0" * 32, task_run="1" * 32)
    left = log.close(0.5)
    assert time.monotonic() - began < 10
    assert sum(left.values()) == 3000
    assert left["evaluate"] == 500


def test_lines_arrive_in_order_and_none_is_lost(prefect_api):
    from ropeway.orchestration.run_page import PageLog

    run = ask(prefect_api.url, "/flow_runs/", {"flow_id": ask(prefect_api.url, "/flows/", {"name": "lines"})["id"]})[
        "id"
    ]
    log = PageLog(prefect_api.url)
    for number in range(1500):
        log.add("train", f"line {number}", flow_run=run, task_run=None)
    assert log.close(30) == {}
    found, offset = [], 0
    asked = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
    while page := ask(prefect_api.url, "/logs/filter", {**asked, "offset": offset}):
        found += [entry["message"] for entry in page]
        offset += len(page)
    assert found == [f"line {number}" for number in range(1500)]


def ask(url, path, body):
    with httpx.Client(trust_env=False, timeout=120) as client:
        return client.post(url + path, json=body).json()
