"""Model FLOPs of training steps: what MFU is measured with (`ropeway.planning.budget` plans them without a model)."""

from collections.abc import Iterable

from transformers import PreTrainedConfig, PreTrainedModel

from ropeway.data.batches import Row
from ropeway.stages.train.model import count_weights


def token_flops(model: PreTrainedModel) -> float:
    """Return FLOPs of forward and backward for one token in matrix products: 4 a weight, 2 more if it is trained.

    The input table only looks up, unless it is the head too. Source: Chowdhery et al. 2022, arXiv:2204.02311, app. B.
    """
    table = model.get_input_embeddings()
    looked_up = 0 if model.config.tie_word_embeddings else count_weights(table)
    learned = 0 if model.config.tie_word_embeddings else count_weights(table, learning_only=True)
    return 4.0 * (count_weights(model) - looked_up) + 2.0 * (count_weights(model, learning_only=True) - learned)


def step_flops(per_token: float, config: PreTrainedConfig, rows: Iterable[Row]) -> float:
    """Return what the model needs for these rows: no padding, nothing recomputed.

    A sequence attends to what lies before in itself: 6 L H T^2, half of the square, forward and backward.
    """
    lengths = [piece.end - piece.begin for row in rows for piece in row]
    squares = sum(length * length for length in lengths)
    return float(per_token * sum(lengths) + 6.0 * config.num_hidden_layers * config.hidden_size * squares)
