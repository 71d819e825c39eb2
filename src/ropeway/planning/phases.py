"""Peak of allocated GPU memory in each phase of a rank's step, as DeepSpeed allocates it.

Sources are lines of deepspeed 0.19.8: `runtime/zero/stage_1_and_2.py` (stages 1 and 2), `stage3.py` (stage 3).
`ropeway plan --engine` runs that code and compares; tests hold the two together within 5 %.

Shapes and symbols: as in `memory`. A *bucket* is the buffer in which gradients are reduced. Ranks differ: rank r owns
the r-th part of all weights in the model's order, and backward produces gradients in the opposite order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ropeway.config.zero import PARTITIONED_STAGE
from ropeway.planning.memory import (
    CONTEXT_BYTES,
    FP32,
    FRAGMENTATION,
    MOMENTS,
    PROCESS_BYTES,
    Load,
    layer_activation_bytes,
    plan_activations,
    plan_forward,
    trained_weights,
)

PHASES = ("engine_start", "forward", "backward", "optimizer_step")
_NORM = 8  # bytes: gradient norms are computed in fp64, one weight at a time (get_norm_dtype)
Parts = dict[str, int]


def plan_phases(load: Load, *, rank: int, memory_bytes: int | None = None) -> dict[str, Parts]:
    """Return the parts in bytes of each phase's peak on one rank; the sum of a phase's parts is its peak.

    `memory_bytes`: of the GPU; with too little, DeepSpeed flattens the weights on the host. None: unlimited.
    """
    if load.zero.stage == PARTITIONED_STAGE:
        return _plan_partitioned(load)
    return _plan_replicated(load, rank=rank, memory_bytes=memory_bytes)


def worst_phase(load: Load, *, memory_bytes: int | None = None) -> tuple[int, str, Parts]:
    """Return (rank, phase, parts) of the highest peak of the first and the last rank, which are the extremes."""
    return max(
        (
            (rank, phase, parts)
            for rank in sorted({0, load.ranks - 1})
            for phase, parts in plan_phases(load, rank=rank, memory_bytes=memory_bytes).items()
        ),
        key=lambda found: sum(found[2].values()),
    )


def plan_gpu(load: Load, *, memory_bytes: int | None = None) -> Parts:
    """Return the bytes of one GPU at the highest peak by part, and their `total`. On a CPU they are in host memory."""
    _, _, parts = worst_phase(load, memory_bytes=memory_bytes)
    temporary = sum(size for name, size in parts.items() if name not in ("weights", "optimizer"))
    parts = {**parts, "reserve": CONTEXT_BYTES + int(FRAGMENTATION * temporary)}
    return {**parts, "total": sum(parts.values())}


def certain_bytes(load: Load) -> int:
    """Return the minimum bytes on a GPU for any rows: states and buckets while gradients accumulate; no assumptions."""
    parts = plan_phases(load, rank=0)["forward"]
    buckets = max(parts.get("buckets", 0), _bucket_bytes(load))
    return buckets + sum(parts.get(name, 0) for name in ("weights", "optimizer", "gradients"))


# -- stages 0 to 2: every rank has all weights ----------------------------------------------------------------------


def _plan_replicated(load: Load, *, rank: int, memory_bytes: int | None) -> dict[str, Parts]:
    zero, width = load.zero, load.number_bytes
    weights, share = width * load.parameters, _share(load)
    flat = width * load.trainable  # a copy of the trained weights, made on the host if it does not fit (line 452)
    flat = flat if memory_bytes is None or weights + flat <= memory_bytes else 0
    # fp32 weights and moments; with offload the GPU has a buffer for the largest gradient (line 659).
    largest = max(trained_weights(load))
    optimizer = width * largest if zero.offload_optimizer else (FP32 + MOMENTS) * share
    states = {"weights": weights, "optimizer": optimizer}
    bucket = _bucket_bytes(load)
    own = _own_gradient_bytes(load, rank=rank)
    accumulates = load.accumulation_steps > 1
    every = width * load.trainable  # stages 0 and 1 keep every gradient until the last micro-batch
    if zero.stage >= 2:  # noqa: PLR2004 - the stage that partitions gradients
        kept = own if accumulates and not zero.offload_optimizer else 0
        between: Parts = {"gradients": kept}  # between micro-batches; the bucket is released (line 926)
    else:
        between = {"gradients": every if accumulates else 0, "buckets": bucket if accumulates else 0}
    return {
        # The flat copy of trained weights exists beside them (line 505), then fp32 weights and their gradients (936).
        "engine_start": {
            "weights": weights,
            "start": flat if zero.offload_optimizer else max(flat, 2 * FP32 * share),
        },
        "forward": {**states, **between, "activations": plan_forward(load)},
        "backward": {**states, **_plan_backward(load, rank=rank, kept=between["gradients"], bucket=bucket)},
        "optimizer_step": {**states, **_plan_step(load, own=own, between=between)},
    }


def _bucket_bytes(load: Load) -> int:
    """Return the bytes of the buffers in which gradients are reduced: two if that overlaps backward (line 3256)."""
    zero = load.zero
    buffers = 2 if zero.overlap and zero.stage < PARTITIONED_STAGE else 1
    return load.number_bytes * zero.bucket_elements * buffers if zero.stage else 0


def _plan_step(load: Load, *, own: int, between: Parts) -> Parts:
    """Return the parts of an optimizer step beside the states.

    The norm of each owned gradient is taken in fp64 (line 2683); then the 16-bit gradients are copied into one flat
    tensor and that to fp32, while they still exist (lines 3110 to 3118). Calls between micro-batches do nothing.
    """
    if load.zero.offload_optimizer:
        return between
    share, width = _share(load), load.number_bytes
    largest = min(share, max(trained_weights(load)))
    copies = max(_NORM * largest, (width + FP32) * share)
    if own + copies < sum(between.values()):
        return between
    return {"gradients": own, "step": copies}


def _own_gradient_bytes(load: Load, *, rank: int) -> int:
    """Return the bytes of gradients that a rank keeps on the GPU; with offload each goes to the host (line 2162)."""
    return 0 if load.zero.offload_optimizer else _whole_gradient_bytes(load, rank=rank)


def _whole_gradient_bytes(load: Load, *, rank: int) -> int:
    """Return the bytes of gradients of all weights that begin or end in a rank's part (line 2186)."""
    share, begin, own = _share(load), 0, 0
    for size in trained_weights(load):
        if begin < (rank + 1) * share and begin + size > rank * share:
            own += size
        begin += size
    return load.number_bytes * own


