"""Derive a profile from what was found: pure functions; every value says where it comes from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ropeway.config.sections import PUBLISHED_TEMPLATE
from ropeway.data.packing import plan_packing, split_document
from ropeway.onboarding.examine_base import BaseFindings
from ropeway.onboarding.examine_data import DataFindings
from ropeway.runtime.errors import ConfigError

_ROUNDED = 64  # tokens; lengths are multiples of it
_SHORTEST = 128
_DOCUMENT_ROW = 2048  # tokens of a row of documents, where nothing else says how long
_CPU_ROW = 512  # longest row on a CPU, where nothing else says how long
_FEWEST_STEPS = 40  # per run, where the data allows it
_MOST_EPOCHS = 3
_QUESTION = 512  # tokens; a passkey's question alone needs up to half of them with a small vocabulary
_LONG_QUESTION = 1024  # the same of questions on long texts
_FEW_DOCUMENTS = 20  # fewer may all fall on one side of the split
_SMALL_MODEL = 500_000_000  # weights
_TOKEN_CHARACTERS = 3  # characters of a chunk per token of a row, so that a chunk is about a row


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the run trains.

    Attributes:
        gpus: Number of GPUs; 0: a CPU with `ranks` processes.
        gpu_memory_gib: Memory of one; None: not known.
    """

    gpus: int
    ranks: int
    gpu_memory_gib: float | None


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of the profile with its value, and why; an empty reason needs none."""

    key: str
    value: object
    why: str = ""


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """Tokens of the sequences of a source.

    Attributes:
        tokens: `(N,)`, one per sequence.
        is_complete: Whether these are all of the source's sequences.
    """

    tokens: NDArray[np.int64]
    is_complete: bool


def choose_preset(data: Sequence[DataFindings], *, is_scratch: bool, lora: bool) -> str:
    """Return the name of the preset: the base decides, then whether there are conversations."""
    if is_scratch:
        return "scratch"
    if lora:
        return "lora"
    return "finetune" if any(one.kind == "conversation" for one in data) else "continue"


def derive_length(
    lengths: Mapping[str, TokenLengths],
    kinds: Mapping[str, str],
    base: BaseFindings,
    machine: Machine,
    context: int | None,
) -> tuple[int, str]:
    """Return `max_length` and why: what nearly all conversations need, within what base and machine allow."""
    if context is not None:
        return context, "--context"
    chats = [lengths[name].tokens for name, kind in kinds.items() if kind == "conversation"]
    limit = min(base.context or _CPU_ROW, _DOCUMENT_ROW * 4 if machine.gpus else _CPU_ROW * 2)
    if not chats or not any(len(one) for one in chats):
        most = min(limit, _DOCUMENT_ROW if machine.gpus else _CPU_ROW)
        return most, "documents are cut into chunks of about this length"
    tokens = np.concatenate(chats)
    needed = int(np.quantile(tokens, 0.99))
    length = min(limit, max(_SHORTEST, math.ceil(needed / _ROUNDED) * _ROUNDED))
    middle, longest = int(np.median(tokens)), int(tokens.max())
    cut = float((tokens > length).mean())
    return (
        length,
        f"conversations: median {middle:,}, 99 % up to {needed:,}, longest {longest:,} tokens; {cut:.1%} are cut",
    )


def derive_rope(length: int, base: BaseFindings) -> list[Entry]:
    """Return the RoPE keys: none if the base reaches `max_length`, else position interpolation.

    Raises:
        ConfigError: The base has a scaling, which has to be extended by its own kind.
    """
    if base.context is None or length <= base.context:
        return []
    if base.is_scaled:
        raise ConfigError(
            f"--context {length}: the base reaches {base.context:,} tokens with {base.rope}; leave --context out, and "
            "extend it in the profile: docs/tasks/long-sequences.md"
        )
    scale = math.ceil(length / base.context)
    return [
        Entry("superhot", True, f"the base reaches {base.context:,} tokens"),  # noqa: FBT003 - a value of params.yaml
        Entry("superhot_config", {"type": "linear", "scale": scale}, "as published; others: docs/tasks/long-sequences"),
    ]


def derive_template(base: BaseFindings, *, is_scratch: bool) -> list[Entry]:
    """Return the template keys where the preset's do not fit."""
    if is_scratch or base.has_template:
        return []
    return [
        Entry("template", PUBLISHED_TEMPLATE, "the base has no chat template of its own"),
        Entry("pad_vocab_to_multiple_of", 16, "its role tokens are added to the vocabulary"),
    ]


def derive_rate(base: BaseFindings, *, preset: str) -> list[Entry]:
    """Return the learning rate where the preset's is for larger models."""
    if preset != "finetune" or base.parameters is None or base.parameters >= _SMALL_MODEL:
        return []
    return [Entry("learning_rate", 1e-4, "measured with SmolLM2-135M: docs/runs.md; the preset's is for 7 B and more")]


