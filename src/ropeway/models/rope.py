"""RoPE scaling: one class per kind, used to configure the model, to verify the loaded model and to write the export.

To add a kind, add a class to `KINDS` here and a section to `SuperhotConfig` in `config/sections.py`. No other module
depends on the name of a kind. A base's own scaling that is kept is in `base_rope`.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Frequencies = NDArray[np.float32]
OwnFrequencies = Mapping[str, tuple[float, ...]]  # name of a buffer -> (attention factor, frequencies)
ONE = "inv_freq"  # name of the buffer of families with one RoPE for all layers
FULL = "full_attention"  # the layer type that is scaled where layer types have their own RoPE, as Gemma 3 does
_PARTIAL = "partial_rotary_factor"
Settings = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class RopeScaling(ABC):
    """A RoPE scaling.

    Attributes:
        factor: Factor by which the context is extended; `linear` divides every position by it.
        theta: Base of the frequencies.
        original: Context length of the base model, in tokens.
        settings: Other settings of the kind as sorted pairs, with transformers' names.
        factors: Divisor of each frequency; only of `longrope`.
        stated: The base's `rope_parameters` as JSON; empty for a model from scratch. Its `partial_rotary_factor` and
            its layer types without full attention are kept.
        frequencies: Buffer -> (attention factor, then its fp32 frequencies) of the layer types that are kept, as
            transformers computes them from the base's config.
        is_flat: Whether the family applies a `rope_scaling` without layer types to its layers with full attention.
    """

    kind: ClassVar[str]
    stretch: ClassVar[str]  # description for the model card
    loader: ClassVar[str] = "4.43.0"  # minimum version of transformers. Source: its release notes

    factor: float
    theta: float
    original: int
    settings: Settings = ()
    factors: tuple[float, ...] = ()
    stated: str = ""
    frequencies: tuple[tuple[str, tuple[float, ...]], ...] = ()
    is_flat: bool = False

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

    @property
    def replaced(self) -> Mapping[str, Any]:
        """The base's `rope_parameters`; empty for a model from scratch."""
        parameters: Mapping[str, Any] = json.loads(self.stated or "{}")
        return parameters

    @property
    def card_settings(self) -> list[tuple[str, object]]:
        """What `superhot_config` states besides type and scale, for the model card."""
        return [*self.settings]

    @property
    def legacy_key(self) -> str:
        """The key of config.json from which transformers 4 reads the scaling; empty if it has none."""
        if self.to_legacy_config() is not None:
            return "rope_scaling"
        stated = self.to_config()
        is_plain = main_parameters(stated)["rope_type"] == DefaultRope.kind
        return "rope_theta" if is_plain and (self.is_flat or not has_layer_types(stated)) else ""

    @property
    def kept_layers(self) -> list[str]:
        """Layer types that keep the base's RoPE."""
        return sorted(set(self.replaced) - {FULL}) if has_layer_types(self.replaced) else []

    @property
    def share(self) -> float:
        """Share of each head that RoPE turns."""
        return float(main_parameters(self.replaced).get(_PARTIAL) or 1.0) if self.stated else 1.0

    def expected(self, dim: int) -> dict[str, tuple[float, Frequencies]]:
        """Return (attention factor, frequencies) of each buffer of a model that turns `dim` dimensions of a head."""
        name = f"{FULL}_{ONE}" if has_layer_types(self.replaced) else ONE
        kept = {name: (own[0], np.asarray(own[1:], dtype=np.float32)) for name, own in self.frequencies}
        return {name: (self.attention_factor, self.inv_freq(dim)), **kept}

    def faults(self, dim: int) -> Iterator[str]:  # noqa: ARG002 - for kinds with a setting per frequency
        """Yield what is wrong with the settings for a model that turns `dim` dimensions of a head."""
        yield from ()

    def parameters(self) -> dict[str, object]:
        """Return the `rope_parameters` of the scaled layers, without what is kept of the base."""
        stated = {"rope_type": self.kind, "rope_theta": self.theta, "factor": self.factor}
        return {**stated, "original_max_position_embeddings": self.original, **dict(self.settings)}

    def to_config(self) -> dict[str, object]:
        """Return the complete `rope_parameters` for transformers 5; it drops theta from incomplete ones (5.24)."""
        main = main_parameters(self.replaced) if self.stated else {}
        scaled = {**self.parameters(), **{name: main[name] for name in (_PARTIAL,) if name in main}}
        return {**self.replaced, FULL: scaled} if has_layer_types(self.replaced) else scaled

    def to_legacy_config(self) -> dict[str, object] | None:
        """Return `rope_scaling` in the format of transformers 4; None where it has none.

        transformers 5 prefers it to `rope_parameters`. Some families (`gpt_neox`) then find theta and
        `partial_rotary_factor` nowhere else, so it has them where a part of each head is turned.
        """
        stated = self.to_config()
        main, is_layered = main_parameters(stated), has_layer_types(stated)
        kind, is_partial = main["rope_type"], _PARTIAL in main
        if kind == DefaultRope.kind or (is_layered and not self.is_flat):
            return None
        if kind in (LinearRope.kind, DynamicRope.kind) and not is_layered and not is_partial:
            # The only keys that 4.31 accepts, with a float factor; it rejects a factor of 1.
            return None if self.factor == 1 else {"type": kind, "factor": self.factor}
        dropped = ("type",) if is_partial and not is_layered else ("type", "rope_theta")
        return {name: value for name, value in main.items() if name not in dropped}

    def to_config_keys(self) -> dict[str, object]:
        """Return all keys of RoPE in the exported config.json, for transformers 4 and 5."""
        stated, legacy = self.to_config(), self.to_legacy_config()
        is_layered = has_layer_types(stated)
        share = None if is_layered else stated.get(_PARTIAL)
        return {
            "rope_parameters": stated,
            # Gemma 4 reads a null as no RoPE at all (5.24).
            **({} if is_layered and legacy is None else {"rope_scaling": legacy}),
            "rope_theta": self.theta,
            **({} if share in (None, 1.0) else {_PARTIAL: share}),
        }

    def to_json(self) -> dict[str, object]:
        """Return the scaling in the format of `scaling_from_json`."""
        return {
            "kind": self.kind,
            "factor": self.factor,
            "theta": self.theta,
            "original": self.original,
            "settings": [list(pair) for pair in self.settings],
            "factors": list(self.factors),
            "kept": "",
            "replaced": self.stated,
            "positions": 0,
            "frequencies": dict(self.frequencies),
            "is_flat": self.is_flat,
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

    def parameters(self) -> dict[str, object]:
        """Return type and theta."""
        return {"rope_type": DefaultRope.kind, "rope_theta": self.theta}


class ThetaRope(DefaultRope):
    """A larger theta: all frequencies but the first are lower. Source: Xiong et al. 2023, arXiv:2309.16039."""

    __slots__ = ()
    kind, stretch, loader = "theta", "theta is larger than the base's, which lowers the frequencies", "4.33.0"

    @property
    def is_scaled(self) -> bool:
        """Always True."""
        return True

    @property
    def card_settings(self) -> list[tuple[str, object]]:
        """The larger theta."""
        return [("rope_theta", self.theta)]

    @property
    def stated_positions(self) -> int:
        """The extended context length; readers multiply nothing."""
        return self.reach


class LinearRope(RopeScaling):
    """Position interpolation: every position is divided by the factor. Source: Chen et al. 2023, arXiv:2306.15595."""

    __slots__ = ()
    kind, stretch, loader = "linear", "every position is divided by the factor", "4.31.0"

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the base's frequencies divided by the factor."""
        return self._plain(head_dim) / np.float32(self.factor)

    def parameters(self) -> dict[str, object]:
        """Return type, theta and factor."""
        return {"rope_type": self.kind, "rope_theta": self.theta, "factor": self.factor}


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

    def parameters(self) -> dict[str, object]:
        """Return the `rope_parameters` with the attention factor."""
        return {**RopeScaling.parameters(self), "attention_factor": self.attention_factor}

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


class LongRope(RopeScaling):
    """Each frequency is divided by a factor of its own, the same for texts of every length.

    transformers has one list of factors for batches whose longest text fits the original context and one for longer
    ones. Both are the same here, so frequencies do not depend on other rows, and a cache stays valid.

    Source: Ding et al. 2024, arXiv:2402.13753; decision 0021.
    """

    __slots__ = ()
    kind = "longrope"
    stretch = "each frequency is divided by a factor of its own, the same for texts of every length (arXiv:2402.13753)"

    @property
    def stated_positions(self) -> int:
        """The scaled context length; readers do not multiply it (Phi-3: 131,072, with an original 4,096)."""
        return self.reach

    @property
    def card_settings(self) -> list[tuple[str, object]]:
        """The factors and the attention factor; null: computed."""
        return [("long_factor", list(self.factors)), ("attention_factor", self._own_attention)]

    @property
    def _own_attention(self) -> float | None:
        return dict(self.settings).get("attention_factor")

    @property
    def attention_factor(self) -> float:
        """The stated one, or sqrt(1 + ln(factor) / ln(original)). Source: Ding et al. 2024, as transformers 5.24."""
        if (own := self._own_attention) is not None:
            return own
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original)) if self.factor > 1 else 1.0

    def faults(self, dim: int) -> Iterator[str]:
        """Yield a fault if there is not one factor for each frequency."""
        if not self.factors:
            yield (
                "superhot_config.long_factor is null, which takes the base's own, but the base has none; state "
                f"{dim // 2} numbers"
            )
        elif len(self.factors) != dim // 2:
            yield (
                f"superhot_config.long_factor: expected {dim // 2} numbers, one for each pair of the {dim} dimensions "
                f"of a head that RoPE turns, found {len(self.factors)}"
            )

    def parameters(self) -> dict[str, object]:
        """Return the `rope_parameters` with the same factors twice and the attention factor."""
        lists = {"short_factor": list(self.factors), "long_factor": list(self.factors)}
        return {**RopeScaling.parameters(self), **lists, "attention_factor": self.attention_factor}

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Return the base's frequencies, each divided by its factor."""
        divided: Frequencies = np.float32(1.0) / (np.asarray(self.factors, dtype=np.float32) * self._powers(head_dim))
        return divided


KINDS: dict[str, type[RopeScaling]] = {
    one.kind: one for one in (DefaultRope, ThetaRope, LinearRope, DynamicRope, YarnRope, Llama3Rope, LongRope)
}


def build_scaling(kind: str, factor: float, theta: float, original: int, settings: Settings = ()) -> RopeScaling:
    """Return a scaling of one of the `known_kinds`; the arguments are those of `RopeScaling`."""
    return KINDS[kind](factor, theta, original, settings)


def known_kinds() -> set[str]:
    """Return the kinds that params.yaml accepts, and `default`."""
    return set(KINDS)


def has_layer_types(stated: Mapping[str, Any]) -> bool:
    """Return whether `rope_parameters` are one mapping per layer type."""
    return "rope_type" not in stated and any(isinstance(value, Mapping) for value in stated.values())


def main_parameters(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `rope_parameters` of all layers, or of those with full attention if layer types differ."""
    if not has_layer_types(stated):
        return stated
    full: Mapping[str, Any] = stated.get(FULL) or next(iter(stated.values()))
    return full


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
    if main["rope_type"] == LongRope.kind and main.get("short_factor") != main.get("long_factor"):
        return int(main.get("original_max_position_embeddings") or positions)
    return None
