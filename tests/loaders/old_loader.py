"""Loads folders as a user does, in an interpreter with an old transformers. Imports nothing of this project.

Reads {folder: {"row": ids, "texts": [...], "conversations": [messages], "prompt": ids, "forced": ids}} from standard
input and writes the results as JSON to standard output; logits go to FOLDER.npy.
"""

import json
import sys

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList


class ForceTokens(LogitsProcessor):
    """Forces generation to these tokens, repeated in a cycle."""

    def __init__(self, start, tokens):
        self.start, self.tokens = start, tokens

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[(input_ids.shape[1] - self.start) % len(self.tokens)]] = 0
        return forced


def load_and_run(folder, case):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
    row, prompt = torch.tensor([case["row"]]), torch.tensor([case["prompt"]])
    with torch.inference_mode():
        logits = model(row, use_cache=False).logits[0].float()
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            logits_processor=LogitsProcessorList([ForceTokens(prompt.shape[1], case["forced"])]),
        )
    np.save(folder + ".npy", logits.numpy())
    templated = hasattr(tokenizer, "apply_chat_template")
    return {
        "dtype": str(model.dtype),
        "rope_scaling": model.config.rope_scaling,
        "use_cache": model.config.use_cache,
        "max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        "roles": tokenizer.convert_tokens_to_ids(case["roles"]),
        "texts": [tokenizer(text)["input_ids"] for text in case["texts"]],
        "rendered": [tokenizer.apply_chat_template(messages, tokenize=False) for messages in case["conversations"]]
        if templated
        else None,
        "generated": generated[0, prompt.shape[1] :].tolist(),
    }


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    found = {folder: load_and_run(folder, case) for folder, case in wanted.items()}
    json.dump({"transformers": transformers.__version__, "found": found}, sys.stdout)
