"""A finished run small enough for a test: a two-layer Llama with the parity tokenizer, two sources, 30 rows."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.config.load_params import load_profile
from ropeway.config.params import Profile
from ropeway.config.stages import READS
from ropeway.data.ledger import (
    EpochTotals,
    FindingCounts,
    Findings,
    Ledger,
    RecordTotals,
    SourceEpoch,
    SourceLedger,
    SplitTotals,
)
from ropeway.data.raw_records import RawWriter
from ropeway.data.shards import FORMAT, Kind, Shards, write_shard
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.proofs import prove_model
from ropeway.models.rope_plan import plan_scaling
from ropeway.models.tokenizer import open_tokenizer, read_special
from ropeway.reporting import report_eval, report_package
from ropeway.runtime.manifest import file_sha256, write_json, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.evaluate import stage as evaluate
from ropeway.stages.evaluate.evaluation_workers import Share
from ropeway.stages.evaluate.token_scores import Score, score_sources, sum_batches
from ropeway.stages.package import stage as package
from tests.support.data_profiles import profile_texts
from tests.support.freezing import code_digests, freeze_inputs
from tests.support.shipped_params import read_shipped_params

ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests" / "contract" / "parity"
SYSTEMS = ("", "You are kind.", "Answer in one word.")
STEPS = "step,loss,lr,grad_norm\n1,7.5,0.0,1.5\n2,6.0,0.0,1.25\n3,5.25,1e-05,1.0\n"
BLOCK = """\
# A run of seconds, for tests.
tiny:
  <<: *published
  dtype: fp32
  max_length: 96
  per_device_eval_batch_size: 4
  global_batch_size: 4
  datasets:
    - talk: {max_val_set: 8}
    - text: {max_val_set: 6, fraction: 0.5}
  sources:
    talk: {kind: python_docs, part: docstrings, expected_rows: null}
    text: {kind: python_docs, part: topics, expected_rows: null}
  base: {kind: scratch}
  expected_model:
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 4
    vocab_size: 2000
    max_position_embeddings: 48
    rope_theta: 10000.0
    rms_norm_eps: 1e-5
    tie_word_embeddings: false
  stop:
    {max_skipped_in_row: 5, spike_window_steps: 8, spike_ratio: 2.0, max_spikes_in_row: 3, rewinds: 0,
    hang_seconds: null}
  duplicates: {exact: count, near: count, threshold: 0.8, permutations: 128, ngram: 5}
  contamination: {ngram: 13, action: count, prompts: []}
  evaluation:
    prompts: configs/prompts.jsonl
    sampling: configs/sampling.json
    max_new_tokens: 8
    positions: {rows: 2, row_tokens: 128, bucket_tokens: 32}
    passkey: {lengths: [192, 256], depths: [0.0, 1.0], repeats: 1}
    long_context: null
    tasks: []
  package: {dtype: bf16, max_shard_bytes: 200000}
  card:   # what no run knows
    license: apache-2.0
    license_name: Apache License 2.0
    license_link: https://www.apache.org/licenses/LICENSE-2.0
    base_model: null
    upstream_datasets: []
    developers: []
    sponsored_by: null
    thanks: null
