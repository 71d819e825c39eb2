"""One rank that trains fp16 on a CPU, through DeepSpeed's public `set_accelerator`: loss scaling without a GPU.

Run as `python -m tests.support.overflow ROOT SCALE_POWER:MAX_SKIPPED:FLOOR_POWER…`; prints one line per run, its log
and how it ended.
"""

import json
import os
import sys
from pathlib import Path


def main(root, *cases):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class HalfOnCpu(CPU_Accelerator):
        def is_fp16_supported(self):
            return True

        def supported_dtypes(self):
            return [torch.float32, torch.bfloat16, torch.float16]

    set_accelerator(HalfOnCpu())
    from ropeway.config.load_params import load_profile
    from ropeway.data.shards import open_shards
    from ropeway.models.attention import Attention
    from ropeway.models.supervised_loss import SupervisedLoss
    from ropeway.runtime.errors import TrainingError
    from ropeway.runtime.op_build import init_distributed
    from ropeway.runtime.workspace import Workspace
    from ropeway.stages.train.deepspeed_config import plan_deepspeed
    from ropeway.stages.train.loop import train
    from ropeway.stages.train.model import open_model
    from ropeway.stages.train.training_run import Run

    init_distributed()
    deepspeed.utils.logger.setLevel("ERROR")
    workspace = Workspace(Path(root), "tiny")
    _, profile = load_profile(Path(root) / "params.yaml")
    named = json.loads((Path(__file__).parents[2] / "configs" / "zero2_cpu.json").read_text())
    attention = Attention(requested_flash=False, effective="sdpa (cpu)")
    for case in cases:
        power, max_skipped, floor = map(int, case.split(":"))
        rules = profile.stop.model_copy(update={"max_skipped_in_row": max_skipped})
        changed = {
            "dtype": "fp16", "per_device_train_batch_size": 4, "num_train_epochs": 4, "learning_rate": 1e-3,
            "warmup_steps": 2, "stop": rules,
        }  # fmt: skip
        run = Run(profile.model_copy(update=changed), open_shards(workspace.data, verify=False), None, 0, 1, 1)
        model = SupervisedLoss(open_model(workspace.base, run.profile, attention))
        scaling = {"initial_scale_power": power, "min_loss_scale": 2**floor, "hysteresis": 1, "loss_scale": 0}
        config = plan_deepspeed(
            run.profile, {**named, "fp16": scaling}, ranks=1, accumulation_steps=1, total_steps=run.total_steps
        )
        run.engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        log, ended = [], "finished"
        try:
            train(run, log, save=lambda _: None, stop=lambda: False, show=lambda _: None)
        except TrainingError as error:
            ended = str(error)
        print(json.dumps({"log": log, "ended": ended}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
