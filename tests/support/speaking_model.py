"""A model that says what a test decides, for scores that are known beforehand."""

import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast


def speaker(model, say):
    """Return a model whose next token is `say(prompt ids, number of generated tokens)`."""
    copy = LlamaForCausalLM(model.config).eval()
    seen = []

    def forward(input_ids=None, **_):
        if input_ids.shape[1] > 1:
            seen[:] = [input_ids[0].tolist(), 0]
        logits = torch.zeros(1, 1, model.config.vocab_size)
        logits[0, 0, say(*seen)] = 99.0
        seen[1] += 1
        return CausalLMOutputWithPast(logits=logits)

    copy.forward = forward
    return copy
