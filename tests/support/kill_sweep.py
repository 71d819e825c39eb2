"""`make chaos`: kill a training at random moments, saves included; whenever it ends, it ends with the same bytes.

A round kills with SIGKILL the whole tree, one rank, the supervisor, dvc, or the flow; the remaining processes must end
by itself. A next start must resume, and a training that reaches its end must leave the weights of one never stopped.
Runs on the tiny main job; the last line is JSON, the exit code 1 when a weight differs or a process survives.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.support.main_job import make_main_job
from tests.support.processes import command_of

COMMANDS = {
    "stage": ("ropeway", "stage", "train"),
    "dvc": ("dvc", "repro", "--force", "--single-item", "train"),
    "flow": ("ropeway", "run", "--no-prefect"),
}
# What is killed, and which command it is killed under.
KILLS = (("tree", "stage"), ("rank", "stage"), ("supervisor", "stage"), ("dvc", "dvc"), ("flow", "flow"))
OFTEN = (3, 3, 2, 1, 1)  # a start under dvc or the flow costs twice as much
# How a start without a kill may end: 75, the workspace is still held by what ends from the last strike (dvc says
# 255 for that). With 1 it would end if it could not resume, in every later start.
UNSTRUCK = {"stage": (75,), "dvc": (75, 255), "flow": (75,)}
STRUCK = (-9, 1, 75, 255)
MOST_FAULTS = 5  # then it gives up
GONE_SECONDS = 120  # after a kill the remaining processes save and end: the supervisor's grace here is 30 s


class Sweep:
    """A prepared workspace, killed over and over; keeps count of what happened."""

    def __init__(self, job, *, seed):
        self.job = job
        self.draw = random.Random(seed)
        self.counts = Counter()
        self.faults = []
        self.lock = (self.job.root / "dvc.lock").read_bytes()
        began = time.monotonic()
        self.job.do(*COMMANDS["stage"])
        self.seconds = time.monotonic() - began
        self.expected = self.digest()
        self.start_over()

    def digest(self):
        return hashlib.sha256(self.job.weights()).hexdigest()

    def start_over(self):
        """Delete the training and keep its inputs."""
        for folder in (".checkpoints", "runs/tiny/model", ".dvc/cache/runs"):
            shutil.rmtree(self.job.root / folder, ignore_errors=True)
        (self.job.root / "dvc.lock").write_bytes(self.lock)

    def round(self):
        """Start, kill at a random moment, check that no process is left; compare the weights if the start ended."""
        whom, command = self.draw.choices(KILLS, OFTEN)[0]
        self.look(command)
        process = self.job.start(*COMMANDS[command])
        tree = self.wait(process, self.moment())
        struck = process.poll() is None and self.strike(whom, tree)
        printed = process.stdout.read()
        code = process.wait()
        process.stdout.close()
        _, alive = psutil.wait_procs(tree, timeout=GONE_SECONDS)
        if alive:
            self.faults.append(f"{whom}: alive {GONE_SECONDS} s later: {[' '.join(command_of(p)[:6]) for p in alive]}")
            for one in alive:
                one.kill()
        if "resuming after step" in printed:
            self.counts["resumed"] += 1
        if code == 0:
            self.hold()
        elif code not in (STRUCK if struck else UNSTRUCK[command]):
            how = whom if struck else f"{command}, not struck"
            self.faults.append(f"{how}: exit code {code}: {printed[-600:]}")

    def look(self, command):
        """Give a stage what DVC gives it: a DVC that was killed may have taken identity's files away to write them."""
        if command == "stage":
            self.job.do("ropeway", "stage", "identity")

    def moment(self):
        """Draw when to strike: any time of an undisturbed run, or while a checkpoint is being written."""
        if self.draw.random() < 0.4:
            return None
        return self.draw.uniform(0.2, 1.1) * self.seconds

    def wait(self, process, seconds):
        """Wait for the moment and return the processes there are then."""
        ends = time.monotonic() + (2 * self.seconds if seconds is None else seconds)
        partial = self.job.root / ".checkpoints"
        skip = self.draw.randrange(5)
        tree = {}
        seen = set()
        while process.poll() is None and time.monotonic() < ends:
            tree = {one.pid: one for one in self.family(process)}
            writing = {path.name for path in partial.glob("*/.partial-*")} if seconds is None else set()
            seen |= writing
            if writing and len(seen) > skip:
                self.counts["while saving"] += 1
                break
            time.sleep(0.002 if seconds is None else 0.02)
        return list(tree.values())

    @staticmethod
    def family(process):
        try:
            parent = psutil.Process(process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def strike(self, whom, tree):
        """Kill; return whether there was anybody to kill."""
        ranks = [one for one in tree if self.says(one, "ropeway.stages.train.rank") and not self.says(one, "launcher")]
        aims = {
            "tree": tree,
            "rank": [self.draw.choice(ranks)] if ranks else [],
            "supervisor": tree[:1],
            "dvc": tree[:1],
            "flow": tree[:1],
        }[whom]
        self.counts[whom] += bool(aims)
        for one in aims:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        return bool(aims)

    @staticmethod
    def says(one, word):
        return word in " ".join(command_of(one))

    def hold(self):
        self.counts["finished"] += 1
        if (found := self.digest()) != self.expected:
            self.faults.append(f"weights {found}, expected {self.expected}")
        self.start_over()

    @property
    def kills(self):
        return sum(self.counts[whom] for whom, _ in KILLS)


def sweep(job, kills, *, seed=0):
    """Kill trainings of a prepared workspace so often, let the last one end, and return what happened."""
    began = time.monotonic()
    run = Sweep(job, seed=seed)
    while run.kills < kills and len(run.faults) < MOST_FAULTS:
        run.round()
        print(f"{run.kills} of {kills} kills, {run.counts['finished']} ends, faults: {run.faults}", file=sys.stderr)
    run.look("stage")
    run.job.do(*COMMANDS["stage"])
    run.hold()
    return {
        "kills": run.kills,
        "asked_kills": kills,
        "by_whom": {whom: run.counts[whom] for whom, _ in KILLS},
        "while_saving": run.counts["while saving"],
        "resumed": run.counts["resumed"],
        "finished_with_the_same_sha256": run.counts["finished"],
        "sha256": run.expected,
        "faults": run.faults,
        "seconds": round(time.monotonic() - began),
        "promise_kept": not run.faults,
    }


def save_in_background(job):
    """Make a prepared workspace write its checkpoints in the background."""
    job.edit("params.yaml", "async_save: false", "async_save: true")
    job.commit("saves in the background")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int)
    parser.add_argument("--async-save", action="store_true", help="write checkpoints in the background")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_main_job(Path(folder) / "workspace")
        if options.async_save:
            save_in_background(tiny)
        tiny.do("dvc", "repro", "prepare")
        found = sweep(tiny, options.kills) | {"async_save": options.async_save}
    print(json.dumps(found))
    sys.exit(not found["promise_kept"])
