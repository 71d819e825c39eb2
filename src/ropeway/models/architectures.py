"""What config.json says about an architecture, and names of parameters. Importing this loads neither torch nor a model.

Any dense decoder may be trained; `ropeway.models.proofs` accepts or refuses the live model. Here only those are refused
whose config says that they are something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ropeway.runtime.errors import ConfigError

DEFAULT = "llama"  # model_type of a base of kind scratch
# Ways in which attention is computed, each proved on the base's first layers: `ropeway.models.proofs`.
SDPA, VARIABLE_LENGTH, PACKED = "sdpa", "variable length", "packed"
Proofs = Mapping[str, str]  # way -> what differs from the model's own code, empty if nothing does
HEAD_LAYER, EMBEDDING_LAYER = "lm_head", "embed_tokens"
# Parameter names in a safetensors file.
HEAD, EMBEDDING = f"{HEAD_LAYER}.weight", f"model.{EMBEDDING_LAYER}.weight"


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes per position of the layer that needs most; `ropeway.models.activations` counts them on the live model.

    Attributes:
        kept: Stored for backward.
        forward: Peak of a forward pass that stores nothing, above its input.
        backward: Peak of the backward pass above `kept`.
    """

    kept: int
    forward: int
    backward: int


def can_split_heads(query: int, key_value: int, ranks: int) -> bool:
    """Return whether ranks that share rows can have equal parts of the heads; fewer key-value heads are repeated.

    >>> can_split_heads(32, 8, 16), can_split_heads(32, 8, 3), can_split_heads(12, 8, 12)
    (True, False, False)
    """
    return query % ranks == 0 and (key_value % ranks == 0 or ranks % key_value == 0)


def check_heads(query: int, key_value: int, ranks: int) -> None:
    """Raise ConfigError unless `sequence_parallel` ranks can split a model's heads."""
    if not can_split_heads(query, key_value, ranks):
        possible = [str(some) for some in range(1, query + 1) if can_split_heads(query, key_value, some)]
        raise ConfigError(
            f"sequence_parallel is {ranks}, over which {query} query heads and {key_value} key-value heads cannot be "
            f"split; possible are {', '.join(possible)}"
        )


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_OTHER_INPUTS = ("vision_config", "audio_config", "speech_config", "image_token_id", "audio_token_id")


def check_architecture(config: Mapping[str, object], *, where: str) -> None:
    """Raise ConfigError if a config.json describes a model that is not a dense decoder of text.

    Args:
        config: The parsed config.json.
        where: Name of the model for the message.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ConfigError(f"{where}: expected a model_type, found {kind!r}; it is not a config.json of transformers")
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{where}: {kind} is an encoder-decoder; choose a dense decoder-only language model")
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    counts = {name: part[name] for part in parts for name in _EXPERTS if name in part}
    experts = {name: count for name, count in counts.items() if isinstance(count, int) and count > 1}
    if experts and config.get("is_moe") is not False:  # some families state a number that a dense model does not use
        name, count = next(iter(experts.items()))
        raise ConfigError(f"{where}: {kind} is a mixture of experts ({name}: {count}); choose a dense decoder")
    if inputs := [name for name in _OTHER_INPUTS if config.get(name) is not None]:
        raise ConfigError(
            f"{where}: {kind} is multimodal ({inputs[0]}); choose a language model of text, such as its text model "
            "if that is published alone"
        )


def check_proof(proofs: Proofs, needed: str, *, where: str) -> None:
    """Raise ConfigError if what a run needs differs from the model's own code; the message says what would work."""
    fault = proofs[needed]
    if not fault:
        return
    working = [name for name, found in proofs.items() if not found]
    remedies = {
        SDPA: "layout: padded with use_flash_attention: false",
        VARIABLE_LENGTH: "layout: padded",
        PACKED: "layout: packed",
    }
    advice = f"What works: {'; '.join(remedies[name] for name in working)}" if working else "Nothing else works either"
    raise ConfigError(
        f"{where}: with attention `{needed}` the model does not compute what it should: {fault}. {advice}"
    )
