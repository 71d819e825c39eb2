"""Find out what a base model is: its context, RoPE, template, weights, and the tokenizer that counts tokens."""

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ropeway.config.params import Profile
from ropeway.config.sections import HubBase, ScratchBase
from ropeway.models.base_rope import keep_scaling
from ropeway.models.chat_template import OPEN_ASSISTANT, open_template
from ropeway.models.open_model import measure_frequencies, model_class, read_config
from ropeway.models.tokenizer import LLAMA_SPECIAL, open_tokenizer, read_special, train_tokenizer
from ropeway.runtime.errors import ConfigError
from ropeway.stages.base.base_template import BaseTokenizer, choose_template
from ropeway.stages.base.stage import locate_origin, open_base_tokenizer, write_base_tokenizer
from ropeway.stages.tokenize.encode import Encoder
from ropeway.storage import hub

_VOCABULARIES = (4000, 2000, 1000, 500, 300)  # of a tokenizer that is trained on the data, the largest that it gives


@dataclass(frozen=True, slots=True)
class BaseFindings:
    """What a base model is.

    Attributes:
        family: Its `model_type`.
        context: Tokens that it reaches with its own RoPE; None: a model that is made.
        rope: Its own RoPE in words.
        is_scaled: Whether it has a RoPE scaling.
        parameters: Number of weights; None: not known.
        has_template: Whether it has a chat template of its own.
        vocabulary: Tokens of the tokenizer.
        license: As its README states it; None: it states none.
        tokenizer: The tokenizer.
    """

    family: str
    context: int | None
    rope: str
    parameters: int | None
    has_template: bool
    vocabulary: int
    license: str | None
    tokenizer: BaseTokenizer
    is_scaled: bool = False


def examine_base(root: Path, profile: Profile, texts: Iterable[str]) -> BaseFindings:
    """Return what the base of a profile is; a tokenizer for `base.kind: scratch` is trained on the texts.

    Raises:
        ConfigError: It cannot be opened, or not be trained.
    """
    if isinstance(profile.base, ScratchBase):
        opened, vocabulary = _train(list(texts))
        return BaseFindings("llama", None, "new", None, has_template=False, vocabulary=vocabulary, license=None,
                            tokenizer=opened)  # fmt: skip
    origin, options = _find_origin(root, profile)
    config = read_config(origin, options)
    with torch.device("meta"):
        model = model_class(config)(config)
    if not getattr(config, "rope_parameters", None):
        raise ConfigError(f"--base: {config.model_type} has no rotary embedding (RoPE); choose a decoder that has one")
    own = keep_scaling(config.rope_parameters, config.max_position_embeddings, measure_frequencies(config))
    opened = open_base_tokenizer(origin, options)
    return BaseFindings(
        family=config.model_type,
        context=own.reach,
        rope=f"{own.kind}, for {own.reach:,} tokens",
        parameters=sum(weight.numel() for weight in model.parameters()),
        has_template=opened.template is not None,
        vocabulary=opened.tokenizer.get_vocab_size(),
        license=_read_license(origin),
        tokenizer=opened,
        is_scaled=own.is_scaled,
    )


def open_encoder(root: Path, profile: Profile, opened: BaseTokenizer, max_chunk_size: int | None) -> Encoder:
    """Return the encoder of the stage tokenize for a profile, with the tokenizer that stage base would write."""
    template = choose_template(profile, root, opened)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base_tokenizer(folder, opened, template, max_length=profile.max_length)
        tokenizer = open_tokenizer(folder)
        special = read_special(folder, tokenizer, template)
        if template is not OPEN_ASSISTANT:
            template = open_template(folder)
    return Encoder(tokenizer, special, template, max_chunk_size, profile.special_tokens_in_text, profile.history)


def _train(texts: list[str]) -> tuple[BaseTokenizer, int]:
    for size in _VOCABULARIES:
        try:
            return BaseTokenizer(train_tokenizer(texts, vocab_size=size), LLAMA_SPECIAL), size
        except ConfigError:  # too little text for so many tokens
            continue
    raise ConfigError(f"--data: the text gives fewer than {_VOCABULARIES[-1]} tokens; add data, or name a base model")


def _find_origin(root: Path, profile: Profile) -> tuple[Path, dict[str, str]]:
    if isinstance(profile.base, HubBase):
        commit = hub.resolve_commit(profile.model_name, profile.base.revision, kind="model")
        names = [
            one
            for one in hub.list_files(profile.model_name, commit, kind="model")
            if one.endswith((".json", ".jinja", "README.md"))
        ]
        revision = profile.base.revision
        return hub.download_files(profile.model_name, commit, names, kind="model", revision=revision), {}
    origin, options = locate_origin(root, profile)
    if origin is None:
        raise ConfigError("--base: expected a folder, a Hub repository, a profile or `scratch`")
    return origin, options


def _read_license(folder: Path) -> str | None:
    """Return the license in the head of a model card; None if there is none."""
    path = folder / "README.md"
    head = path.read_text("utf-8", "replace").split("---")[1:2] if path.is_file() else []
    found = re.search(r"(?m)^license:\s*([\w.-]+)\s*$", head[0]) if head else None
    return found[1] if found else None
