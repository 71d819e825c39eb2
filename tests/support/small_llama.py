"""A two-layer Llama that returns losses, and a batch for it."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.models.supervised_loss import SupervisedLoss
from ropeway.stages.train.model import enable_checkpointing


def small_llama(implementation, *, checkpointed=False, dtype=torch.float32, **sizes):
    torch.manual_seed(5)
    usual = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    usual |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**{**usual, **sizes}), dtype=dtype, attn_implementation=implementation
    )
    if checkpointed:
        enable_checkpointing(model)
    return SupervisedLoss(model.train())


def batch(lengths, rows=1):
    """Return the arguments of a forward: `rows` equal rows of sequences of these lengths."""
    positions = torch.cat([torch.arange(length) for length in lengths]).repeat(rows, 1)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50, positions.shape))
    return {"input_ids": ids, "position_ids": positions, "targets": ids.roll(-1, 1), "loss_mask": positions >= 0}
