"""The steps of `ropeway init`: examine, derive, write, show."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ropeway.config.frozen import read_texts
from ropeway.config.load_params import load_profiles, read_block, resolve_preset
from ropeway.config.params import Profile
from ropeway.config.sections import FilesSource, FolderBase, ScratchBase
from ropeway.config.zero import read_zero
from ropeway.data.loss_mask import loss_masks
from ropeway.data.raw_records import iterate_texts
from ropeway.models.jinja_template import UnusableConversationError
from ropeway.onboarding.derive import (
    Entry,
    Machine,
    TokenLengths,
    choose_preset,
    chunk_size,
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
from ropeway.onboarding.ignore_data import IgnoredData, ignore_data
from ropeway.onboarding.profile_name import check_profile_name
from ropeway.onboarding.write_profile import add_profile, render_profile
from ropeway.planning.budget import check_fit
from ropeway.planning.measure import measure_cpu, measure_disk
from ropeway.planning.memory import GIB, Load
from ropeway.planning.plan import EpochCounts, PlanRequest, RunPlan, plan_run
from ropeway.planning.shape import with_shape
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.formats import split_members
from ropeway.stages.tokenize.encode import Encoder

_GPU_JSON, _CPU_JSON = "configs/zero_config_pretrain.json", "configs/zero2_cpu.json"
_PARTITIONED_JSON = "configs/zero3.json"
_STEPS_WORTH = 10  # fewest steps for which a micro-batch of several rows is taken
_DRAFT_LENGTH = 512  # `max_length` with which the data is looked at first
_LEAST_VOCABULARY = 300  # of a draft from scratch
_HELD_OUT = 0.1  # `val_split`
UNKNOWN = "unknown"
_LICENSE_KEYS = ("license", "license_name", "license_link")
_SPDX = (  # identifiers as the addresses of spdx.org have them; the Hub writes them in lower case
    "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0",
    "GPL-3.0-only", "LGPL-3.0-only", "MPL-2.0",
)  # fmt: skip
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

    @property
    def is_scratch(self) -> bool:
        """Whether the base is made with random weights."""
        return self.base == "scratch"


Sample = tuple[list[int], list[bool]]


@dataclass(frozen=True, slots=True)
class Measured:
    """The base, and the data in its tokens.

    Attributes:
        template: Keys of the template, where the preset's do not fit.
        sample: Token ids of the first sequence, and which of them are supervised.
        unwritable: By source: reason -> records that the template cannot write.
        length: `max_length`.
        why: Where it comes from.
    """

    base: BaseFindings
    template: Sequence[Entry]
    encoder: Encoder
    lengths: Mapping[str, TokenLengths]
    sample: Sample
    unwritable: Mapping[str, Mapping[str, int]]
    length: int
    why: str


@dataclass(frozen=True, slots=True)
class Started:
    """What was found and written.

    Attributes:
        block: The profile's text in params.yaml.
        open_points: What a person has to state or look at.
        plan: The plan of the run.
        ignored: What git ignores from now on.
    """

    data: Sequence[DataFindings]
    measured: Measured
    block: str
    open_points: Sequence[str]
    plan: RunPlan
    ignored: IgnoredData


def start_profile(root: Path, request: InitRequest) -> Started:
    """Examine data and base, derive a profile, add it to params.yaml and its data to .gitignore.

    Raises:
        ConfigError: Data or base cannot be used, the name is in use, or no batch fits the stated GPU.
    """
    path = root / "params.yaml"
    request = _check_request(path, request)
    data: list[DataFindings] = []
    for one in request.data:
        data.append(examine_data(one, root, frozenset(known.name for known in data)))
    measured = _measure(root, request, data)
    entries = _derive(root, request, data, measured)
    preset = resolve_preset(path, str(entries[0].value))
    stated = [one for one in entries if one.key not in preset or preset[one.key] != one.value]
    block = render_profile(request.name, f"Written by `ropeway init`: {_describe(measured.base)}.", stated)
    profile = _validated(path, request.name, stated)
    machine = request.machine
    speed = None if machine.gpus else measure_cpu(profile.dtype, machine.ranks)
    asked = PlanRequest(
        gpu_memory_gib=machine.gpu_memory_gib, cpu_tflops=speed, save_gbps=measure_disk(root), save_measured=True
    )
    counted = _count_data(profile, data, measured)
    planned = plan_run(Workspace(root, request.name), profile, ranks=machine.ranks, request=asked, counted=counted)
    points = _open_points(profile, data, measured)
    with workspace_lock(root, command="ropeway init", profile=request.name):
        add_profile(path, request.name, block)
        ignored = ignore_data(root, _local_paths(profile))
    points += [
        f"{one}: git has it, so a change of it counts as uncommitted; DVC records data anyway: git rm --cached -r {one}"
        for one in ignored.tracked
    ]
    return Started(data, measured, block, points, planned, ignored)


def _local_paths(profile: Profile) -> list[str]:
    """Return the files, folders and patterns of data and base that a profile names; of an archive's members, it."""
    files = [source for source in profile.sources.values() if isinstance(source, FilesSource)]
    base = [profile.model_name] if isinstance(profile.base, FolderBase) else []
    return [*(split_members(path)[0] for source in files for path in source.paths), *base]


