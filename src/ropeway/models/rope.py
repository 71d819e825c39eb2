"""RoPE scaling: one class per kind. It opens the model, is compared with the live module, and writes the export.

A kind is added here, as a class in `_KINDS`, and in `SuperhotConfig` of `config/params.py`. No other module asks for a
kind by its name.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import BaseParams

Frequencies = NDArray[np.float32]
Settings = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class RopeScaling(ABC):
    """How positions are stretched.

    Attributes:
        factor: By how much the context grows; the divisor of every position under `linear`.
        theta: Base of the frequencies.
        original: Positions the base model knows, in tokens.
        settings: What the kind needs beside that, by transformers' names; sorted pairs.
    """

    kind: ClassVar[str]
    stretch: ClassVar[str]  # what it does, for the card
    loader: ClassVar[str] = "4.43.0"  # the lowest transformers that has it. Source: its release notes

    factor: float
    theta: float
    original: int
    settings: Settings = ()

    @property
    def is_scaled(self) -> bool:
        """Whether positions are stretched at all."""
        return True

    @property
    def kept(self) -> str:
        """The base's own `rope_parameters` as JSON where they are kept; empty where the run decides."""
        return ""

    @property
    def reach(self) -> int:
        """Positions the scaled model is made for, in tokens."""
        return int(self.original * self.factor)

    @property
    def stated_positions(self) -> int:
        """What config.json says as `max_position_embeddings`: the base's own, which programs multiply by the factor."""
        return self.original

    @property
    def attention_factor(self) -> float:
        """By how much sine and cosine are multiplied."""
        return 1.0

    @abstractmethod
    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return `(head_dim / 2,)` fp32 frequencies of the positions the base model knows."""

    def to_config(self) -> dict[str, object]:
        """Return the full `rope_parameters` that transformers 5 wants; a partial one loses theta there (5.24)."""
        stated = {"rope_type": self.kind, "rope_theta": self.theta, "factor": self.factor}
        return {**stated, "original_max_position_embeddings": self.original, **dict(self.settings)}

    def to_legacy_config(self) -> dict[str, object] | None:
        """Return `rope_scaling` as transformers 4 reads it."""
        return _legacy(self.to_config())

    def to_json(self) -> dict[str, object]:
        """Return what `scaling_from_json` reads."""
        return {
            "kind": self.kind,
            "factor": self.factor,
            "theta": self.theta,
            "original": self.original,
            "settings": [list(pair) for pair in self.settings],
            "kept": "",
            "positions": 0,
            "frequencies": [],
        }

    def _powers(self, head_dim: int) -> Frequencies:
        """Return theta to the power of 2i / head_dim. Source: Su et al. 2021, arXiv:2104.09864."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # The power rounded once, as torch does: numpy's fp32 power is an ulp off, 1e-4 in the sine at position 8,191.
        return np.power(np.float64(self.theta), exponents.astype(np.float64)).astype(np.float32)

    def _plain(self, head_dim: int) -> Frequencies:
        plain: Frequencies = np.float32(1.0) / self._powers(head_dim)
        return plain


class DefaultRope(RopeScaling):
    """No scaling."""

    __slots__ = ()
    kind, stretch, loader = "default", "positions are not stretched", "4.31.0"

    @property
    def is_scaled(self) -> bool:
        """False."""
        return False

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the base's frequencies."""
        return self._plain(head_dim)

    def to_config(self) -> dict[str, object]:
        """Return type and theta: there is no more."""
        return {"rope_type": self.kind, "rope_theta": self.theta}

    def to_legacy_config(self) -> None:
        """Return None: transformers 4 states no scaling so."""


