"""The base of a rehearsal: the real one if it is on this machine and small, else a stand-in with few random weights.

A stand-in of a base that is here has its family, tokenizer and chat template. Where the base is missing, it is a Llama
in the proportions of `expected_model` with a tokenizer that is trained on the sample.
"""

import importlib.util
import math
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel

from ropeway.config.params import Profile
from ropeway.config.sections import FolderBase, GgufBase, HubBase, ModelShape, ScratchBase
from ropeway.models.architectures import can_split_heads
from ropeway.models.open_model import create_model, head_dim, model_class, read_config, read_shape, refused_by_name
from ropeway.models.proofs import shorten
from ropeway.models.tokenizer import LLAMA_SPECIAL, count_tokens, train_tokenizer
from ropeway.rehearse.shrink import RehearsedBase
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import write_json
from ropeway.runtime.terminal import format_large
from ropeway.stages.base.base_files import CONFIG, check_folder

FOLDER = "stand-in"
MOST_WEIGHTS = {False: 200_000_000, True: 500_000_000}  # of a real base that is rehearsed with: without GPU, with one
_SCRATCH_WEIGHTS = 20_000_000
_VOCABULARIES = (
    4000,
    2000,
    1000,
    500,
    400,
    300,
    280,
    270,
    265,
    262,
)  # of a tokenizer that is trained on the sample, the largest possible
_LAYERS, _MOST_KEY_VALUE_HEADS, _MOST_GROUP = 2, 2, 4
# A template in the form of ChatML, for a stand-in whose base is not here: nothing is known of its own.
_MARKS = ("<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NOT_COPIED = (CONFIG, "generation_config.json")


@dataclass(frozen=True, slots=True)
class BaseChoice:
    """What the rehearsal starts from.

    Attributes:
        way: The real base; a stand-in like the files in `folder`; a stand-in in the proportions of `expected_model`; or
            a base that every run makes (`base.kind: scratch`).
        folder: The real base's folder, if it has one on this machine.
        why: Why it is not the real base.
    """

    way: Literal["real", "like files", "like shape", "scratch"]
    folder: Path | None = None
    why: str = ""


def choose_base(root: Path, profile: Profile, *, has_gpu: bool) -> BaseChoice:
    """Return which base a rehearsal starts from.

    Raises:
        ConfigError: The base is on this machine and is not complete, or no model that can be trained.
    """
    base = profile.base
    if isinstance(base, ScratchBase):
        return BaseChoice("scratch")
    if isinstance(base, GgufBase):
        return _choose_gguf(profile, base, has_gpu=has_gpu)
    if isinstance(base, HubBase):
        folder = hub_folder(profile.model_name, base)
        if folder is None:
            return BaseChoice("like shape", why=f"{profile.model_name} is not in the Hub's cache")
    else:
        folder = root / profile.model_name
        if not folder.is_dir():
            return BaseChoice("like shape", why=f"{profile.model_name} is not on this machine")
    check_folder(folder)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2  # most are stored in 16 bit
    if weights <= MOST_WEIGHTS[has_gpu]:
        return BaseChoice("real", folder)
    return BaseChoice("like files", folder, f"its files are those of {format_large(weights)} weights")


def _choose_gguf(profile: Profile, base: GgufBase, *, has_gpu: bool) -> BaseChoice:
    if importlib.util.find_spec(base.package) is None:
        return BaseChoice("like shape", why=f"the package {base.package} is not installed")
    weights = count_weights(profile.expected_model) if profile.expected_model else 0
    if weights <= MOST_WEIGHTS[has_gpu]:
        return BaseChoice("real")
    return BaseChoice("like shape", why=f"its file is that of {format_large(weights)} weights")


def hub_folder(repo: str, base: HubBase) -> Path | None:
    """Return the complete folder of a model in the Hub's cache; None if it is not there."""
    from ropeway.storage import hub

    folder = hub.find_cached(repo, base.revision, kind="model")
    return folder if folder and (folder / CONFIG).is_file() and any(folder.glob("*.safetensors")) else None


def count_weights(shape: ModelShape) -> int:
    """Return the weights of a Llama of a shape, without its norms."""
    size = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    attention = 2 * shape.hidden_size * size * (shape.num_attention_heads + shape.num_key_value_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size
    return shape.num_hidden_layers * layer + shape.vocab_size * shape.hidden_size * (2 - shape.tie_word_embeddings)


def make_base(
    profile: Profile, choice: BaseChoice, texts: Sequence[str], folder: Path, *, length: int
) -> RehearsedBase:
    """Write the stand-in, if one is needed, and return what is rehearsed with.

    Args:
        profile: The real profile.
        choice: What `choose_base` returned.
        texts: Texts of the sample, in the order in which stage base reads them.
        folder: The rehearsal's workspace.
        length: `max_length` of the rehearsal.
    """
    block = profile.base.model_dump()
    stated = profile.expected_model
    if choice.way == "real":
        name = str(choice.folder.resolve()) if choice.folder else profile.model_name
        shown = "the real base" + (", from the Hub's cache" if isinstance(profile.base, HubBase) else "")
        kept = {"kind": "folder"} if choice.folder else block
        shape = stated.model_dump() if stated else None
        return RehearsedBase(kept, name, shape, shown, is_real=True, has_own_tokenizer=True)
    if choice.way == "scratch":
        assert stated is not None  # noqa: S101 - the schema requires it
        small = stated if count_weights(stated) <= _SCRATCH_WEIGHTS else shrink_shape(profile, stated, length=length)
        found = fit_vocabulary(texts, small.vocab_size).get_vocab_size()
        shape = small.model_copy(update={"vocab_size": found}).model_dump()
        return RehearsedBase(block, profile.model_name, shape, "made by stage base", is_real=True,
                             has_own_tokenizer=False)  # fmt: skip
    target = folder / FOLDER
    target.mkdir(parents=True)
    if choice.way == "like files" and choice.folder:
        weights, family = _write_like_files(choice.folder, target, profile, length=length)
        words = f"stand-in: {family} with {format_large(weights)} random weights and its tokenizer; {choice.why}"
    else:
        weights = _write_like_shape(profile, stated, texts, target, length=length)
        words = f"stand-in: a Llama of {format_large(weights)} random weights, tokenizer of the sample; {choice.why}"
    own = read_shape(read_config(target, {}))
    shape = {key: own[key] for key, value in stated.model_dump().items() if value is not None} if stated else None
    is_like_files = choice.way == "like files"
    return RehearsedBase({"kind": FolderBase(kind="folder").kind}, FOLDER, shape, words, is_real=False,
                         has_own_tokenizer=is_like_files)  # fmt: skip


def fit_vocabulary(texts: Sequence[str], most: int) -> Tokenizer:
    """Return a tokenizer trained on texts, with as many tokens of `_VOCABULARIES` as they give, `most` at most.

    Raises:
        ConfigError: The texts give too few tokens.
    """
    sizes = [size for size in (most, *_VOCABULARIES) if size <= most]
    for size in sizes:
        try:
            return train_tokenizer(texts, vocab_size=size)
        except ConfigError as error:  # too little text for so many tokens
            last = error
    raise last


def shrink_shape(profile: Profile, shape: ModelShape, *, length: int) -> ModelShape:
    """Return a small shape in the same proportions: head size, ratio of heads, and rows over the base's context."""
    size = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    query, key_value = plan_heads(shape.num_attention_heads, shape.num_key_value_heads, profile.sequence_parallel)
    scale = profile.superhot_config.scale if profile.superhot else 1
    hidden = query * size
    return shape.model_copy(
        update={
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": min(shape.num_hidden_layers, _LAYERS),
            "num_attention_heads": query,
            "num_key_value_heads": key_value,
            "max_position_embeddings": max(2, math.ceil(length / scale)),
        }
    )


def plan_heads(query: int, key_value: int, shared: int) -> tuple[int, int]:
    """Return few (query, key-value) heads in about the same ratio that `shared` ranks can split.

    >>> plan_heads(40, 40, 1), plan_heads(32, 8, 1), plan_heads(32, 4, 8)
    ((2, 2), (8, 2), (8, 2))
    """
    few = min(key_value, _MOST_KEY_VALUE_HEADS)
    heads = few * min(query // key_value, _MOST_GROUP)
    while not can_split_heads(heads, few, shared) and heads < query:
        heads, few = 2 * heads, min(2 * few, key_value)
    return (heads, few) if can_split_heads(heads, few, shared) else (query, key_value)


def shrink_config(config: PreTrainedConfig, shared: int) -> PreTrainedConfig:
    """Return a config of the same family with few, narrow layers, one of each kind, and the whole vocabulary."""
    small, stated = shorten(config), config.to_dict()
    for name in ("vocab_size", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "use_cache",
                 "pad_token_id", "bos_token_id", "eos_token_id"):  # fmt: skip
        if name in stated:
            setattr(small, name, stated[name])
    size = head_dim(config)
    query, key_value = plan_heads(
        config.num_attention_heads, stated.get("num_key_value_heads") or config.num_attention_heads, shared
    )
    hidden = min(config.hidden_size, query * size)
    new = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": query}
    new |= {"num_key_value_heads": key_value, "head_dim": size}
    for name, value in new.items():
        if name in stated and stated[name] is not None:
            setattr(small, name, value)
    return small


def _write_like_files(origin: Path, target: Path, profile: Profile, *, length: int) -> tuple[int, str]:
    """Write a small model of the family of `origin` with its tokenizer; return its weights and its family in words."""
    config = read_config(origin, {})
    family = f"its family ({config.model_type})"
    try:
        with refused_by_name(config.model_type), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = shrink_config(deepcopy(config), profile.sequence_parallel)
            model = model_class(small)(small).to(torch.bfloat16)
    except ConfigError as error:
        family = f"a Llama, because its family cannot be made smaller ({error})"
        shape = shrink_shape(
            profile, profile.expected_model or _UNKNOWN, length=max(length, config.max_position_embeddings)
        )
        model = _make_llama(shape, rows=config.vocab_size)
    for path in origin.iterdir():
        of_tokenizer = path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(".index.json")
        if path.is_file() and of_tokenizer and path.name not in _NOT_COPIED:
            shutil.copyfile(path, target / path.name)
    model.save_pretrained(target)
    if (origin / "generation_config.json").is_file():
        shutil.copyfile(origin / "generation_config.json", target / "generation_config.json")
    return sum(weight.numel() for weight in model.parameters()), family


def _make_llama(shape: ModelShape, *, rows: int) -> PreTrainedModel:
    facts = shape.model_dump(exclude={"rope_theta", "vocab_size"}, exclude_none=True)
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        special = {"bos_token_id": 1, "eos_token_id": 2}
        return create_model({**facts, "vocab_size": rows, "rope_parameters": rope, **special}).to(torch.bfloat16)


def _write_like_shape(
    profile: Profile, stated: ModelShape | None, texts: Sequence[str], target: Path, *, length: int
) -> int:
    shape = shrink_shape(profile, stated or _UNKNOWN, length=length)
    tokenizer = fit_vocabulary(texts, min(shape.vocab_size, _VOCABULARIES[0]))
    named = {f"{name}_token": text for name, text in LLAMA_SPECIAL.items()}
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "model_max_length": length}
    if profile.template == "base":
        tokenizer.add_special_tokens(list(_MARKS))
        config |= {"chat_template": _CHAT_TEMPLATE, "additional_special_tokens": list(_MARKS)}
    tokenizer.save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})
    model = _make_llama(shape, rows=count_tokens(tokenizer))
    model.save_pretrained(target)
    return sum(weight.numel() for weight in model.parameters())


# A Llama of no base in particular: nothing is known of one that is not here and whose shape no key states.
_UNKNOWN = ModelShape(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
    vocab_size=4000, max_position_embeddings=4096, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip
