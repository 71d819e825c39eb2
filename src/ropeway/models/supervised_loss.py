"""The loss of a causal model at supervised positions, computed in chunks so that never all logits exist.

Shapes: B rows, T tokens, H hidden, V vocabulary, N supervised positions.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ropeway.models.attention import VARLEN, borders
from ropeway.models.open_model import backbone, compute_logits
from ropeway.models.sequence_parallel import SequenceGroup

# 1,024 x 32,016 logits in fp32 are 125 MiB; the whole of 2 x 8,192 positions would be 2.0 GiB.
CHUNK_POSITIONS = 1024


class SupervisedLoss(nn.Module):
    """A causal language model that returns the loss of each supervised position instead of logits."""

    def __init__(
        self, model: PreTrainedModel, sequence: SequenceGroup | None = None, *, equal_chunks: bool = False
    ) -> None:
        """Wrap a transformers causal model; its decoder and head are called separately.

        Args:
            model: The model.
            sequence: The ranks that share rows: the inputs are this rank's slice of them.
            equal_chunks: Call the head equally often on every rank. ZeRO-3 gathers its weights from all ranks at each
                call, so a rank with fewer supervised positions would leave the others waiting.
        """
        super().__init__()
        self.model, self.sequence, self.equal_chunks = model, sequence, equal_chunks

    def forward(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
        """Return `(N,)` fp32 losses, in row order. No attention mask: a sequence begins where `position_ids` is 0."""
        where: dict[str, object] = {}
        if self.model.config._attn_implementation == VARLEN:  # noqa: SLF001 - transformers 5.24 has no other name for it
            whole = self.sequence.gather(position_ids) if self.sequence else position_ids
            where["cu_seqlens"], where["longest"] = borders(whole)
        decoded = backbone(self.model)(input_ids=input_ids, position_ids=position_ids, use_cache=False, **where)
        hidden = decoded.last_hidden_state
        supervised = hidden[loss_mask]
        most = _largest(len(supervised), hidden.device) if self.equal_chunks else None
        return chunked_losses(supervised, partial(compute_logits, self.model), targets[loss_mask], most=most)


def _largest(count: int, device: torch.device) -> int:
    """Return the largest count of any rank."""
    largest = torch.tensor(count, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def chunked_losses(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    most: int | None = None,
    chunk: int = CHUNK_POSITIONS,
) -> Tensor:
    """Return `(N,)` cross entropies of `(N, H)` states; logits live for one chunk only, in either direction.

    `most`: call the head as often as for this many positions, the last times without any.
    """
    positions = len(targets) if most is None else most
    if not positions:
        return hidden.float().sum(-1)  # empty, but still part of the graph: every rank must run backward
    return torch.cat(
        [
            checkpoint(
                _losses, hidden[begin : begin + chunk], head, targets[begin : begin + chunk], use_reentrant=False
            )
            for begin in range(0, positions, chunk)
        ]
    )


def _losses(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