class LinearRope(RopeScaling):
    """Every position divided by the factor. Source: Chen et al. 2023, arXiv:2306.15595."""

    __slots__ = ()
    kind, stretch, loader = "linear", "every position is divided by the factor", "4.31.0"

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the base's frequencies divided by the factor."""
        return self._plain(head_dim) / np.float32(self.factor)

    def to_config(self) -> dict[str, object]:
        """Return type, theta and factor."""
        return {"rope_type": self.kind, "rope_theta": self.theta, "factor": self.factor}

    def to_legacy_config(self) -> dict[str, object] | None:
        """Return exactly type and a float factor, as 4.31 wants it, which refuses a factor of 1."""
        return None if self.factor == 1 else {"type": self.kind, "factor": self.factor}


class DynamicRope(LinearRope):
    """Frequencies as the base's until a sequence is longer than its context; then theta grows."""

    __slots__ = ()
    kind, stretch = "dynamic", "beyond the base's context theta grows"

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the base's frequencies."""
        return self._plain(head_dim)


class YarnRope(RopeScaling):
    """What turns less than beta_slow times over the known context is stretched, more than beta_fast is kept.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2; the ramp's ends are whole as in their code.
    """

    __slots__ = ()
    kind = "yarn"
    stretch = "slow frequencies are divided by the factor, fast ones kept, those between blended (arXiv:2309.00071)"

    @property
    def attention_factor(self) -> float:
        """Source: arXiv:2309.00071, equation 22."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def to_config(self) -> dict[str, object]:
        """Return everything with the attention factor stated."""
        return {**RopeScaling.to_config(self), "attention_factor": self.attention_factor}

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return stretched, blended and kept frequencies."""
        powers, plain = self._powers(head_dim), self._plain(head_dim)
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


class Llama3Rope(RopeScaling):
    """Long wavelengths are stretched, short ones kept. Source: Llama 3.1's reference code (July 2024)."""

    __slots__ = ()
    kind = "llama3"
    stretch = "long wavelengths are stretched by the factor, short ones kept, others blended (as Llama 3.1 does)"

    @property
    def stated_positions(self) -> int:
        """The whole reach: programs do not multiply here (Llama 3.1 states 131,072 beside an original 8,192)."""
        return self.reach

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return stretched, blended and kept frequencies."""
        plain = self._plain(head_dim)
        settings = dict(self.settings)
        low, high = np.float32(settings["low_freq_factor"]), np.float32(settings["high_freq_factor"])
        turns = np.float32(self.original) / (np.float32(2 * math.pi) / plain)  # over the known context
        stretched = plain / np.float32(self.factor)
        smooth = (turns - low) / (high - low)
        blended = (np.float32(1) - smooth) * stretched + smooth * plain
        found: Frequencies = np.where(turns < low, stretched, np.where(turns > high, plain, blended))
        return found


@dataclass(frozen=True, slots=True)
class BaseModelRope(RopeScaling):
    """A base's own scaling of any kind, untouched.

    Attributes:
        own_kind: As the base's config has it.
        stated: The base's `rope_parameters` as JSON.
        positions: Its `max_position_embeddings`.
        frequencies: What transformers computes from its untouched config: attention factor, then `head_dim / 2` fp32
            frequencies.
    """

    stretch: ClassVar[str] = "positions are stretched as the base states it"

    own_kind: str = ""
    stated: str = ""
    positions: int = 0
    frequencies: tuple[float, ...] = ()

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The base's kind."""
        return self.own_kind

    @property
    def is_scaled(self) -> bool:
        """Whether the base's kind stretches positions."""
        return self.kind != DefaultRope.kind

    @property
    def loader(self) -> str:  # type: ignore[override]
        """That of the kind; an unknown one counts as new."""
        return _KINDS[self.kind].loader if self.kind in _KINDS else RopeScaling.loader

    @property
    def kept(self) -> str:
        """The base's `rope_parameters`."""
        return self.stated

    @property
    def reach(self) -> int:
        """What the base states, by positions or by factor."""
        return max(self.positions, int(self.original * self.factor))

    @property
    def stated_positions(self) -> int:
        """The base's number."""
        return self.positions

    @property
    def attention_factor(self) -> float:
        """As transformers computed it."""
        return self.frequencies[0]

    def inv_freq(self, head_dim: int) -> Frequencies:  # noqa: ARG002 - they were computed for the base's
        """Return what transformers computed."""
        return np.asarray(self.frequencies[1:], dtype=np.float32)

    def to_config(self) -> dict[str, object]:
        """Return the base's `rope_parameters`."""
        parameters: dict[str, object] = json.loads(self.stated)
        return parameters

    def to_legacy_config(self) -> dict[str, object] | None:
        """Return what transformers 4 reads of the kind."""
        if self.kind in (DefaultRope.kind, LinearRope.kind, DynamicRope.kind):
            return build_scaling(self.kind, self.factor, self.theta, self.original).to_legacy_config()
        return _legacy(self.to_config())

    def to_json(self) -> dict[str, object]:
        """Return what `scaling_from_json` reads."""
        own = {"kept": self.stated, "positions": self.positions, "frequencies": list(self.frequencies)}
        return {**RopeScaling.to_json(self), **own}


