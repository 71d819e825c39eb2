"""RoPE scaling as one typed object: it opens the model, checks the live module and writes the export."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import Profile

Frequencies = NDArray[np.float32]
_ALIKE = ("linear", "dynamic")  # transformers 4.31 knows these two


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How positions are stretched.

    Attributes:
        kind: `default` (none), `linear`, `dynamic`, `yarn` or `llama3`, as transformers spells it.
        factor: By how much the context grows; the divisor of every position under `linear`.
        theta: Base of the frequencies.
        original: Positions the base model knows, in tokens.
        settings: What the kind needs beside that, by transformers' names; sorted pairs.
        kept: The base's own `rope_parameters` as JSON where nothing is scaled by this run; empty where the run decides.
        positions: The base's own `max_position_embeddings`, with `kept`.
        frequencies: With `kept`, what transformers computes from the base's untouched config: the attention factor,
            then `head_dim / 2` fp32 frequencies. Empty until `base` has opened it.
    """

    kind: str
    factor: float
    theta: float
    original: int
    settings: tuple[tuple[str, float], ...] = ()
    kept: str = ""
    positions: int = 0
    frequencies: tuple[float, ...] = ()

    @classmethod
    def keep(cls, stated: Mapping[str, Any], positions: int, frequencies: tuple[float, ...] = ()) -> "RopeScaling":
        """Return a base's own scaling, untouched.

        Args:
            stated: `rope_parameters` of its config, as transformers 5 reads it.
            positions: Its `max_position_embeddings`.
            frequencies: See the class.
        """
        kind, factor = str(stated.get("rope_type", "default")), float(stated.get("factor") or 1.0)
        original = int(stated.get("original_max_position_embeddings") or positions)
        theta, text = float(stated["rope_theta"]), json.dumps(dict(stated), sort_keys=True)
        return cls(kind, factor, theta, original, kept=text, positions=positions, frequencies=frequencies)

    @classmethod
    def of(cls, profile: Profile, *, theta: float, original: int) -> "RopeScaling":
        """Translate the published spelling, `superhot_config: {type, scale, …}`."""
        if not profile.superhot:
            return cls("default", 1.0, theta, original)
        stated = profile.superhot_config.model_dump()
        kind, factor = stated.pop("type"), float(stated.pop("scale"))
        return cls(kind, factor, theta, original, tuple(sorted((name, float(value)) for name, value in stated.items())))

    @classmethod
    def from_json(cls, stated: dict[str, Any]) -> "RopeScaling":
        """Return the object whose `dataclasses.asdict` went through JSON."""
        settings = tuple((name, value) for name, value in stated["settings"])
        return cls(**{**stated, "settings": settings, "frequencies": tuple(stated["frequencies"])})

    def rope_parameters(self) -> dict[str, Any]:
        """Return the full dict transformers 5 wants; a partial one loses theta there (5.24)."""
        if self.kept:
            parameters: dict[str, Any] = json.loads(self.kept)
            return parameters
        if self.kind == "default":
            return {"rope_type": "default", "rope_theta": self.theta}
        return {"rope_type": self.kind, "rope_theta": self.theta, "factor": self.factor, **self._beyond()}

    def legacy(self) -> dict[str, Any] | None:
        """Return `rope_scaling` as transformers 4 reads it: for 4.31 exactly type and a float factor, or None."""
        if self.kind == "default" or (self.kind in _ALIKE and self.factor == 1):  # 4.31 refuses a factor of 1
            return None
        if self.kind in _ALIKE:
            return {"type": self.kind, "factor": self.factor}
        parameters = self.rope_parameters()
        return {name: value for name, value in parameters.items() if name not in ("rope_theta", "type")}

    def _beyond(self) -> dict[str, Any]:
        if self.kind in _ALIKE:
            return {}
        stated = {"attention_factor": self.attention_factor} if self.kind == "yarn" else {}
        return {"original_max_position_embeddings": self.original, **dict(self.settings), **stated}

    @property
    def reach(self) -> int:
        """Positions the scaled model is made for, in tokens."""
        return max(self.positions, int(self.original * self.factor))

    @property
    def stated_positions(self) -> int:
        """What config.json says as `max_position_embeddings`.

        The base's own, which programs multiply by the factor; under `llama3` the whole reach, which they do not
        (Llama 3.1's config states 131,072 beside an original 8,192). A kept scaling keeps the base's number.
        """
        if self.kept:
            return self.positions
        return self.reach if self.kind == "llama3" else self.original

    @property
    def attention_factor(self) -> float:
        """By how much sine and cosine are multiplied. Source: arXiv:2309.00071, equation 22 (yarn alone)."""
        if self.frequencies:
            return self.frequencies[0]
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" and self.factor > 1 else 1.0

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return `(head_dim / 2,)` fp32 frequencies of the positions the base model knows.

        Source: Su et al. 2021, arXiv:2104.09864; linear: Chen et al. 2023, arXiv:2306.15595. `dynamic` leaves them
        alone until a sequence is longer than the base's context. Of a kept scaling: what transformers computed.
        """
        if self.frequencies:
            return np.asarray(self.frequencies[1:], dtype=np.float32)
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # The power rounded once, as torch does: numpy's fp32 power is an ulp off, 1e-4 in the sine at position 8,191.
        powers = np.power(np.float64(self.theta), exponents.astype(np.float64)).astype(np.float32)
        plain: Frequencies = np.float32(1.0) / powers
        if self.kind == "yarn":
            return self._yarn(plain, powers, head_dim)
        if self.kind == "llama3":
            return self._llama3(plain)
        return plain / np.float32(self.factor if self.kind == "linear" else 1.0)

    def _yarn(self, plain: Frequencies, powers: Frequencies, head_dim: int) -> Frequencies:
        """Stretch what turns less than beta_slow times over the known context, keep what turns more than beta_fast.

        Source: Peng et al. 2023, arXiv:2309.00071, section 3.2; the ramp's ends are whole as in their code.
        """
        settings = dict(self.settings)

        def dimension(turns: float) -> float:
            return head_dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low = max(math.floor(dimension(settings["beta_fast"])), 0)
        high = min(math.ceil(dimension(settings["beta_slow"])), head_dim - 1)
        span = np.float32(high - low or 0.001)
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / span, 0, 1)
        kept = np.float32(1) - ramp
        stretched: Frequencies = np.float32(1.0) / (np.float32(self.factor) * powers)
        blended: Frequencies = stretched * ramp + plain * kept
        return blended

    def _llama3(self, plain: Frequencies) -> Frequencies:
        """Stretch long wavelengths, keep short ones, blend between. Source: Llama 3.1's reference code (July 2024)."""
        settings = dict(self.settings)
        low, high = np.float32(settings["low_freq_factor"]), np.float32(settings["high_freq_factor"])
        turns = np.float32(self.original) / (np.float32(2 * math.pi) / plain)  # over the known context
        stretched = plain / np.float32(self.factor)
        smooth = (turns - low) / (high - low)
        blended = (np.float32(1) - smooth) * stretched + smooth * plain
        found: Frequencies = np.where(turns < low, stretched, np.where(turns > high, plain, blended))
        return found
