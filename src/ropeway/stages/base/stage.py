"""Stage base: write the model and tokenizer that training starts from.

The chat template is chosen and proved, role tokens are added if it is the published one, the vocabulary is padded, and
RoPE scaling is written to the config.
"""

import importlib.util
import math
import mmap
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import BaseParams
from ropeway.config.sections import (
    GgufBase,
    HubBase,
    ModelShape,
    ScratchBase,
)
from ropeway.data.raw_records import iterate_records, iterate_texts, load_raw_manifest
from ropeway.models.activations import count_activations
from ropeway.models.base_rope import keep_scaling
from ropeway.models.chat_template import OPEN_ASSISTANT, ChatTemplate
from ropeway.models.jinja_template import OWN_FILE, find_own_templates
from ropeway.models.open_model import (
    check_dense,
    create_model,
    disable_dropout,
    is_finite,
    layer_weights,
    load_base_model,
    measure_frequencies,
    model_class,
    output_head,
    plain_copy,
    read_config,
    read_shape,
    reads_flat_scaling,
    refused_by_name,
    rotary_dim,
    set_rope,
)
from ropeway.models.proofs import prove_model
from ropeway.models.rope import RopeScaling
from ropeway.models.rope_plan import change_faults, describe_change, plan_scaling
from ropeway.models.tokenizer import (
    LLAMA_SPECIAL,
    count_tokens,
    open_tokenizer,
    prepare_tokenizer,
    read_additional,
    read_other_names,
    read_response_template,
    read_special,
    read_special_names,
    state_response_template,
    train_tokenizer,
    write_tokenizer,
)
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import file_sha256, whole_folder, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.base.base_files import check_folder, check_names
from ropeway.stages.base.base_template import (
    BaseTokenizer,
    choose_template,
    describe_template,
    find_replaced_template,
    prove_template,
)
from ropeway.stages.base.gguf_header import check_gguf_header
from ropeway.storage import hub

_NO_SETTINGS = (  # of a generation config: nothing that a base states about its answers
    "transformers_version", "_from_model_config", "output_attentions", "output_hidden_states", "use_cache",
)  # fmt: skip
NEW_ROW_STD = 0.02  # Source: Llama's initializer_range, which resizing drew from in transformers 4.31
SHARD_BYTES = 5_000_000_000
_GGUF_ROPE = (b".rope.scaling.", b"rope_freqs.weight")  # names of what states a RoPE scaling in a GGUF file
_TEXTS = (
    "Hello",
    " Hello",
    "  two blanks",
    "a\tb\n\nc ",
    "na\u00efve \u2014 \u6f22\u5b57 \U0001f642",
    "1234567890",
    "def f(x):\n    return x",
)


