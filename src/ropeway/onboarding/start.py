"""The steps of `ropeway init`: examine, derive, write, show."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from ropeway.config.frozen import read_texts
from ropeway.config.load_params import list_presets, load_profiles, read_block, resolve_preset
from ropeway.config.params import Profile
from ropeway.config.presets import SECTION
from ropeway.config.sections import PROFILE_NAME, ScratchBase
from ropeway.config.zero import read_zero
from ropeway.data.loss_mask import loss_masks
from ropeway.data.raw_records import iterate_texts
from ropeway.models.jinja_template import UnusableConversationError
from ropeway.onboarding.derive import (
    Entry,
    Machine,
    TokenLengths,
    choose_preset,
    count_rows,
    derive_batch,
    derive_evaluation,
    derive_gate,
    derive_length,
    derive_rate,
    derive_rope,
    derive_sources,
    derive_template,
)
from ropeway.onboarding.examine_base import BaseFindings, examine_base, open_encoder
from ropeway.onboarding.examine_data import DataFindings, examine_data
from ropeway.onboarding.write_profile import add_profile, render_profile
from ropeway.planning.budget import check_fit
from ropeway.planning.memory import GIB, Load
from ropeway.planning.plan import PlanRequest, RunPlan, plan_run
from ropeway.planning.shape import with_shape
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.workspace import Workspace
from ropeway.stages.tokenize.encode import Encoder

_GPU_JSON, _CPU_JSON = "configs/zero_config_pretrain.json", "configs/zero2_cpu.json"
_PARTITIONED_JSON = "configs/zero3.json"
_STEPS_WORTH = 10
_MICRO_BATCHES = (8, 4, 2, 1)
_SCRATCH_SHAPE = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 6, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class InitRequest:
    """What a person states.

    Attributes:
        base: A folder, `owner/name` on the Hub, a profile whose base is taken, or `scratch`.
        data: Files, folders or patterns.
        context: `max_length`; None: derived from the data.
    """

    name: str
    base: str
    data: Sequence[str]
    machine: Machine
    context: int | None = None
    lora: bool = False
    license: str | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """What was found and written.

    Attributes:
        block: The profile's text in params.yaml.
        sample: Token ids of the first sequence, and which of them are supervised.
        open_points: What a person has to state or look at.
        plan: The plan of the run.
    """

    data: Sequence[DataFindings]
    base: BaseFindings
    lengths: Mapping[str, TokenLengths]
    block: str
    encoder: Encoder
    sample: tuple[list[int], list[bool]]
    open_points: Sequence[str]
    plan: RunPlan


def start_profile(root: Path, request: InitRequest) -> Started:
    """Examine data and base, derive a profile and add it to params.yaml.

    Raises:
        ConfigError: Data or base cannot be used, the name is in use, or no batch fits the stated GPU.
    """
    path = root / "params.yaml"
    request = _check_request(path, request)
    data: list[DataFindings] = []
    for one in request.data:
        data.append(examine_data(one, root, frozenset(known.name for known in data)))
    is_scratch = request.base == "scratch"
    preset = choose_preset(data, is_scratch=is_scratch, lora=request.lora)
    share = 0.1
    fixed = [Entry("preset", preset), *_base_entries(root, request)]
    entries = [*fixed, Entry("max_length", request.context or 512), *derive_sources(data, {}, 512, share)]
    entries += _machine_entries(request.machine)
    if is_scratch:
        entries.append(Entry("expected_model", _scratch_shape(1000, request.context or 512)))
    draft = _validated(path, request.name, [*entries, *_license_entries(request, None)])
    texts = (text for one in data for record in one.records for text in iterate_texts(record))
    base = examine_base(root, draft, texts)
    template = derive_template(base, is_scratch=is_scratch)
    draft = _validated(path, request.name, [*entries, *template, *_license_entries(request, None)])
    try:
        encoder = open_encoder(root, draft, base.tokenizer, draft.max_length * 3)
    except UnusableConversationError as error:
        raise ConfigError(f"--base {request.base}: its chat template cannot be used: {error}") from None
    lengths, sample, unwritable = _measure(encoder, data, draft)
    entries = [*fixed, *template]
    length = derive_length(lengths, {one.name: one.kind for one in data}, base, request.machine, request.context)
    tokens = int(str(length.value))
    entries += [length, *derive_rope(tokens, base), *derive_rate(base, preset=preset)]
    if is_scratch:
        entries.append(Entry("expected_model", _scratch_shape(base.vocabulary, tokens), "3 M weights; make it larger"))
    entries += [*_machine_entries(request.machine), *derive_sources(data, lengths, tokens, share)]
    packed = _validated(path, request.name, [*entries, *_license_entries(request, base)]).layout == "packed"
    rows = count_rows(lengths, tokens, packed=packed, share=share)
    micro = _choose_micro_batch(root, path, request, [*entries, *_license_entries(request, base)], rows)
    entries = _replaced(entries, micro)
    is_complete = all(one.is_complete for one in data)
    entries += derive_batch(rows, request.machine, int(str(micro[0].value)), is_complete=is_complete)
    held_out = int(sum(int(one.tokens.sum()) for one in lengths.values()) * share)
    entries += [derive_evaluation(tokens, held_out, base, request.machine), *derive_gate(request.machine)]
    entries += _license_entries(request, base, _read_card(path, request.base))
    known = resolve_preset(path, preset)
    stated = [one for one in entries if one.key not in known or known[one.key] != one.value]
    block = render_profile(request.name, f"Written by `ropeway init`: {_describe(base)}.", stated)
    profile = _validated(path, request.name, stated)
    planned = plan_run(
        Workspace(root, request.name),
        profile,
        ranks=request.machine.ranks,
        request=PlanRequest(gpu_memory_gib=request.machine.gpu_memory_gib),
    )
    with workspace_lock(root, command="ropeway init", profile=request.name):
        add_profile(path, request.name, block)
    points = _open_points(path, data, base, request, unwritable, profile.max_refused_fraction)
    return Started(data, base, lengths, block, encoder, sample, points, planned)


def _check_request(path: Path, request: InitRequest) -> InitRequest:
    """Return the request; a profile that is made from scratch is `scratch`.

    Raises:
        ConfigError: The name cannot be a profile's or is in use, or options exclude each other.
    """
    if not PROFILE_NAME.fullmatch(request.name):
        raise ConfigError(f"{request.name!r}: expected a profile name of A-Z a-z 0-9 . _ -, e.g. my_model")
    if request.name in ("profile", SECTION) or not isinstance(YAML(typ="safe", pure=True).load(request.name), str):
        raise ConfigError(f"{request.name!r}: YAML or params.yaml reads this as something else; choose another name")
    profiles = load_profiles(path)[1]
    if request.name in list_presets(path):
        raise ConfigError(f"{request.name!r} is the name of a preset; choose another name")
    if request.name in profiles:
        raise ConfigError(f"{path}: there is a profile '{request.name}'; choose another name, or remove its block")
    if request.base in profiles and isinstance(profiles[request.base].base, ScratchBase):
        request = replace(request, base="scratch")
    if request.base == "scratch" and request.lora:
        raise ConfigError("--lora: adapters need a base that is trained; leave --lora or `--base scratch` out")
    return request


def _base_entries(root: Path, request: InitRequest) -> list[Entry]:
    """Return the keys that name the base."""
    if request.base == "scratch":
        return []
    path = root / "params.yaml"
    if request.base in load_profiles(path)[1]:
        block = read_block(path, request.base)
        keys = ("model_name", "base", "expected_model")
        return [Entry(key, block[key], f"of profile {request.base}") for key in keys]
    folder = Path(request.base).expanduser()
    folder = folder if folder.is_absolute() else Path.cwd() / folder
    if folder.is_dir():
        name = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
        return [Entry("model_name", name), Entry("base", {"kind": "folder"})]
    if request.base.count("/") == 1 and not request.base.startswith((".", "/")):
        revision = Entry("base", {"kind": "hub", "revision": "main"}, "a commit here pins it")
        return [Entry("model_name", request.base), revision]
    raise ConfigError(
        f"--base {request.base}: expected a folder, owner/name on the Hub, a profile of params.yaml, or `scratch`"
    )


def _machine_entries(machine: Machine) -> list[Entry]:
    if machine.gpus:
        return [Entry("per_device_train_batch_size", 1), Entry("deepspeed_config", _GPU_JSON)]
    return [
        Entry("per_device_train_batch_size", 1),
        Entry("deepspeed_config", _CPU_JSON, "no GPU"),
        Entry("use_flash_attention", False),  # noqa: FBT003 - a value of params.yaml
    ]


def _scratch_shape(vocabulary: int, length: int) -> dict[str, object]:
    return {**_SCRATCH_SHAPE, "vocab_size": vocabulary, "max_position_embeddings": length}


def _read_card(path: Path, profile: str) -> dict[str, object]:
    """Return what the card of the profile whose base is taken says of it; empty for other bases."""
    if profile not in load_profiles(path)[1]:
        return {}
    card = read_block(path, profile)["card"]
    names = ("license", "license_name", "license_link", "base_model")
    return {name: card[name] for name in names} if isinstance(card, dict) else {}


def _license_entries(
    request: InitRequest, base: BaseFindings | None, card: Mapping[str, object] | None = None
) -> list[Entry]:
    if card and not request.license:
        return [Entry("card", dict(card), f"of profile {request.base}; the data may have other terms")]
    stated = request.license or (base.license if base else None)
    name = stated or "unknown"
    card = {"license": name, "license_name": name, "license_link": f"https://spdx.org/licenses/{name}.html"}
    why = "--license" if request.license else "of the base" if stated else "state the license of base and data"
    return [Entry("card", card if stated else {**card, "license_link": "unknown"}, why)]


def _validated(path: Path, name: str, entries: Sequence[Entry]) -> Profile:
    """Return the profile of these entries with the values of its preset."""
    text = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n" + render_profile(name, "draft", entries)
    return load_profiles(path, text=text)[1][name]


def _measure(
    encoder: Encoder, data: Sequence[DataFindings], profile: Profile
) -> tuple[dict[str, TokenLengths], tuple[list[int], list[bool]], dict[str, Counter[str]]]:
    """Return lengths by source, a sample, and by source reason -> records that the template cannot write."""
    lengths, sample, refused = {}, None, {}
    for one in data:
        tokens: list[int] = []
        counting = encoder.copy_without_counts()
        for batch in counting.encode_batches(one.records):
            tokens += batch.lengths.tolist()
            if sample is None and len(batch.lengths):
                count = int(batch.lengths[0])
                mask = loss_masks(batch.kinds, batch.lengths, profile)[:count]
                supervised = [False, *mask[:-1].tolist()]  # of each token, not of the position before it
                sample = (batch.tokens[:count].tolist(), supervised)
        lengths[one.name] = TokenLengths(np.array(tokens, np.int64), one.is_complete)
        if not tokens:
            raise ConfigError(
                f"--data: no record of {one.name} can be written in the template "
                f"({_list_reasons(counting.refused)}); docs/tasks/chat-templates.md"
            )
        refused[one.name] = counting.refused
    return lengths, sample or ([], []), refused


def _list_reasons(refused: Mapping[str, int]) -> str:
    return "; ".join(f"{reason}: {count:,}" for reason, count in Counter(refused).most_common(3))


def _choose_micro_batch(
    root: Path, path: Path, request: InitRequest, entries: Sequence[Entry], training_rows: int
) -> list[Entry]:
    """Return micro-batch and DeepSpeed configuration: the largest that fits the GPU, else the smallest with a note."""
    machine = request.machine
    if not machine.gpus or machine.gpu_memory_gib is None:
        return [Entry("per_device_train_batch_size", 1, "" if machine.gpus else "on a CPU")]
    memory = int(machine.gpu_memory_gib * GIB)
    for name in (_GPU_JSON, _PARTITIONED_JSON):
        zero = read_zero(read_texts(root, [name], key="deepspeed_config")[name], name)
        for rows in _MICRO_BATCHES:
            size = rows * machine.ranks
            if rows > 1 and size * _STEPS_WORTH > training_rows:
                continue  # so few steps would teach little
            changed = _replaced(
                [*entries, Entry("global_batch_size", size), Entry("gradient_accumulation_steps", 1)],
                [Entry("per_device_train_batch_size", rows), Entry("deepspeed_config", name)],
            )
            profile = with_shape(Workspace(root, request.name), _validated(path, request.name, changed))
            verdict = check_fit(Load.of(profile, zero, ranks=machine.ranks), size, memory)
            if verdict.fits:
                why = f"planned: {verdict.needed_bytes / GIB:.1f} of {machine.gpu_memory_gib:g} GiB per GPU"
                return [Entry("per_device_train_batch_size", rows, why), Entry("deepspeed_config", name)]
    remedies = "; ".join(words for words, _ in verdict.remedies[:3]) or "larger GPUs"
    raise ConfigError(
        f"one row of {profile.max_length:,} tokens does not fit {machine.ranks} GPUs of {machine.gpu_memory_gib:g} GiB "
        f"(planned {verdict.needed_bytes / GIB:.1f} GiB); use --lora, a smaller --context, or {remedies}"
    )


def _replaced(entries: Sequence[Entry], new: Sequence[Entry]) -> list[Entry]:
    """Return the entries with those of the same keys replaced."""
    by_key = {one.key: one for one in new}
    return [by_key.get(one.key, one) for one in entries]


def _describe(base: BaseFindings) -> str:
    weights = f", {base.parameters / 1e6:,.0f} M weights" if base.parameters else ""
    return f"{base.family}{weights}, RoPE {base.rope}"


def _open_points(
    path: Path,
    data: Sequence[DataFindings],
    base: BaseFindings,
    request: InitRequest,
    unwritable: Mapping[str, Mapping[str, int]],
    limit: float,
) -> list[str]:
    """Return what was decided for a person, or could not be known."""
    points = ["evaluation.prompts: the shipped questions are about Python; name a file with questions of your own"]
    if not request.license and not base.license and request.base not in load_profiles(path)[1]:
        points.append("card.license: state the license of base and data")
    for one in data:
        if one.ignored:
            listed = ", ".join(f"{key} ({count:,})" for key, count in one.ignored.items())
            points.append(f"sources.{one.name}.ignored_keys: these fields are not read: {listed}")
        if one.not_read:
            listed = ", ".join(f"{count:,} with {suffix}" for suffix, count in one.not_read.items())
            points.append(f"source {one.name}: files of the folder that are not read: {listed}")
        refused = {"refused": one.refused, "that the template cannot write": unwritable[one.name]}
        for words, reasons in refused.items():
            if count := sum(reasons.values()):
                stops = count > limit * one.read
                advice = f"; more than max_refused_fraction {limit:g}, so THE RUN WILL STOP: correct them, or raise it"
                points.append(
                    f"source {one.name}: {count:,} of {one.read:,} records {words} ({_list_reasons(reasons)})"
                    + (advice if stops else "")
                )
        if not one.is_complete:
            points.append(f"source {one.name}: only the first {one.read:,} records were read here")
    return points
