"""`make chaos-power POINTS=200`: cut the power at any change of a disk; what was reported as done must be there.

Three programs run on a disk that records their changes: the registry in a folder, a training with its checkpoints, and
a whole run with DVC's cache. For each sampled change the disk is made again as a power loss at this moment can leave
it, in the three states of `power_loss`, and looked at as the next start does. A few of them are also run to their end.
"""

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field

from ruamel.yaml import YAML

from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration import dvc_recovery as recovery
from ropeway.registry import ANY, Registry
from ropeway.stages.train.checkpoints import newest_valid
from ropeway.storage import FileStore
from tests.support.main_job import ROOT, MainJob, make_main_job
from tests.support.power_loss import STATES, Disk
from tests.support.recorded_disk import mark, mounted, read_record, run_chaos
from tests.support.registry_world import check_whole, make_package, tiny

BEGIN = "begin"
DONE = re.compile(r"(\w+): (Completed|Restored),")
SAVED = re.compile(r"checkpoint of step (\d+) saved")
PUBLISHED = re.compile(r"registered (tiny@v\d+)")


@dataclass
class Outcome:
    """What one program's record showed; `faults` must stay empty."""

    program: str
    changes: int = 0
    points: int = 0
    states: Counter = field(default_factory=Counter)
    claims: int = 0  # how often something that was reported as done was looked for
    ended: int = 0
    faults: list = field(default_factory=list)


def visit(record, folder, points, draw, look, outcome):
    """Make the disk of each sampled change again and look at it: `look(root, marks, last)`."""
    operations = list(read_record(record))
    begin = operations.index(("mark", BEGIN))
    changes = [at for at, one in enumerate(operations) if at > begin and one[0] != "mark"]
    outcome.changes = len(changes)
    chosen = set(draw.sample(changes, min(points, len(changes))))
    outcome.points = len(chosen)
    disk, target = Disk(), folder / "crashed"
    for at, operation in enumerate(operations):
        disk.apply(operation)
        if at == begin:
            disk.sync()  # what a program finds has been there for long
        if at not in chosen:
            continue
        for state in STATES:
            disk.write(target, state, draw)
            outcome.states[state] += 1
            try:
                look(target, disk.marks[disk.marks.index(BEGIN) + 1 :])
            except Exception as error:  # noqa: BLE001 - whatever the next start met is the finding
                outcome.faults.append(f"change {at}, {state}: {type(error).__name__}: {str(error)[:500]}")
            shutil.rmtree(target)


# The registry.


def use_registry(mount):
    """Publish, promote, roll back, withdraw and collect; mark what was reported."""
    store = FileStore(mount / "registry")
    mark(mount, BEGIN)
    for number in range(1, 7):
        package = make_package(mount / f"package{number}", random.Random(number).randbytes(20_000))
        done = tiny(store).publish(package, provenance={"git": "abc", "dirty": False}, attachments={})
        mark(mount, f"published {done.digest}")
        if number % 2:
            tiny(store).version(done.digest).promote("candidate", expect=ANY, by="a test", reason="it was time")
            mark(mount, f"candidate {done.digest}")
        elif number == 4:
            tiny(store).version(done.digest).withdraw(by="a test", reason="wrong data")
            mark(mount, f"withdrawn {done.digest}")
    tiny(store).version(done.digest).pull(mount / "pulled")
    mark(mount, f"pulled {done.digest}")


def look_at_registry(outcome):
    def look(root, marks):
        store, folder = FileStore(root / "registry"), root.with_name("next")
        claims = [claim.split() for claim in marks]
        outcome.claims += len(claims)
        withdrawn = {digest for what, digest in claims if what == "withdrawn"}
        for what, digest in claims:
            version = tiny(store).find(digest)
            assert version, f"{what} {digest} is gone"
            if version.is_withdrawn:  # its mark may not have been written
                assert what != "candidate"
                continue
            assert digest not in withdrawn
            version.verify()
            if what == "pulled":
                version.verify_folder(root / "pulled")
        if promoted := [digest for what, digest in claims if what == "candidate"]:
            assert promoted[-1] in {event["digest"] for event in tiny(store).alias("candidate").events}
        shutil.rmtree(folder, ignore_errors=True)
        done = tiny(store).publish(make_package(folder, b"after"), provenance={}, attachments={})
        tiny(store).version(done.digest).promote("candidate", expect=ANY, by="a test", reason="after")
        if not withdrawn and not any(version.is_withdrawn for version in tiny(store).versions()):
            check_whole(store)
        else:
            Registry(store).version("tiny@candidate").verify()
        outcome.ended += 1

    return look


# A training.


def run_marked(mount, job, *command):
    """Run a command; mark what it reports, and its end."""
    with job.start(*command) as process:
        for line in process.stdout:
            if found := DONE.match(line) or SAVED.search(line) or PUBLISHED.search(line):
                mark(mount, f"{found.group(1)}")
        text = process.wait()
    assert text == 0, command


def look_at_checkpoints(outcome):
    def look(root, marks):
        steps = [int(claim) for claim in marks if claim.isdigit()]
        outcome.claims += len(steps)
        saved = max(steps, default=0)
        for folder in (root / "workspace" / ".checkpoints").glob("*"):
            with contextlib.redirect_stdout(io.StringIO()):
                found = newest_valid(folder)
            assert (found.step if found else 0) >= saved, f"step {saved} was reported, the newest is {found}"
        assert not saved or list((root / "workspace" / ".checkpoints").glob("*")), "no folder of checkpoints"

    return look


