"""`python -m ropeway.stages.package.check FOLDER`: load a package as users do and compare it with its probe.

The stage package runs this in a fresh interpreter before it publishes the folder; it also works on a pulled package.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ropeway.models.base_rope import scaling_from_json
from ropeway.models.chat_template import open_template
from ropeway.models.jinja_template import FILE as TEMPLATE_FILE
from ropeway.models.jinja_template import pin_date
from ropeway.models.open_model import (
    check_rendering,
    live_frequencies,
    load_tokenizer,
    load_with_info,
    output_head,
    rotary,
    rotary_dim,
)
from ropeway.models.rope import frequency_faults
from ropeway.runtime.errors import DataError, RopewayError
from ropeway.runtime.json_text import read_json
from ropeway.runtime.manifest import NAME as MANIFEST
from ropeway.runtime.manifest import load_manifest
from ropeway.stages.package.model_config import TORCH_NAMES
from ropeway.stages.package.probe import Probe, probe_logits
from ropeway.stages.package.weights import STORED, locate_tensors, read_dtypes

_REMEDY = "Pull or package it again"
# Largest allowed difference of logits, relative to the largest logit. On one machine they are equal; other kernels
# differ.
_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}


def check_package(folder: Path, logits: Path | None = None) -> None:
    """Raise DataError with every difference between the folder and its probe, expected and found.

    Args:
        folder: A package.
        logits: `(T, V)` logits of the probe row from the exported model; None: logits are not compared.
    """
    if (folder / MANIFEST).exists():
        load_manifest(folder, remedy=_REMEDY)
    probe = read_probe(folder)
    config = read_json(folder / "config.json", remedy=_REMEDY)
    tokenizer = load_tokenizer(folder)
    faults = [
        *config_faults(config, probe),
        *token_faults(tokenizer, probe),
        *template_faults(folder, tokenizer, probe),
    ]
    faults += [*weight_faults(folder, probe)]
    try:
        model, found = load_with_info(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError("\n".join([f"{folder}: cannot be loaded: {error}", *faults])) from error
    model.eval()
    for name in sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        what = "missing in the files" if name in found["missing_keys"] else "in the files, but not used by the model"
        faults.append(f"  tensor {name}: {what}")
    faults += [*model_faults(model, tokenizer, probe), *stop_faults(model, tokenizer, probe)]
    if logits:
        faults += logits_faults(model, np.load(logits, allow_pickle=False), probe)
    if faults:
        raise DataError("\n".join([f"{folder}: the reloaded package differs from the trained model:", *faults]))


def read_probe(folder: Path) -> Probe:
    """Return a package's probe; that of an earlier version has one end token and no prompts."""
    probe: Probe = read_json(folder / "probe.json", remedy=_REMEDY)
    if "stops" not in probe:
        probe["stops"] = {f"{short}_token_id": probe["special"][short] for short in ("bos", "eos", "pad")}
        for case in probe["conversations"]:
            case["prompt"], case["prompt_ids"] = "", []
    return probe


def config_faults(config: Mapping[str, object], probe: Probe) -> Iterator[str]:
    """Yield each value of config.json that transformers 4.31 to 5 would read differently from the trained model."""
    rope = scaling_from_json(probe["rope"])
    keys = rope.to_config_keys()
    if "is_flat" not in probe["rope"] and rope.stated and "partial_rotary_factor" in rope.to_config():
        # Written before 2026-12, when such a base had other keys for transformers 4.
        keys = {name: keys[name] for name in ("rope_parameters", "rope_theta")}
    wanted = {
        **keys,
        "dtype": TORCH_NAMES[probe["dtype"]],
        "torch_dtype": TORCH_NAMES[probe["dtype"]],
        "use_cache": True,
        **probe["stops"],
    }
    for key, value in wanted.items():
        yield from _compare(f"config.json, {key}", value, config.get(key))
    if type(reach := config.get("max_position_embeddings")) is not int:
        yield f"  config.json, max_position_embeddings: expected an integer, found {reach}"


