"""Checkpoints: whole or not there. Written aside, hashed, synced, manifest last, renamed; the newest valid one resumes.

.checkpoints/<fingerprint>/step-000200/state/      DeepSpeed's shards
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

_NAME = re.compile(r"step-(\d{6,})")
STATE = "state"
LOG = "steps.jsonl"
OWNER = "run.json"
OTHER_VERSIONS = "ROPEWAY_OTHER_VERSIONS"
TAKEN_OVER = "taken_over"  # in the manifest of a checkpoint that another run wrote


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A valid checkpoint: its folder and what its manifest says."""

    folder: Path
    step: int
    facts: dict[str, Any]

    def log(self) -> list[Line]:
        """Return the log lines up to this step."""
        return [json.loads(line) for line in (self.folder / LOG).read_text(encoding="utf-8").splitlines()]


def partial_folder(root: Path, step: int) -> Path:
    """Return where a checkpoint is written before it is whole."""
    return root / f".partial-step-{step:06d}"


def step_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step stands once it is whole."""
    return root / f"step-{step:06d}"


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every checkpoint that was renamed into place, oldest first."""
    if not root.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted((int(match.group(1)), path) for match, path in found if match)


def newest_valid(root: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose every byte is as its manifest says; say which ones are not."""
    for step, folder in reversed(list_steps(root)):
        try:
            facts = load_manifest(folder, remedy="It is skipped")
            _check_owner(folder, step, facts)
        except DataError as error:
            print(f"checkpoint of step {step} is not whole: {error}", flush=True)
            _KNOWN[folder] = _signature(folder), False
            continue
        _KNOWN[folder] = _signature(folder), True
        return Checkpoint(folder, step, facts)
    return None


def _check_owner(folder: Path, step: int, facts: Mapping[str, object]) -> None:
    """Raise DataError unless a checkpoint is this step of this run; one that names no run is of an older Ropeway."""
    of, at = facts.get("fingerprint", folder.parent.name), facts.get("step", step)
    if (of, at) != (folder.parent.name, step):
        raise DataError(
            f"{folder}: holds step {at} of run {of}. It was copied or renamed; `ropeway run --resume-from {of}@{at}` "
            "continues from another run. It is skipped"
        )


# What this process knows of checkpoints that it wrote or read to the last byte: folder -> their files' looks, verdict.
_KNOWN: dict[Path, tuple[tuple[tuple[str, int, int, int], ...], bool]] = {}


def is_valid(folder: Path, *, thoroughly: bool = True) -> bool:
    """Return whether a checkpoint is whole; it is read again only where this process has not done so as it now is.

    Not `thoroughly`: of one that this process has not read, sizes alone are compared. (194 GB take minutes to hash.)
    """
    now = _signature(folder)
    if folder in _KNOWN and _KNOWN[folder][0] == now:
        return _KNOWN[folder][1]
    try:
        load_manifest(folder, remedy="-", verify=thoroughly or folder in _KNOWN)
    except DataError:
        return False
    if thoroughly:
        _KNOWN[folder] = now, True
    return True


def _signature(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats)


def read_ranks(folder: Path) -> int | None:
    """Return how many ranks say they wrote a checkpoint, its bytes unread; None where its manifest is broken."""
    try:
        return int(json.loads((folder / NAME).read_bytes())["ranks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def universal_folder(checkpoint: Checkpoint) -> Path:
    """Return where a checkpoint stands in the form that any number of ranks can load."""
    return checkpoint.folder.parent / f".universal-step-{checkpoint.step:06d}"


def check_resumable(checkpoint: Checkpoint, *, ranks: int, now: dict[str, str]) -> None:
    """Raise ConfigError where going on would silently give other bytes than the run that was begun."""
    wrote = checkpoint.facts
    if wrote["ranks"] != ranks and not universal_folder(checkpoint).is_dir():
        raise ConfigError(
            f"{checkpoint.folder} was written by {wrote['ranks']} ranks, this start has {ranks} and it was not "
            f"converted for them; run the stage again, or set ROPEWAY_RANKS={wrote['ranks']}"
        )
    other = [f"{name} {wrote[name]}, here is {version}" for name, version in now.items() if wrote[name] != version]
    if other and os.environ.get(OTHER_VERSIONS) != "1":
        raise ConfigError(
            f"{checkpoint.folder} was written with {'; '.join(other)}. Another version may round otherwise. Install "
            f"the one it was begun with, set {OTHER_VERSIONS}=1 to go on all the same (it is recorded), or remove "
            f"{checkpoint.folder.parent} to train from the beginning"
        )


def make_loadable(folder: Path, *, ranks: int) -> None:
    """Convert the newest valid checkpoint of a run if other ranks wrote it; the original stays.

    DeepSpeed's universal format loads into any number of ranks. They resume to the same rows in the same order, since
    positions are counted in steps of `global_batch_size` rows; the bytes may differ in the last place, since sums over
    ranks are taken in another order.

    Done before any rank starts: on a large model it outlasts the time-out of a collective.

    Raises:
        ConfigError: DeepSpeed could not convert it.
    """
    # Of all, not of the newest alone: where that one is damaged an older one resumes.
    if all(read_ranks(step) == ranks for _, step in list_steps(folder)):
        return
    checkpoint = newest_valid(folder)
    if checkpoint is None or checkpoint.facts["ranks"] == ranks:
        return
    target = universal_folder(checkpoint)
    if target.exists():
        return
    print(
        f"{checkpoint.folder} was written by {checkpoint.facts['ranks']} ranks; converting it for {ranks}: "
        "same rows in the same order, sums over ranks round otherwise",
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
        why = done.stderr.strip().rpartition("\n")[2].strip() or "no word of why"
        raise ConfigError(
            f"{checkpoint.folder}: DeepSpeed could not convert it for {ranks} ranks ({why}); set "
            f"ROPEWAY_RANKS={checkpoint.facts['ranks']} to go on with those that wrote it"
        )
    partial.rename(target)


def name_last_good(folder: Path) -> str:
    """Return where the same command would resume; no checkpoint holds steps that a stop rule suspects."""
    steps = list_steps(folder)
    for step, place in reversed(steps):
        if is_valid(place):
            return f"The last good checkpoint is of step {step}: {place}; the same command resumes there"
    if steps:
        return f"None of the {len(steps)} checkpoints in {folder} is whole; the same command trains from the beginning"
    return "No checkpoint was saved before that"


def commit(root: Path, step: int, log: Sequence[Line], facts: Mapping[str, object]) -> Path:
    """Make a written partial folder the checkpoint of `step`; call on one rank, after all have written.

    A checkpoint of the same step that is already there (an invalid one, skipped on resume) is replaced.
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
    _KNOWN[target] = _signature(target), True  # hashed and synced a moment ago
    return target


def sync_file(path: Path) -> None:
    """Put a file's bytes on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def rotate(root: Path, *, keep: int, saved: int) -> None:
    """Remove checkpoints until `keep` are left, and what unfinished saves and conversions left behind.

    Damaged ones go first, then the oldest. The one that was saved just now and the newest valid one always stay: a
    damaged one may have a higher step, since the run went back before it.
    """
    steps = list_steps(root)
    if len(steps) > keep:
        valid = [step for step, folder in steps if step == saved or is_valid(folder, thoroughly=step > saved)]
        newest = [step for step in valid if step != saved][::-1]
        stay = {saved, *valid[-1:], *newest[: keep - 1]}
        damaged = [step for step, _ in steps if step not in valid]
        going = [*damaged, *(step for step in valid if step not in stay)][: len(steps) - keep]
        for step in going:
            remove(step_folder(root, step))
        if lost := [step for step in damaged if step in going]:
            print(f"damaged checkpoints removed: {', '.join(f'step {step}' for step in lost)}", flush=True)
    for folder in root.glob(".universal-*"):  # loaded, and overtaken by what is saved now
        shutil.rmtree(folder, ignore_errors=True)
    clear_partial(root)


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that a kill in between leaves nothing that looks whole."""
    _KNOWN.pop(folder, None)
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def take_over(checkpoint: Checkpoint, root: Path) -> None:
    """Make another run's checkpoint, its bytes verified just now, one of this run; its files are linked, not copied."""
    partial = partial_folder(root, checkpoint.step)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint.folder, partial, copy_function=_link, ignore=lambda *_: (NAME,))
    write_json(partial / NAME, {**checkpoint.facts, "fingerprint": root.name, TAKEN_OVER: True})
    partial.rename(step_folder(root, checkpoint.step))
    sync_folder(root)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
        sync_file(Path(target))


