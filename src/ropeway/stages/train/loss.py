"""The two normalisations of a step's loss, from the losses of supervised positions.

Shapes: N supervised positions.
"""

from torch import Tensor

# Source: Open-Assistant's losses.py divides by (N + 1e-8), so a micro-batch without targets gives 0.
EPSILON = 1e-8


def micro_batch_loss(losses: Tensor, *, total: int | None = None, sharing_ranks: int = 1) -> Tensor:
    """Return the published normalisation: the micro-batch's own mean, 0 when nothing counts.

    If ranks share a micro-batch, the mean of what their results give is that of its `total` supervised positions.
    """
    count = len(losses) if total is None else total
    return losses.sum() * sharing_ranks / (count + EPSILON)


def token_loss(losses: Tensor, *, total: int, micro_batches: int) -> Tensor:
    """Return this micro-batch's share of the mean over all `total` supervised positions of the optimizer step.

    The engine averages over the `micro_batches` of all ranks, so the share is scaled up by their number: the step's
    gradient is then the same however the rows are cut into micro-batches and ranks.
    """
    return losses.sum() * (micro_batches / max(total, 1))
