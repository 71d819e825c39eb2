"""Stage base: write the model and tokenizer that training starts from.

Role tokens are added, the vocabulary is padded, and RoPE scaling is written to the config.
"""

import importlib.util
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import BaseParams, GgufBase, HubBase, ModelShape, ScratchBase
from ropeway.data.raw_records import iterate_records, iterate_texts, load_raw_manifest
from ropeway.models.architectures import check_architecture
from ropeway.models.chat_template import choose_template
from ropeway.models.open_model import (
    create_model,
    load_base_model,
    measure_frequencies,
    output_head,
    plain_copy,
    read_config,
)
from ropeway.models.rope import RopeScaling, keep_scaling, plan_scaling
from ropeway.models.tokenizer import (
    LLAMA_SPECIAL,
    count_tokens,
    open_tokenizer,
    prepare_tokenizer,
    read_special,
    read_special_names,
    train_tokenizer,
    write_tokenizer,
)
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import file_sha256, whole_folder, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.base.base_files import check_folder, check_names
from ropeway.storage import hub

NEW_ROW_STD = 0.02  # Source: Llama's initializer_range, which resizing drew from in transformers 4.31
SHARD_BYTES = 5_000_000_000


def run(workspace: Workspace, profile: BaseParams) -> None:
    """Write `base/`: weights, config, tokenizer with the role tokens and the template, manifest.

    Raises:
        ConfigError: The model is missing, is not a Llama, or has another shape than `expected_model`.
        DataError: raw/ is incomplete or has changed; only for `base.kind: scratch`, which trains a tokenizer.
        TemporaryError: The Hub does not respond.
    """
    with whole_folder(workspace.base) as folder:
        origin, options = _locate_origin(workspace.root, profile)
        tokenizer, names = _open_or_train_tokenizer(workspace, profile, origin, options)
        template = choose_template()
        prepare_tokenizer(tokenizer, names, template)
        write_tokenizer(folder, tokenizer, names, template, max_length=profile.max_length)
        rows = plan_vocabulary(count_tokens(tokenizer), profile.pad_vocab_to_multiple_of)
        if origin is None:
            model, rope = make_model(profile, rows=rows)
        else:
            model, rope = open_model(origin, options, profile)
            resize(model, rows=rows, new_rows=profile.new_rows, seed=profile.rng_seed)
        special = read_special(folder, tokenizer, template)
        _save(model, folder, special)
        parameters = sum(part.numel() for part in model.parameters())
        stated = {
            "name": profile.model_name,
            "kind": profile.base.kind,
            **profile.expected_model.model_dump(),
            "embedding_rows": rows,
            "rope_parameters": rope.to_config(),
            **_describe_origin(workspace.root, profile),
        }
        facts = {
            "model": stated,
            "rope": rope.to_json(),
            "tokenizer": file_sha256(folder / "tokenizer.json"),
            "template": template.digest,
            "special": special,
            "parameters": parameters,
        }
        write_manifest(folder, facts)
    print(f"{profile.model_name}: {parameters:,} parameters, {rows:,} rows, special tokens {special}")


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


def make_model(profile: BaseParams, *, rows: int) -> tuple[PreTrainedModel, RopeScaling]:
    """Return a Llama of `expected_model`'s shape with random fp32 weights that depend on the run's seed only."""
    shape, rope = profile.expected_model.model_dump(exclude={"vocab_size", "rope_theta"}), _rope(profile)
    shape |= {"vocab_size": rows, "max_position_embeddings": rope.stated_positions}
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator only
        torch.manual_seed(profile.rng_seed)
        return create_model({**shape, "rope_parameters": rope.to_config()}).to(torch.float32), rope


def open_model(origin: Path, options: Mapping[str, str], profile: BaseParams) -> tuple[PreTrainedModel, RopeScaling]:
    """Return the Llama of a folder in its stored dtype, and its RoPE scaling as params.yaml sets it.

    Raises:
        ConfigError: It is not a Llama, has another shape than `expected_model`, or lacks weights.
    """
    config = read_config(origin, options)
    check_shape(config, profile.expected_model, where=f"model_name {profile.model_name}")
    rope = plan_rope(config, profile)
    config.rope_parameters = rope.to_config()  # the whole dict: a partial one loses theta (5.24)
    config.max_position_embeddings = rope.stated_positions
    config.rms_norm_eps = profile.expected_model.rms_norm_eps
    try:
        model, found = load_base_model(origin, config, options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{origin}: the weights cannot be loaded: {error}. Download the model again") from error
    _check_weights(origin, model, found)
    return (plain_copy(model) if "gguf_file" in options else model), rope


def _check_weights(origin: Path, model: PreTrainedModel, found: Mapping[str, Collection[str]]) -> None:
    """Raise ConfigError unless the files have exactly the config's weights, all of them finite."""
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"{origin}: {len(missing)} weights are missing from the files, first {missing[0]}; download the model again"
        )
    if unexpected := sorted(found["unexpected_keys"]):
        raise ConfigError(
            f"{origin}: {len(unexpected)} weights do not belong to a Llama of this config and would be dropped, first "
            f"{unexpected[0]}; use a plain Llama, or correct config.json"
        )
    for name, weight in model.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            count = int((~torch.isfinite(weight)).sum())
            raise ConfigError(f"{origin}: {count:,} values of {name} are NaN or infinite; download the model again")


