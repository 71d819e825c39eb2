"""Slurm's commands, and the record of the job that trains: what a login shell submits, asks and cancels.

`.work/train.slurm.json` is written before a job is submitted and removed after it has ended. Whatever kills the process
that waits, the next start of stage `train` finds the job through it, so that no two trainings write the same files.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Self

from ropeway.runtime.errors import ConfigError, RopewayError, TemporaryError
from ropeway.runtime.manifest import json_mapping, write_json

SWITCH, ARGUMENTS = "ROPEWAY_SLURM", "ROPEWAY_SLURM_ARGS"
_RECORD = "train.slurm.json"
_ANSWER_SECONDS = 60.0  # for one command of Slurm; a busy controller takes seconds
# What `slurm_job` sets: sbatch would take the last one.
_RESERVED = ("array", "chdir", "error", "job-name", "output", "parsable", "wait", "wrap")
_RESERVED_LETTERS = ("-D", "-J", "-W", "-a", "-e", "-o")
_FACT = re.compile(r" (JobState|Reason|Restarts|ExitCode|NodeList|WorkDir)=(\S*)")
_UNKNOWN_JOB = "invalid job id"
_FINAL = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)
_WAITING = frozenset(("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"))


class SlurmSilentError(TemporaryError):
    """Slurm's controller does not answer."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What Slurm says about a job.

    Attributes:
        state: As in squeue(1), e.g. PENDING.
        reason: Why it waits or ended; None if Slurm names no reason.
        code: Its exit code; 128 + n after signal n.
        restarts: How often it was requeued.
        nodes: Nodes that it runs on, as a host list; empty while it waits.
    """

    state: str
    reason: str | None = None
    code: int = 0
    restarts: int = 0
    nodes: str = ""

    @property
    def is_final(self) -> bool:
        """Return whether the job has ended and all its processes too."""
        return self.state in _FINAL

    @property
    def is_waiting(self) -> bool:
        """Return whether the job is in the queue."""
        return self.state in _WAITING


@dataclass(frozen=True, slots=True)
class JobRecord:
    """The job that a workspace submitted last and that may still exist.

    Attributes:
        job: Its id; None while it is being submitted.
        name: Its name: profile and run.
        ranks: Ranks that it starts.
        options: The options of `ROPEWAY_SLURM_ARGS`.
        since: ISO time of the submission.
        state: What Slurm said last, for `ropeway status`.
        reason: Why it waits, as Slurm said last.
        nodes: Its nodes, as Slurm said last.
    """

    job: int | None
    name: str
    ranks: int
    options: tuple[str, ...]
    since: str
    state: str = "SUBMITTING"
    reason: str | None = None
    nodes: str = ""

    @classmethod
    def create(cls, name: str, ranks: int, options: Sequence[str]) -> Self:
        """Return the record of a job that is about to be submitted."""
        return cls(None, name, ranks, tuple(options), datetime.now().astimezone().isoformat(timespec="seconds"))

    @classmethod
    def read(cls, root: Path) -> Self | None:
        """Return the record of a workspace; None if it has no job.

        Raises:
            ConfigError: The file is damaged.
        """
        path = record_path(root)
        try:
            facts = json_mapping(path.read_bytes())
        except FileNotFoundError:
            return None
        with suppress(TypeError, KeyError):
            return cls(**{**facts, "options": tuple(facts["options"])})
        raise ConfigError(
            f"{path}: not the record of a Slurm job. Cancel jobs of this workspace (`squeue --me`), then remove it"
        )

    def write(self, root: Path) -> None:
        """Write the record."""
        write_json(record_path(root), asdict(self))

    def with_state(self, now: JobState) -> "JobRecord":
        """Return the record with what Slurm says now."""
        return replace(self, state=now.state, reason=now.reason, nodes=now.nodes)

    def log(self, root: Path) -> Path:
        """Return the file that the job prints to."""
        return record_path(root).with_name(f"slurm-{self.job}.log")

    def exit_file(self, root: Path) -> Path:
        """Return the file with the exit code that the job writes at its end."""
        return exit_path(root, self.job)

    def remove(self, root: Path) -> None:
        """Remove the record and the files of the job, which has ended."""
        for path in (self.log(root), self.exit_file(root), record_path(root)):
            path.unlink(missing_ok=True)


def record_path(root: Path) -> Path:
    """Return the path of a workspace's record."""
    return root / ".work" / _RECORD


def exit_path(root: Path, job: int | str | None) -> Path:
    """Return the file that a job writes its exit code into."""
    return record_path(root).with_name(f"slurm-{job}.exit.json")


