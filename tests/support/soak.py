"""`make soak RUNS=200`: a workspace that is retrained again and again while its data changes and everything fails.

Each round asks the served deployment for a retraining, as a schedule does. The data was changed before most rounds.
During every fourth round one fault: a rank, the run, `ropeway serve` or the Prefect server is killed, or the store
refuses, resets or freezes. A run that did not end well is asked for again, as on the next night. Every ten rounds the
retention rules run: `ropeway clean`, `registry retire`, `registry gc`; Prefect's own run all the time.

The last line is JSON: how runs ended, what was injected, sizes and memory per round and their medians in the first and
last third. The exit code is 1 if a run was lost, a version does not verify, or something grows without bound.
"""

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from ropeway.registry import Registry
from ropeway.runtime.workspace import count_bytes
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.flow_processes import free_port
from tests.support.main_job import MainJob
from tests.support.processes import command_of
from tests.support.s3_server import start_server
from tests.support.whole_run import SHAPE, make_workspace, say

FAULTS = ("rank", "run", "serve", "server", "store errors", "store resets", "store freezes")
OFTEN = (3, 3, 2, 1, 3, 2, 1)
CHANGE, FAULT = 0.35, 0.25  # most nights bring no new data
EVERY = 10  # rounds between two cleanings
KEEP = 5  # versions and results that stay
END_SECONDS = 900  # of one run, with everything that fails
GOOD = {"Published", "Unchanged", "Rejected"}
RETENTION_SECONDS = 3660  # of Prefect's database; the least that Prefect takes
GROWTH = 1.5  # median of the last third of the rounds to that of the first, beyond SLACK
SLACK = 16 << 20
# Every version passes: what is soaked is not the gate.
GATE = {
    "max_loss_increase_nats": 100.0, "min_gain_over_base_nats": -100.0, "max_accuracy_decrease": None,
    "max_position_loss_increase_nats": None, "max_passkey_decrease": None, "min_passkey_accuracy": None,
    "max_long_context_decrease": None, "max_task_decrease_errors": None, "drift": None,
}  # fmt: skip
SHARED = {"kind": "files", "paths": ["data/chats.jsonl"], "rows": "messages", "columns": {}, "expected_rows": None}


