"""Tiny random models of the families that are shown to work end to end, as another program would save them."""

import shutil
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

from tests.support.tiny_run import PARITY
from tests.support.whole_run import CHAT, CHATS, jsonl, make_workspace

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3],
    "original_max_position_embeddings": 128,
}
WINDOW = {"sliding_window": 12}


@dataclass(frozen=True)
class Family:
    """A model_type with what it adds to `SIZES`, and what is special about it."""

    model_type: str
    special: str
    layout: str = "packed"
    more: dict = field(default_factory=dict)
    lacks: tuple[str, ...] = ()

    @property
    def sizes(self):
        """What its config states."""
        return {name: value for name, value in {**SIZES, **self.more}.items() if name not in self.lacks}


FAMILIES = {
    "llama": Family(
        "llama", "llama3 RoPE scaling, tied", more={"rope_parameters": LLAMA3, "tie_word_embeddings": True}
    ),
    "mistral": Family("mistral", "sliding window", more=WINDOW),
    "qwen2": Family("qwen2", "biases of q, k, v"),
    "qwen3": Family("qwen3", "norms of q and k, head_dim not hidden / heads", more={"head_dim": 16}),
    "smollm3": Family("smollm3", "layers without RoPE"),
    "olmo2": Family("olmo2", "norms after the layers"),
    "phi3": Family("phi3", "fused projections, longrope", more={"rope_parameters": LONGROPE}),
    "gemma2": Family(
        "gemma2",
        "soft caps, scaled embeddings, alternating windows",
        more={"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOW},
    ),
    "gemma3_text": Family(
        "gemma3_text",
        "another RoPE for layers with windows",
        more={"head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 6, **WINDOW},
    ),
    "granite": Family(
        "granite",
        "multipliers of embeddings, attention, residuals and logits",
        more={
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
    ),
    "starcoder2": Family("starcoder2", "LayerNorm, biases, no gate in the MLP"),
    "cohere2": Family("cohere2", "parallel blocks, scaled logits, alternating windows", more=WINDOW),
    "glm4": Family("glm4", "RoPE on half of each head", more={"head_dim": 8}),
    "ernie4_5": Family("ernie4_5", "interleaved RoPE", more={"head_dim": 8}),
    "exaone4": Family("exaone4", "RoPE in layers with windows only", more=WINDOW),
    "gpt_neox": Family("gpt_neox", "no key-value heads in its config, parallel blocks", lacks=("num_key_value_heads",)),
    "seed_oss": Family("seed_oss", "dropout in its config, off in training", more={"head_dim": 8}),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        "Granite 4, dense: attention layers, experts configured to 0",
        more={
            "layer_types": ["attention"] * 4,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "shared_intermediate_size": 64,
            "position_embedding_type": "rope",
        },
    ),
    "stablelm": Family("stablelm", "no boundaries of sequences in its attention", layout="padded"),
}
FAST = ("gemma2",)


def save_family(family, folder):
    """Save a random model of a family and a tokenizer; return its config."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **family.sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    if family.model_type == "qwen2":  # transformers builds its tokenizer again, so it must be one of its kind
        write_qwen2_tokenizer(folder)
        return model
    for path in (PARITY / "tokenizer_base").iterdir():
        shutil.copyfile(path, folder / path.name)
    return model


def write_qwen2_tokenizer(folder):
    """Write a byte-level tokenizer of Qwen2's kind, trained on the tests' texts."""
    texts = [message["content"] for chat in CHATS for message in chat["messages"]]
    markers = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size=400, new_special_tokens=markers)
    tokenizer.bos_token, tokenizer.eos_token = markers
    tokenizer.save_pretrained(folder)


def make_family_workspace(root, layout, changes):
    """Return a workspace whose base is the model in `root/base`, for a run of few steps."""
    small = {
        "base": {"kind": "folder"},
        "model_name": str(root / "base"),
        "expected_model": None,
        "layout": layout,
        "per_device_train_batch_size": 1,
        "global_batch_size": 4,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "num_train_epochs": 3,
        "datasets": [{"talk": {"max_val_set": 8}}],
    }
    sources = {"talk": {"kind": "files", "paths": ["talk.jsonl"], **CHAT}}
    workspace = make_workspace(root / "workspace", sources, small | changes)
    (workspace.root / "talk.jsonl").write_bytes(jsonl(CHATS))
    return workspace
