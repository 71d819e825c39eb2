"""One rank of the invariance check: the same rows cut into micro-batches in every way its world size allows.

Run as `python -m tests.support.splits ROOT CHANGES MICRO…` under the environment of torch.distributed; CHANGES are
values of the profile as JSON. With a `gradients` path among them, rank 0 stores the gradients of the step there.
"""

import json
import os
import sys
from pathlib import Path

ROWS = 32


def main(root, changes, *sizes):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch

    from ropeway.config.load_params import load_profile
    from ropeway.data.shards import open_shards
    from ropeway.models import supervised_loss
    from ropeway.models.attention import Heads, choose_attention
    from ropeway.models.open_model import read_config
    from ropeway.models.sequence_parallel import join_sequence_group
    from ropeway.models.supervised_loss import SupervisedLoss
    from ropeway.runtime.op_build import collective_timeout, init_distributed
    from ropeway.runtime.workspace import Workspace
    from ropeway.stages.train.deepspeed_config import plan_deepspeed
    from ropeway.stages.train.loop import train_step
    from ropeway.stages.train.model import open_model
    from ropeway.stages.train.training_run import Run

    init_distributed()
    deepspeed.utils.logger.setLevel("ERROR")
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    workspace = Workspace(Path(root), "tiny")
    _, profile = load_profile(Path(root) / "params.yaml")
    named = json.loads((Path(__file__).parents[2] / "configs" / "zero2_cpu.json").read_text())
    changes = json.loads(changes)
    gradients, rows = changes.pop("gradients", None), changes.pop("rows", ROWS)
    if stage := changes.pop("zero", None):
        named["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if chunk := changes.pop("chunk", None):
        supervised_loss.chunked_losses.__kwdefaults__["chunk"] = chunk
    sequence = join_sequence_group(changes.get("sequence_parallel", 1), timeout=collective_timeout())
    groups = ranks // changes.get("sequence_parallel", 1)
    for size in map(int, sizes):
        accumulation = rows // size // groups
        changed = {
            "global_batch_size": rows,
            "per_device_train_batch_size": size,
            "use_flash_attention": False,
            **changes,
        }
        shards = open_shards(workspace.data, verify=False)
        run = Run(profile.model_copy(update=changed), shards, None, rank, ranks, accumulation, sequence=sequence)
        attention = choose_attention(run.profile, Heads.of(read_config(workspace.base, {})), torch.device("cpu"))
        model = SupervisedLoss(
            open_model(workspace.base, run.profile, attention, sequence=sequence), sequence, equal_chunks=stage == 3
        )
        config = plan_deepspeed(run.profile, named, ranks=ranks, accumulation_steps=accumulation, total_steps=1)
        run.engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        kept = keep_gradients(run.engine) if gradients else {}
        line = train_step(run, 1, [], stop=lambda: False).line
        if rank == 0:
            if gradients:
                torch.save(kept, gradients)
            print(json.dumps({"micro": size, "accumulation": accumulation, "ranks": ranks, **line}), flush=True)


def keep_gradients(engine):
    """Return a dict that has the reduced gradient of each weight once the optimizer's step begins."""
    from deepspeed.utils import safe_get_full_grad

    kept, step = {}, engine.step

    def keep_and_step():
        if engine.is_gradient_accumulation_boundary():
            kept.update({name: safe_get_full_grad(part) for name, part in engine.module.named_parameters()})
        step()

    engine.step = keep_and_step
    return kept


if __name__ == "__main__":
    main(*sys.argv[1:])