def _measure(root: Path, request: InitRequest, data: Sequence[DataFindings]) -> Measured:
    """Return what the base is, and the tokens of the data in its template, with `max_length` from them."""
    path = root / "params.yaml"
    length, why = request.context or _DRAFT_LENGTH, ""
    draft = _validated(path, request.name, _draft(root, request, data, length))
    texts = (text for one in data for record in one.records for text in iterate_texts(record))
    base = examine_base(root, draft, texts)
    template = derive_template(base, is_scratch=request.is_scratch)
    kinds = {one.name: one.kind for one in data}
    for is_final in (False, True):  # documents are cut into chunks whose size follows from max_length
        draft = _validated(path, request.name, [*_draft(root, request, data, length), *template])
        try:
            encoder = open_encoder(root, draft, base.tokenizer, chunk_size(length))
        except UnusableConversationError as error:
            raise ConfigError(f"--base {request.base}: its chat template cannot be used: {error}") from None
        lengths, sample, unwritable = _encode(encoder, data, draft)
        if not is_final:
            length, why = derive_length(lengths, kinds, base, request.machine, request.context)
        if "document" not in kinds.values():
            break
    return Measured(base, template, encoder, lengths, sample, unwritable, length, why)


def _draft(root: Path, request: InitRequest, data: Sequence[DataFindings], length: int) -> list[Entry]:
    """Return a valid profile before anything is known of the base."""
    shape = [Entry("expected_model", _scratch_shape(_LEAST_VOCABULARY, length))] if request.is_scratch else []
    return [
        *_base_entries(root, request, data),
        Entry("max_length", length),
        *derive_sources(data, {}, length, _HELD_OUT),
        *_machine_entries(request.machine),
        *shape,
    ]


def _derive(root: Path, request: InitRequest, data: Sequence[DataFindings], measured: Measured) -> list[Entry]:
    """Return the keys of the profile, the preset first."""
    path, base, length = root / "params.yaml", measured.base, measured.length
    entries = _base_entries(root, request, data)
    preset = str(entries[0].value)
    entries += [*measured.template, Entry("max_length", length, measured.why), *derive_rope(length, base)]
    entries += derive_rate(base, preset=preset)
    if request.is_scratch:
        shape = _scratch_shape(base.vocabulary, length)
        entries.append(Entry("expected_model", shape, "a small Llama; vocab_size is what the text gives"))
    entries += derive_sources(data, measured.lengths, length, _HELD_OUT)
    kinds = {one.name: one.kind for one in data}
    packed = resolve_preset(path, preset)["layout"] == "packed"
    rows = count_rows(measured.lengths, kinds, length, packed=packed, share=_HELD_OUT)
    card = _card_entry(path, request, base)
    micro_batch, machine = _choose_micro_batch(root, request, [*entries, card], rows)
    is_complete = all(one.is_complete for one in data)
    entries += [*machine, *derive_batch(rows, request.machine, micro_batch, length=length, is_complete=is_complete)]
    held_out = int(sum(int(one.tokens.sum()) for one in measured.lengths.values()) * _HELD_OUT)
    entries += [derive_evaluation(length, held_out, base, request.machine), *derive_gate(request.machine), card]
    return entries