def count_rows(
    lengths: Mapping[str, TokenLengths], kinds: Mapping[str, str], length: int, *, packed: bool, share: float
) -> int:
    """Return the training rows of an epoch of what was read; there are more if a source was read in part.

    Args:
        lengths: Tokens of each sequence, by source.
        kinds: `conversation` or `document`, by source; packed rows cut conversations and split documents.
        length: `max_length`.
        packed: Whether rows hold several sequences.
        share: Of the sequences, that is held out.
    """
    pieces: list[int] = []
    for name, one in lengths.items():
        if packed and kinds[name] == "document":
            pieces += [end - begin for tokens in one.tokens for begin, end in split_document(tokens, capacity=length)]
        else:
            pieces += np.minimum(one.tokens, length).tolist()
    rows = len(plan_packing(pieces, capacity=length)) if packed else len(pieces)
    return int(rows * (1 - share))


def derive_batch(rows: int, machine: Machine, micro_batch: int, *, length: int, is_complete: bool) -> list[Entry]:
    """Return batch, epochs, warm-up and how often is validated and saved.

    Raises:
        ConfigError: There are fewer rows than the ranks need for one step.
    """
    smallest = micro_batch * machine.ranks
    if rows < smallest:
        raise ConfigError(
            f"about {rows:,} training rows of {length:,} tokens do not fill one step of {machine.ranks} ranks x "
            f"{micro_batch}; add data, choose a smaller --context{', or fewer --gpus' if machine.gpus else ''}"
        )
    sizes = [size for size in (128, 64, 32, 16, 8, 4) if size % smallest == 0] or [smallest]
    size = next((one for one in sizes if rows // one >= _FEWEST_STEPS), sizes[-1])
    size = size if size <= rows else smallest
    epochs = min(_MOST_EPOCHS, max(1, math.ceil(_FEWEST_STEPS / (rows // size))))
    steps = rows // size * epochs
    often = max(1, steps // 4)
    about = "about" if is_complete else "at least"
    return [
        Entry("global_batch_size", size, f"{about} {steps:,} steps; `ropeway plan` counts them after prepare"),
        Entry("gradient_accumulation_steps", size // smallest),
        Entry("num_train_epochs", epochs, "" if epochs == 1 else "the data is small"),
        Entry("warmup_steps", max(1, round(0.03 * steps)), "3 % of the steps, as the published run's 100 of 3,319"),
        Entry("eval_steps", often, "4 times a run"),
        Entry("save_steps", often),
    ]


def derive_evaluation(length: int, held_out: int, base: BaseFindings, machine: Machine) -> Entry:
    """Return the evaluation: lengths around `max_length`, and within what is held out.

    Args:
        length: `max_length`.
        held_out: Tokens of all validation texts, about.
        base: The base.
        machine: The machine.
    """
    beyond = 2 * length
    repeats = 4 if machine.gpus else 1
    row = max(2, min(beyond, held_out // 4))
    long_context = {
        "kinds": ["multi_key", "multi_value", "variable_tracking", "common_words"],
        "lengths": [length],
        "repeats": repeats,
    }
    return Entry(
        "evaluation",
        {
            "max_new_tokens": 128 if machine.gpus else 48,
            "positions": {"rows": 8 if machine.gpus else 4, "row_tokens": row, "bucket_tokens": max(1, row // 8)},
            "passkey": {
                "lengths": sorted({max(_QUESTION, length // 2), max(_QUESTION, length), max(_QUESTION, beyond)}),
                "depths": [0.0, 0.5, 1.0],
                "repeats": repeats,
            },
            "long_context": long_context if length >= _LONG_QUESTION else None,
        },
        f"up to twice max_length; a passkey's question needs {_QUESTION}"
        + (f"; the base reaches {base.context:,}" if base.context else ""),
    )


def derive_gate(machine: Machine) -> list[Entry]:
    """Return the gate where the evaluation asks too little for the preset's limits."""
    if machine.gpus:
        return []
    limits = {"max_passkey_decrease": None, "max_long_context_decrease": None}
    return [Entry("gate", limits, "one question of each kind says too little")]


def derive_sources(
    data: Sequence[DataFindings], lengths: Mapping[str, TokenLengths], length: int, share: float
) -> list[Entry]:
    """Return the mixture and its sources; `lengths` is empty until they are known."""
    datasets: list[dict[str, object]] = []
    for one in data:
        sequences = len(lengths[one.name].tokens) if one.name in lengths else len(one.records)
        chunks = {"max_chunk_size": chunk_size(length)} if one.kind == "document" else {}
        datasets.append({one.name: {"max_val_set": max(1, min(200, int(sequences * share))), **chunks}})
    known = {name: len(one.tokens) for name, one in lengths.items() if one.is_complete}
    sources = {one.name: {**one.source, "expected_rows": known.get(one.name)} for one in data}
    notes = "; ".join(f"{one.name}: {len(one.records):,} {one.kind}s" for one in data)
    partial = any(not one.is_complete for one in data)
    few = [one.name for one in data if one.kind == "document" and len(one.records) < _FEW_DOCUMENTS]
    return [
        Entry("val_split", share, "held out; the published run's 0.2 is of 1.2 million sequences"),
        *([Entry("split_by", "chunk", f"{', '.join(few)}: so few documents, one side could get none")] if few else []),
        Entry("datasets", datasets, notes + (" or more" if partial else "")),
        Entry("sources", sources, "expected_rows: counted here; prepare reports a difference" if known else ""),
    ]


def chunk_size(length: int) -> int:
    """Return the characters of a document's chunk, which is about a row of this many tokens."""
    return length * _TOKEN_CHARACTERS
