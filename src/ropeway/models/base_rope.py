"""The RoPE scaling that a base model has and keeps, of any kind; and any scaling read back from JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ropeway.models.rope import KINDS, ONE, DefaultRope, Frequencies, OwnFrequencies, RopeScaling, main_parameters


@dataclass(frozen=True, slots=True)
class BaseModelRope(RopeScaling):
    """The unmodified scaling of a base model, of any kind.

    `stated` are its `rope_parameters`, `frequencies` those of all its buffers.

    Attributes:
        own_kind: `rope_type` of the base's config.
        positions: The base's `max_position_embeddings`.
    """

    stretch: ClassVar[str] = "positions are stretched as the base states it"

    own_kind: str = ""
    positions: int = 0

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
        return KINDS[self.kind].loader if self.kind in KINDS else RopeScaling.loader

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
        return dict(self.replaced)

    def to_json(self) -> dict[str, object]:
        """Return the scaling in the format of `scaling_from_json`."""
        return {**RopeScaling.to_json(self), "kept": self.stated, "replaced": "", "positions": self.positions}


def keep_scaling(
    stated: Mapping[str, Any], positions: int, frequencies: OwnFrequencies, *, is_flat: bool = False
) -> BaseModelRope:
    """Return the unmodified scaling of a base model.

    Args:
        stated: `rope_parameters` of its config, as loaded by transformers 5: one mapping, or one per layer type, of
            which those of full attention describe the reach.
        positions: Its `max_position_embeddings`.
        frequencies: As in `BaseModelRope`.
        is_flat: As in `RopeScaling`.
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
        is_flat=is_flat,
    )


def scaling_from_json(stated: Mapping[str, Any]) -> RopeScaling:
    """Return the scaling from the output of `to_json`; keys that earlier versions did not write have defaults."""
    own = stated["frequencies"] or {}
    named = {ONE: own} if isinstance(own, list) else own  # a list in files written before 2026-12
    values = {
        "factor": float(stated["factor"]),
        "theta": float(stated["theta"]),
        "original": int(stated["original"]),
        "settings": tuple((name, value) for name, value in stated["settings"]),
        "factors": tuple(stated.get("factors", ())),
        "stated": stated["kept"] or stated.get("replaced", ""),
        "frequencies": tuple((name, tuple(numbers)) for name, numbers in named.items()),
        "is_flat": stated.get("is_flat", False),
    }
    if not stated["kept"]:
        return KINDS[stated["kind"]](**values)
    return BaseModelRope(**values, own_kind=stated["kind"], positions=stated["positions"])