# A whole run.


def restart_machine(root):
    """Make the workspace one of an earlier start of the machine."""
    for path in (root / ".dvc" / "cache").glob(recovery.DURABLE.as_posix()):
        record = json.loads(path.read_bytes())
        path.write_text(json.dumps(record | {"boot": "an earlier one"}))


def look_at_run(outcome):
    check_checkpoints = look_at_checkpoints(outcome)

    def look(root, marks):
        workspace = root / "workspace"
        restart_machine(workspace)
        recovery.repair(workspace)
        objects = workspace / ".dvc" / "cache" / "files" / "md5"
        for path in objects.glob("??/*"):
            if re.fullmatch(r"[0-9a-f]{30}(\.dir)?", path.name):
                assert recovery.is_named(path), f"{path} is taken for complete"
        lock = workspace / "dvc.lock"
        stages = (graph.parse_lock(lock.read_bytes()).get("stages") or {}) if lock.is_file() else {}
        results = [stage["outs"] for stage in stages.values()] + list(_run_cache(workspace))
        check_checkpoints(root, marks)
        for claim in (claim for claim in marks if not claim.isdigit()):
            outcome.claims += 1
            if claim.startswith("tiny@"):
                Registry(FileStore(workspace / "registry")).version(claim).verify()
            else:
                assert any(_is_result(objects, outs, claim) for outs in results), f"stage {claim} was reported"

    return look


def _run_cache(workspace):
    for path in (workspace / ".dvc" / "cache" / "runs").glob("??/*/*"):
        with contextlib.suppress(Exception):  # DVC passes over a damaged entry
            yield graph.parse_lock(path.read_bytes()).get("outs", [])


def _is_result(objects, outs, stage):
    """Return whether DVC can take a stage's result from its cache."""
    first = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"][stage]["outs"][0].replace("${profile}", "tiny")
    if all(out["path"] != first for out in outs):
        return False
    names = [out["md5"] for out in outs if "md5" in out]
    names += [member for name in names if name.endswith(".dir") for member in graph.folder_members(objects, name)]
    return all(graph.object_path(objects, name).is_file() for name in names)


def main():
    """Cut the power under the three programs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("points", type=int, nargs="?", default=200, help="of each program; each in three states")
    parser.add_argument("--ends", type=int, default=3, help="of the runs and trainings that go on to their end")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)

    def cut(folder):
        for program in (cut_registry, cut_training, cut_run):
            outcome = program(folder / program.__name__, options, draw)
            print(outcome, file=sys.stderr, flush=True)
            yield outcome

    return run_chaos("power", cut)


def cut_registry(folder, options, draw):
    """Cut the power under the registry in a folder."""
    outcome = Outcome("registry")
    with mounted(folder / "recorded") as (mount, record):
        use_registry(mount)
    visit(record, folder, options.points, draw, look_at_registry(outcome), outcome)
    return outcome


def cut_training(folder, options, draw):
    """Cut the power under a training of two ranks; then train on from some of these moments to the same weights."""
    outcome = Outcome("checkpoints")
    with mounted(folder / "recorded") as (mount, record):
        job = make_main_job(mount / "workspace")
        job.do("dvc", "repro", "prepare")
        mark(mount, BEGIN)
        run_marked(mount, job, "ropeway", "stage", "train")
        weights = job.weights()
    visit(record, folder, options.points, draw, look_at_checkpoints(outcome), outcome)

    def end(root, _marks):
        again = MainJob(root / "workspace")
        again.do("ropeway", "stage", "identity")
        again.do("ropeway", "stage", "train")
        assert again.weights() == weights, "the weights differ from those of a training that was not interrupted"
        outcome.ended += 1

    _end(record, folder, options, draw, end, outcome)
    return outcome


def cut_run(folder, options, draw):
    """Cut the power under `ropeway run`; then run on from some of these moments to the same version."""
    outcome = Outcome("run")
    with mounted(folder / "recorded") as (mount, record):
        job = make_main_job(mount / "workspace")
        mark(mount, BEGIN)
        run_marked(mount, job, "ropeway", "run", "--no-prefect")
        digest = Registry(FileStore(job.root / "registry")).version("tiny@v1").digest
    visit(record, folder, options.points, draw, look_at_run(outcome), outcome)

    def end(root, marks):
        again = MainJob(root / "workspace")
        restart_machine(again.root)
        printed = again.do("ropeway", "run", "--no-prefect")
        ran = {name for name, how in re.findall(r"^(\w+): (\w+),", printed, re.MULTILINE) if how == "Completed"}
        assert not (again_run := ran & set(marks)), f"reported as done before the power loss, ran again: {again_run}"
        assert Registry(FileStore(again.root / "registry")).version("tiny@v1").digest == digest, "another version"
        outcome.ended += 1

    _end(record, folder, options, draw, end, outcome)
    return outcome


def _end(record, folder, options, draw, end, outcome):
    """Run on to the end from some moments, in one state each."""
    part = Outcome(outcome.program)
    visit(record, folder, -(-options.ends // len(STATES)), draw, end, part)
    outcome.faults += part.faults


if __name__ == "__main__":
    sys.exit(main())