def run(workspace: Workspace, profile: BaseParams) -> None:
    """Write `base/`: weights, config, tokenizer with the role tokens and the template, manifest.

    Raises:
        ConfigError: The model is missing, is no dense decoder, has another shape than `expected_model`, or its own code
            computes something else than this project's.
        DataError: raw/ is incomplete or has changed; only for `base.kind: scratch`, which trains a tokenizer.
        TemporaryError: The Hub does not respond.
    """
    with whole_folder(workspace.base) as folder:
        origin, options = locate_origin(workspace.root, profile)
        opened = _train_tokenizer(workspace, profile) if origin is None else open_base_tokenizer(origin, options)
        template, tokenizer = choose_template(profile, workspace.root, opened), opened.tokenizer
        chat = prove_template(template, opened, name=profile.template)
        write_base_tokenizer(folder, opened, template, max_length=profile.max_length)
        rows = plan_vocabulary(count_tokens(tokenizer), profile.pad_vocab_to_multiple_of)
        if origin is None:
            model, rope, shape = make_model(profile, rows=rows)
        else:
            model, rope, shape = open_model(origin, options, profile)
            rows = max(
                rows, model.get_input_embeddings().weight.shape[0]
            )  # rows that the base has beyond its tokens stay
            resize(model, rows=rows, new_rows=profile.new_rows, seed=profile.rng_seed)
        if own := find_replaced_template(template, opened):
            (folder / OWN_FILE).write_text(own, encoding="utf-8")
        special = read_special(folder, tokenizer, template)
        with refused_by_name(f"{profile.model_name} ({model.config.model_type})"):
            check_dense(model)
            proofs = prove_model(model)
            layers, dropout = layer_weights(model), disable_dropout(model)
        stops = _stop_ids(model, special, None if template is OPEN_ASSISTANT else tokenizer.token_to_id(chat["end"]))
        _save(model, folder, stops, keep_settings=template is not OPEN_ASSISTANT)
        check_reload(folder, tokenizer, where=profile.model_name)
        parameters = sum(part.numel() for part in model.parameters())
        stated = {
            "name": profile.model_name,
            "kind": profile.base.kind,
            "model_type": model.config.model_type,
            **shape,
            "embedding_rows": rows,
            "rope_parameters": rope.to_config(),
            **_describe_origin(workspace.root, profile),
        }
        facts = {
            "model": stated,
            "rope": rope.to_json(),
            "tokenizer": file_sha256(folder / "tokenizer.json"),
            "template": template.digest,
            "chat": chat,
            "special": special,
            "stops": stops,
            "parameters": parameters,
            "layer_weights": layers,
            "layer_activations": count_activations(model),
            "proofs": proofs,
            "dropout_off": dropout,
        }
        write_manifest(folder, facts)
    print(f"{profile.model_name}: {parameters:,} parameters, {rows:,} rows, special tokens {special}")
    print(describe_template(chat))
    if dropout:
        named = ", ".join(f"{name} {value:g}" for name, value in dropout.items())
        print(f"dropout of the base's config ({named}) is off in training: residual_dropout is 0")
    for name, fault in proofs.items():
        print(f"attention `{name}`: {fault or 'loss and gradients of the first layers equal those of transformers'}")


def check_reload(folder: Path, tokenizer: Tokenizer, *, where: str) -> None:
    """Raise ConfigError if transformers loads the written tokenizer as another one.

    transformers 5 builds the tokenizers of some model types again from their vocabulary (`qwen2`: byte level, its own
    rules), whatever tokenizer.json says. A package with such a tokenizer would read other tokens than training did.
    """
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for text in _TEXTS:
        mine = tokenizer.encode(text, add_special_tokens=False).ids
        found = loaded(text, add_special_tokens=False)["input_ids"]
        if found != mine:
            raise ConfigError(
                f"{where}: transformers loads its tokenizer as {type(loaded).__name__}, which gives {text!r} the ids "
                f"{found}, tokenizer.json the ids {mine}. Users of the model would get other tokens than it is trained "
                "with; use the tokenizer that this model type has"
            )


def _describe_origin(root: Path, profile: BaseParams) -> dict[str, dict[str, object]]:
    """Return the origin of a Hub or GGUF base for the manifest; of a local folder only times are known."""
    if not isinstance(profile.base, HubBase | GgufBase):
        return {}
    file = {"file": profile.base.file} if isinstance(profile.base, GgufBase) else {}
    return {"origin": FrozenInputs.load(root).value("base") | file}


