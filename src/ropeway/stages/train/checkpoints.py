"""Checkpoints, written atomically: into a partial folder, hashed, synced, manifest last, then renamed into place.

A run resumes from its newest valid checkpoint.

.checkpoints/<fingerprint>/step-000200/state/      DeepSpeed's state
.checkpoints/<fingerprint>/step-000200/steps.jsonl the log up to this step
.checkpoints/<fingerprint>/step-000200/manifest.json
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import (
    NAME,
    FileFacts,
    iterate_files,
    load_manifest,
    make_folder,
    sync_file,
    sync_folder,
    sync_folders,
    sync_tree,
    write_json,
)
from ropeway.stages.train.stop import Line

_STEP_FOLDER = re.compile(r"step-(\d{6,})")
STATE = "state"
LOG = "steps.jsonl"
RUN_INFO = "run.json"
_ONE_SECOND_NS = 10**9  # file systems with the coarsest times count in seconds
OTHER_VERSIONS = "ROPEWAY_OTHER_VERSIONS"
CONTINUED = "taken_over"  # key in the manifest of a checkpoint that was linked from another run


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A valid checkpoint: its folder and its manifest."""

    folder: Path
    step: int
    facts: dict[str, Any]

    def log(self) -> list[Line]:
        """Return the log lines up to this step."""
        return [json.loads(line) for line in (self.folder / LOG).read_text(encoding="utf-8").splitlines()]


def partial_folder(root: Path, step: int) -> Path:
    """Return the folder in which a checkpoint is written before it is complete."""
    return root / f".partial-step-{step:06d}"


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of a complete checkpoint."""
    return root / f"step-{step:06d}"


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every complete checkpoint, by step."""
    if not root.is_dir():
        return []
    found = ((_STEP_FOLDER.fullmatch(path.name), path) for path in root.iterdir())
    return sorted((int(match.group(1)), path) for match, path in found if match)


def clear_unfinished(root: Path) -> None:
    """Create the folder of a run, or remove from it what an interrupted attempt has not finished."""
    make_folder(root)
    clear_partial(root)
    if (step_0 := step_folder(root, 0)).exists():
        remove(step_0)  # left by an attempt that was interrupted in its warm-up step


def newest_valid(root: Path) -> Checkpoint | None:
    """Return the newest checkpoint that matches its manifest byte by byte; print which ones do not."""
    for step, folder in reversed(list_steps(root)):
        try:
            facts = load_manifest(folder, remedy="Skipped")
            _check_identity(folder, step, facts)
        except DataError as error:
            print(f"checkpoint of step {step} is damaged: {error}", flush=True)
            mark_verified(folder, valid=False)
            continue
        mark_verified(folder)
        return Checkpoint(folder, step, facts)
    return None


