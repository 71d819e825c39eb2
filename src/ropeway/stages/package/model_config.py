"""The JSON beside the weights, in both spellings where loaders of transformers 4.31 to 5 differ.

Source: reference loaders 4.31.0, 4.46 and 5.24: a config saved by 5.24 has `rope_parameters` and `dtype` only; 4.x then
runs unscaled RoPE in fp32 without a word. 4.31 wants `rope_scaling` to be exactly {type, factor} with a float factor.
"""

from collections.abc import Mapping
from typing import NotRequired, TypedDict, TypeGuard

from ropeway.models.chat_template import ChatTemplate
from ropeway.models.rope import RopeScaling

TORCH_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
LLAMA_THETA = 10000.0  # the only one that transformers before 4.33 knows

# What a tokenizer config may carry over: loaders disagree on the rest (5.24 writes `extra_special_tokens` as a list,
# which 4.46 refuses; `backend` and `is_local` are its own).
_TOKENIZER_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token")


class TokenizerModel(TypedDict):
    """`model` of tokenizer.json, as far as it is read here."""

    merges: NotRequired[list[list[str]] | list[str] | None]
    ignore_merges: NotRequired[bool]


class TokenizerJson(TypedDict):
    """tokenizer.json, as far as it is read here."""

    model: TokenizerModel


def plan_config(
    trained: Mapping[str, object], *, rope: RopeScaling, dtype: str, special: Mapping[str, int]
) -> dict[str, object]:
    """Return config.json of the package, made of that of train's export."""
    dropped = ("transformers_version", "_name_or_path", "rope_type")
    return {
        **{key: value for key, value in trained.items() if key not in dropped},
        "dtype": TORCH_NAMES[dtype],
        "torch_dtype": TORCH_NAMES[dtype],
        "rope_parameters": rope.to_config(),
        "rope_scaling": rope.to_legacy_config(),
        "rope_theta": rope.theta,
        "use_cache": True,  # training switches it off
        **{f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")},
    }


def plan_tokenizer_config(
    trained: Mapping[str, object], template: ChatTemplate, *, max_length: int
) -> dict[str, object]:
    """Return tokenizer_config.json: a class every version knows, and the template as a key beside its file.

    `PreTrainedTokenizerFast` runs tokenizer.json as it is; `LlamaTokenizer` of transformers 5 rebuilds it and gives
    other ids.
    """
    named = {key: _text(trained[key]) for key in _TOKENIZER_KEYS if trained.get(key)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": list(template.added_tokens),
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": template.plain_jinja,
    }


def plan_special_tokens_map(tokenizer_config: Mapping[str, object]) -> dict[str, object]:
    """Return special_tokens_map.json, which loaders before 5 read beside the config."""
    return {
        key: tokenizer_config[key] for key in (*_TOKENIZER_KEYS, "additional_special_tokens") if key in tokenizer_config
    }


def plan_generation_config(special: Mapping[str, int]) -> dict[str, int]:
    """Return generation_config.json: stop at the end token; how to draw is the reader's choice."""
    return {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")}


def plan_tokenizer(trained: TokenizerJson) -> TokenizerJson:
    """Return tokenizer.json with its merges as `"a b"`, which every version of tokenizers reads, if they can be so.

    Source: tokenizers 0.20 writes them as pairs, and all before it (transformers up to 4.44) then refuse the file.
    A token with a blank in it can stand in pairs alone.
    """
    model = trained["model"]
    merges = model.get("merges")
    if not _all_pairs(merges) or any(" " in part for pair in merges for part in pair):
        return trained
    return {**trained, "model": {**model, "merges": [" ".join(pair) for pair in merges]}}


def _all_pairs(merges: object) -> TypeGuard[list[list[str]]]:
    return isinstance(merges, list) and bool(merges) and all(isinstance(pair, list) for pair in merges)


def lowest_loader(rope: RopeScaling, tokenizer: TokenizerJson) -> str:
    """Return the lowest version of transformers that loads such a model right.

    Source: transformers' release notes: linear and dynamic scaling came with 4.31.0; `rope_theta` with 4.33.0, before
    which every Llama has 10,000; yarn and llama3 with 4.43.0. Its setup.py: tokenizers 0.19 (`ignore_merges`) came
    with 4.40.0, 0.20 (merges as pairs) with 4.45.0.
    """
    model = tokenizer["model"]
    needed = {
        "4.33.0": rope.theta != LLAMA_THETA,
        "4.40.0": model.get("ignore_merges") is True,
        rope.loader: True,
        "4.45.0": _all_pairs(model.get("merges")),
    }
    return max((version for version, is_needed in needed.items() if is_needed), default="4.31.0")


def _text(token: object) -> str:
    """Return the text of a token that stands as a string, or as an AddedToken's mapping."""
    return str(token["content"] if isinstance(token, Mapping) else token)
