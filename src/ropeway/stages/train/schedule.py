"""The learning-rate curve as our own pure function; the engine's is compared with it at every step."""

import math

from ropeway.config.params import Profile


def learning_rate(profile: Profile, applied: int, *, total_steps: int) -> float:
    """Return the rate that the next optimizer step uses, when `applied` steps were applied before it.

    DeepSpeed takes one step at rate 0 before its scheduler starts counting, and again rate 0 at count 0: so steps 1
    and 2 use 0, and the full rate comes at step warm-up + 2. Source: deepspeed 0.19.8, runtime/lr_schedules.py.
    """
    count = max(applied - 1, 0)
    warmup = max(profile.warmup_steps, 2)
    if count < warmup:
        return profile.learning_rate * count / warmup
    if profile.lr_schedule == "constant":
        return profile.learning_rate
    if profile.lr_schedule == "linear":
        return profile.learning_rate * max(0.0, (total_steps - count) / max(1.0, total_steps - warmup))
    progress = min(1.0, (count - warmup + 1) / max(1, total_steps - warmup))
    return profile.learning_rate * (1 + math.cos(math.pi * progress)) / 2