def open_verified(root: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step that another process of this start has verified; check only file sizes.

    Checkpoints of later steps are recorded as damaged: the other process chose this one as the newest valid.

    Raises:
        DataError: The checkpoint changed since, or this host does not see it.
    """
    folder = step_folder(root, step)
    facts = load_manifest(folder, remedy="It was verified before the ranks started; run the same command", verify=False)
    _check_identity(folder, step, facts)
    mark_verified(folder)
    for other, place in list_steps(root):
        if other > step:
            mark_verified(place, valid=False)
    return Checkpoint(folder, step, facts)


def _check_identity(folder: Path, step: int, facts: Mapping[str, object]) -> None:
    """Raise DataError unless the manifest names this run and step; older versions of Ropeway recorded no run."""
    run, recorded_step = facts.get("fingerprint", folder.parent.name), facts.get("step", step)
    if (run, recorded_step) != (folder.parent.name, step):
        raise DataError(
            f"{folder}: holds step {recorded_step} of run {run}, so it was copied or renamed; skipped. To continue "
            f"from another run: `ropeway run --resume-from {run}@{recorded_step}`"
        )


# Checkpoints that the processes of this start have written or fully verified: folder -> (stats of its files, whether it
# is valid).
_VERIFIED: dict[Path, tuple[tuple[tuple[str, int, int, int], ...], bool]] = {}


def is_valid(folder: Path, *, full: bool = True) -> bool:
    """Return whether a checkpoint is valid; unchanged since this process verified it, it is not read again.

    Without `full`, a checkpoint not yet verified is checked by file sizes only: hashing 194 GB takes minutes.
    """
    now = _file_stats(folder)
    if folder in _VERIFIED and _VERIFIED[folder][0] == now:
        return _VERIFIED[folder][1]
    try:
        load_manifest(folder, remedy="-", verify=full or folder in _VERIFIED)
    except DataError:
        return False
    if full:
        _VERIFIED[folder] = now, True
    return True


def _file_stats(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats)


def universal_folder(checkpoint: Checkpoint) -> Path:
    """Return the folder of a checkpoint in DeepSpeed's universal format, which any number of ranks can load."""
    return checkpoint.folder.parent / f".universal-step-{checkpoint.step:06d}"


def check_resumable(checkpoint: Checkpoint, *, ranks: int, now: dict[str, str]) -> None:
    """Raise ConfigError where resuming could silently change the result: other ranks or other library versions."""
    facts = checkpoint.facts
    if facts["ranks"] != ranks and not universal_folder(checkpoint).is_dir():
        raise ConfigError(
            f"{checkpoint.folder} was written by {facts['ranks']} ranks, this start has {ranks}, and it was not "
            f"converted; run the stage again, or set ROPEWAY_RANKS={facts['ranks']}"
        )
    other = [f"{name} {facts[name]} (now {version})" for name, version in now.items() if facts[name] != version]
    if other and os.environ.get(OTHER_VERSIONS) != "1":
        raise ConfigError(
            f"{checkpoint.folder} was written with {', '.join(other)}, and another version may round differently. "
            f"Install the recorded version, set {OTHER_VERSIONS}=1 to resume anyway (this is recorded), or remove "
            f"{checkpoint.folder.parent} to train from the beginning"
        )


def convert_for_ranks(checkpoint: Checkpoint | None, *, ranks: int) -> None:
    """Convert a checkpoint to DeepSpeed's universal format if another number of ranks wrote it.

    The ranks resume with the same rows in the same order, since positions are counted in steps of `global_batch_size`
    rows; weights may differ in the last bits, since sums over ranks round differently. The original is kept.

    This runs before any rank starts: for a large model it takes minutes.

    Raises:
        ConfigError: DeepSpeed could not convert it.
    """
    if checkpoint is None or checkpoint.facts["ranks"] == ranks:
        return
    target = universal_folder(checkpoint)
    if target.exists():
        return
    print(
        f"{checkpoint.folder} was written by {checkpoint.facts['ranks']} ranks; converting it for {ranks} ranks (same "
        "rows in the same order; sums over ranks round differently)",
        flush=True,
    )
    partial = checkpoint.folder.parent / f".partial-universal-{checkpoint.step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    paths = [
        f"--input_folder={checkpoint.folder / STATE}",
        f"--output_folder={partial / STATE}",
    ]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2].strip() or "no error message"
        raise ConfigError(
            f"{checkpoint.folder}: DeepSpeed could not convert it for {ranks} ranks ({why}); set "
            f"ROPEWAY_RANKS={checkpoint.facts['ranks']} to resume with the original number of ranks"
        )
    sync_tree(partial)
    partial.rename(target)
    sync_folder(target.parent)


def describe_last_good(folder: Path) -> str:
    """Return a sentence with the checkpoint from which the same command resumes."""
    steps = list_steps(folder)
    for step, place in reversed(steps):
        if is_valid(place):
            return f"The last good checkpoint is step {step}: {place}; the same command resumes from it"
    if steps:
        return f"All {len(steps)} checkpoints in {folder} are damaged; the same command trains from the beginning"
    return "No checkpoint was saved before; the same command trains from the beginning"


def write_log(root: Path, step: int, log: Sequence[Line]) -> None:
    """Write the log into the partial folder of `step`; call on one rank."""
    text = "".join(json.dumps(line) + "\n" for line in log)
    (partial_folder(root, step) / LOG).write_text(text, encoding="utf-8")


