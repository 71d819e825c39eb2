"""Export of the trained model: the folder that later stages open with plain transformers."""

import shutil

import deepspeed
import torch
from transformers import PreTrainedModel

from ropeway.config.stages import READS
from ropeway.config.zero import PARTITIONED_STAGE
from ropeway.models.attention import Attention
from ropeway.models.lora import merge_adapters
from ropeway.runtime.manifest import load_manifest, whole_folder, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.train.model import open_model
from ropeway.stages.train.stop import Line
from ropeway.stages.train.training_run import Run

MAX_SHARD = "5GB"
_EXPORT_ATTENTION = Attention(requested_flash=False, effective="none: gathered to be saved")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export_model(run: Run, workspace: Workspace, *, fingerprint: str, log: list[Line]) -> None:
    """Write `model/`: weights as safetensors, config with the run's RoPE scaling, the base's tokenizer files.

    The manifest records fingerprint, chat template and tokenizer, so that evaluation can refuse a template other than
    the one used in training.
    """
    model = _gather_model(run, workspace)
    if model is None:
        return
    if run.profile.peft_model:
        merge_adapters(model)
    model.config.use_cache = True  # off for gradient checkpointing only; the export must have it on
    base = load_manifest(workspace.base, remedy="Run `dvc repro base`", verify=False)
    with whole_folder(workspace.model) as folder:
        model.save_pretrained(folder, safe_serialization=True, max_shard_size=MAX_SHARD)
        for name in TOKENIZER_FILES:
            if (workspace.base / name).is_file():
                shutil.copyfile(workspace.base / name, folder / name)
        facts = {
            "fingerprint": fingerprint,
            "steps": len(log),
            "applied_steps": sum(line["applied"] for line in log),
            "dtype": run.profile.dtype,
            "params": run.profile.model_dump(mode="json", include=set(READS["train"])),
            "tokenizer": base["tokenizer"],
            "template": base["template"],
        }
        write_manifest(folder, facts)
    print(f"exported the model after {facts['applied_steps']} applied steps to {workspace.model}", flush=True)


def _gather_model(run: Run, workspace: Workspace) -> PreTrainedModel | None:
    """Return the trained model on rank 0, None on others. Under ZeRO-3 parameters are gathered one at a time."""
    if run.engine.zero_optimization_stage() < PARTITIONED_STAGE:
        return run.engine.module.model if run.rank == 0 else None
    whole = open_model(workspace.base, run.profile, _EXPORT_ATTENTION) if run.rank == 0 else None
    targets = dict(whole.named_parameters()) if whole is not None else {}
    for name, part in run.engine.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([part]), torch.no_grad():
            if name in targets:
                targets[name].copy_(part)
    return whole
