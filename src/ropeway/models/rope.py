"""RoPE scaling: one class per kind, used to configure the model, to verify the loaded model and to write the export.

To add a kind, add a class to `_KINDS` here and a section to `SuperhotConfig` in `config/sections.py`. No other module
depends on the name of a kind.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import BaseParams

Frequencies = NDArray[np.float32]
OwnFrequencies = Mapping[str, tuple[float, ...]]  # name of a buffer -> (attention factor, frequencies)
_ONE = "inv_freq"  # name of the buffer of families with one RoPE for all layers
Settings = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class RopeScaling(ABC):
    """A RoPE scaling.

    Attributes:
        factor: Factor by which the context is extended; `linear` divides every position by it.
        theta: Base of the frequencies.
        original: Context length of the base model, in tokens.
        settings: Other settings of the kind as sorted pairs, with transformers' names.
    """

    kind: ClassVar[str]
    stretch: ClassVar[str]  # description for the model card
    loader: ClassVar[str] = "4.43.0"  # minimum version of transformers. Source: its release notes

    factor: float
    theta: float
    original: int
    settings: Settings = ()

    @property
    def is_scaled(self) -> bool:
        """Whether positions or frequencies are scaled."""
        return True

    @property
    def kept(self) -> str:
        """The base's `rope_parameters` as JSON if the base keeps its own scaling; otherwise empty."""
        return ""

    @property
    def reach(self) -> int:
        """Context length with scaling, in tokens."""
        return int(self.original * self.factor)

    @property
    def stated_positions(self) -> int:
        """`max_position_embeddings` of the exported config.json: the base's; readers multiply it by the factor."""
        return self.original

    @property
    def attention_factor(self) -> float:
        """Multiplier of sine and cosine."""
        return 1.0

    @abstractmethod
    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the `(head_dim / 2,)` fp32 frequencies for positions within the base's context."""

    def expected(self, dim: int) -> dict[str, tuple[float, Frequencies]]:
        """Return (attention factor, frequencies) of each buffer of a model that turns `dim` dimensions of a head."""
        return {_ONE: (self.attention_factor, self.inv_freq(dim))}

    def to_config(self) -> dict[str, object]:
        """Return the complete `rope_parameters` for transformers 5; it drops theta from incomplete ones (5.24)."""
        stated = {"rope_type": self.kind, "rope_theta": self.theta, "factor": self.factor}
        return {**stated, "original_max_position_embeddings": self.original, **dict(self.settings)}

    def to_legacy_config(self) -> dict[str, object] | None:
        """Return `rope_scaling` in the format of transformers 4."""
        return _legacy(self.to_config())

    def to_json(self) -> dict[str, object]:
        """Return the scaling in the format of `scaling_from_json`."""
        return {
            "kind": self.kind,
            "factor": self.factor,
            "theta": self.theta,
            "original": self.original,
            "settings": [list(pair) for pair in self.settings],
            "kept": "",
            "positions": 0,
            "frequencies": {},
        }

    def _powers(self, head_dim: int) -> Frequencies:
        """Return theta to the power of 2i / head_dim. Source: Su et al. 2021, arXiv:2104.09864."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # Rounded once, as torch does: numpy's fp32 power differs by one ulp, 1e-4 in the sine at position 8,191.
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
        """Always False."""
        return False

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the base's frequencies."""
        return self._plain(head_dim)

    def to_config(self) -> dict[str, object]:
        """Return type and theta."""
        return {"rope_type": self.kind, "rope_theta": self.theta}

    def to_legacy_config(self) -> None:
        """Return None, the `rope_scaling` of transformers 4 without scaling."""


class ThetaRope(DefaultRope):
    """A larger theta: all frequencies but the first are lower. Source: Xiong et al. 2023, arXiv:2309.16039."""

    __slots__ = ()
    kind, stretch, loader = "theta", "theta is larger than the base's, which lowers the frequencies", "4.33.0"

    @property
    def stated_positions(self) -> int:
        """The extended context length; readers multiply nothing."""
        return self.reach

    def to_config(self) -> dict[str, object]:
        """Return type `default` and the larger theta."""
        return {"rope_type": DefaultRope.kind, "rope_theta": self.theta}


class LinearRope(RopeScaling):
    """Position interpolation: every position is divided by the factor. Source: Chen et al. 2023, arXiv:2306.15595."""

    __slots__ = ()
    kind, stretch, loader = "linear", "every position is divided by the factor", "4.31.0"

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the base's frequencies divided by the factor."""
        return self._plain(head_dim) / np.float32(self.factor)

    def to_config(self) -> dict[str, object]:
        """Return type, theta and factor."""
        return {"rope_type": self.kind, "rope_theta": self.theta, "factor": self.factor}

    def to_legacy_config(self) -> dict[str, object] | None:
        """Return type and float factor, the only keys that 4.31 accepts; None for a factor of 1, which it rejects."""
        return None if self.factor == 1 else {"type": self.kind, "factor": self.factor}