def _count_data(profile: Profile, data: Sequence[DataFindings], measured: Measured) -> EpochCounts | None:
    """Return rows and tokens of the run, estimated from what was read; None if a source was read in part."""
    if not all(one.is_complete for one in data):
        return None
    kinds, length, packed = {one.name: one.kind for one in data}, profile.max_length, profile.layout == "packed"
    sequences = {name: len(one.tokens) for name, one in measured.lengths.items()}
    tokens = {
        name: int((one.tokens if packed and kinds[name] == "document" else np.minimum(one.tokens, length)).sum())
        for name, one in measured.lengths.items()
    }
    trained = 1 - profile.val_split
    rows = count_rows(measured.lengths, kinds, length, packed=packed, share=profile.val_split)
    epochs = profile.num_train_epochs
    held_out = {name: int(count * profile.val_split) for name, count in sequences.items()}
    limits = {name: options.max_val_set for name, options in profile.mixture}
    return EpochCounts(
        rows_per_source={name: count - held_out[name] for name, count in sequences.items()},
        tokens_per_source={name: int(count * trained) for name, count in tokens.items()},
        rows=rows,
        tokens=int(sum(tokens.values()) * trained) * epochs,
        most_tokens=rows * length * epochs,
        validation_rows=sum(min(count, limits[name] or count) for name, count in held_out.items()),
        from_data=False,
    )


def _check_request(path: Path, request: InitRequest) -> InitRequest:
    """Return the request; a profile that is made from scratch is `scratch`.

    Raises:
        ConfigError: The name cannot be a profile's or is in use, or options exclude each other.
    """
    check_profile_name(path, request.name)
    profiles = load_profiles(path)[1]
    if request.base in profiles and isinstance(profiles[request.base].base, ScratchBase):
        request = replace(request, base="scratch")
    if request.is_scratch and request.lora:
        raise ConfigError("--lora: adapters need a base that is trained; leave --lora or `--base scratch` out")
    return request


def _base_entries(root: Path, request: InitRequest, data: Sequence[DataFindings]) -> list[Entry]:
    """Return the preset and the keys that name the base."""
    preset = Entry("preset", choose_preset(data, is_scratch=request.is_scratch, lora=request.lora))
    return [preset, *_name_base(root, request)]


def _name_base(root: Path, request: InitRequest) -> list[Entry]:
    if request.is_scratch:
        return []
    path = root / "params.yaml"
    if request.base in load_profiles(path)[1]:
        block = read_block(path, request.base)
        keys = ("model_name", "base", "expected_model")
        first, *others = (Entry(key, block[key]) for key in keys)
        return [replace(first, why=f"this and the next keys are those of profile {request.base}"), *others]
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


def _machine_entries(machine: Machine, rows: int = 1, config: str = _GPU_JSON, why: str = "") -> list[Entry]:
    """Return micro-batch, DeepSpeed JSON and attention."""
    if machine.gpus:
        return [Entry("per_device_train_batch_size", rows, why), Entry("deepspeed_config", config)]
    return [
        Entry("per_device_train_batch_size", 1, "on a CPU"),
        Entry("deepspeed_config", _CPU_JSON, "no GPU"),
        Entry("use_flash_attention", False),  # noqa: FBT003 - a value of params.yaml
    ]


def _scratch_shape(vocabulary: int, length: int) -> dict[str, object]:
    return {**_SCRATCH_SHAPE, "vocab_size": vocabulary, "max_position_embeddings": length}


def _card_entry(path: Path, request: InitRequest, base: BaseFindings) -> Entry:
    """Return the license: stated, of the profile whose base is taken, or of the base's README."""
    if request.license is None and request.base in load_profiles(path)[1]:
        card = read_block(path, request.base)["card"]
        names = ("license", "license_name", "license_link", "base_model")
        known = {name: card[name] for name in names} if isinstance(card, dict) else {}
        return Entry("card", known, f"of profile {request.base}; the data may have other terms")
    stated = request.license or base.license
    if stated is None:
        return Entry("card", dict.fromkeys(_LICENSE_KEYS, UNKNOWN), "state the license of base and data")
    identifier = next((one for one in _SPDX if one.lower() == stated.lower()), None)
    link = f"https://spdx.org/licenses/{identifier}.html" if identifier else UNKNOWN
    why = "--license" if request.license else "of the base's README; the data may have other terms"
    return Entry("card", dict(zip(_LICENSE_KEYS, (stated, identifier or stated, link), strict=True)), why)


