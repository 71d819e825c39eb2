"""Gradient accumulation steps, derived from the global batch size; used by the planner and by training."""

from ropeway.config.params import WeightParams
from ropeway.runtime.errors import ConfigError

PUBLISHED_RANKS = 8  # 424,864 rows // (2 rows x 8 accumulation x 8 ranks) = 3,319 steps


def accumulation_steps(profile: WeightParams, ranks: int) -> int:
    """Return the forward passes per rank and optimizer step, so that 4 or 8 ranks take equal steps.

    Ranks that share rows (`sequence_parallel`) count as one.

    Raises:
        ConfigError: The global batch does not divide evenly, or params.yaml has another number for 8 ranks.
    """
    shared = profile.sequence_parallel
    groups, alone = divmod(ranks, shared)
    if alone:
        raise ConfigError(
            f"sequence_parallel is {shared}, which does not divide {ranks} ranks; change it or ROPEWAY_RANKS"
        )
    rows_per_pass = profile.per_device_train_batch_size * groups
    steps, rest = divmod(profile.global_batch_size, rows_per_pass)
    if rest or not steps:
        raise ConfigError(
            f"global_batch_size is {profile.global_batch_size}, not a multiple of per_device_train_batch_size "
            f"{profile.per_device_train_batch_size} x {groups} {'ranks' if shared == 1 else 'groups of ranks'} = "
            f"{rows_per_pass}; change one of them or ROPEWAY_RANKS"
        )
    stated = profile.gradient_accumulation_steps
    if groups == PUBLISHED_RANKS and steps != stated:
        raise ConfigError(
            f"gradient_accumulation_steps is {stated}, but global_batch_size {profile.global_batch_size} / "
            f"({groups} ranks x per_device_train_batch_size {profile.per_device_train_batch_size}) = {steps}; on "
            f"{PUBLISHED_RANKS} ranks the two must agree (on other rank counts it is ignored)"
        )
    return steps