"""

# The same with packed rows of twice the length.
PACKED_BLOCK = (
    BLOCK.replace("  global_batch_size: 4", "  global_batch_size: 4\n  layout: packed")
    .replace("max_length: 96", "max_length: 192")
    .replace("max_position_embeddings: 48", "max_position_embeddings: 96")
)


def make_run(
    root: Path, stage: str = "evaluate", *, block: str = BLOCK, configs: Mapping[str, str] | None = None
) -> tuple[Workspace, Profile]:
    """Lay the outputs of every stage before `evaluate`; return (workspace, profile as `stage` reads it).

    `configs` are further files below configs/, by name.
    """
    made = _make_once(stage == "package", block, tuple(sorted((configs or {}).items())))
    shutil.copytree(made, root, dirs_exist_ok=True)
    return Workspace(root, "tiny"), load_profile(root / "params.yaml")[1].reading(READS[stage])


@functools.cache
def _make_once(finished: bool, block: str, configs: tuple[tuple[str, str], ...]) -> Path:  # noqa: FBT001
    """Return a folder with such a run, for copies alone; it takes seconds to make one, with plots and scores."""
    folder = tempfile.TemporaryDirectory(prefix="tiny-run-")
    atexit.register(folder.cleanup)
    root = Path(folder.name)
    (root / "params.yaml").write_text(read_shipped_params("tiny") + "\n" + block)
    (root / "configs").mkdir()
    (root / "configs" / "prompts.jsonl").write_text('"What is a list?"\n"How are you?"\n')
    for name in ("sampling.json", "zero_config_pretrain.json"):
        shutil.copyfile(ROOT / "configs" / name, root / "configs" / name)
    for name, content in configs:
        (root / "configs" / name).write_text(content)
    workspace, (_, profile) = Workspace(root, "tiny"), load_profile(root / "params.yaml")
    make_model(workspace.base, profile, seed=1, steps=0)
    make_model(workspace.model, profile, seed=2, steps=3)
    conversations, documents = talks(), texts()
    make_raw(workspace, conversations, documents)
    make_data(workspace, profile, conversations, documents)
    write_ledger(workspace)
    workspace.steps.write_text(STEPS)
    freeze_inputs(root, **{f"code-{stage}": code_digests(stage) for stage in READS})
    if finished:
        finish_run(workspace, profile)
    return root


def finish_run(workspace: Workspace, profile: Profile) -> None:
    """Lay what train, evaluate and report_data leave beside the model."""
    write_json(workspace.data_profile, profile_texts(texts()))
    evaluate.run(workspace, profile.reading(READS["evaluate"]))
    report_eval.run(workspace, profile.reading(READS["report_eval"]))
    write_json(
        workspace.train_metrics,
        {
            "steps": 3,
            "applied_steps": 3,
            "rewinds": 0,
            "rows_left_out": 0,
            "epochs": 1,
            "final_loss": 5.25,
            "continued_from": {},
        },
    )


def make_package(workspace: Workspace, profile: Profile) -> None:
    """Make the package and the pages of a finished run."""
    package.run(workspace, profile)
    report_package.run(workspace, profile)


def write_ledger(workspace: Workspace) -> None:
    """Write what prepare accounts for."""
    accounts = tuple(
        SourceLedger(
            name=name,
            kind=kind,
            records=RecordTotals(count + 1, {"no text": 1}, {}, count, 0, {}, 0),
            sequences=SplitTotals(count, count - 8, 6, 2, 0, 0),
            tokens=SplitTotals(40 * count, 40 * (count - 8), 240, 80, 0, 0),
            findings=Findings(
                FindingCounts("count", 2, 2, 80), FindingCounts("off", 0, 0, 0), FindingCounts("count", 1, 1, 40), 1
            ),
            epochs=(SourceEpoch(0, 0, count - 8, 40 * (count - 8), 0, 0, 1, 10, 512, 42, 40 * (count - 8) - 10, 99),),
        )
        for name, kind, count in (("talk", "conversation", 19), ("text", "document", 12))
    )
    write_json(workspace.ledger, Ledger(accounts, (EpochTotals(0, 15, 15, 4, 3, 3),)).to_json())


def make_model(folder: Path, profile: Profile, *, seed: int, steps: int) -> None:
    """Save a model with random weights, as train's export or base's folder would look."""
    folder.mkdir(parents=True)
    shape = profile.expected_model
    copy_tokenizer(folder)
    torch.manual_seed(seed)
    rope = plan_scaling(profile, theta=shape.rope_theta, original=shape.max_position_embeddings)
    config = LlamaConfig(
        **shape.model_dump(exclude={"vocab_size", "rope_theta", "max_position_embeddings"}),
        vocab_size=2016,
        max_position_embeddings=rope.stated_positions,
        rope_parameters=rope.to_config(),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    facts = {"tokenizer": file_sha256(folder / "tokenizer.json"), "template": OPEN_ASSISTANT.digest}
    if steps:
        facts |= {"fingerprint": "0123456789abcdef", "steps": steps, "applied_steps": steps, "dtype": profile.dtype}
        facts |= {"params": profile.model_dump(mode="json", include=set(READS["train"]))}
    else:
        facts |= {"special": read_special(folder, open_tokenizer(folder), OPEN_ASSISTANT)}
        facts |= {"model": {"kind": profile.base.kind, "name": profile.model_name}, "rope": rope.to_json()}
        facts["proofs"] = prove_model(model)
        facts["stops"] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    write_manifest(folder, facts)


def copy_tokenizer(folder: Path) -> None:
    for path in (PARITY / "tokenizer").iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "chat_template.jinja").write_text(OPEN_ASSISTANT.jinja)


def measure(model, shards: Shards, profile: Profile, *, name: str) -> list[Score]:
    """Score all rows of a model that is no folder."""
    return score_sources(sum_batches(model, shards, profile, share=Share(0, 1)), shards, name=name)


def talks() -> list[Conversation]:
    return [
        Conversation((f"Why is {n} odd?", "It is " + "not " * (17 * n % 60) + "even."), SYSTEMS[n % len(SYSTEMS)])
        for n in range(1, 20)
    ]


def texts() -> list[str]:
    return [f"Chapter {n}. " + "The with statement wraps a block. " * (n % 7 + 1) for n in range(12)]


def make_raw(workspace: Workspace, conversations: list[Conversation], documents: list[str]) -> None:
    identity = {"kind": "python_docs", "python": "3.11.7"}
    sources = {
        "talk": {"kind": "conversation", "kept": len(conversations), "identity": {**identity, "part": "docstrings"}},
        "text": {"kind": "document", "kept": len(documents), "identity": {**identity, "part": "topics"}},
    }
    for name, records in (("talk", conversations), ("text", documents)):
        with RawWriter(workspace.raw / name, sources[name]["kind"]) as writer:
            for record in records:
                writer.add(record)
        sources[name] |= {"read": len(records), "refused": {}, "first_refused": []}
    write_manifest(workspace.raw, {"sources": sources})


def make_data(workspace: Workspace, profile: Profile, conversations: list[Conversation], documents: list[str]) -> None:
    """Write shards, half of each source for validation."""
    tokenizer = open_tokenizer(workspace.base)
    encoded = {
        "talk": ("conversation", [encode_talk(tokenizer, one) for one in conversations]),
        "text": ("document", [encode_text(tokenizer, one) for one in documents]),
    }
    facts = []
    for name, (kind, sequences) in encoded.items():
        folder = workspace.data / name
        folder.mkdir(parents=True)
        lengths = write_shard(folder, 0, sequences, vocab_size=2005)
        half = len(sequences) // 2
        np.save(folder / "lengths.npy", np.asarray(lengths, dtype=np.int32))
        np.save(folder / "train.npy", np.arange(half, len(sequences)))
        np.save(folder / "validation.npy", np.arange(half)[: dict(profile.mixture)[name].max_val_set])
        facts.append({"name": name, "kind": kind, "shard_sequences": [len(sequences)]})
    tokens = file_sha256(workspace.base / "tokenizer.json")
    special = read_special(workspace.base, tokenizer, OPEN_ASSISTANT)
    write_manifest(
        workspace.data,
        {
            "format": FORMAT,
            "sources": facts,
            "special": special,
            "tokenizer": tokens,
            "template": OPEN_ASSISTANT.digest,
        },
    )


def encode_talk(tokenizer, conversation: Conversation):
    ids = tokenizer.encode("".join(OPEN_ASSISTANT.render_turns(conversation, end="</s>"))).ids
    kinds, now = [], Kind.SYSTEM
    for number in ids:
        now = {2000: Kind.PROMPTER, 2001: Kind.ASSISTANT}.get(number, now)
        kinds.append(now)
    return np.asarray(ids), np.asarray(kinds, dtype=np.uint8)


def encode_text(tokenizer, text: str):
    ids = tokenizer.encode(text).ids
    kinds = np.full(len(ids), Kind.DOCUMENT, dtype=np.uint8)
    kinds[-1] = Kind.DOCUMENT_END
    return np.asarray(ids), kinds