def assign_files(partial: Path, written: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return for each rank the files of a partial folder that it hashes and flushes to disk.

    A rank has the files that it wrote: their pages are in its host's memory, and another host of a shared file system
    could not flush them. Files that no rank reported (the log, what DeepSpeed copies) are rank 0's.

    Args:
        partial: The folder, as rank 0 sees it.
        written: For each rank, the names of the files that it wrote, relative to the folder.
    """
    reported = {name for names in written for name in names}
    present = [path.relative_to(partial).as_posix() for path in iterate_files(partial)]
    first, *others = written
    return [[*first, *(name for name in present if name not in reported)], *(list(names) for names in others)]


def publish(root: Path, step: int, facts: Mapping[str, object], files: Mapping[str, FileFacts]) -> Path:
    """Write the manifest of a partial folder and rename it to the checkpoint of `step`; call on one rank, last.

    An existing checkpoint of the same step (an invalid one that was skipped on resume) is replaced.

    Args:
        root: The folder of the run.
        step: The step after which it was saved.
        facts: Facts for the manifest.
        files: Entry of every file, which its rank has flushed to disk.

    Raises:
        DataError: The folder holds other files than `files` names.
    """
    partial = partial_folder(root, step)
    present = {path.relative_to(partial).as_posix() for path in iterate_files(partial)}
    if present != set(files):
        one = min(present ^ set(files))
        raise DataError(
            f"{partial}: {one} was {'not hashed by any rank' if one in present else 'hashed and then removed'}; run "
            "the same command again, it resumes from the last checkpoint"
        )
    sync_folders(partial)
    write_json(partial / NAME, {"fingerprint": root.name, **facts, "step": step, "files": dict(files)})
    target = step_folder(root, step)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    sync_folder(root)
    return target


def mark_verified(folder: Path, *, valid: bool = True) -> None:
    """Record that a checkpoint's files, as they are now, are valid or damaged, so that `is_valid` reads none again."""
    _VERIFIED[folder] = _file_stats(folder), valid


def rotate(root: Path, *, keep: int, saved: int) -> None:
    """Remove checkpoints until `keep` remain; remove the folders of unfinished saves and of conversions too.

    Damaged ones are removed first, then the oldest. The one just saved and the newest valid one are always kept: a
    checkpoint with a higher step may be left from before a rewind or may be damaged.
    """
    steps = list_steps(root)
    if len(steps) > keep:
        valid = [step for step, folder in steps if step == saved or is_valid(folder, full=step > saved)]
        newest = [step for step in valid if step != saved][::-1]
        kept = {saved, *valid[-1:], *newest[: keep - 1]}
        damaged = [step for step, _ in steps if step not in valid]
        to_remove = [*damaged, *(step for step in valid if step not in kept)][: len(steps) - keep]
        for step in to_remove:
            remove(step_folder(root, step))
        if removed := [step for step in damaged if step in to_remove]:
            print(f"damaged checkpoints removed: {', '.join(f'step {step}' for step in removed)}", flush=True)
    for folder in root.glob(".universal-*"):  # already loaded; the new checkpoint replaces it
        shutil.rmtree(folder, ignore_errors=True)
    clear_partial(root)


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that an interrupted removal leaves an invalid checkpoint."""
    _VERIFIED.pop(folder, None)
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def link_checkpoint(checkpoint: Checkpoint, root: Path) -> None:
    """Hard-link another run's checkpoint, just verified, into this run's folder; copy where links are not supported."""
    partial = partial_folder(root, checkpoint.step)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint.folder, partial, copy_function=_link, ignore=lambda *_: (NAME,))
    sync_folders(partial)
    write_json(partial / NAME, {**checkpoint.facts, "fingerprint": root.name, CONTINUED: True})
    partial.rename(step_folder(root, checkpoint.step))
    sync_folder(root)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target)
        sync_file(Path(target))


def write_run_info(root: Path, info: Mapping[str, object]) -> None:
    """Write run.json: profile, digests and params of the run; its modification time is the run's latest start.

    That time is after those of all other runs, also if the clock was set back since: the order decides what is removed.
    """
    path = root / RUN_INFO
    same = False
    with contextlib.suppress(OSError, ValueError):  # missing or damaged
        same = json.loads(path.read_bytes()) == info
    if same:
        path.touch()  # possible on a full disk too; the disk check then reports it
    else:
        write_json(path, info)
    others = [other.stat().st_mtime_ns for other in root.parent.glob(f"*/{RUN_INFO}") if other != path]
    if (latest := max(others, default=0)) >= path.stat().st_mtime_ns:
        os.utime(path, ns=(latest + _ONE_SECOND_NS, latest + _ONE_SECOND_NS))


def prune_runs(root: Path, *, profile: str, current: str, keep: int) -> list[str]:
    """Remove the checkpoints of a profile's runs except the `keep` started last; return the fingerprints removed.

    The current run is always kept, and so is a folder without a readable run.json.
    """
    mine = [folder for folder in root.iterdir() if (folder / RUN_INFO).is_file() and read_profile(folder) == profile]
    mine.sort(key=lambda folder: (folder.name == current, (folder / RUN_INFO).stat().st_mtime_ns))
    old = mine[: max(0, len(mine) - keep)]
    for folder in old:
        for _, step in list_steps(folder):
            remove(step)
        shutil.rmtree(folder)
    return [folder.name for folder in old]


def read_profile(folder: Path) -> str | None:
    """Return the profile of a run's folder; print a warning and return None where run.json cannot be read."""
    try:
        return str(json.loads((folder / RUN_INFO).read_bytes())["profile"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{folder / RUN_INFO}: cannot be read ({type(error).__name__}: {error}); the folder is kept", flush=True)
        return None


def clear_partial(root: Path) -> None:
    """Remove unfinished saves."""
    for folder in root.glob(".partial-*"):
        shutil.rmtree(folder, ignore_errors=True)
