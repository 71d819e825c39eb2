"""A run's plan as text for a terminal."""

from collections.abc import Iterator, Mapping

from rich.console import RenderableType

from ropeway.planning.budget import CPU
from ropeway.planning.memory import CHUNK_POSITIONS, CONTEXT_BYTES, FRAGMENTATION, PROCESS_BYTES
from ropeway.planning.plan import RunPlan
from ropeway.runtime.terminal import AlignedTable, format_count, format_large, render
from ropeway.runtime.workspace import format_bytes

UNKNOWN = "not known before prepare"
_MOST_REMEDIES = 6
_GPU_NOTES = {
    "live_weights": "gathered weights, up to the limit of the DeepSpeed JSON",
    "gradients": "in the training dtype: accumulated ones, and those of this micro-batch",
    "optimizer": "fp32 weights and Adam's two moments; with offload a buffer for the largest gradient",
    "buckets": "gradients being reduced",
    "reduction": "copy of a full bucket",
    "activations": f"every row at full length, logits in chunks of {CHUNK_POSITIONS:,} positions",
    "start": "a flat copy of the trained weights while the engine starts",
    "step": "gradients in fp32",
    "reserve": f"assumed: {format_bytes(CONTEXT_BYTES)} for CUDA and NCCL, {FRAGMENTATION:.0%} fragmentation",
}
_HOST_NOTES = {
    "opening": "the base model's files, mapped by all ranks",
    "offloaded": "allocated after opening, so the larger of the two counts",
    "export": "on rank 0, beside what is offloaded",
    "processes": f"assumed: {format_bytes(PROCESS_BYTES)} per rank",
}


def describe_plan(plan: RunPlan) -> str:
    """Return the full plan, formatted for the terminal's width."""
    parts = (_run_parts(plan), _memory_parts(plan), _disk_parts(plan), _time_lines(plan))
    return render(*(part for some in parts for part in ("", *some)))[1:]


def outline_plan(plan: RunPlan) -> str:
    """Return a summary of the plan for a run's log."""
    steps = "steps not known before prepare" if plan.optimizer_steps is None else _count_steps(plan)
    lines = [
        f"{_count_weights(plan)}, {steps}, {_batch(plan)}",
        f"memory per rank {format_bytes(plan.gpu_bytes['total'])}, disk {_disk(plan)}",
        *(line.strip() for line in _verdict_lines(plan) if plan.fits is not None),
    ]
    return "\n".join(lines)


def summarize_plan(plan: RunPlan) -> str:
    """Return the outline with rows and the time of training."""
    rows = "rows not known before prepare" if plan.rows is None else f"{format_count(plan.rows, 'row')} per epoch"
    others = "not in it: the stages before and after training"
    return "\n".join([rows, outline_plan(plan), *_time_lines(plan), f"  {others}"])


def _run_parts(plan: RunPlan) -> Iterator[RenderableType]:
    yield f"profile {plan.profile}: {_count_weights(plan)}, one checkpoint {format_bytes(plan.checkpoint_bytes)}"
    yield ""
    yield f"one epoch ({'counted in the prepared data' if plan.from_data else 'estimated before prepare'}):"
    yield AlignedTable(
        ("source", "rows", "tokens"),
        [
            (name, _known(rows), "" if rows is None else _known(plan.tokens_per_source[name]))
            for name, rows in plan.rows_per_source.items()
        ],
    )
    if plan.rows is None:
        yield f"steps: {UNKNOWN}"
        return
    yield f"{format_count(plan.rows, 'row')}, {_count_steps(plan)}: {_batch(plan)}"
    yield ""
    yield "with other numbers of ranks:"
    yield AlignedTable(
        ("ranks", "accumulation", "steps", "steps in the published code", "note"),
        [
            (
                str(ranks),
                str(other.get("accumulation_steps", "")),
                _known(other["optimizer_steps"]) if "optimizer_steps" in other else "",
                _known(other["original"]),
                str(other.get("refused", "")),
            )
            for ranks, other in plan.other_ranks.items()
        ],
    )


def _known(count: int | str | None) -> str:
    return UNKNOWN if count is None else f"{count:,}"


def _count_weights(plan: RunPlan) -> str:
    about = "" if plan.counted else "about "  # of a Llama with the base's sizes, until stage base has counted
    return f"{about}{format_large(plan.parameters)} weights"


def _count_steps(plan: RunPlan) -> str:
    return format_count(plan.optimizer_steps or 0, "step")