def token_faults(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> Iterator[str]:
    """Yield special tokens with other ids, and texts with other token ids."""
    special = probe["special"]
    written = set(open_template(Path(tokenizer.name_or_path)).control_tokens())
    for token in sorted(written - set(special) - set(tokenizer.special_tokens_map.values())):
        yield f"  probe.json, special: expected the id of {token}, which the chat template writes, found none"
    short = [name for name in ("bos", "eos", "pad") if name in special]
    found: dict[str, int] = {name: getattr(tokenizer, f"{name}_token_id") for name in short}
    found |= {token: tokenizer.convert_tokens_to_ids(token) for token in special if token not in found}
    for name, number in found.items():
        yield from _compare(f"id of {name}", special[name], number)
    yield from _compare("tokenizer's model_max_length", probe["max_length"], tokenizer.model_max_length)
    yield from _compare("tokenizer's padding side", "right", tokenizer.padding_side)
    for case in probe["texts"]:
        yield from _compare(f"ids of {case['text']!r}", case["ids"], tokenizer(case["text"])["input_ids"])


def template_faults(folder: Path, tokenizer: PreTrainedTokenizerBase, probe: Probe) -> Iterator[str]:
    """Yield conversations that the template, in its file or in the config, renders differently from training."""
    key = read_json(folder / "tokenizer_config.json", remedy=_REMEDY).get("chat_template")
    places = {TEMPLATE_FILE: (folder / TEMPLATE_FILE).read_text(encoding="utf-8"), "tokenizer_config": key}
    for place, template in places.items():
        if not template:
            yield f"  {place}: the chat template is missing"
        if template:
            check_rendering(tokenizer, template, f"{folder}: {place}")
            pin_date(template)
        for case in probe["conversations"] if template else []:
            options = {"chat_template": template, "add_generation_prompt": bool(case["prompt"])}
            text = tokenizer.apply_chat_template(case["messages"], tokenize=False, **options)
            yield from _compare(f"{place}, conversation as text", case["prompt"] or case["text"], text)
            told = tokenizer.apply_chat_template(case["messages"], tokenize=True, return_dict=True, **options)
            yield from _compare(f"{place}, conversation as ids", case["prompt_ids"] or case["ids"], told["input_ids"])


def weight_faults(folder: Path, probe: Probe) -> Iterator[str]:
    """Yield tensors that are not in the file that the index names, or are stored in another dtype."""
    placed = {(path.name, name) for name, path in locate_tensors(folder).items()}
    stored = {(path.name, name): dtype for path in folder.glob("*.safetensors") for name, dtype in read_dtypes(path)}
    for file, name in sorted(placed - set(stored)):
        yield f"  tensor {name}: missing in {file}, where the index has it"
    for file, name in sorted(set(stored) - placed):
        yield f"  tensor {name}: found in {file}, where the index does not have it"
    for (_, name), dtype in sorted(stored.items()):
        yield from _compare(f"stored dtype of {name}", STORED[probe["dtype"]], dtype)


def model_faults(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Probe) -> Iterator[str]:
    """Yield differences of the loaded model from the trained one: dtype, RoPE frequencies, vocabulary size."""
    config = model.config
    yield from _compare("dtype of the loaded model", f"torch.{TORCH_NAMES[probe['dtype']]}", str(model.dtype))
    rope = scaling_from_json(probe["rope"])
    yield from frequency_faults(live_frequencies(rotary(model)), rope.expected(rotary_dim(config)))
    yield from _compare("config.json, architectures", [type(model).__name__], config.architectures)
    rows = model.get_input_embeddings().weight.shape[0]
    yield from _compare("rows of the embedding and config's vocab_size", rows, config.vocab_size)
    yield from _compare("rows of the head and of the embedding", rows, output_head(model).weight.shape[0])
    if rows < len(tokenizer):
        yield f"  rows of the embedding: expected at least {len(tokenizer)}, the tokenizer's tokens, found {rows}"


def stop_faults(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Probe) -> Iterator[str]:
    """Yield a fault if generation, configured by the folder's files alone, does not stop at the end token."""
    settings = GenerationConfig.from_pretrained(tokenizer.name_or_path, local_files_only=True)
    try:
        settings.validate(strict=True)  # save_pretrained fails on what is invalid here
    except ValueError as error:
        yield f"  generation_config.json: invalid settings: {error}"
    stated = probe["stops"]["eos_token_id"]
    ends = stated if isinstance(stated, list) else [stated]
    before = next(number for number in probe["conversations"][0]["ids"][::-1] if number not in ends)
    prompt = torch.tensor([probe["conversations"][0]["ids"]])
    for end in ends:
        processors = LogitsProcessorList([_ForceTokens(prompt.shape[1], [before, end])])
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=4,
                do_sample=False,
                logits_processor=processors,
            )
        yield from _compare(
            f"tokens generated when the second is end token {end}", [before, end], out[0, prompt.shape[1] :].tolist()
        )


def logits_faults(model: PreTrainedModel, expected: NDArray[np.float32], probe: Probe) -> Iterator[str]:
    """Yield the largest difference between package and exported model in the logits of the probe row."""
    found = probe_logits(model, probe)
    if found.shape != expected.shape:
        yield f"  logits of the probe row: expected shape {expected.shape}, found {found.shape}"
        return
    limit = _TOLERANCE[probe["dtype"]] * float(np.abs(expected).max())
    position, token = np.unravel_index(np.argmax(np.abs(found - expected)), found.shape)
    package, export = float(found[position, token]), float(expected[position, token])
    if not abs(package - export) <= limit:  # also true for NaN
        at = f"logit of token {token} at position {position} of the probe"
        yield f"  {at}: expected {export:.6g}, found {package:.6g}"


class _ForceTokens(LogitsProcessor):  # type: ignore[misc] # transformers is untyped
    """Forces generation to these tokens, repeated in a cycle."""

    def __init__(self, start: int, tokens: Sequence[int]) -> None:
        self._start, self._tokens = start, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._tokens[(input_ids.shape[1] - self._start) % len(self._tokens)]] = 0
        return forced


def _compare(what: str, expected: object, found: object) -> Iterator[str]:
    # As JSON, since old loaders refuse a factor 2 that is not 2.0.
    if json.dumps(expected, sort_keys=True, default=str) != json.dumps(found, sort_keys=True, default=str):
        yield f"  {what}: expected {expected}, found {found}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one folder; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ropeway.stages.package.check", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--logits", type=Path, help="(T, V) logits of the probe row, as .npy")
    options = parser.parse_args(arguments)
    try:
        check_package(options.folder, options.logits)
    except RopewayError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{options.folder}: loads and equals the trained model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
