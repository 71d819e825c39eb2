"""The shape and the number of weights of a run's base model, from params or from the base itself; without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ropeway.config.params import Profile
from ropeway.config.sections import FolderBase, ModelShape
from ropeway.models.architectures import LayerBytes, check_architecture
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import NAME, Json
from ropeway.runtime.workspace import Workspace

_ROPE_THETA = 10000.0  # of configs that state none; memory and time do not depend on it
_EPSILON = 1e-6  # the same
AnyProfile = TypeVar("AnyProfile", bound=Profile)


@dataclass(frozen=True, slots=True)
class MeasuredWeights:
    """Weights of the base that stage base has written.

    Attributes:
        layers: Elements of each weight of all layers.
        parameters: Elements of all weights.
        rows: Rows of the embedding.
        activations: Bytes per number -> activations of a layer; empty: not counted.
    """

    layers: tuple[int, ...]
    parameters: int
    rows: int
    activations: Mapping[int, LayerBytes] = field(default_factory=dict)


def with_shape(workspace: Workspace, profile: AnyProfile) -> AnyProfile:
    """Return the profile with `expected_model` stated: its own, else that of its base's folder or of the written base.

    Raises:
        ConfigError: It is null, and there is neither; or the base in the folder cannot be trained.
    """
    if profile.expected_model is not None:
        return profile
    if isinstance(profile.base, FolderBase):  # what is there now, not what an earlier run had
        folder = workspace.root / profile.model_name
        config = _read(folder / "config.json")
        if config is None:
            raise ConfigError(f"expected_model is null, and {folder} has no config.json; put the base there")
        check_architecture(config, where=profile.model_name)
        return _stated(profile, config)
    facts = _read(workspace.base / NAME)
    if facts is not None and (facts["model"]["name"], facts["model"]["kind"]) == (
        profile.model_name,
        profile.base.kind,
    ):
        return _stated(profile, facts["model"])
    raise ConfigError(
        "expected_model is null, and the base's shape is not known yet: run `dvc repro base` first, or state the shape"
    )


def measured_weights(workspace: Workspace, profile: Profile) -> MeasuredWeights | None:
    """Return the weights of the written base; None before stage base has run, or if that was another base."""
    facts, shape = _read(workspace.base / NAME), profile.expected_model
    if facts is None or shape is None or "layer_weights" not in facts:
        return None
    if (facts["model"]["name"], facts["model"]["kind"]) != (profile.model_name, profile.base.kind):
        return None
    stated = shape.model_dump(exclude_none=True, exclude={"rope_theta", "rms_norm_eps", "max_position_embeddings"})
    if any(facts["model"].get(name) != value for name, value in stated.items()):
        return None
    layers = tuple(size for layer in facts["layer_weights"] for size in layer)
    counted = {int(width): LayerBytes(**one) for width, one in facts.get("layer_activations", {}).items()}
    return MeasuredWeights(layers, facts["parameters"], facts["model"]["embedding_rows"], counted)


def _read(path: Path) -> Json | None:
    return json.loads(path.read_bytes()) if path.is_file() else None


def _stated(profile: AnyProfile, config: Json) -> AnyProfile:
    names = ModelShape.model_fields
    found = {name: config[name] for name in names if config.get(name) is not None}
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
    found.setdefault("tie_word_embeddings", False)
    found.setdefault("rope_theta", _ROPE_THETA)
    found.setdefault("rms_norm_eps", _EPSILON)
    if lacking := [name for name, field in names.items() if field.is_required() and found.get(name) is None]:
        raise ConfigError(
            f"expected_model is null, and the base's config.json states no {', '.join(lacking)}; run `dvc repro base` "
            "first, or state the shape"
        )
    return profile.model_copy(update={"expected_model": ModelShape.model_validate(found)})
