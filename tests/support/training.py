"""Trainings of the tiny run by the real stage: DeepSpeed ranks in processes of their own."""

import json
import os
import shutil
import sys

from ropeway.config.load_params import load_profile
from tests.support import forked
from tests.support.tiny_run import BLOCK, make_data, make_run, talks, texts

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


def train(root, named, *lines, ranks=2):
    """Return (what the stage printed, workspace) of a training of the tiny run with these keys."""
    block = BLOCK + EDITS + "".join(f"  {line}\n" for line in lines)
    workspace, _ = make_run(root, block=block, configs={"ds.json": json.dumps(named)})
    return start(workspace, ranks=ranks), workspace


def forget(workspace, count):
    """Remove the last checkpoints; return the log that the run ended with."""
    folders = sorted(workspace.checkpoints.glob("*/step-*"))
    log = (folders[-1] / "steps.jsonl").read_text().splitlines()
    for folder in folders[-count:]:
        shutil.rmtree(folder)
    return [json.loads(line) for line in log]


def make_many_rows(root, block):
    """Return the root of a workspace ready to train, with more than 32 rows an epoch."""
    workspace, _ = make_run(root, "train", block=block.replace("fraction: 0.5", "fraction: 1.0"))
    shutil.rmtree(workspace.data)
    workspace.data.mkdir()
    make_data(workspace, load_profile(root / "params.yaml")[1], talks() * 3, texts() * 2)
    return root


def start(workspace, *, ranks=2):
    """Run the stage to its end in a forked process and return what it printed."""
    shutil.rmtree(workspace.model)
    here = {"ROPEWAY_RANKS": str(ranks), "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "ropeway.cli.main", "execute-stage", "train"]
    done = forked.run(command, cwd=workspace.root, env={**os.environ, **here})
    assert done.returncode == 0, done.stdout
    return done.stdout
