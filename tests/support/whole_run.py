"""Whole runs of tiny workspaces with any source and base: every stage in this process, then a published version."""

import json
from types import SimpleNamespace

from ruamel.yaml import YAML

from ropeway.config.load_params import load_profile
from ropeway.orchestration.publish import publish_package
from ropeway.orchestration.revision import Revision
from ropeway.orchestration.stage_process import STAGE_NAMES, execute_stage, write_identity
from ropeway.runtime.workspace import Workspace
from tests.support import forked
from tests.support.main_job import make_main_job

WORDS = (
    "the sun is hot and the sea is wide, so we sail in the morning when it is calm".split()  # noqa: SIM905
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2000,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def say(number, count):
    return " ".join(WORDS[(number * 7 + at * (number % 5 + 1)) % len(WORDS)] for at in range(count))


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CHATS = [
    {"messages": [{"role": "user", "content": f"{n}? {say(n, 5)}"}, {"role": "assistant", "content": say(n + 50, 8)}]}
    for n in range(40)
]
TEXTS = [{"text": f"Part {n}. " + say(n, 60)} for n in range(30)]
CHAT = {"rows": "messages", "columns": {}, "expected_rows": None}
TEXT = {"rows": "text", "columns": {}, "expected_rows": None}


def make_workspace(root, sources, changes):
    """Return a workspace of one profile with these sources, each in the mixture, and other values."""
    job = make_main_job(root)
    yaml = YAML(typ="safe", pure=True)
    path = job.root / "params.yaml"
    block = dict(yaml.load(path.read_text())["tiny"])
    block |= {
        "max_length": 96,
        "sources": sources,
        "datasets": [{name: {"max_val_set": 4}} for name in sources],
        "evaluation": {**block["evaluation"], "passkey": {"lengths": [768], "depths": [0.5], "repeats": 1}},
        "num_train_epochs": 1,
        "global_batch_size": 16,
        "per_device_train_batch_size": 4,
        "contamination": {**block["contamination"], "prompts": []},
        **changes,
    }  # fmt: skip
    with path.open("w") as file:
        YAML().dump({"profile": "tiny", "tiny": block}, file)
    return Workspace(job.root, "tiny")


def rewrite(workspace, changes):
    yaml = YAML()
    path = workspace.root / "params.yaml"
    tree = yaml.load(path.read_text())
    tree["tiny"].update(changes)
    with path.open("w") as file:
        yaml.dump(tree, file)
    return workspace


def run_all(workspace, monkeypatch, *, ranks=1):
    """Run every stage and publish; return the publication."""
    monkeypatch.setenv("ROPEWAY_RANKS", str(ranks))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    for module in ("train.stage", "package.stage"):
        monkeypatch.setattr(f"ropeway.stages.{module}.subprocess", SimpleNamespace(run=forked.run))
    write_identity(workspace.root)
    for stage in STAGE_NAMES:
        execute_stage(workspace.root, stage)
    _, profile = load_profile(workspace.root / "params.yaml")
    return publish_package(workspace, profile, Revision("0" * 40, ()), lambda *_: None)