def plan_vocabulary(tokens: int, multiple: int) -> int:
    """Return the rows of the embedding: `tokens`, rounded up. Source: Open-Assistant's model loading (July 2023).

    >>> plan_vocabulary(32005, 16)
    32016
    """
    return -(-tokens // multiple) * multiple


Opened = tuple[PreTrainedModel, RopeScaling, dict[str, object]]  # with the shape before rows are added


def make_model(profile: BaseParams, *, rows: int) -> Opened:
    """Return a Llama of `expected_model`'s shape with random fp32 weights that depend on the run's seed only."""
    expected = profile.expected_model
    if expected is None:
        raise ConfigError("expected_model is null, but base.kind scratch creates a model of its shape; state the shape")
    shape = expected.model_dump(exclude={"vocab_size", "rope_theta"}, exclude_none=True)
    rope = plan_scaling(profile, theta=expected.rope_theta, original=expected.max_position_embeddings)
    size = expected.head_dim or expected.hidden_size // expected.num_attention_heads
    if faults := list(rope.faults(size)):
        raise ConfigError("\n".join(faults))
    shape |= {"vocab_size": rows, "max_position_embeddings": rope.stated_positions}
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator only
        torch.manual_seed(profile.rng_seed)
        model = create_model({**shape, "rope_parameters": rope.to_config()}).to(torch.float32)
    return model, rope, read_shape(model.config) | expected.model_dump(exclude_none=True)


def open_model(origin: Path, options: Mapping[str, str], profile: BaseParams) -> Opened:
    """Return the model of a folder in its stored dtype, and its RoPE scaling as params.yaml sets it.

    Raises:
        ConfigError: It is no dense decoder, has another shape than `expected_model`, or lacks weights.
    """
    config = read_config(origin, options)
    model_class(config)
    if profile.expected_model is not None:
        check_shape(config, profile.expected_model, where=f"model_name {profile.model_name}")
    with refused_by_name(f"{profile.model_name} ({config.model_type})"):
        rope, shape = plan_rope(config, profile), read_shape(config)
        config = set_rope(config, rope)
    if profile.expected_model is not None and "gguf_file" in options:
        config.rms_norm_eps = profile.expected_model.rms_norm_eps  # GGUF stores 1e-5 as 9.999999747378752e-06
    try:
        model, found = load_base_model(origin, config, options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{origin}: the weights cannot be loaded: {error}. Download the model again") from error
    _check_weights(origin, model, found)
    return (plain_copy(model) if "gguf_file" in options else model), rope, shape


def _check_weights(origin: Path, model: PreTrainedModel, found: Mapping[str, Collection[str]]) -> None:
    """Raise ConfigError unless the files have exactly the config's weights, all of them finite."""
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"{origin}: {len(missing)} weights are missing from the files, first {missing[0]}; download the model again"
        )
    if unexpected := sorted(found["unexpected_keys"]):
        raise ConfigError(
            f"{origin}: {len(unexpected)} weights do not belong to a {type(model).__name__} of this config and would "
            f"be dropped, first {unexpected[0]}; use a plain model, or correct config.json"
        )
    for name, weight in model.state_dict().items():
        if not is_finite(weight):
            count = int((~torch.isfinite(weight)).sum())
            raise ConfigError(f"{origin}: {count:,} values of {name} are NaN or infinite; download the model again")


def plan_rope(config: PreTrainedConfig, profile: BaseParams) -> RopeScaling:
    """Return the run's RoPE scaling: the base model's own, unchanged, unless `superhot` is true.

    Raises:
        ConfigError: `superhot` would replace the base model's scaling by another kind or a shorter one, its settings do
            not fit the base, or `max_length` exceeds its context length. The message has every reason.
    """
    if not getattr(config, "rope_parameters", None):
        raise ConfigError(
            f"model_type {config.model_type}: transformers has no rope_parameters for it, by which this project plans "
            "and proves RoPE; bases with learned positions, ALiBi, no attention, or RoPE of their own code cannot be "
            "trained. Choose a decoder such as a Llama, Mistral, Qwen or Gemma"
        )
    own = keep_scaling(
        config.rope_parameters,
        config.max_position_embeddings,
        measure_frequencies(config),
        is_flat=reads_flat_scaling(config),
    )
    if not profile.superhot:
        if profile.max_length > own.reach:
            raise ConfigError(
                f"max_length is {profile.max_length} tokens, but the base model supports {own.reach} "
                f"(max_position_embeddings {config.max_position_embeddings}, RoPE {own.kind}); reduce max_length, or "
                "set superhot: true to extend the context"
            )
        return own
    # A scaled base is extended from its original context, so that factors do not multiply.
    rope = plan_scaling(profile, theta=own.theta, original=own.original, base=own)
    if faults := list(change_faults(rope, own, max_length=profile.max_length, dim=rotary_dim(config))):
        raise ConfigError("\n".join(faults))
    print(describe_change(rope, own))
    return rope


def check_shape(config: PreTrainedConfig, expected: ModelShape, *, where: str) -> None:
    """Raise ConfigError unless a model's config has the expected shape; the message lists every difference."""
    stated = read_shape(config)
    faults = [
        f"  {name}: expected_model has {value!r}, the model's config {stated.get(name)!r}"
        for name, value in expected.model_dump().items()
        if value is not None and not _equal(value, stated.get(name))
    ]
    if faults:
        raise ConfigError("\n".join([f"{where}: not the model that params.yaml expects", *faults]))


def _equal(expected: float, found: object) -> bool:
    """Return whether two numbers are equal in fp32: GGUF stores 1e-5 as 9.999999747378752e-06."""
    return isinstance(found, int | float) and math.isclose(expected, found, rel_tol=1e-6)


def resize(model: PreTrainedModel, *, rows: int, new_rows: str, seed: int) -> None:
    """Resize input embedding and output head to `rows`; new rows are N(0, 0.02), or the mean of the old rows."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows == old:
        return
    with torch.random.fork_rng(devices=[]):  # its random rows are overwritten below
        model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    for part in (model.get_input_embeddings(), *(() if tied else (output_head(model),))):
        weight = part.weight.data
        if new_rows == "mean":
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)
        else:
            weight[old:] = (torch.randn(weight[old:].shape, generator=generator) * NEW_ROW_STD).to(weight.dtype)


def locate_origin(root: Path, profile: BaseParams) -> tuple[Path | None, dict[str, str]]:
    """Return (folder of the original model, options for loading it); the folder is None for `base.kind: scratch`."""
    base = profile.base
    if isinstance(base, ScratchBase):
        return None, {}
    if isinstance(base, HubBase):
        return _download(profile.model_name, FrozenInputs.load(root).value("base")["commit"], base.revision), {}
    if isinstance(base, GgufBase):
        return _find_in_package(base), {"gguf_file": base.file}
    folder = root / profile.model_name
    if not folder.is_dir():
        raise ConfigError(f"model_name: {folder} is not a folder; copy the base model there, or set base.kind")
    check_folder(folder)
    return folder, {}


def _find_in_package(base: GgufBase) -> Path:
    """Return the folder of an installed package that contains the GGUF file, without importing the package."""
    found = importlib.util.find_spec(base.package)
    if found is None or found.origin is None:
        raise ConfigError(
            f"base.package: {base.package} is not installed; `make setup` installs that of the profile smollm2"
        )
    folder = Path(found.origin).parent
    if not (folder / base.file).is_file():
        there = sorted(path.name for path in folder.glob("*.gguf"))
        raise ConfigError(f"base.file: {folder} has no {base.file}; GGUF files there: {', '.join(there) or 'none'}")
    check_gguf_rope(folder / base.file)
    return folder


def check_gguf_rope(path: Path) -> None:
    """Raise ConfigError if a GGUF file is invalid or has a RoPE scaling, which transformers 5.24 ignores."""
    check_gguf_header(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if all(content.find(name) < 0 for name in _GGUF_ROPE):  # parsing the file takes seconds
            return
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, OverflowError) as error:
        raise ConfigError(f"base.file: {path} is not a valid GGUF file ({error}); download it again") from None
    stated = {key: field.contents() for key, field in reader.fields.items() if ".rope.scaling." in key}
    kind = next((str(value) for key, value in stated.items() if key.endswith(".type")), "none")
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if kind != "none" or (factors is not None and bool((factors != 1).any())):
        what = f"{kind} scaling ({stated})" if kind != "none" else "a RoPE scaling (tensor rope_freqs.weight)"
        raise ConfigError(
            f"base.file: {path} has {what}, which transformers does not read from a GGUF file; training would ignore "
            "it. Use the original in safetensors: base: {kind: folder} or {kind: hub, revision: COMMIT}"
        )


def _download(repo: str, commit: str, revision: str) -> Path:
    """Return the local snapshot of a Hub repository at a commit; missing files are downloaded."""
    there = hub.list_files(repo, commit, kind="model")
    check_names(there, where=f"{repo} at {commit}")
    names = [name for name in there if name.endswith((".json", ".jinja", ".safetensors"))]
    folder = hub.download_files(repo, commit, names, kind="model", revision=revision)
    check_folder(folder)
    return folder


def _train_tokenizer(workspace: Workspace, profile: BaseParams) -> BaseTokenizer:
    """Return a tokenizer that is trained on the sources, for `base.kind: scratch`."""
    sources = sorted(load_raw_manifest(workspace.raw)["sources"])
    records = (record for name in sources for record in iterate_records(workspace.raw / name))
    texts = (text for record in records for text in iterate_texts(record))
    vocabulary = profile.expected_model.vocab_size if profile.expected_model else 0
    return BaseTokenizer(train_tokenizer(texts, vocab_size=vocabulary), LLAMA_SPECIAL)


def open_base_tokenizer(origin: Path, options: Mapping[str, str]) -> BaseTokenizer:
    """Return the base's tokenizer; the arguments are what `locate_origin` returns."""
    if "gguf_file" not in options:
        names, additional = read_special_names(origin), read_additional(origin)
        other = read_other_names(origin)
        stated = read_response_template(origin)
        return BaseTokenizer(open_tokenizer(origin), names, additional, find_own_templates(origin), other, stated)
    opened = AutoTokenizer.from_pretrained(origin, trust_remote_code=False, **options)
    named = {"unk": opened.unk_token, "bos": opened.bos_token, "eos": opened.eos_token, "pad": opened.pad_token}
    found = {short: text for short, text in named.items() if text}
    tokenizer = Tokenizer.from_str(opened.backend_tokenizer.to_str())
    own = opened.chat_template
    return BaseTokenizer(tokenizer, found, templates=own if isinstance(own, dict) else {"default": own} if own else {})


def write_base_tokenizer(folder: Path, opened: BaseTokenizer, template: ChatTemplate, *, max_length: int) -> None:
    """Write the tokenizer; the published template replaces padding and further special tokens, others keep them."""
    names, additional = dict(opened.names), opened.additional
    if template is OPEN_ASSISTANT:
        names.pop("pad", None)
        additional = ()
    prepare_tokenizer(opened.tokenizer, names, template)
    write_tokenizer(folder, opened.tokenizer, names, template, max_length=max_length, additional=additional)
    if opened.response_template and template.jinja == opened.template:
        state_response_template(folder, opened.response_template)


def _stop_ids(model: PreTrainedModel, special: Mapping[str, int], end: int | None) -> dict[str, int | list[int]]:
    """Return the ids of BOS, padding and of all tokens that end generation.

    Args:
        model: The base; its own ids are kept where the template is kept.
        special: Ids of the tokenizer.
        end: What ends an answer in a Jinja template; None: the published template, whose stops are the tokenizer's.
    """
    if end is None:
        return {f"{short}_token_id": special[short] for short in ("bos", "eos", "pad")}
    stated: list[int] = []
    for one in (model.generation_config.eos_token_id, model.config.eos_token_id, special["eos"]):
        stated += one if isinstance(one, list) else [] if one is None else [one]
    ends = list(dict.fromkeys([*stated, end]))
    if end not in stated:
        print(f"the base stops at {sorted(set(stated))}, but its template ends answers with token {end}: added")
    bos = special.get("bos", model.config.bos_token_id)
    known: dict[str, int | list[int]] = {} if bos is None else {"bos_token_id": bos}
    return known | {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": special["pad"]}


def _save(model: PreTrainedModel, folder: Path, stops: Mapping[str, int | list[int]], *, keep_settings: bool) -> None:
    """Save weights, config and a generation config with these ids.

    `keep_settings`: whether the base's other generation settings, e.g. its temperature, are kept; they are dropped
    where transformers refuses to save them.
    """
    settings = model.generation_config if keep_settings else GenerationConfig()
    own = set(model.generation_config.to_diff_dict()) - {*stops, *_NO_SETTINGS}
    if own and not keep_settings:
        print(f"the base's generation settings are not kept with template open_assistant: {', '.join(sorted(own))}")
    for name, number in stops.items():
        setattr(model.config, name, number)
        setattr(settings, name, number)
    try:
        settings.validate(strict=True)
    except ValueError as error:
        print(f"the base's generation settings are invalid and dropped: {error}")
        settings = GenerationConfig(**stops)
    model.generation_config = settings
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
