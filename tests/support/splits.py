"""One rank of the invariance check: the same rows cut into micro-batches in every way its world size allows.

Run as `python -m tests.support.splits ROOT NORMALISATION MICRO…` under the environment of torch.distributed.
"""

import json
import os
import sys
from pathlib import Path

ROWS = 32


def main(root, normalisation, *sizes):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch

    from ropeway.config.load_params import load_profile
    from ropeway.data.shards import open_shards
    from ropeway.models.attention import Attention
    from ropeway.runtime.op_build import init_distributed
    from ropeway.runtime.workspace import Workspace
    from ropeway.stages.train.deepspeed_config import plan_deepspeed
    from ropeway.stages.train.loop import train_step
    from ropeway.stages.train.loss import SupervisedLoss
    from ropeway.stages.train.model import open_model
    from ropeway.stages.train.training_run import Run

    init_distributed()
    deepspeed.utils.logger.setLevel("ERROR")
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    workspace = Workspace(Path(root), "tiny")
    _, profile = load_profile(Path(root) / "params.yaml")
    named = json.loads((Path(__file__).parents[2] / "configs" / "zero2_cpu.json").read_text())
    attention = Attention(requested_flash=False, effective="sdpa (cpu)")
    for size in map(int, sizes):
        accumulation = ROWS // size // ranks
        changed = {
            "global_batch_size": ROWS,
            "per_device_train_batch_size": size,
            "loss_normalisation": normalisation,
            "use_flash_attention": False,
        }
        shards = open_shards(workspace.data, verify=False)
        run = Run(profile.model_copy(update=changed), shards, None, rank, ranks, accumulation)
        model = SupervisedLoss(open_model(workspace.base, run.profile, attention))
        config = plan_deepspeed(run.profile, named, ranks=ranks, accumulation_steps=accumulation, total_steps=1)
        run.engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        line = train_step(run, 1, [], stop=lambda: False).line
        if rank == 0:
            print(json.dumps({"micro": size, "accumulation": accumulation, "ranks": ranks, **line}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
