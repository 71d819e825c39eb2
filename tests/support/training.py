"""Trainings of the tiny run by the real stage: DeepSpeed ranks in processes of their own."""

import json
import os
import shutil
import subprocess
import sys

from tests.support import forked
from tests.support.tiny_run import BLOCK, make_run

EDITS = """
  deepspeed_config: configs/ds.json
  learning_rate: 1e-2
  warmup_steps: 1
  use_flash_attention: false
  gradient_checkpointing: true
  per_device_train_batch_size: 1
  num_train_epochs: 1
  save_steps: 1
"""


def zero(stage, **more):
    return {
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000000, "overlap_comm": False, **more},
    }


def train(root, named, *lines, run=forked.run):
    """Return (what the stage printed, workspace) of a training of the tiny run with these keys."""
    block = BLOCK + EDITS + "".join(f"  {line}\n" for line in lines)
    workspace, _ = make_run(root, block=block, configs={"ds.json": json.dumps(named)})
    return start(workspace, run=run), workspace


def start(workspace, *, ranks=2, run=forked.run):
    """Run the stage to its end and return what it printed; `run` says how: forked, or as a person's command."""
    shutil.rmtree(workspace.model)
    here = {"ROPEWAY_RANKS": str(ranks), "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "ropeway.cli.main", "room", "train"]
    done = run(command, cwd=workspace.root, env={**os.environ, **here})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_command(command, **options):
    """Run a command in a process of its own."""
    return subprocess.run(command, **options, capture_output=True, text=True, check=False)