class DynamicRope(LinearRope):
    """NTK-aware scaling: theta grows for sequences longer than the base's context; shorter ones are not scaled."""

    __slots__ = ()
    kind, stretch = "dynamic", "beyond the base's context theta grows"

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the base's frequencies."""
        return self._plain(head_dim)


class YarnRope(RopeScaling):
    """YaRN: frequencies below beta_slow rotations per original context are scaled, those above beta_fast are not.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2; the ends of the ramp are rounded as in their code.
    """

    __slots__ = ()
    kind = "yarn"
    stretch = "slow frequencies are divided by the factor, fast ones kept, those between blended (arXiv:2309.00071)"

    @property
    def attention_factor(self) -> float:
        """Source: arXiv:2309.00071, equation 22."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def to_config(self) -> dict[str, object]:
        """Return the `rope_parameters` with the attention factor."""
        return {**RopeScaling.to_config(self), "attention_factor": self.attention_factor}

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the frequencies: scaled, blended or unchanged."""
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
    """Long wavelengths are scaled, short ones are not. Source: Llama 3.1's reference code (July 2024)."""

    __slots__ = ()
    kind = "llama3"
    stretch = "long wavelengths are stretched by the factor, short ones kept, others blended (as Llama 3.1 does)"

    @property
    def stated_positions(self) -> int:
        """The scaled context length; readers do not multiply it (Llama 3.1: 131,072, with an original 8,192)."""
        return self.reach

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the frequencies: scaled, blended or unchanged."""
        plain = self._plain(head_dim)
        settings = dict(self.settings)
        low, high = np.float32(settings["low_freq_factor"]), np.float32(settings["high_freq_factor"])
        turns = np.float32(self.original) / (np.float32(2 * math.pi) / plain)  # rotations over the original context
        stretched = plain / np.float32(self.factor)
        smooth = (turns - low) / (high - low)
        blended = (np.float32(1) - smooth) * stretched + smooth * plain
        found: Frequencies = np.where(turns < low, stretched, np.where(turns > high, plain, blended))
        return found


@dataclass(frozen=True, slots=True)
class BaseModelRope(RopeScaling):
    """The unmodified scaling of a base model, of any kind.

    Attributes:
        own_kind: `rope_type` of the base's config.
        stated: The base's `rope_parameters` as JSON.
        positions: The base's `max_position_embeddings`.
        frequencies: Buffer -> (attention factor, then its fp32 frequencies), as transformers computes them from the
            base's config; several where layer types have their own.
    """

    stretch: ClassVar[str] = "positions are stretched as the base states it"

    own_kind: str = ""
    stated: str = ""
    positions: int = 0
    frequencies: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The base's kind."""
        return self.own_kind

    @property
    def is_scaled(self) -> bool:
        """Whether the base's kind scales positions."""
        return self.kind != DefaultRope.kind

    @property
    def loader(self) -> str:  # type: ignore[override]
        """Minimum version of transformers; unknown kinds get the default."""
        return _KINDS[self.kind].loader if self.kind in _KINDS else RopeScaling.loader

    @property
    def kept(self) -> str:
        """The base's `rope_parameters`."""
        return self.stated

    @property
    def reach(self) -> int:
        """Context length of the base: its positions, or original x factor if that is larger."""
        return max(self.positions, int(self.original * self.factor))

    @property
    def stated_positions(self) -> int:
        """The base's `max_position_embeddings`."""
        return self.positions

    @property
    def attention_factor(self) -> float:
        """The factor that transformers computed; of the first buffer if there are several."""
        return self.frequencies[0][1][0]

    def inv_freq(self, head_dim: int) -> Frequencies:  # noqa: ARG002 - computed for the base's head size
        """Return the frequencies that transformers computed; of the first buffer if there are several."""
        return np.asarray(self.frequencies[0][1][1:], dtype=np.float32)

    def expected(self, dim: int) -> dict[str, tuple[float, Frequencies]]:  # noqa: ARG002 - computed for the base
        """Return what transformers computed from the base's config."""
        return {name: (own[0], np.asarray(own[1:], dtype=np.float32)) for name, own in self.frequencies}

    def to_config(self) -> dict[str, object]:
        """Return the base's `rope_parameters`."""
        parameters: dict[str, object] = json.loads(self.stated)
        return parameters

    def to_legacy_config(self) -> dict[str, object] | None:
        """Return `rope_scaling` in the format of transformers 4, which has none for RoPE per layer type."""
        if has_layer_types(self.to_config()):
            return None
        if self.kind in (DefaultRope.kind, LinearRope.kind, DynamicRope.kind):
            return build_scaling(self.kind, self.factor, self.theta, self.original).to_legacy_config()
        return _legacy(self.to_config())

    def to_json(self) -> dict[str, object]:
        """Return the scaling in the format of `scaling_from_json`."""
        own = {"kept": self.stated, "positions": self.positions, "frequencies": dict(self.frequencies)}
        return {**RopeScaling.to_json(self), **own}


