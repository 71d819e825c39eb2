"""Raw records and a tokenizer as fetch and base leave them, and the profile that prepare reads."""

import shutil

from ropeway.config.load_params import load_profile
from ropeway.config.sections import DatasetOptions
from ropeway.data.raw_records import RawWriter
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.runtime.manifest import write_manifest
from ropeway.runtime.workspace import Workspace
from tests.support.tiny_run import PARITY, ROOT
from tests.support.tokenizing import KEYS

TOKENIZER = PARITY / "tokenizer"
_, PUBLISHED = load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")
TALKS = [Conversation((f"Is lamp {n} lit?", "Yes. " * (1 + n % 9)), ("", "Be brief.")[n % 2]) for n in range(40)]
TEXTS = [f"Log of day {n}: " + "calm sea, no sail. " * (n % 7) for n in range(30)]


def profile(**changes):
    options = [{"talk": DatasetOptions(max_val_set=5)}, {"text": DatasetOptions(max_chunk_size=60, max_val_set=4)}]
    sources = {"talk": PUBLISHED.sources["orca-chat"], "text": PUBLISHED.sources["fanfics"]}
    values = {"datasets": options, "sources": sources, "max_length": 24, "global_batch_size": 4, "rng_seed": 11}
    values["contamination"] = PUBLISHED.contamination.model_copy(update={"prompts": []})
    return PUBLISHED.model_copy(update=values | changes).reading(KEYS)


def write_raw(root, talks=TALKS, texts=TEXTS, *, refused=None):
    """A workspace as fetch and base leave it."""
    workspace, facts = Workspace(root, "run"), {}
    for name, kind, records in (("talk", "conversation", talks), ("text", "document", texts)):
        with RawWriter(workspace.raw / name, kind) as writer:
            for record in records:
                writer.add(record)
        lost = refused if refused and kind == "conversation" else {}
        read = len(records) + sum(lost.values())
        facts[name] = {"kind": kind, "read": read, "kept": len(records), "refused": lost}
    write_manifest(workspace.raw, {"sources": facts})
    shutil.copytree(TOKENIZER, workspace.base)
    (workspace.base / "chat_template.jinja").write_text(OPEN_ASSISTANT.jinja)
    return workspace
