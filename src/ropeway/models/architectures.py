"""Which model architectures are accepted, and the names of their parts. Light: importing it opens no model.

The one decision "accepted or refused" is made here. `ropeway.models.open_model` holds what needs a live model.
"""

from ropeway.runtime.errors import ConfigError

# model_type of config.json -> (noun for messages, class of transformers that holds the weights).
ACCEPTED = {"llama": ("Llama", "LlamaForCausalLM")}
DEFAULT = "llama"  # what base.kind scratch creates
HEAD_LAYER, EMBEDDING_LAYER = "lm_head", "embed_tokens"
# Names of their weights in a file of safetensors.
HEAD, EMBEDDING = f"{HEAD_LAYER}.weight", f"model.{EMBEDDING_LAYER}.weight"


def check_architecture(model_type: object, *, where: str) -> None:
    """Raise ConfigError unless models of this `model_type` are accepted.

    Args:
        model_type: As config.json states it.
        where: The model, for the message.
    """
    if class_name(model_type) is None:
        nouns = " or ".join(noun for noun, _ in ACCEPTED.values())
        raise ConfigError(f"{where}: expected a {nouns}, found model_type {model_type!r}")


def class_name(model_type: object) -> str | None:
    """Return the class that config.json must name in `architectures`; None for a type that is not accepted."""
    return ACCEPTED[model_type][1] if isinstance(model_type, str) and model_type in ACCEPTED else None


def is_embedding_or_head(name: str) -> bool:
    """Return whether a parameter belongs to the input embedding or the output head."""
    return EMBEDDING_LAYER in name or name.startswith(HEAD_LAYER)
