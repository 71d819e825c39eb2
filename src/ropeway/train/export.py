"""The end of training: the model folder that every later room opens with plain transformers."""

import shutil
from pathlib import Path
from typing import Any

from ropeway.manifest import load_manifest, whole_folder, write_manifest
from ropeway.train.loop import Line, Run
from ropeway.workspace import Workspace

MAX_SHARD = "5GB"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export_model(run: Run, workspace: Workspace, *, fingerprint: str, log: list[Line]) -> None:
    """Write `model/`: weights as safetensors, config with the run's RoPE scaling, the base's tokenizer files.

    The folder's manifest names the fingerprint, and the base's template and tokenizer, so that evaluation can refuse
    another template than the one trained with.
    """
    if run.rank != 0:
        return
    model = run.engine.module.model
    model.config.use_cache = True  # off for checkpointing only; it must not leak into the export
    base = load_manifest(workspace.base, remedy="Run `dvc checkout`", verify=False)
    with whole_folder(workspace.model) as folder:
        model.save_pretrained(folder, safe_serialization=True, max_shard_size=MAX_SHARD)
        _copy_tokenizer(workspace.base, folder)
        facts: dict[str, Any] = {
            "fingerprint": fingerprint,
            "steps": len(log),
            "applied_steps": sum(line["applied"] for line in log),
            "dtype": run.profile.dtype,
            "tokenizer": base["tokenizer"],
            "template": base["template"],
        }
        write_manifest(folder, facts)
    print(f"model of {facts['applied_steps']} applied steps in {workspace.model}", flush=True)


def _copy_tokenizer(base: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
