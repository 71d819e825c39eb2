"""Loads folders as a stranger would, in an interpreter of an old transformers. Knows nothing of this project.

Reads from standard input {folder: {"row": ids, "texts": [...], "conversations": [messages], "prompt": ids, "say": ids}}
and writes to standard output what it finds; logits go to FOLDER.npy.
"""

import json
import sys

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList


class Say(LogitsProcessor):
    """Makes these tokens the most likely ones, in turn."""

    def __init__(self, start, tokens):
        self.start, self.tokens = start, tokens

    def __call__(self, input_ids, scores):
        said = torch.full_like(scores, -torch.inf)
        said[:, self.tokens[(input_ids.shape[1] - self.start) % len(self.tokens)]] = 0
        return said


def look(folder, asked):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
    row, prompt = torch.tensor([asked["row"]]), torch.tensor([asked["prompt"]])
    with torch.inference_mode():
        logits = model(row, use_cache=False).logits[0].float()
        said = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            logits_processor=LogitsProcessorList([Say(prompt.shape[1], asked["say"])]),
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
        "roles": tokenizer.convert_tokens_to_ids(asked["roles"]),
        "texts": [tokenizer(text)["input_ids"] for text in asked["texts"]],
        "rendered": [tokenizer.apply_chat_template(messages, tokenize=False) for messages in asked["conversations"]]
        if templated
        else None,
        "said": said[0, prompt.shape[1] :].tolist(),
    }


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    found = {folder: look(folder, asked) for folder, asked in wanted.items()}
    json.dump({"transformers": transformers.__version__, "found": found}, sys.stdout)
