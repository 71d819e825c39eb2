"""What a run will do, before anything is spent: pure arithmetic over params, rows and ranks. No torch here."""

import json
import math
from dataclasses import asdict, dataclass

from ropeway.chat import ROLE_TOKENS
from ropeway.errors import ConfigError
from ropeway.manifest import NAME
from ropeway.mixture import epoch_count
from ropeway.params import Profile
from ropeway.rows import plan_epoch
from ropeway.shards import open_shards
from ropeway.workspace import Workspace

PUBLISHED_RANKS = 8  # 424,864 rows // (2 rows x 8 accumulation x 8 ranks) = 3,319 steps
OTHER_RANKS = (1, 2, 4, 8, 16)


def accumulation_steps(profile: Profile, ranks: int) -> int:
    """Return the forward passes each rank makes per optimizer step; derived, so 4 or 8 ranks take equal steps.

    Raises:
        ConfigError: The global batch does not divide evenly, or the card's own number disagrees at 8 ranks.
    """
    rows_per_pass = profile.per_device_train_batch_size * ranks
    steps, rest = divmod(profile.global_batch_size, rows_per_pass)
    if rest or not steps:
        raise ConfigError(
            f"global_batch_size is {profile.global_batch_size}, not a multiple of per_device_train_batch_size "
            f"{profile.per_device_train_batch_size} x {ranks} ranks = {rows_per_pass}; change one of them or "
            "ROPEWAY_RANKS"
        )
    stated = profile.gradient_accumulation_steps
    if ranks == PUBLISHED_RANKS and steps != stated:
        raise ConfigError(
            f"gradient_accumulation_steps is {stated}, but global_batch_size {profile.global_batch_size} / "
            f"({ranks} ranks x per_device_train_batch_size {profile.per_device_train_batch_size}) = {steps}; on "
            f"{PUBLISHED_RANKS} ranks the two must agree (on other rank counts it is ignored)"
        )
    return steps


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will do.

    Attributes:
        rows: Rows an epoch reads over all ranks, per source; None where nothing states them yet.
        other_ranks: Steps that other rank counts would make here, and would have made in the original.
        parameters: Weights of the model, vocabulary padded.
        checkpoint_bytes: One checkpoint: 16-bit or fp32 weights, fp32 masters and two Adam moments.
    """

    profile: str
    ranks: int
    micro_batch_size: int
    accumulation_steps: int
    global_batch_size: int
    rows_per_source: dict[str, int | None]
    rows: int | None
    optimizer_steps: int | None
    other_ranks: dict[int, dict[str, int | str]]
    parameters: int
    checkpoint_bytes: int
    from_data: bool

    def as_json(self) -> str:
        """Return the plan for programs."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def plan_run(workspace: Workspace, profile: Profile, *, ranks: int) -> RunPlan:
    """Return the plan of a run: from the data where it is prepared, else from `expected_rows` of the sources."""
    accumulation = accumulation_steps(profile, ranks)
    from_data = (workspace.data / NAME).is_file()
    sizes = _prepared_sizes(workspace) if from_data else _expected_sizes(profile)
    rows = {
        name: None if (size := sizes[name]) is None else epoch_count(size, options, name=name)
        for name, options in profile.mixture
    }
    known = [count for count in rows.values() if count is not None]
    total = sum(known) if len(known) == len(rows) else None
    if profile.layout == "packed":  # how many rows the sequences fill is known once they are counted
        total = plan_epoch(open_shards(workspace.data, verify=False), profile, epoch=0).rows if from_data else None
    parameters = count_parameters(profile)
    return RunPlan(
        workspace.profile,
        ranks,
        profile.per_device_train_batch_size,
        accumulation,
        profile.global_batch_size,
        rows,
        total,
        None if total is None else total // profile.global_batch_size * profile.num_train_epochs,
        {} if total is None else {count: _elsewhere(profile, total, count) for count in OTHER_RANKS if count != ranks},
        parameters,
        parameters * (12 if profile.dtype == "fp32" else 14),  # weights, and fp32 master (16-bit runs) + two moments
        from_data,
    )


def _prepared_sizes(workspace: Workspace) -> dict[str, int | None]:
    return {source.name: len(source.train) for source in open_shards(workspace.data, verify=False).sources}


def _expected_sizes(profile: Profile) -> dict[str, int | None]:
    """Return the training parts that the sources' `expected_rows` leave after the split."""
    split = profile.val_split
    return {
        name: None if source.expected_rows is None else source.expected_rows - math.ceil(split * source.expected_rows)
        for name, source in profile.sources.items()
    }


def _elsewhere(profile: Profile, rows: int, ranks: int) -> dict[str, int | str]:
    """Return what another rank count does here (equal steps), and did in the original (accumulation fixed)."""
    rows_per_pass = profile.per_device_train_batch_size * ranks
    original = rows // (rows_per_pass * profile.gradient_accumulation_steps) * profile.num_train_epochs
    if profile.global_batch_size % rows_per_pass:
        return {"refused": f"{profile.global_batch_size} rows do not divide by {rows_per_pass}", "original": original}
    return {
        "accumulation_steps": profile.global_batch_size // rows_per_pass,
        "optimizer_steps": rows // profile.global_batch_size * profile.num_train_epochs,
        "original": original,
    }


def count_parameters(profile: Profile) -> int:
    """Return the weights of a Llama of `expected_model`'s shape, role tokens added and vocabulary padded.

    Source: Touvron et al. 2023, arXiv:2302.13971; grouped key and value heads: Ainslie et al. 2023, arXiv:2305.13245.
    """
    shape, multiple = profile.expected_model, profile.pad_vocab_to_multiple_of
    hidden = shape.hidden_size
    key_value = hidden * shape.num_key_value_heads // shape.num_attention_heads
    layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * shape.intermediate_size + 2 * hidden
    vocabulary = -(-(shape.vocab_size + len(ROLE_TOKENS)) // multiple) * multiple
    embeddings = vocabulary * hidden * (1 if shape.tie_word_embeddings else 2)
    return embeddings + shape.num_hidden_layers * layer + hidden


def describe_plan(plan: RunPlan) -> str:
    """Return the plan in words."""
    unknown, counts = "not known before prepare", plan.rows_per_source.items()
    shown = [f"{name} {unknown if count is None else format(count, ',')}" for name, count in counts]
    size = f"{plan.parameters / 1e9:.3f} B weights, one checkpoint {plan.checkpoint_bytes / 2**30:.2f} GiB"
    lines = [
        f"profile {plan.profile}: {size}",
        f"rows an epoch ({'counted in the data' if plan.from_data else 'from expected_rows'}): {', '.join(shown)}",
    ]
    if plan.rows is None:
        return "\n".join([*lines, f"steps: {unknown}"])
    lines.append(
        f"{plan.rows:,} rows, {plan.optimizer_steps:,} steps: {plan.ranks} ranks x {plan.micro_batch_size} rows x "
        f"accumulation {plan.accumulation_steps} = {plan.global_batch_size} rows a step"
    )
    for ranks, other in plan.other_ranks.items():
        here = other.get("refused") or f"accumulation {other['accumulation_steps']}, {other['optimizer_steps']:,} steps"
        lines.append(f"  on {ranks} ranks: {here} (the original would have made {other['original']:,})")
    return "\n".join(lines)
