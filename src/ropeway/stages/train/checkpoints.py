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
from ropeway.runtime.manifest import NAME, load_manifest, sync_folder, write_json, write_manifest
from ropeway.stages.train.stop import Line

_STEP_FOLDER = re.compile(r"step-(\d{6,})")
STATE = "state"
LOG = "steps.jsonl"
RUN_INFO = "run.json"
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


def newest_valid(root: Path) -> Checkpoint | None:
    """Return the newest checkpoint that matches its manifest byte by byte; print which ones do not."""
    for step, folder in reversed(list_steps(root)):
        try:
            facts = load_manifest(folder, remedy="Skipped")
            _check_identity(folder, step, facts)
        except DataError as error:
            print(f"checkpoint of step {step} is damaged: {error}", flush=True)
            _VERIFIED[folder] = _file_stats(folder), False
            continue
        _VERIFIED[folder] = _file_stats(folder), True
        return Checkpoint(folder, step, facts)
    return None


def _check_identity(folder: Path, step: int, facts: Mapping[str, object]) -> None:
    """Raise DataError unless the manifest names this run and step; older versions of Ropeway recorded no run."""
    run, recorded_step = facts.get("fingerprint", folder.parent.name), facts.get("step", step)
    if (run, recorded_step) != (folder.parent.name, step):
        raise DataError(
            f"{folder}: holds step {recorded_step} of run {run}, so it was copied or renamed; skipped. To continue "
            f"from another run: `ropeway run --resume-from {run}@{recorded_step}`"
        )


# Checkpoints that this process has written or fully verified: folder -> (stats of its files, whether it is valid).
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


def read_ranks(folder: Path) -> int | None:
    """Return how many ranks wrote a checkpoint, from its manifest alone; None where that cannot be read."""
    try:
        return int(json.loads((folder / NAME).read_bytes())["ranks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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


def convert_for_ranks(folder: Path, *, ranks: int) -> None:
    """Convert the newest valid checkpoint to DeepSpeed's universal format if another number of ranks wrote it.

    The ranks resume with the same rows in the same order, since positions are counted in steps of `global_batch_size`
    rows; weights may differ in the last bits, since sums over ranks round differently. The original is kept.

    This runs before any rank starts: for a large model it takes longer than the timeout of a collective.

    Raises:
        ConfigError: DeepSpeed could not convert it.
    """
    # All, not only the newest: if that one is damaged, an older one resumes.
    if all(read_ranks(step) == ranks for _, step in list_steps(folder)):
        return
    checkpoint = newest_valid(folder)
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
    partial = folder / f".partial-universal-{checkpoint.step:06d}"
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
    partial.rename(target)


def describe_last_good(folder: Path) -> str:
    """Return a sentence with the checkpoint from which the same command resumes."""
    steps = list_steps(folder)
    for step, place in reversed(steps):
        if is_valid(place):
            return f"The last good checkpoint is step {step}: {place}; the same command resumes from it"
    if steps:
        return f"All {len(steps)} checkpoints in {folder} are damaged; the same command trains from the beginning"
    return "No checkpoint was saved before; the same command trains from the beginning"


def commit(root: Path, step: int, log: Sequence[Line], facts: Mapping[str, object]) -> Path:
    """Publish the partial folder as the checkpoint of `step`; call on one rank, after all ranks have written.

    An existing checkpoint of the same step (an invalid one that was skipped on resume) is replaced.
    """
    partial = partial_folder(root, step)
    (partial / LOG).write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            sync_file(path)
    write_manifest(partial, {"fingerprint": root.name, **facts, "step": step})
    target = step_folder(root, step)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    sync_folder(root)
    _VERIFIED[target] = _file_stats(target), True  # just hashed and synced
    return target


def sync_file(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


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
    """Write run.json: profile, digests and params of the run; its modification time is the run's latest start."""
    with contextlib.suppress(OSError, ValueError):  # missing or damaged
        if json.loads((root / RUN_INFO).read_bytes()) == info:
            (root / RUN_INFO).touch()  # possible on a full disk too; the disk check then reports it
            return
    write_json(root / RUN_INFO, info)


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
