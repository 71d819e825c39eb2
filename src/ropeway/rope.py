"""RoPE scaling as one typed object: it opens the model, checks the live module and writes the export."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropeway.params import Profile


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How positions are stretched.

    Attributes:
        kind: `default` (none), `linear` or `dynamic`, as transformers spells it.
        factor: Divisor of every position under `linear`.
        theta: Base of the frequencies.
    """

    kind: str
    factor: float
    theta: float

    @classmethod
    def of(cls, profile: Profile, *, theta: float) -> "RopeScaling":
        """Translate the published spelling, `superhot_config: {type, scale}`."""
        if not profile.superhot:
            return cls("default", 1.0, theta)
        return cls(profile.superhot_config.type, float(profile.superhot_config.scale), theta)

    def rope_parameters(self) -> dict[str, Any]:
        """Return the full dict transformers 5 wants; a partial one loses theta there (5.24)."""
        if self.kind == "default":
            return {"rope_type": "default", "rope_theta": self.theta}
        return {"rope_type": self.kind, "factor": self.factor, "rope_theta": self.theta}

    def legacy(self) -> dict[str, Any] | None:
        """Return `rope_scaling` as transformers 4.31 reads it: exactly type and a float factor, or None."""
        return None if self.kind == "default" else {"type": self.kind, "factor": self.factor}

    def inv_freq(self, head_dim: int) -> NDArray[np.float32]:
        """Return `(head_dim / 2,)` fp32 frequencies of the positions the base model knows.

        Source: Su et al. 2021, arXiv:2104.09864; linear scaling: Chen et al. 2023, arXiv:2306.15595. `dynamic` leaves
        them alone until a sequence is longer than the base's context.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # The power rounded once, as torch does: numpy's fp32 power is an ulp off, 1e-4 in the sine at position 8,191.
        powers = np.power(np.float64(self.theta), exponents.astype(np.float64)).astype(np.float32)
        factor = np.float32(self.factor if self.kind == "linear" else 1.0)
        frequencies: NDArray[np.float32] = np.float32(1.0) / powers / factor
        return frequencies
