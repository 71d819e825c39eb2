"""A checkpoint of some ranks made loadable by any number of them, through DeepSpeed's universal format.

Other ranks resume to the same rows in the same order, since positions are counted in steps of `global_batch_size`
rows; the bytes may differ in the last place, since sums over ranks are taken in another order.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from ropeway.runtime.errors import ConfigError
from ropeway.stages.train import checkpoints


def make_loadable(folder: Path, *, ranks: int) -> None:
    """Convert the newest valid checkpoint of a run if other ranks wrote it; the original stays.

    Done before any rank starts: on a large model it outlasts the time-out of a collective.

    Raises:
        ConfigError: DeepSpeed could not convert it.
    """
    # Of all, not of the newest alone: where that one is damaged an older one resumes.
    if all(checkpoints.read_ranks(step) == ranks for _, step in checkpoints.list_steps(folder)):
        return
    checkpoint = checkpoints.newest_valid(folder)
    if checkpoint is None or checkpoint.facts["ranks"] == ranks:
        return
    target = checkpoints.universal_folder(checkpoint)
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
        f"--input_folder={checkpoint.folder / checkpoints.STATE}",
        f"--output_folder={partial / checkpoints.STATE}",
    ]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"{checkpoint.folder}: DeepSpeed could not convert it for {ranks} ranks ({_last_line(done.stderr)}); set "
            f"ROPEWAY_RANKS={checkpoint.facts['ranks']} to go on with those that wrote it"
        )
    partial.rename(target)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no word of why")
