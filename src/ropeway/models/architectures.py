"""Supported model architectures and the names of their parameters. Importing this loads neither torch nor a model.

Only this module decides whether an architecture is supported. Code that needs a live model is in
`ropeway.models.open_model`.
"""

from ropeway.runtime.errors import ConfigError

# model_type of config.json -> (name for messages, model class of transformers).
ACCEPTED = {"llama": ("Llama", "LlamaForCausalLM")}
DEFAULT = "llama"  # model_type of a base of kind scratch
HEAD_LAYER, EMBEDDING_LAYER = "lm_head", "embed_tokens"
# Parameter names in a safetensors file.
HEAD, EMBEDDING = f"{HEAD_LAYER}.weight", f"model.{EMBEDDING_LAYER}.weight"


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


def check_architecture(model_type: object, *, where: str) -> None:
    """Raise ConfigError unless this `model_type` is supported.

    Args:
        model_type: As config.json states it.
        where: Name of the model for the message.
    """
    if class_name(model_type) is None:
        nouns = " or ".join(noun for noun, _ in ACCEPTED.values())
        raise ConfigError(f"{where}: expected a {nouns}, found model_type {model_type!r}")


def class_name(model_type: object) -> str | None:
    """Return the class name for `architectures` in config.json; None if the type is not supported."""
    return ACCEPTED[model_type][1] if isinstance(model_type, str) and model_type in ACCEPTED else None


def is_embedding_or_head(name: str) -> bool:
    """Return whether a parameter belongs to the input embedding or the output head."""
    return EMBEDDING_LAYER in name or name.startswith(HEAD_LAYER)