_KINDS: dict[str, type[RopeScaling]] = {
    one.kind: one for one in (DefaultRope, ThetaRope, LinearRope, DynamicRope, YarnRope, Llama3Rope)
}


def build_scaling(kind: str, factor: float, theta: float, original: int, settings: Settings = ()) -> RopeScaling:
    """Return a scaling of one of the `known_kinds`; the arguments are those of `RopeScaling`."""
    return _KINDS[kind](factor, theta, original, settings)


def known_kinds() -> set[str]:
    """Return the kinds that params.yaml accepts, and `default`."""
    return set(_KINDS)


def plan_scaling(profile: BaseParams, *, theta: float, original: int) -> RopeScaling:
    """Return the scaling of `superhot_config: {type, scale, …}`; the default without `superhot`."""
    if not profile.superhot:
        return build_scaling(DefaultRope.kind, 1.0, theta, original)
    stated = profile.superhot_config.model_dump()
    kind, factor = stated.pop("type"), float(stated.pop("scale"))
    theta = float(stated.pop("rope_theta", theta))
    settings = tuple(sorted((name, float(value)) for name, value in stated.items()))
    return build_scaling(kind, factor, theta, original, settings)


def keep_scaling(stated: Mapping[str, Any], positions: int, frequencies: OwnFrequencies) -> BaseModelRope:
    """Return the unmodified scaling of a base model.

    Args:
        stated: `rope_parameters` of its config, as loaded by transformers 5: one mapping, or one per layer type, of
            which those of full attention describe the reach.
        positions: Its `max_position_embeddings`.
        frequencies: As in `BaseModelRope`.
    """
    main = main_parameters(stated)
    return BaseModelRope(
        factor=float(main.get("factor") or 1.0),
        theta=float(main["rope_theta"]),
        original=int(main.get("original_max_position_embeddings") or positions),
        own_kind=str(main.get("rope_type", DefaultRope.kind)),
        stated=json.dumps(dict(stated), sort_keys=True),
        positions=positions,
        frequencies=tuple(frequencies.items()),
    )


def has_layer_types(stated: Mapping[str, Any]) -> bool:
    """Return whether `rope_parameters` are one mapping per layer type."""
    return "rope_type" not in stated and any(isinstance(value, Mapping) for value in stated.values())


def main_parameters(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `rope_parameters` of all layers, or of those with full attention if layer types differ."""
    if not has_layer_types(stated):
        return stated
    full: Mapping[str, Any] = stated.get("full_attention") or next(iter(stated.values()))
    return full


def scaling_from_json(stated: Mapping[str, Any]) -> RopeScaling:
    """Return the scaling from the output of `to_json`."""
    settings = tuple((name, value) for name, value in stated["settings"])
    scaling = (float(stated["factor"]), float(stated["theta"]), int(stated["original"]), settings)
    if not stated["kept"]:
        return build_scaling(stated["kind"], *scaling)
    own = stated["frequencies"]
    named = {_ONE: own} if isinstance(own, list) else own  # a list in files written before 2026-12
    frequencies = tuple((name, tuple(values)) for name, values in named.items())
    kept = {"stated": stated["kept"], "positions": stated["positions"], "frequencies": frequencies}
    return BaseModelRope(*scaling, own_kind=stated["kind"], **kept)


def _legacy(parameters: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in parameters.items() if name not in ("rope_theta", "type")}


def frequency_faults(live: OwnFrequencies, expected: Mapping[str, tuple[float, Frequencies]]) -> Iterator[str]:
    """Yield each buffer whose attention factor or frequencies are not the expected ones."""
    if live.keys() != expected.keys():
        yield f"  RoPE buffers: expected {', '.join(sorted(expected))}, found {', '.join(sorted(live))}"
        return
    for name, (factor, wanted) in expected.items():
        found_factor, *values = live[name]
        found = np.asarray(values, dtype=np.float32)
        if not math.isclose(factor, found_factor, rel_tol=1e-6):
            yield f"  RoPE attention factor ({name}): expected {factor:g}, found {found_factor:g}"
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-6, atol=0):
            yield f"  RoPE frequencies ({name}): expected {wanted[:4].tolist()}…, found {found[:4].tolist()}…"


def longest_independent(parameters: Mapping[str, Any], positions: int) -> int | None:
    """Return the row length, in tokens, up to which frequencies do not depend on the batch; None: any length.

    Longer rows get frequencies that depend on the longest row of their batch.

    Source: transformers 5.24, modeling_rope_utils.dynamic_rope_update.

    Args:
        parameters: `rope_parameters` of a config.
        positions: Its `max_position_embeddings`.
    """
    main = main_parameters(parameters)
    if main["rope_type"] == DynamicRope.kind:
        return positions
    if main["rope_type"] == "longrope":  # only as a base's own scaling
        return int(main.get("original_max_position_embeddings") or positions)
    return None
