"""A run's plan in words."""

from collections.abc import Iterator, Mapping

from ropeway.planning.budget import gib
from ropeway.planning.memory import CHUNK_POSITIONS, CONTEXT_BYTES, FRAGMENTATION, PROCESS_BYTES
from ropeway.planning.plan import RunPlan

UNKNOWN = "not known before prepare"
_MOST_REMEDIES = 6
_GPU_NOTES = {
    "live_weights": "gathered at one time (the JSON's limit)",
    "gradients": "in training numbers, and in fp32 for the step",
    "optimizer": "fp32 weights and Adam's two moments",
    "buckets": "gradients being reduced",
    "activations": "every row at full length",
    "logits": f"chunks of {CHUNK_POSITIONS:,} positions, beyond what a layer's backward takes",
    "reserve": f"assumed: {gib(CONTEXT_BYTES)} for CUDA and NCCL, {FRAGMENTATION:.0%} of what comes and goes",
}
_HOST_NOTES = {
    "opening": "every rank opens the whole model",
    "offloaded": "after that, so the larger of the two counts",
    "processes": f"assumed: {gib(PROCESS_BYTES)} each",
}


def describe_plan(plan: RunPlan) -> str:
    """Return the whole plan."""
    return "\n".join([*_run_lines(plan), *_memory_lines(plan), *_disk_lines(plan), *_time_lines(plan)])


def outline_plan(plan: RunPlan) -> str:
    """Return the plan in a few lines, for a run's log."""
    steps = "steps not known before prepare" if plan.optimizer_steps is None else f"{plan.optimizer_steps:,} steps"
    lines = [
        f"{plan.parameters / 1e9:.3f} B weights, {steps}, {_batch(plan)}",
        f"memory of each rank {gib(plan.gpu_bytes['total'])}, disk {_disk(plan)}",
        *(line.strip() for line in _verdict_lines(plan) if plan.fits is not None),
    ]
    return "\n".join(lines)


def _run_lines(plan: RunPlan) -> Iterator[str]:
    size = f"{plan.parameters / 1e9:.3f} B weights, one checkpoint {gib(plan.checkpoint_bytes)}"
    yield f"profile {plan.profile}: {size}"
    yield f"an epoch ({'counted in the data' if plan.from_data else 'from expected_rows'}):"
    width = max(map(len, plan.rows_per_source))
    for name, rows in plan.rows_per_source.items():
        tokens = plan.tokens_per_source[name]
        shown = UNKNOWN if rows is None else f"{rows:>11,} rows"
        shown += "" if rows is None else f", tokens {UNKNOWN}" if tokens is None else f" {tokens:>15,} tokens"
        yield f"  {name:<{width}} {shown}"
    if plan.rows is None:
        yield f"steps: {UNKNOWN}"
        return
    yield f"{plan.rows:,} rows, {plan.optimizer_steps:,} steps: {_batch(plan)}"
    for ranks, other in plan.other_ranks.items():
        here = other.get("refused") or f"accumulation {other['accumulation_steps']}, {other['optimizer_steps']:,} steps"
        yield f"  on {ranks} ranks: {here} (the original would have made {other['original']:,})"


def _batch(plan: RunPlan) -> str:
    return (
        f"{plan.ranks} ranks x {plan.micro_batch_size} rows x accumulation {plan.accumulation_steps} = "
        f"{plan.global_batch_size} rows a step"
    )


def _memory_lines(plan: RunPlan) -> Iterator[str]:
    yield f"memory of one GPU (on a CPU, of one rank): {gib(plan.gpu_bytes['total'])}"
    yield from _parts(plan.gpu_bytes, _GPU_NOTES)
    yield from _verdict_lines(plan)
    yield f"host memory, all {plan.ranks} ranks on one machine: {gib(plan.host_bytes['total'])}"
    yield from _parts(plan.host_bytes, _HOST_NOTES)


def _verdict_lines(plan: RunPlan) -> Iterator[str]:
    for size, verdict in plan.cards.items():
        if verdict.fits:
            yield f"  fits {size} GiB"
            continue
        yield f"  DOES NOT FIT {size} GiB; what would:" + ("" if verdict.remedies else " none of the changes tried")
        for words, total in verdict.remedies[:_MOST_REMEDIES]:
            yield f"    {words}: {gib(total)}"


def _disk_lines(plan: RunPlan) -> Iterator[str]:
    yield f"disk: {_disk(plan)}, free {gib(plan.disk_free_bytes)}"
    notes = {
        "checkpoints": "save_total_limit and the one being written",
        "dvc_cache": "copies of the stages' files, unless the file system knows reflinks",
        "registry": "of packages, on this disk",
    }
    yield from _parts({name: size for name, size in plan.disk_parts.items() if name not in plan.disk_unknown}, notes)


def _disk(plan: RunPlan) -> str:
    unknown = f" without {' and '.join(plan.disk_unknown)} ({UNKNOWN})" if plan.disk_unknown else ""
    return gib(plan.disk_bytes) + unknown


def _time_lines(plan: RunPlan) -> Iterator[str]:
    speed = plan.speed
    if speed.peak_tflops is None:
        yield "hours: not known; no peak is listed for fp32, state one in TFLOPS with --card"
        return
    basis = f"assumed: MFU {speed.mfu:g} of {speed.peak_tflops:g} TFLOPS ({speed.card}) on {plan.ranks} ranks"
    expected, most = plan.hours["expected"], plan.hours["at_most"]
    if most is None:
        yield f"hours: {UNKNOWN}"
        return
    shown = f"{expected:,.1f} on {plan.tokens:,} tokens without padding, " if expected is not None else ""
    yield f"hours: {shown}at most {most:,.1f} with every row full ({basis})"


def _parts(parts: Mapping[str, int], notes: Mapping[str, str]) -> Iterator[str]:
    for name, size in parts.items():
        if name != "total" and size:
            note = f"  {notes[name]}" if name in notes else ""
            yield f"  {name.replace('_', ' '):<13} {gib(size):>12}{note}".rstrip()
