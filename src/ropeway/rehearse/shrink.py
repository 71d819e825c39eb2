"""The rehearsed profile: a pure function of the real one, which keys are smaller or other and why.

A key keeps its kind: a padded run stays padded, LoRA stays LoRA, a RoPE scaling keeps its type and factor. Every other
value is listed as a `ShrunkValue`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

from ropeway.runtime.json_text import parse_json

STEPS = 3  # optimizer steps; with a warm-up of one step the learning rate of the first two is 0
FEW_RECORDS = 16  # below this number a split by hash may leave a side empty
_VALIDATION_ROWS = 4
_MIN_LENGTH, _MAX_LENGTH = 256, 1024  # of a row in tokens, on a CPU
_MAX_LENGTH_ON_GPU = 2048
_CHARACTERS_PER_TOKEN = 3.0  # of plain English text in a small vocabulary; a guess that only sizes rows
_PASSKEY_TOKENS, _PUZZLE_TOKENS = 512, 1024  # most tokens of a passkey's text and of a long-context question
_SMALL_VOCABULARY = 1.5  # the same texts in a tokenizer that is trained on the sample have that many times the tokens
_SHARD_BYTES = 4_000_000
_BUCKET_ELEMENTS = 5_000_000
_BUCKETS = ("allgather_bucket_size", "reduce_bucket_size", "stage3_prefetch_bucket_size")
OFFLOADS = ("offload_optimizer", "offload_param")
_COMPILED = ("adam", "adamw", "lamb", "lion")  # optimizers that DeepSpeed compiles

Block = Mapping[str, Any]


class Put(Protocol):
    """Sets a dotted key of the rehearsed profile and records the change."""

    def __call__(self, key: str, value: object, why: str = "") -> None:
        """Set `key`."""


@dataclass(frozen=True, slots=True)
class ShrunkValue:
    """A value that differs from the real run's; `why` is empty where it is only smaller."""

    key: str
    real: str
    rehearsed: str
    why: str = ""

    def __str__(self) -> str:
        """Return one line.

        >>> str(ShrunkValue("dtype", "fp16", "bf16", "a CPU has no fp16"))
        'dtype: fp16 -> bf16 (a CPU has no fp16)'
        """
        return f"{self.key}: {self.real} -> {self.rehearsed}" + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True, slots=True)
class SourceSample:
    """The records of one source that are rehearsed.

    Attributes:
        block: The source's section in the rehearsed profile.
        lengths: Characters of each record.
        origin: Where the records are from, in words.
        is_generated: Whether they are not the user's.
        refused: Reason -> records of the sample that fetch will refuse.
    """

    name: str
    block: Block
    lengths: tuple[int, ...]
    origin: str
    is_generated: bool
    refused: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RehearsedBase:
    """The base that is rehearsed with.

    Attributes:
        block: `base` of the rehearsed profile.
        model_name: `model_name` of it.
        shape: `expected_model` of it; None: the base's own.
        words: What it is, in words.
        is_real: Whether these are the real weights, or weights that the real run draws itself.
        has_own_tokenizer: Whether the tokenizer is the real run's.
    """

    block: Block
    model_name: str
    shape: Block | None
    words: str
    is_real: bool
    has_own_tokenizer: bool


@dataclass(frozen=True, slots=True)
class RehearsalMachine:
    """What the rehearsal runs on."""

    ranks: int
    has_gpu: bool


def records_wanted(block: Block, machine: RehearsalMachine) -> int:
    """Return how many records of each source are taken: enough for `STEPS` steps with two micro-batches each.

    >>> records_wanted({"sources": {"a": {}}, "layout": "padded", "val_split": 0.2}, RehearsalMachine(2, False))
    38
    """
    rows: int = STEPS * 2 * 2 * machine.ranks * (2 if block["layout"] == "packed" else 1)
    sources: int = len(block["sources"])
    return math.ceil(rows / sources / max(1 - float(block["val_split"]), 0.2)) + 8