_KINDS: dict[str, type[RopeScaling]] = {
    one.kind: one for one in (DefaultRope, LinearRope, DynamicRope, YarnRope, Llama3Rope)
}


def build_scaling(kind: str, factor: float, theta: float, original: int, settings: Settings = ()) -> RopeScaling:
    """Return the scaling of a kind that this package can compute; see the class for the rest."""
    return _KINDS[kind](factor, theta, original, settings)


def known_kinds() -> set[str]:
    """Return the kinds that params may ask for, `default` among them."""
    return set(_KINDS)


def plan_scaling(profile: BaseParams, *, theta: float, original: int) -> RopeScaling:
    """Translate the published spelling, `superhot_config: {type, scale, …}`."""
    if not profile.superhot:
        return build_scaling(DefaultRope.kind, 1.0, theta, original)
    stated = profile.superhot_config.model_dump()
    kind, factor = stated.pop("type"), float(stated.pop("scale"))
    settings = tuple(sorted((name, float(value)) for name, value in stated.items()))
    return build_scaling(kind, factor, theta, original, settings)


def keep_scaling(stated: Mapping[str, Any], positions: int, frequencies: tuple[float, ...]) -> BaseModelRope:
    """Return a base's own scaling, untouched.

    Args:
        stated: `rope_parameters` of its config, as transformers 5 reads it.
        positions: Its `max_position_embeddings`.
        frequencies: See the class.
    """
    return BaseModelRope(
        factor=float(stated.get("factor") or 1.0),
        theta=float(stated["rope_theta"]),
        original=int(stated.get("original_max_position_embeddings") or positions),
        own_kind=str(stated.get("rope_type", DefaultRope.kind)),
        stated=json.dumps(dict(stated), sort_keys=True),
        positions=positions,
        frequencies=frequencies,
    )


def scaling_from_json(stated: Mapping[str, Any]) -> RopeScaling:
    """Return the object whose `to_json` went through JSON."""
    settings = tuple((name, value) for name, value in stated["settings"])
    scaling = (float(stated["factor"]), float(stated["theta"]), int(stated["original"]), settings)
    if not stated["kept"]:
        return build_scaling(stated["kind"], *scaling)
    kept = {"stated": stated["kept"], "positions": stated["positions"], "frequencies": tuple(stated["frequencies"])}
    return BaseModelRope(*scaling, own_kind=stated["kind"], **kept)


def _legacy(parameters: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in parameters.items() if name not in ("rope_theta", "type")}


def longest_independent(parameters: Mapping[str, Any], positions: int) -> int | None:
    """Return the longest row, in tokens, whose frequencies do not follow the longest row of its batch; None: all.

    Source: transformers 5.24, modeling_rope_utils.dynamic_rope_update.

    Args:
        parameters: `rope_parameters` of a config.
        positions: Its `max_position_embeddings`.
    """
    if parameters["rope_type"] == DynamicRope.kind:
        return positions
    if parameters["rope_type"] == "longrope":  # a base's own
        return int(parameters.get("original_max_position_embeddings") or positions)
    return None
