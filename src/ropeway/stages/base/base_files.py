"""Check a base model's files before it is loaded; reads file names, config.json and safetensors headers only."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from ropeway.models.architectures import check_architecture
from ropeway.models.weight_files import INDEX, NAMED_ELSEWHERE, check_weights_name, find_adapter, read_weight_map
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.json_text import parse_json

CONFIG = "config.json"
_FLOATS = ("F32", "BF16", "F16", "F64")
_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_folder(folder: Path) -> None:
    """Raise ConfigError unless a folder contains a complete, unquantized model in safetensors."""
    check_names((path.name for path in folder.iterdir()), where=str(folder))
    check_config(_read_object(folder / CONFIG), where=str(folder / CONFIG))
    held = {path.name: _read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    for file, tensors in held.items():
        for name, dtype in tensors.items():
            if dtype not in _FLOATS:
                raise ConfigError(
                    f"{folder / file}: {name} is stored as {dtype}, expected {', '.join(_FLOATS)}. Use the model "
                    "that was quantized instead"
                )
    if (folder / INDEX).is_file():
        _check_index(folder, held)


def _check_index(folder: Path, held: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ConfigError unless an index and the files (file -> tensor -> dtype) agree on every tensor."""
    try:
        placed = read_weight_map(folder / INDEX)
    except DataError as error:
        raise ConfigError(str(error)) from None
    named = set(placed.values())
    if absent := sorted(named - held.keys()):
        raise ConfigError(f"{folder}: {INDEX} names {', '.join(absent)}, which do not exist; download the model again")
    if unexpected := sorted(held.keys() - named):
        raise ConfigError(
            f"{folder}: has {', '.join(unexpected)} besides the files that {INDEX} names, so it is ambiguous which "
            "weights to load; remove the files or the index"
        )
    for file, tensors in held.items():
        if elsewhere := sorted(name for name in tensors if placed.get(name) != file):
            there = placed.get(elsewhere[0], "no file")
            raise ConfigError(f"{folder / file}: holds {elsewhere[0]}, which {INDEX} places in {there}; fetch it again")


def check_names(names: Iterable[str], *, where: str) -> None:
    """Raise ConfigError unless these are the files of a complete model in safetensors.

    Args:
        names: File names in a folder or repository; files in subfolders are ignored.
        where: The folder or repository, for the message.
    """
    there = {name for name in names if "/" not in name}
    if fault := find_adapter(there):
        raise ConfigError(f"{where}: {fault}")
    if CONFIG not in there:
        raise ConfigError(
            f"{where}: has no {CONFIG}, so it contains no model. Put one there ({CONFIG}, *.safetensors, "
            "tokenizer.json), or set base: {kind: hub, revision: COMMIT} and model_name to its repository, e.g. "
            "meta-llama/Llama-2-13b-hf"
        )
    if not any(name.endswith(".safetensors") for name in there):
        pickled = sorted(name for name in there if PurePosixPath(name).suffix in _PICKLED)
        found = f"only {', '.join(pickled)}, pickles, which can run code when they are loaded" if pickled else "none"
        raise ConfigError(
            f"{where}: expected weights in *.safetensors, found {found}. If you trust them, convert them with "
            "transformers (from_pretrained, then save_pretrained to a new folder) and use that folder"
        )


def check_config(config: Mapping[str, object], *, where: str) -> None:
    """Raise ConfigError unless a model's config is that of a dense decoder with unquantized weights."""
    check_architecture(config, where=where)
    check_weights_name(config.get(NAMED_ELSEWHERE), where=where)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"{where}: the weights are quantized ({method}), which full fine-tuning does not support. Use the model "
            "that was quantized instead"
        )


def _read_header(path: Path) -> dict[str, str]:
    """Return the tensors of a safetensors file, name -> dtype, from its header."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(size)) if size <= _HEADER_BYTES else None
        if header is None:
            raise ConfigError(
                f"{path}: its header has {size:,} bytes, expected {_HEADER_BYTES:,} at most; download the model again"
            )
        return {name: str(facts["dtype"]) for name, facts in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a safetensors file ({error}); download the model again") from None


def _read_object(path: Path) -> dict[str, object]:
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a JSON object, found {error}; download the model again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}; download the model again")
    return value
