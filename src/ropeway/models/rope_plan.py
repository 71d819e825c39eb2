"""Which RoPE scaling a run has: the base's own, or that of params.yaml over it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ropeway.config.params import BaseParams
from ropeway.models.base_rope import BaseModelRope
from ropeway.models.rope import (
    FULL,
    ONE,
    DefaultRope,
    LongRope,
    RopeScaling,
    ThetaRope,
    build_scaling,
    has_layer_types,
    main_parameters,
)


def plan_scaling(profile: BaseParams, *, theta: float, original: int, base: BaseModelRope | None = None) -> RopeScaling:
    """Return the scaling of `superhot_config: {type, scale, …}`; the default without `superhot`.

    Args:
        profile: Params of stage base.
        theta: Base of the base model's frequencies.
        original: Its context length without scaling, in tokens.
        base: Its own scaling; None for a model from scratch.
    """
    if not profile.superhot:
        return build_scaling(DefaultRope.kind, 1.0, theta, original)
    stated = {name: value for name, value in profile.superhot_config.model_dump().items() if value is not None}
    kind, factor = stated.pop("type"), float(stated.pop("scale"))
    theta, factors = float(stated.pop("rope_theta", theta)), stated.pop("long_factor", ())
    settings = tuple(sorted((name, float(value)) for name, value in stated.items()))
    plain = build_scaling(kind, factor, theta, original, settings)
    if base is None:
        return replace(plain, factors=tuple(factors))
    if kind == base.kind == LongRope.kind:
        factors = factors or main_parameters(base.replaced)["long_factor"]
    others = tuple((name, own) for name, own in base.frequencies if name not in (ONE, f"{FULL}_{ONE}"))
    factors = tuple(map(float, factors))
    return replace(plain, factors=factors, stated=base.stated, frequencies=others, is_flat=base.is_flat)


def change_faults(rope: RopeScaling, own: BaseModelRope, *, max_length: int, dim: int) -> Iterator[str]:
    """Yield each reason why a scaling of params.yaml cannot replace the base's own.

    Args:
        rope: Scaling of params.yaml.
        own: The base's.
        max_length: Longest row, in tokens.
        dim: Dimensions of a head that RoPE turns.
    """
    if has_layer_types(own.replaced) and FULL not in own.replaced:
        yield (
            f"superhot: true scales the layers with full attention, but the base model has RoPE for "
            f"{', '.join(own.replaced)}. Set superhot: false to keep it"
        )
    if own.is_scaled and (rope.kind != own.kind or rope.reach < own.reach):
        shorter = "" if rope.kind != own.kind else f", which reaches {own.reach:,} tokens and not {rope.reach:,}"
        yield (
            f"superhot: true sets {rope.kind} RoPE scaling by {rope.factor:g}, but the base model already has "
            f"{own.kept}{shorter}. Set superhot: false to keep that scaling, or extend it: the same type, with a scale "
            f"that counts from {own.original:,} tokens"
        )
    if rope.reach < max_length:
        yield (
            f"max_length is {max_length} tokens, but the base's {rope.original} x superhot_config.scale "
            f"{rope.factor:g} allows only {rope.reach}; increase the scale or reduce max_length"
        )
    if isinstance(rope, ThetaRope) and rope.theta <= own.theta:
        yield (
            f"superhot_config.rope_theta: {rope.theta:g} is not above the base's {own.theta:g}, whose "
            f"{own.original:,} tokens belong to it. Raise it, or set superhot: false to keep the base's"
        )
    yield from rope.faults(dim)


def describe_change(rope: RopeScaling, own: BaseModelRope) -> str:
    """Return what a scaling of params.yaml changes and what it keeps."""
    kept = [f"layers of type {name} keep the base's RoPE" for name in rope.kept_layers]
    kept += [] if rope.share == 1 else [f"RoPE turns {rope.share:.0%} of each head, as in the base"]
    return "; ".join(
        [
            f"RoPE: the base has {_brief(own.to_config())}, for {own.reach:,} tokens",
            f"trained and exported with {_brief(rope.to_config())}, for {rope.reach:,}",
            *kept,
        ]
    )


def _brief(parameters: Mapping[str, Any]) -> str:
    """Return `rope_parameters` as JSON, with long lists shortened."""

    def shorten(value: object) -> object:
        if isinstance(value, Mapping):
            return {name: shorten(one) for name, one in value.items()}
        if isinstance(value, list) and len(value) > 4:  # noqa: PLR2004 - a screen has room for so many
            return f"{len(value)} numbers from {value[0]:g} to {value[-1]:g}"
        return value

    return json.dumps(shorten(parameters))