class Soak:
    """The workspace, its server and its runner, and what happened to them."""

    def __init__(self, folder, *, seed):
        self.draw = random.Random(seed)
        self.s3 = start_server()
        os.environ.update(self.s3.environment)  # this process looks at the store directly, the workspace by the proxy
        self.bucket = self.s3.make_bucket("soak")
        self.proxy = FaultProxy(self.s3.endpoint)
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.lines = 0
        self.job = self._make(folder)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.http = httpx.Client(trust_env=False, timeout=30)
        self.counts, self.faults, self.ended, self.rounds = Counter(), Counter(), Counter(), []
        self.lost = []
        self.server = self.runner = None

    def _make(self, folder):
        root = folder / "workspace"
        workspace = make_workspace(
            root,
            {"chats": SHARED},
            {"model_name": "scratch", "expected_model": {**SHAPE, "vocab_size": 320}, "gate": GATE},
        )
        job = MainJob(root)
        job.environment |= self.s3.environment
        job.environment |= {
            "AWS_ENDPOINT_URL_S3": self.proxy.endpoint,
            "ROPEWAY_REGISTRY": f"s3://{self.bucket}/registry",
            "ROPEWAY_RANKS": "1",
            "ROPEWAY_RETRY_SECONDS": "1",
            "AWS_MAX_ATTEMPTS": "4",
            "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(RETENTION_SECONDS),
            "PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": "120",
            "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "01:01:00",
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        }
        (root / "data").mkdir()
        self.records = [self._record() for _ in range(60)]
        self._write(root)
        (root / ".gitignore").write_text((root / ".gitignore").read_text() + "\n/data/\n")
        job.commit("a soak")
        assert workspace.profile == "tiny"
        return job

    def _record(self):
        self.lines += 1
        turns = [("user", f"{self.lines}? {say(self.lines, 5)}"), ("assistant", say(self.lines + 7, 30))]
        return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})

    def _write(self, root):
        partial = root / "data" / ".chats.partial"
        partial.write_text("".join(f"{one}\n" for one in self.records))
        partial.replace(root / "data" / "chats.jsonl")

    def change_data(self):
        """Append, remove or replace some records; the number stays between 40 and 120."""
        kind = self.draw.choice(["append", "replace", "remove"])
        count = self.draw.randint(1, 5)
        if kind != "append" and len(self.records) > 40:
            for _ in range(count):
                self.records.pop(self.draw.randrange(len(self.records)))
        if kind != "remove" and len(self.records) < 120:
            self.records += [self._record() for _ in range(count)]
        self._write(self.job.root)

    # The processes.

    def start_server(self):
        self.server = self.job.start("ropeway", "server", "--port", str(self.port))
        self._drain(self.server)
        self._await(self._answers, "the Prefect server")

    def start_runner(self):
        self.job.environment["PREFECT_API_URL"] = self.url
        self.runner = self.job.start("ropeway", "serve")
        self._drain(self.runner)
        self._await(self._deployment, "the deployment")

    def _drain(self, process):
        """Keep a process's pipe empty."""
        log = self.job.root.parent / f"{process.args[1]}.log"

        def copy():
            with log.open("a", buffering=1) as file:
                for line in process.stdout:
                    file.write(line)

        threading.Thread(target=copy, daemon=True).start()

    def _answers(self):
        with suppress(httpx.HTTPError):
            return self.http.get(f"{self.url}/health").status_code == httpx.codes.OK
        return False

    def _deployment(self):
        with suppress(httpx.HTTPError):
            found = self.http.get(f"{self.url}/deployments/name/retrain/retrain")
            if found.status_code == httpx.codes.OK and found.json().get("status") == "READY":
                return found.json()["id"]
        return None

    def _await(self, what, name, seconds=300):
        until = time.monotonic() + seconds
        while not (found := what()):
            if time.monotonic() > until:
                raise TimeoutError(f"{name} did not come back within {seconds} s")
            time.sleep(0.5)
        return found

    def _ask(self, method, path, body=None):
        """Ask the server, which may be away or busy for a while."""
        until = time.monotonic() + 300
        while True:
            with suppress(httpx.TransportError):
                answer = self.http.request(method, f"{self.url}{path}", json=body)
                if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    return answer.raise_for_status().json()
            if time.monotonic() > until:
                raise TimeoutError(f"{method} {path}: no answer for 300 s")
            time.sleep(0.5)

    # A round.

    def round(self, number):
        """Retrain once, perhaps with other data, perhaps with a fault; ask again until it ends well."""
        began = time.monotonic()
        fault = self.draw.choices(FAULTS, OFTEN)[0] if self.draw.random() < FAULT else None
        changed = bool(fault) or self.draw.random() < CHANGE  # an unchanged run is over before a fault
        if changed:
            self.change_data()
            self.counts["changed"] += 1
        states = []
        for attempt in range(6):
            state = self.retrain(fault if attempt == 0 else None)
            states.append(state)
            self.ended[state] += 1
            if state in GOOD:
                break
        else:
            self.lost.append(f"round {number}: {states}, fault {fault}")
        if number % EVERY == EVERY - 1:
            self.clean()
        self.rounds.append({"round": number, "fault": fault, "changed": changed, "states": states, **self.measure()})
        self.rounds[-1]["seconds"] = round(time.monotonic() - began, 1)
        print(json.dumps(self.rounds[-1]), file=sys.stderr, flush=True)

    def retrain(self, fault):
        """Ask the deployment for a run and return the name of its final state; `lost` if it has none in time."""
        deployment = self._await(self._deployment, "the deployment")
        run = self._ask("POST", f"/deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]
        moment = time.monotonic() + self.draw.uniform(2, 40) if fault else float("inf")
        until = time.monotonic() + END_SECONDS
        while time.monotonic() < until:
            if time.monotonic() > moment:
                moment = float("inf")
                self.strike(fault)
            state = self._ask("GET", f"/flow_runs/{run}")["state"]
            if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                self.proxy.faults.clear()
                return state["name"]
            time.sleep(0.5)
        return "lost"

    def strike(self, fault):
        """Inject a fault; what was killed and does not come back by itself is started again."""
        self.faults[fault] += 1
        if fault in ("rank", "run"):
            mark = {"rank": "ropeway.stages.train.rank", "run": "prefect.engine"}[fault]
            tree = psutil.Process(self.runner.pid).children(recursive=True)
            mine = [one for one in tree if mark in command_of(one) or any(mark in word for word in command_of(one))]
            if mine:
                with suppress(psutil.NoSuchProcess):
                    self.draw.choice(mine).kill()
                    self.counts[f"killed {fault}"] += 1
        elif fault == "serve":
            self.runner.kill()
            self.runner.wait()
            self.start_runner()
        elif fault == "server":
            for one in psutil.Process(self.server.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            self.server.kill()
            self.server.wait()
            self.start_server()
        elif fault == "store freezes":
            os.kill(self.s3.process.pid, signal.SIGSTOP)
            time.sleep(self.draw.uniform(2, 15))
            os.kill(self.s3.process.pid, signal.SIGCONT)
        else:
            kinds = ("500", "503", "lost") if fault == "store errors" else ("reset", "truncated")
            self.proxy.faults += [
                Fault(kind, method, ".", times=self.draw.randint(1, 4)) for kind in kinds for method in ("GET", "PUT")
            ]

    def clean(self):
        """Apply the retention rules, as a person's weekly job does."""
        for command in (
            ("clean", "--apply", "--keep", str(KEEP)),
            ("registry", "retire", "tiny", "--keep", str(KEEP), "--apply"),
            ("registry", "gc", "--apply", "--grace-hours", "0", "--withdrawn"),
        ):
            with self.job.start("ropeway", *command) as process:
                said = process.stdout.read()
            self.counts[f"{command[0]} {process.returncode}"] += 1
            if process.returncode:
                self.lost.append(f"{' '.join(command)}: exit code {process.returncode}")
                print(said, file=sys.stderr, flush=True)

    def measure(self):
        """Return sizes in bytes, memory in bytes and counts, as they are between two rounds."""
        root = self.job.root
        entries = Registry.open(f"s3://{self.bucket}/registry").store.list_entries("")
        trees = {"server": self.server, "runner": self.runner}
        return {
            "registry": sum(one.bytes for one in entries),
            "registry_objects": len(entries),
            "dvc_cache": count_bytes(root / ".dvc" / "cache"),
            "prefect": count_bytes(root / ".prefect"),
            "checkpoints": count_bytes(root / ".checkpoints"),
            "work": count_bytes(root / ".work"),
            "shm_files": sum(1 for _ in Path("/dev/shm").iterdir()),  # noqa: S108
            **{f"{name}_rss": _memory(process) for name, process in trees.items()},
            **{f"{name}_files": _files(process) for name, process in trees.items()},
        }

    def verify(self):
        """Verify every version that is not withdrawn; return how many there are, and the faulty ones."""
        artifact, faulty, count = Registry.open(f"s3://{self.bucket}/registry").artifact("tiny"), [], 0
        for version in artifact.versions():
            if not version.is_withdrawn:
                count += 1
                try:
                    version.verify()
                except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
                    faulty.append(f"{version}: {error}")
        return count, faulty

    def close(self):
        for process in (self.runner, self.server):
            if process and process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(60)
                process.kill()
        self.proxy.closing.set()
        self.proxy.shutdown()
        self.s3.stop()


def _memory(process):
    with suppress(psutil.NoSuchProcess):
        main = psutil.Process(process.pid)
        return sum(one.memory_info().rss for one in [main, *main.children(recursive=True)])
    return 0


def _files(process):
    with suppress(psutil.NoSuchProcess):
        main = psutil.Process(process.pid)
        return sum(one.num_fds() for one in [main, *main.children(recursive=True)])
    return 0


def find_growth(rounds):
    """Return for each measured size the medians of the first and last third of the rounds, and what grew.

    Prefect's database fills for as long as its retention keeps everything, so rounds within that time do not count,
    unless there are few later ones.
    """
    after = list(rounds)
    for passed in itertools.accumulate(one["seconds"] for one in rounds):
        after = after[1:] if passed <= RETENTION_SECONDS else after
    rounds = after if len(after) >= 3 * EVERY else rounds
    third = max(1, len(rounds) // 3)
    medians, grown = {}, []
    for key in (key for key in rounds[0] if key not in ("round", "fault", "changed", "states", "seconds")):
        first, last = (statistics.median(one[key] for one in part) for part in (rounds[:third], rounds[-third:]))
        medians[key] = [first, last]
        slack = SLACK if key not in ("shm_files", "server_files", "runner_files", "registry_objects") else 50
        # Records of versions are never removed: a few objects for each, with a few hundred bytes.
        if key != "registry_objects" and last > GROWTH * first + slack:
            grown.append(key)
    return medians, grown


def main():
    """Run the soak; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ropeway-soak-") as folder:
        soak = Soak(Path(folder), seed=options.seed)
        try:
            soak.start_server()
            soak.start_runner()
            for number in range(options.runs):
                soak.round(number)
                if time.monotonic() - began > options.minutes * 60:
                    break
            soak.clean()
            versions, faulty = soak.verify()
        finally:
            soak.close()
    medians, grown = find_growth(soak.rounds)
    summary = {
        "soak": "tiny",
        "rounds": len(soak.rounds),
        "runs": sum(soak.ended.values()),
        "seconds": round(time.monotonic() - began),
        "ended": dict(soak.ended),
        "faults": dict(soak.faults),
        "counts": dict(soak.counts),
        "lost": soak.lost,
        "versions_verified": versions,
        "versions_faulty": faulty,
        "medians_first_and_last_third": medians,
        "grown": grown,
    }
    print(json.dumps(summary))
    return 1 if soak.lost or faulty or grown else 0


if __name__ == "__main__":
    sys.exit(main())