def choose_length(block: Block, samples: Sequence[SourceSample], *, has_gpu: bool) -> int:
    """Return `max_length` of the rehearsal: most records of the sample fit, up to 1,024 tokens on a CPU.

    >>> choose_length({"max_length": 8192}, [SourceSample("a", {}, (300, 900, 90000), "", True, {})], has_gpu=False)
    384
    """
    if has_gpu:
        return int(min(block["max_length"], _MAX_LENGTH_ON_GPU))
    middle = max((sorted(one.lengths)[len(one.lengths) // 2] for one in samples if one.lengths), default=0)
    needed = math.ceil((middle / _CHARACTERS_PER_TOKEN + 64) / 128) * 128  # with system message and role tokens
    return int(min(block["max_length"], max(_MIN_LENGTH, min(needed, _MAX_LENGTH))))


def shrink_profile(
    block: Block, samples: Sequence[SourceSample], base: RehearsedBase, machine: RehearsalMachine
) -> tuple[dict[str, Any], tuple[ShrunkValue, ...]]:
    """Return the rehearsed profile's block and what differs from the real one.

    Args:
        block: All keys of the real profile, presets resolved.
        samples: One sample per source.
        base: The base that is rehearsed with.
        machine: Ranks and device.
    """
    small = deepcopy(dict(block))
    changes: list[ShrunkValue] = []

    def put(key: str, value: object, why: str = "") -> None:
        place: Any = small
        *path, last = key.split(".")
        for part in path:
            place = place[part]
        changes.extend(_differences(key, place[last], value, why))
        place[last] = value

    length = choose_length(block, samples, has_gpu=machine.has_gpu)
    _put_sources(small, changes, samples)
    _put_base(small, changes, base)
    put("max_length", length)
    _put_batch(put, block, samples, machine, length)
    _put_mixture(small, changes, samples, length)
    for key, most in {"num_train_epochs": 1, "warmup_steps": 1, "eval_steps": STEPS, "save_steps": STEPS}.items():
        put(key, min(block[key], most))
    put("resume_from", None, "the checkpoints of real runs are not read")
    if block["lora"] and block["lora"]["rank"] > 8:  # noqa: PLR2004 - of adapters
        put("lora.rank", 8)
    if not machine.has_gpu:
        if block["dtype"] == "fp16":
            put("dtype", "bf16", "training in fp16 is refused on a CPU")
        put("use_flash_attention", value=False, why="a CPU has none and uses SDPA")
        put("fused_kernels", value=False, why="refused on a CPU")
    if not base.is_real and block["package"]["max_shard_bytes"] > _SHARD_BYTES:
        put("package.max_shard_bytes", _SHARD_BYTES)
    if any(len(one.lengths) < FEW_RECORDS for one in samples):
        put("split", "permutation", "with few records a split by hash may leave one side empty")
    elif block["split"] == "by_hash":
        put("val_split", max(block["val_split"], 0.5), "with few records a split by hash may leave one side empty")
    put("max_refused_fraction", max(block["max_refused_fraction"], 0.5), "of few records")
    _put_evaluation(put, block, length, factor=1 if base.has_own_tokenizer else _SMALL_VOCABULARY)
    return small, tuple(changes)


def shrink_deepspeed(text: str, path: str, machine: RehearsalMachine) -> tuple[str, tuple[ShrunkValue, ...]]:
    """Return a DeepSpeed JSON for small models and, without a GPU, without what needs one; other text is unchanged.

    >>> text = '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000000}}'
    >>> [str(one) for one in shrink_deepspeed(text, "zero.json", RehearsalMachine(2, False))[1]]
    ['zero.json zero_optimization.reduce_bucket_size: 1000000000 -> 5000000']
    """
    try:
        named = parse_json(text)
        zero = named.get("zero_optimization", {})
        optimizer = named.get("optimizer", {})
        buckets = {key: zero[key] for key in _BUCKETS if isinstance(zero.get(key), int | float)}
        kind = str(optimizer.get("type", "")).lower()
    except (ValueError, AttributeError, TypeError):
        return text, ()  # the stage names the fault
    changes = [
        ShrunkValue(f"{path} zero_optimization.{key}", _shown(size), str(_BUCKET_ELEMENTS))
        for key, size in buckets.items()
        if size > _BUCKET_ELEMENTS
    ]
    zero |= {key: min(size, _BUCKET_ELEMENTS) for key, size in buckets.items()}
    if not machine.has_gpu:
        offloaded = [key for key in OFFLOADS if zero.pop(key, None) is not None]
        changes += [
            ShrunkValue(f"{path} zero_optimization.{key}", "stated", "none", "there is no GPU") for key in offloaded
        ]
        if kind in _COMPILED and not optimizer.get("params", {}).get("torch_adam"):
            why = "DeepSpeed's own is not compiled for a rehearsal"
            changes.append(ShrunkValue(f"{path} optimizer", str(optimizer["type"]), "AdamW of torch", why))
            named["optimizer"] = {"type": "AdamW", "params": {**optimizer.get("params", {}), "torch_adam": True}}
    return json.dumps(named, indent=2), tuple(changes)


def _differences(key: str, real: object, small: object, why: str = "") -> list[ShrunkValue]:
    """Return what differs between two values, key by key within mappings."""
    if real == small:
        return []
    if isinstance(real, Mapping) and isinstance(small, Mapping):
        names = dict.fromkeys([*real, *small])
        return [one for name in names for one in _differences(f"{key}.{name}", real.get(name), small.get(name), why)]
    return [ShrunkValue(key, _shown(real), _shown(small), why)]


def _put_sources(small: dict[str, Any], changes: list[ShrunkValue], samples: Sequence[SourceSample]) -> None:
    for one in samples:
        changes.append(ShrunkValue(f"sources.{one.name}", small["sources"][one.name]["kind"], one.origin))
        small["sources"][one.name] = dict(one.block)


def _put_base(small: dict[str, Any], changes: list[ShrunkValue], base: RehearsedBase) -> None:
    if (small["base"], small["model_name"]) != (base.block, base.model_name):
        place = "the same base, from its folder" if base.is_real else "stand-in"
        changes.append(ShrunkValue("base", str(small["base"]["kind"]), place))
    small |= {"base": dict(base.block), "model_name": base.model_name}
    stated = small["expected_model"]
    if stated is None:
        return
    small["expected_model"] = shape = None if base.shape is None else dict(base.shape)
    changes += _differences("expected_model", stated, shape)


def _put_batch(put: Put, block: Block, samples: Sequence[SourceSample], machine: RehearsalMachine, length: int) -> None:
    """Set the batch so that the sample gives about `STEPS` steps."""
    shared = math.gcd(block["sequence_parallel"], machine.ranks)
    groups = machine.ranks // shared
    rows = _rows(block, samples, length)
    size = min(block["per_device_train_batch_size"], 2)
    passes = 2 if block["global_batch_size"] > size * groups else 1
    while size * groups * passes * STEPS > rows and (size, passes) != (1, 1):
        size, passes = (size, 1) if passes > 1 else (1, 1)
    put("sequence_parallel", shared, f"{machine.ranks} ranks")
    put("per_device_train_batch_size", size)
    put("global_batch_size", size * groups * passes)
    put("gradient_accumulation_steps", passes)
    put("per_device_eval_batch_size", min(block["per_device_eval_batch_size"], 4))


def _rows(block: Block, samples: Sequence[SourceSample], length: int) -> int:
    """Return rows that an epoch of the samples has at least."""
    kept: float = 1 - block["val_split"]
    if block["split"] == "by_hash":
        kept = min(kept, 0.5) * 0.6  # what few records may differ from their expected number
    if block["layout"] == "padded":
        return sum(math.floor(len(one.lengths) * kept) for one in samples)
    tokens = sum(min(size / _CHARACTERS_PER_TOKEN / 2, length) for one in samples for size in one.lengths)
    return math.floor(tokens * kept / length)


def _put_mixture(
    small: dict[str, Any], changes: list[ShrunkValue], samples: Sequence[SourceSample], length: int
) -> None:
    """Bound what an epoch takes of each source; chunks get shorter as rows do."""
    rows = STEPS * small["global_batch_size"]
    size = math.ceil(rows / len(samples))
    for entry in small["datasets"]:
        for name, options in entry.items():
            stated = dict(options or {})
            new = {**stated, "max_val_set": min(stated.get("max_val_set") or _VALIDATION_ROWS, _VALIDATION_ROWS)}
            if small["layout"] == "padded":
                new.pop("fraction", None)
                new["size"] = size
            if stated.get("max_chunk_size"):
                new["max_chunk_size"] = min(stated["max_chunk_size"], 8 * length)
            entry[name] = new
            changes += _differences(f"datasets.{name}", stated, new)


def _put_evaluation(put: Put, block: Block, length: int, *, factor: float) -> None:
    """Shrink evaluation; `factor` 1: the run's own tokenizer, with which its shortest lengths are known to fit."""
    stated = block["evaluation"]
    long = min(stated["positions"]["row_tokens"], 2 * length)
    positions = {"rows": min(stated["positions"]["rows"], 2), "row_tokens": long, "bucket_tokens": max(long // 4, 1)}
    put("evaluation.positions", positions)

    def shortest(lengths: Sequence[int], most: int) -> list[int]:
        return [min(*lengths, most) if factor == 1 else round(most * factor)]

    keys, puzzles = stated["passkey"], stated["long_context"]
    lengths = shortest(keys["lengths"], _PASSKEY_TOKENS)
    put("evaluation.passkey", {"lengths": lengths, "depths": keys["depths"][:1], "repeats": 1})
    if puzzles:
        lengths = shortest(puzzles["lengths"], _PUZZLE_TOKENS)
        put("evaluation.long_context", {**puzzles, "lengths": lengths, "repeats": 1})
    put("evaluation.max_new_tokens", min(stated["max_new_tokens"], 8))
    put("evaluation.tasks", [], "found and loaded, not asked")


def _shown(value: object) -> str:
    """Return a value as params.yaml would have it, in one line."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(one) for one in value) + "]"
    return str(value)