def _validated(path: Path, name: str, entries: Sequence[Entry]) -> Profile:
    """Return the profile of these entries with the values of its preset."""
    text = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n" + render_profile(name, "draft", entries)
    return load_profiles(path, text=text)[1][name]


def _encode(
    encoder: Encoder, data: Sequence[DataFindings], profile: Profile
) -> tuple[dict[str, TokenLengths], Sample, dict[str, Counter[str]]]:
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
    root: Path, request: InitRequest, entries: Sequence[Entry], training_rows: int
) -> tuple[int, list[Entry]]:
    """Return the micro-batch, and the keys of the machine: the largest batch that fits its GPUs.

    Raises:
        ConfigError: One row does not fit.
    """
    machine = request.machine
    if not machine.gpus or machine.gpu_memory_gib is None:
        return 1, _machine_entries(machine)
    memory = int(machine.gpu_memory_gib * GIB)
    for name in (_GPU_JSON, _PARTITIONED_JSON):
        zero = read_zero(read_texts(root, [name], key="deepspeed_config")[name], name)
        for rows in _MICRO_BATCHES:
            size = rows * machine.ranks
            if rows > 1 and size * _STEPS_WORTH > training_rows:
                continue  # so few steps would teach little
            batch = [Entry("global_batch_size", size), Entry("gradient_accumulation_steps", 1)]
            changed = [*entries, *batch, *_machine_entries(machine, rows, name)]
            valid = _validated(root / "params.yaml", request.name, changed)
            profile = with_shape(Workspace(root, request.name), valid)
            verdict = check_fit(Load.of(profile, zero, ranks=machine.ranks), size, memory)
            if verdict.fits:
                why = f"planned: {verdict.needed_bytes / GIB:.1f} of {machine.gpu_memory_gib:g} GiB per GPU"
                return rows, _machine_entries(machine, rows, name, why)
    remedies = "; ".join(words for words, _ in verdict.remedies[:3]) or "larger GPUs"
    raise ConfigError(
        f"one row of {profile.max_length:,} tokens does not fit {machine.ranks} GPUs of {machine.gpu_memory_gib:g} GiB "
        f"(planned {verdict.needed_bytes / GIB:.1f} GiB); use --lora, a smaller --context, or {remedies}"
    )


def _describe(base: BaseFindings) -> str:
    weights = f", {base.parameters / 1e6:,.0f} M weights" if base.parameters else ""
    return f"{base.family}{weights}, RoPE {base.rope}"


def _open_points(profile: Profile, data: Sequence[DataFindings], measured: Measured) -> list[str]:
    """Return what was decided for a person, or could not be known."""
    points = ["evaluation.prompts: the shipped questions are about Python; name a file with questions of your own"]
    if UNKNOWN in (profile.card.license, profile.card.license_link):
        points.append("card: state license, license_name and license_link of base and data")
    for one in data:
        where = f"source {one.name}"
        if one.ignored:
            listed = ", ".join(f"{key} ({count:,})" for key, count in one.ignored.items())
            points.append(f"sources.{one.name}.ignored_keys: these fields are not read: {listed}")
        if one.not_read:
            listed = ", ".join(f"{count:,} with {suffix}" for suffix, count in one.not_read.items())
            points.append(
                f"{where}: files of the folder that are not read: {listed}; a source has files of one kind, so name "
                "others that you want with another --data"
            )
        for words, reasons in (
            ("are refused", one.refused),
            ("cannot be written in the template", measured.unwritable[one.name]),
        ):
            if count := sum(reasons.values()):
                points.append(f"{where}: {count:,} of {one.read:,} records {words} ({_list_reasons(reasons)})")
                if count > profile.max_refused_fraction * one.read:
                    limit = f"max_refused_fraction {profile.max_refused_fraction:g}"
                    points.append(f"{where}: that is more than {limit}: the run will stop; correct them, or raise it")
        if not one.is_complete:
            points.append(f"{where}: only the first {one.read:,} records were read here")
    return points