def plan_rope(config: PreTrainedConfig, profile: BaseParams) -> RopeScaling:
    """Return the run's RoPE scaling: the base model's own, unchanged, unless `superhot` is true.

    Raises:
        ConfigError: `superhot` would replace the base model's scaling, or `max_length` exceeds its context length.
    """
    own = keep_scaling(config.rope_parameters, config.max_position_embeddings, measure_frequencies(config))
    if not profile.superhot:
        if profile.max_length > own.reach:
            raise ConfigError(
                f"max_length is {profile.max_length} tokens, but the base model supports {own.reach} "
                f"(max_position_embeddings {config.max_position_embeddings}, RoPE {own.kind}); reduce max_length, or "
                "set superhot: true to extend the context"
            )
        return own
    rope = _rope(profile)
    if own.is_scaled:
        raise ConfigError(
            f"superhot: true sets {rope.kind} RoPE scaling by {rope.factor:g}, but the base model already has "
            f"{own.kept}. Set superhot: false to keep that scaling"
        )
    return rope


def check_shape(config: PreTrainedConfig, expected: ModelShape, *, where: str) -> None:
    """Raise ConfigError unless a model's config has the expected shape; the message lists every difference."""
    check_architecture(config.model_type, where=where)
    stated = {**config.to_dict(), "rope_theta": (config.rope_parameters or {}).get("rope_theta")}
    faults = [
        f"  {name}: expected_model has {value!r}, the model's config {stated.get(name)!r}"
        for name, value in expected.model_dump().items()
        if not _equal(value, stated.get(name))
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


def _rope(profile: BaseParams) -> RopeScaling:
    shape = profile.expected_model
    return plan_scaling(profile, theta=shape.rope_theta, original=shape.max_position_embeddings)


def _locate_origin(root: Path, profile: BaseParams) -> tuple[Path | None, dict[str, str]]:
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
        raise ConfigError(f"base.package: {base.package} is not installed; run `make setup EXTRAS=smollm2`")
    folder = Path(found.origin).parent
    if not (folder / base.file).is_file():
        there = sorted(path.name for path in folder.glob("*.gguf"))
        raise ConfigError(f"base.file: {folder} has no {base.file}; GGUF files there: {', '.join(there) or 'none'}")
    check_gguf_rope(folder / base.file)
    return folder


def check_gguf_rope(path: Path) -> None:
    """Raise ConfigError if a GGUF file has a RoPE scaling, which transformers 5.24 ignores for a Llama."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
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
    names = [name for name in there if name.endswith((".json", ".safetensors"))]
    folder = hub.download_files(repo, commit, names, kind="model", revision=revision)
    check_folder(folder)
    return folder


def _open_or_train_tokenizer(
    workspace: Workspace, profile: BaseParams, origin: Path | None, options: Mapping[str, str]
) -> tuple[Tokenizer, dict[str, str]]:
    """Return (tokenizer, {unk, bos, eos: text})."""
    if origin is None:
        names = sorted(load_raw_manifest(workspace.raw)["sources"])
        records = (record for name in names for record in iterate_records(workspace.raw / name))
        texts = (text for record in records for text in iterate_texts(record))
        return train_tokenizer(texts, vocab_size=profile.expected_model.vocab_size), dict(LLAMA_SPECIAL)
    if "gguf_file" not in options:
        return open_tokenizer(origin), {k: v for k, v in read_special_names(origin).items() if k != "pad"}
    opened = AutoTokenizer.from_pretrained(origin, **options)
    named = {"unk": opened.unk_token, "bos": opened.bos_token, "eos": opened.eos_token}
    return Tokenizer.from_str(opened.backend_tokenizer.to_str()), {k: v for k, v in named.items() if v}


def _save(model: PreTrainedModel, folder: Path, special: dict[str, int]) -> None:
    """Save weights, config and a generation config with the training tokens only; the original's other settings go."""
    stops = {f"{short}_token_id": special[short] for short in ("bos", "eos", "pad")}
    for name, number in stops.items():
        setattr(model.config, name, number)
    model.generation_config = GenerationConfig(**stops)
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