def _batch(plan: RunPlan) -> str:
    return (
        f"{format_count(plan.ranks, 'rank')} x {format_count(plan.micro_batch_size, 'row')} x accumulation "
        f"{plan.accumulation_steps} = {format_count(plan.global_batch_size, 'row')}/step"
    )


def _memory_parts(plan: RunPlan) -> Iterator[RenderableType]:
    yield f"memory of one GPU (on a CPU, of one rank): {format_bytes(plan.gpu_bytes['total'])}, in {plan.gpu_peak}"
    yield _draw_parts(plan.gpu_bytes, _GPU_NOTES)
    yield from _verdict_lines(plan)
    yield ""
    total = format_bytes(plan.host_bytes["total"])
    yield f"host memory of one machine with {format_count(plan.ranks, 'rank')}: {total}"
    yield _draw_parts(plan.host_bytes, _HOST_NOTES)


def _verdict_lines(plan: RunPlan) -> Iterator[str]:
    for size, verdict in plan.cards.items():
        if verdict.fits:
            yield f"fits a GPU of {size} GiB"
            continue
        yield f"DOES NOT FIT a GPU of {size} GiB; " + (
            "changes that fit:" if verdict.remedies else "none of the considered changes fits"
        )
        for words, total in verdict.remedies[:_MOST_REMEDIES]:
            yield f"  {words}: {format_bytes(total)}"


def _disk_parts(plan: RunPlan) -> Iterator[RenderableType]:
    fits = plan.disk_bytes <= plan.disk_free_bytes
    yield f"disk: {_disk(plan)}, {format_bytes(plan.disk_free_bytes)} free"
    notes = {
        "checkpoints": "save_total_limit plus the one being written",
        "dvc_cache": "copies of the stages' files, unless the file system has reflinks",
        "registry": "the package, on this disk",
    }
    yield _draw_parts({name: size for name, size in plan.disk_parts.items() if name not in plan.disk_unknown}, notes)
    if not fits:
        yield "DOES NOT FIT the free disk space; free space or lower save_total_limit"
    elif not plan.disk_unknown:
        yield "fits the free disk space"


def _disk(plan: RunPlan) -> str:
    unknown = f" without {' and '.join(plan.disk_unknown)} ({UNKNOWN})" if plan.disk_unknown else ""
    return format_bytes(plan.disk_bytes) + unknown


def _time_lines(plan: RunPlan) -> Iterator[str]:
    speed = plan.speed
    if speed.peak_tflops is None:
        yield "hours: not known, because no peak is listed for fp32; set it in TFLOPS with --card"
        return
    ranks = format_count(plan.ranks, "rank")
    peak = (
        f"{speed.peak_tflops:.2g} TFLOPS measured on this CPU"
        if speed.card == CPU
        else (f"{speed.peak_tflops:g} TFLOPS ({speed.card})")
    )
    basis = f"assumed: MFU {speed.mfu:g} of {peak}, on {ranks}"
    expected, most = plan.hours["expected"], plan.hours["at_most"]
    if most is None:
        yield f"hours: {UNKNOWN}"
        return
    shown = f"{_hours(expected)} on {plan.tokens:,} tokens without padding, " if expected is not None else ""
    yield f"training: {shown}at most {_hours(most)} with every row full ({basis})"
    yield f"  {_describe_pauses(plan)}"


def _hours(hours: float) -> str:
    """Return a time in hours, or a shorter one in minutes or seconds.

    >>> _hours(182.04), _hours(0.4), _hours(0.0021)
    ('182.0 hours', '24 min', '8 s')
    """
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _describe_pauses(plan: RunPlan) -> str:
    """Return what the hours contain besides training."""
    passes, saves = format_count(plan.validation_passes or 0, "validation"), format_count(plan.saves or 0, "checkpoint")
    validation = plan.hours["validation"]
    shown = f"{passes} {UNKNOWN}" if validation is None else f"{passes} with full rows {_hours(validation)}"
    waiting = plan.hours["saves"]
    if waiting is None:
        return f"of these: {shown}; {saves} not counted, state --save-gbps"
    basis = "measured on this disk" if plan.save_measured else "stated"
    where = f"{_hours(waiting)} at {plan.save_gbps:.2g} GB/s ({basis})"
    return f"of these: {shown}; {saves} of {format_bytes(plan.checkpoint_bytes)} {where}"


def _draw_parts(parts: Mapping[str, int], notes: Mapping[str, str]) -> AlignedTable:
    rows = [
        (f"  {name.replace('_', ' ')}", format_bytes(size), notes.get(name, ""))
        for name, size in parts.items()
        if name != "total" and size
    ]
    return AlignedTable(("", "", ""), rows)
