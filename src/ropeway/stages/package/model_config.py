"""The JSON files of the package, with both keys where transformers 4.31 to 5 read different ones.

Source: reference loaders 4.31.0, 4.46 and 5.24: a config saved by 5.24 has only `rope_parameters` and `dtype`; 4.x then
silently uses unscaled RoPE in fp32. 4.31 requires `rope_scaling` to be exactly {type, factor} with a float factor.
"""

from collections.abc import Mapping
from typing import NotRequired, TypedDict, TypeGuard

from ropeway.models.architectures import DEFAULT
from ropeway.models.chat_template import OPEN_ASSISTANT, ChatTemplate
from ropeway.models.rope import RopeScaling

TORCH_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
TESTED_LOADER = "5.17.0"  # the lowest that pyproject.toml allows
LLAMA_THETA = 10000.0  # the only value that transformers before 4.33 supports

# The keys of a tokenizer config to keep: loaders disagree on the rest (5.24 writes `extra_special_tokens` as a list,
# which 4.46 refuses; `backend` and `is_local` are its own).
_TOKENIZER_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token")


class TokenizerModel(TypedDict):
    """The keys of `model` in tokenizer.json that are read here."""

    merges: NotRequired[list[list[str]] | list[str] | None]
    ignore_merges: NotRequired[bool]


class TokenizerJson(TypedDict):
    """The keys of tokenizer.json that are read here."""

    model: TokenizerModel


def plan_config(
    trained: Mapping[str, object], *, rope: RopeScaling, dtype: str, stops: Mapping[str, object]
) -> dict[str, object]:
    """Return config.json of the package from that of the exported model."""
    dropped = ("transformers_version", "_name_or_path", "rope_type")
    return {
        **{key: value for key, value in trained.items() if key not in dropped},
        "dtype": TORCH_NAMES[dtype],
        "torch_dtype": TORCH_NAMES[dtype],
        **rope.to_config_keys(),
        "use_cache": True,  # off in training
        **stops,
    }


def plan_tokenizer_config(
    trained: Mapping[str, object], template: ChatTemplate, *, max_length: int
) -> dict[str, object]:
    """Return tokenizer_config.json with a class that every version has, and the chat template as a key.

    `PreTrainedTokenizerFast` uses tokenizer.json unchanged; `LlamaTokenizer` of transformers 5 rebuilds it, with other
    ids.
    """
    named = {key: _token_text(trained[key]) for key in _TOKENIZER_KEYS if trained.get(key)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": trained["additional_special_tokens"],
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": template.plain_jinja,
        **({"response_template": trained["response_template"]} if trained.get("response_template") else {}),
    }


def plan_special_tokens_map(tokenizer_config: Mapping[str, object]) -> dict[str, object]:
    """Return special_tokens_map.json, which loaders before 5 read in addition to the config."""
    return {
        key: tokenizer_config[key] for key in (*_TOKENIZER_KEYS, "additional_special_tokens") if key in tokenizer_config
    }


def plan_generation_config(
    trained: Mapping[str, object], template: ChatTemplate, stops: Mapping[str, object]
) -> dict[str, object]:
    """Return generation_config.json: it stops at the end tokens.

    Under the published template sampling settings are left to the user; where the base's template is kept, so are its
    generation settings.
    """
    if template is OPEN_ASSISTANT:
        return dict(stops)
    own = ("transformers_version", "_from_model_config")
    return {**{key: value for key, value in trained.items() if key not in own}, **stops}


def plan_tokenizer(trained: TokenizerJson) -> TokenizerJson:
    """Return tokenizer.json with merges as `"a b"`, which every version of tokenizers reads, where possible.

    Source: tokenizers 0.20 writes merges as pairs, which earlier versions (transformers up to 4.44) refuse. A token
    that contains a space requires pairs.
    """
    model = trained["model"]
    merges = model.get("merges")
    if not _all_pairs(merges) or any(" " in part for pair in merges for part in pair):
        return trained
    return {**trained, "model": {**model, "merges": [" ".join(pair) for pair in merges]}}


def _all_pairs(merges: object) -> TypeGuard[list[list[str]]]:
    return isinstance(merges, list) and bool(merges) and all(isinstance(pair, list) for pair in merges)


def lowest_loader(rope: RopeScaling, tokenizer: TokenizerJson, model_type: str) -> str:
    """Return the lowest version of transformers that loads the model correctly.

    For other families than Llama it is the lowest that this project is tested with.

    Source: transformers' release notes: linear and dynamic scaling since 4.31.0; `rope_theta` since 4.33.0 (before it
    every Llama has 10,000); yarn and llama3 since 4.43.0. Its setup.py: tokenizers 0.19 (`ignore_merges`) since 4.40.0,
    0.20 (merges as pairs) since 4.45.0.
    """
    if model_type != DEFAULT:
        return TESTED_LOADER
    model = tokenizer["model"]
    needed = {
        "4.33.0": rope.theta != LLAMA_THETA,
        "4.40.0": model.get("ignore_merges") is True,
        rope.loader: True,
        "4.45.0": _all_pairs(model.get("merges")),
    }
    return max((version for version, is_needed in needed.items() if is_needed), default="4.31.0")


def _token_text(token: object) -> str:
    """Return the text of a token stored as a string or as an AddedToken's mapping."""
    return str(token["content"] if isinstance(token, Mapping) else token)