def _share(load: Load) -> int:
    """Return the elements that a rank's optimizer has: trained weights over ranks, aligned to pairs (line 446)."""
    if not load.zero.stage:
        return load.trainable
    return -(-load.trainable // (2 * load.ranks)) * 2


@dataclass(frozen=True, slots=True)
class _Reduction:
    """A full bucket is reduced during backward.

    Attributes:
        done: Layers whose backward is complete.
        released: Tensors of the MLP's width that the current layer has released by then.
        copied: Elements that are copied: all if they belong to several ranks (allreduce_bucket, line 2368), else 0.
        own: Whether one of its weights is in this rank's part, so that the rank's own gradients exist from here on.
    """

    done: int
    released: int
    copied: int
    own: bool


def _plan_backward(load: Load, *, rank: int, kept: int, bucket: int) -> Parts:
    """Return the parts of backward's peak in the last micro-batch beside the states.

    The first layers to go back have the most activations. Later ones have fewer, but from the first bucket with a
    weight of this rank on, its new gradients exist beside the accumulated ones (`grads_in_partition`, line 2192).
    """
    own = _own_gradient_bytes(load, rank=rank) if load.zero.stage >= 2 else 0  # noqa: PLR2004
    every = load.number_bytes * load.trainable if load.zero.stage < 2 else 0  # noqa: PLR2004
    grows = every and not kept  # no accumulated gradients yet: each layer adds its own
    peaks = [{"gradients": kept, "buckets": bucket, "activations": sum(plan_activations(load).values())}]
    reductions = list(_reductions(load, rank=rank)) if load.zero.stage >= 2 else []  # noqa: PLR2004
    new = 0
    for at in reductions:
        new = own if at.own else new
        peaks.append(
            {
                "gradients": kept + new,
                "buckets": bucket,
                "reduction": load.number_bytes * at.copied,
                "activations": _activations_after(load, at.done, released=at.released),
            }
        )
        if at.done + 1 < load.sizes.layers:
            peaks.append(
                {
                    "gradients": kept + new,
                    "buckets": bucket,
                    "activations": _activations_after(load, at.done + 1),
                }
            )
    if grows:
        per_layer = every // load.sizes.layers
        for done in range(load.sizes.layers):
            activations = _activations_after(load, done)
            peaks.append({"gradients": per_layer * done, "buckets": bucket, "activations": activations})
    # After backward: what is left in the bucket is reduced.
    ends = _own_gradient_bytes(load, rank=rank)
    left = min(bucket, load.number_bytes * load.trainable)
    peaks.append({"gradients": (kept or every) + ends, "buckets": bucket, "reduction": left, "activations": 0})
    return max(peaks, key=lambda parts: sum(parts.values()))


def _activations_after(load: Load, done: int, *, released: int = 0) -> int:
    """Return the bytes of activations in backward when `done` layers are complete, at the peak of the next one.

    Args:
        load: The load of the rank.
        done: Number of complete layers.
        released: Tensors of the MLP's width that the next layer has released since its peak.
    """
    sizes = load.sizes
    state = load.number_bytes * load.positions * sizes.hidden
    layer = layer_activation_bytes(load)
    whole = plan_activations(load)["activations"] - done * (state if load.checkpointing else layer)
    return whole - released * load.number_bytes * load.positions * sizes.intermediate


def _reductions(load: Load, *, rank: int) -> Iterator[_Reduction]:
    """Yield the reductions of a micro-batch in the order in which backward fills the bucket (line 1421)."""
    begins, at = [], 0
    sizes = trained_weights(load)
    for size in sizes:
        begins.append(at)
        at += size
    share, filled = _share(load), 0
    held: set[int] = set()
    for index in reversed(range(len(sizes))):
        if filled and filled + sizes[index] > load.zero.bucket_elements:
            done, released = _position(load, index)
            yield _Reduction(done, released, filled if len(held) > 1 else 0, rank in held)
            filled, held = 0, set()
        filled += sizes[index]
        held |= set(range(begins[index] // share, (begins[index] + sizes[index] - 1) // share + 1))


def _position(load: Load, index: int) -> tuple[int, int]:
    """Return (complete layers, tensors of the MLP's width released since) when weight `index` gets its gradient.

    Backward goes through a layer's MLP first: down_proj releases its input, gate_proj and up_proj the two products of
    the activation; the attention's weights come when all are released.
    """
    if load.adapters:  # too small to fill a bucket within the layers
        return load.sizes.layers, 0
    layers = load.sizes.layers
    per_layer = len(load.sizes.all_layer_weights) // layers
    within = index - 1  # the embedding comes first
    if within < 0:
        return layers, 0
    if within >= layers * per_layer:  # final norm or head
        return 0, 0
    released = _RELEASED[within % per_layer] if per_layer == len(_RELEASED) else max(_RELEASED)
    return layers - 1 - within // per_layer, released


_RELEASED = (4, 4, 4, 4, 2, 2, 1, 4, 1)  # q, k, v, o, gate, up, down, norms before attention and MLP


# -- stage 3: weights are partitioned -------------------------------------------------------------------------------


def _plan_partitioned(load: Load) -> dict[str, Parts]:
    """Return the phases of stage 3, which are equal on all ranks: every weight is split over all of them.

    The bucket (line 782) and the partition of gradients (line 791) exist from the start, fp32 gradients of one
    sub-group during its step (line 2684).
    """
    zero, width, ranks = load.zero, load.number_bytes, load.ranks
    share = -(-load.trainable // ranks)
    largest = width * max(trained_weights(load))
    own = 0 if zero.offload_parameters else width * -(-load.parameters // ranks)
    fp32 = 0 if zero.offload_optimizer else FP32 * share
    moments = 0 if zero.offload_optimizer else MOMENTS * share
    gradients = 0 if zero.offload_optimizer else width * share
    bucket = _bucket_bytes(load)
    states = {"weights": own, "optimizer": fp32 + moments, "gradients": gradients, "buckets": bucket}
    sub_group = min(share, zero.sub_group_elements)
    started = own + fp32 + gradients + bucket + largest  # one weight is gathered to hook its gradient (line 1504)
    opened = width * load.parameters + largest // ranks  # the engine moves the whole model before it is partitioned
    live = {"live_weights": live_weight_bytes(load)}
    # When the last layer's MLP goes back, the weights of the head and of down_proj are released again.
    released = width * (load.sizes.embedding_parameters + load.sizes.hidden * load.sizes.intermediate)
    back = {"live_weights": min(live["live_weights"], max(0, width * load.parameters - released))}
    backward = {**states, **back, "activations": sum(plan_activations(load).values())}
    # A full bucket is copied to be scattered (reduce_scatter_coalesced); two layers fill the usual one.
    copies = dict(backward, reduction=bucket, activations=_activations_after(load, 2, released=4))
    return {
        "engine_start": {"weights": own, "start": max(started, opened) - own},
        "forward": {**states, **live, "activations": plan_forward(load)},
        "backward": max(backward, copies, key=lambda parts: sum(parts.values())),
        "optimizer_step": {**states, "step": 0 if zero.offload_optimizer else (width + FP32) * sub_group},
    }


def live_weight_bytes(load: Load) -> int:
    """Return the bytes of gathered weights at most: up to the limits of the JSON, all if the model is smaller."""
    zero = load.zero
    live = max(zero.live_elements, load.sizes.embedding_parameters) + zero.prefetch_elements
    return load.number_bytes * min(load.parameters, live)


# -- host memory ----------------------------------------------------------------------------------------------------


def plan_host(load: Load) -> Parts:
    """Return the host memory in bytes of all ranks on one machine by part, and their `total`.

    Opening: one copy of the weights in the page cache, which all ranks share (`open_folder` maps the files). Export:
    under ZeRO-3 rank 0 opens the model again and fills it with the gathered weights; below, one file of weights at a
    time passes through the host. Offloaded states exist until the end, so opening or both others count.
    """
    weights = load.number_bytes * load.parameters
    kept = sum(offloaded_bytes(load, rank=rank) for rank in range(load.ranks))
    kept += weights if load.zero.offload_parameters else 0
    export = weights if load.zero.stage == PARTITIONED_STAGE else min(weights, EXPORT_FILE_BYTES)
    parts = {"opening": weights, "offloaded": kept, "export": export, "processes": load.ranks * PROCESS_BYTES}
    return {**parts, "total": max(weights, kept + export) + parts["processes"]}


EXPORT_FILE_BYTES = 5_000_000_000  # equal to MAX_SHARD of stages/train/export.py; a test compares them


def offloaded_bytes(load: Load, *, rank: int) -> int:
    """Return the host memory in bytes of one rank's optimizer, 0 if it is on the GPU.

    fp32 weights, their gradients and two moments. Stages 1 and 2 also have the updated weights in the training dtype
    (line 568), a buffer for the largest gradient (line 652) and, if they accumulate, whole gradients of the weights in
    this rank's part (line 1823); stage 3 the partition of gradients (line 791).
    """
    if not load.zero.offload_optimizer:
        return 0
    width, share = load.number_bytes, _share(load)
    states = (FP32 + FP32 + MOMENTS) * share + width * share
    if load.zero.stage == PARTITIONED_STAGE:
        return states
    accumulated = _whole_gradient_bytes(load, rank=rank) if load.accumulation_steps > 1 else 0
    return states + width * max(trained_weights(load)) + accumulated