def read_exit(path: Path) -> int | None:
    """Return the exit code that a job wrote; None if it has not."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(path.read_bytes())["code"])
    return None


def submits_jobs(environment: Mapping[str, str]) -> bool:
    """Return whether stage `train` submits a Slurm job: `ROPEWAY_SLURM=1`, outside of an allocation.

    Raises:
        ConfigError: `ROPEWAY_SLURM` is neither 0 nor 1.
    """
    stated = environment.get(SWITCH, "0")
    if stated not in ("0", "1"):
        raise ConfigError(f"{SWITCH}: expected 0 or 1, found {stated!r}")
    return stated == "1" and "SLURM_JOB_ID" not in environment


def job_options(environment: Mapping[str, str]) -> list[str]:
    """Return the options of sbatch that the environment states.

    Raises:
        ConfigError: They cannot be split, or one of them is set by Ropeway.
    """
    text = environment.get(ARGUMENTS, "")
    try:
        options = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{ARGUMENTS}: {error}, found {text!r}") from None
    for option in options:
        name = option.partition("=")[0]
        if name.removeprefix("--") in _RESERVED or option[:2] in _RESERVED_LETTERS:
            raise ConfigError(f"{ARGUMENTS}: {name} is set by Ropeway; remove it")
    return options


def count_job_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of tasks that the options of sbatch ask for.

    >>> count_job_tasks({"ROPEWAY_SLURM_ARGS": "--nodes=2 --ntasks-per-node 8 -p gpu"})
    16

    Raises:
        ConfigError: They state no number of tasks, or not a fixed one.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--nodes", "-N")
    parser.add_argument("--ntasks", "-n")
    parser.add_argument("--ntasks-per-node")
    options = job_options(environment)
    try:
        found, _ = parser.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{ARGUMENTS}: {error}") from None
    stated = {name: value for name, value in vars(found).items() if value is not None}
    if any(not value.isdecimal() or int(value) < 1 for value in stated.values()) or not stated:
        raise ConfigError(
            f"{ARGUMENTS}: expected --nodes and --ntasks-per-node, or --ntasks, each with one whole number; found "
            f"{shlex.join(options)!r}. Or set ROPEWAY_RANKS"
        )
    numbers = {name: int(value) for name, value in stated.items()}
    if "ntasks" in numbers:
        return numbers["ntasks"]
    return numbers.get("nodes", 1) * numbers.get("ntasks_per_node", 1)


def job_name(profile: str, fingerprint: str) -> str:
    """Return the name of the job that trains a run."""
    return f"ropeway-{profile}-{fingerprint[:12]}"


def submit(options: Sequence[str], script: str) -> int:
    """Submit a batch script and return the job's id.

    Raises:
        ConfigError: Slurm refuses the job, or sbatch is not installed.
        SlurmSilentError: The controller does not answer.
    """
    done = _run("sbatch", "--parsable", *options, given=script)
    if done.returncode:
        why = done.stderr.strip()
        kind = SlurmSilentError if _is_silent(why) else ConfigError
        raise kind(f"sbatch {shlex.join(options)}: {why}. Correct {ARGUMENTS}, or ask Slurm's administrator")
    return int(done.stdout.strip().partition(";")[0])


def read_state(job: int) -> JobState | None:
    """Return what Slurm says about a job; None if it no longer knows it (by default 5 minutes after its end).

    Raises:
        SlurmSilentError: The controller does not answer.
    """
    done = _run("scontrol", "--oneliner", "show", "job", str(job))
    if done.returncode:
        if _UNKNOWN_JOB in done.stderr.lower():
            return None
        raise SlurmSilentError(f"scontrol show job {job}: {done.stderr.strip()}")
    return parse_state(done.stdout)


def parse_state(text: str) -> JobState:
    """Return the state in the output of `scontrol --oneliner show job`.

    >>> parse_state("JobId=7 JobState=PENDING Reason=Resources Restarts=1 ExitCode=0:0 NodeList=(null)")
    JobState(state='PENDING', reason='Resources', code=0, restarts=1, nodes='')
    """
    facts = dict(reversed(_FACT.findall(text)))  # the first of each name
    code, _, number = facts.get("ExitCode", "0:0").partition(":")
    return JobState(
        facts.get("JobState", "UNKNOWN"),
        None if facts.get("Reason", "None") == "None" else facts["Reason"],
        128 + int(number) if number not in ("", "0") else int(code),
        int(facts.get("Restarts", "0")),
        facts.get("NodeList", "").replace("(null)", ""),
    )


def find_job(root: Path, name: str) -> int | None:
    """Return the id of a job with this name that was submitted from this workspace; None if there is none.

    Raises:
        SlurmSilentError: The controller does not answer.
    """
    done = _run("squeue", "--noheader", f"--name={name}", "--format=%i|%Z")
    if done.returncode:
        raise SlurmSilentError(f"squeue: {done.stderr.strip()}")
    lines = (line.strip().partition("|") for line in done.stdout.splitlines())
    return next((int(job) for job, _, folder in lines if folder == str(root) and job.isdecimal()), None)


def stop_ranks(job: int) -> bool:
    """Send TERM to the ranks of a job, which then save and end; return whether it has any."""
    return not _run("scancel", "--signal=TERM", str(job)).returncode


def cancel(job: int) -> None:
    """Cancel a job: Slurm sends TERM to its ranks, and KILL after its `KillWait`."""
    _run("scancel", "--quiet", str(job))


def find_node_address(node: str) -> str | None:
    """Return the address by which Slurm reaches a node; None if Slurm does not say."""
    with suppress(RopewayError):
        found = re.search(r" NodeAddr=(\S+)", _run("scontrol", "--oneliner", "show", "node", node).stdout)
        return found[1] if found else None
    return None


def _is_silent(words: str) -> bool:
    return any(part in words.lower() for part in ("unable to contact", "timed out", "connection refused", "zero bytes"))


def _run(*command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm in a session of its own, which Ctrl-C does not reach."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=_ANSWER_SECONDS,
            env=environment,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]}: command not found. {SWITCH}=1 needs Slurm's commands on PATH (Debian: slurm-client)"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmSilentError(f"{command[0]} has not answered for {_ANSWER_SECONDS:g} s") from None