def claim(root: Path, owner: Mapping[str, object]) -> None:
    """Say in a run's folder whose it is and what it was begun with; its time says when it was last started."""
    with contextlib.suppress(OSError, ValueError):  # not there yet, or not whole
        if json.loads((root / OWNER).read_bytes()) == owner:
            (root / OWNER).touch()  # which a full disk still takes: the run then says itself what is missing
            return
    write_json(root / OWNER, owner)


def prune_runs(root: Path, *, profile: str, current: str, keep: int) -> list[str]:
    """Remove the checkpoints of a profile's older runs, all but the `keep` last started; return what was removed.

    The current run stays whatever its age, and so does a folder that does not say whose it is, or not readably.
    """
    mine = [folder for folder in root.iterdir() if (folder / OWNER).is_file() and read_owner(folder) == profile]
    mine.sort(key=lambda folder: (folder.name == current, (folder / OWNER).stat().st_mtime_ns))
    gone = mine[: max(0, len(mine) - keep)]
    for folder in gone:
        for _, step in list_steps(folder):
            remove(step)
        shutil.rmtree(folder)
    return [folder.name for folder in gone]


def read_owner(folder: Path) -> str | None:
    """Return which profile's run a folder is; None, and said, where its note is damaged or another program's."""
    try:
        return str(json.loads((folder / OWNER).read_bytes())["profile"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{folder / OWNER}: cannot be read ({type(error).__name__}: {error}); the folder stays", flush=True)
        return None


def clear_partial(root: Path) -> None:
    """Remove unfinished saves."""
    for folder in root.glob(".partial-*"):
        shutil.rmtree(folder, ignore_errors=True)
