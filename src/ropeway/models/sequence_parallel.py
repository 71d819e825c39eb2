"""Sequence parallelism: the ranks of a group share their rows, each with one slice of every row's tokens.

All layers but attention treat tokens one by one. For attention an all-to-all exchanges slices of tokens for slices of
heads, so that every rank computes some heads of whole rows; a second one exchanges the output back. Communication per
rank does not grow with the group. Source: DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509.

Shapes: B rows, T tokens/row, N ranks in the group, H query heads, K key-value heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig

from ropeway.config.params import WeightParams
from ropeway.models.architectures import check_heads
from ropeway.models.rope import longest_independent, main_parameters
from ropeway.runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that share rows, as one of them sees it.

    Attributes:
        ranks: The process group.
        index: Number of this rank in the group: it has the tokens from index x T/N to (index + 1) x T/N of each row.
        size: N.
    """

    ranks: ProcessGroup
    index: int
    size: int

    def to_heads(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return query, key and value of whole rows for this rank's heads, from this rank's tokens of all heads.

        `(B, T/N, H, D)` becomes `(B, T, H/N, D)`; all parts travel together. Key-value heads that are fewer than the
        ranks are repeated first, so that each rank has one.
        """
        repeated = [part.repeat_interleave(max(1, self.size // part.shape[2]), dim=2) for part in parts]
        by_rank = [part.unflatten(2, (self.size, -1)).movedim(2, 0) for part in repeated]  # (N, B, T/N, H/N, D)
        received = _Exchange.apply(torch.cat(by_rank, dim=3), self.ranks)
        whole = received.movedim(0, 1).flatten(1, 2)
        return list(whole.split([part.shape[3] for part in by_rank], dim=2))

    def to_tokens(self, out: Tensor) -> Tensor:
        """Return this rank's tokens of all heads, `(B, T/N, H, D)`, from whole rows of its heads, `(B, T, H/N, D)`."""
        received = _Exchange.apply(out.unflatten(1, (self.size, -1)).movedim(1, 0), self.ranks)  # (N, B, T/N, H/N, D)
        tokens: Tensor = received.movedim(0, 2).flatten(2, 3)
        return tokens

    def gather(self, tokens: Tensor) -> Tensor:
        """Return `(B, T)` values of whole rows from the `(B, T/N)` of every rank; no gradient flows back."""
        parts = [torch.empty_like(tokens) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tokens.contiguous(), group=self.ranks)
        return torch.cat(parts, dim=1)

    def join(self, values: Tensor) -> Tensor:
        """Return the `(S,)` values of all ranks in their order; S may differ, and no gradient flows back."""
        parts: list[Tensor] = [values] * self.size
        torch.distributed.all_gather_object(parts, values, group=self.ranks)
        return torch.cat(parts)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks of the group; no gradient flows back."""
        values = values.clone()
        torch.distributed.all_reduce(values, group=self.ranks)
        return values


class _Exchange(torch.autograd.Function):
    """Sends part i of a tensor's first dimension to rank i of the group; its own transpose, so backward is the same."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, ranks: ProcessGroup) -> Tensor:  # noqa: ANN401 - torch's context has no type
        ctx.ranks = ranks
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        torch.distributed.all_to_all_single(received, parts, group=ranks)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # noqa: ANN401
        return _Exchange.forward(ctx, gradient, ctx.ranks), None


def check_shareable(config: PreTrainedConfig, profile: WeightParams) -> None:
    """Raise ConfigError unless this model's rows can be shared by `sequence_parallel` ranks."""
    ranks = profile.sequence_parallel
    if ranks == 1:
        return
    query = config.num_attention_heads
    check_heads(query, getattr(config, "num_key_value_heads", None) or query, ranks)
    longest = longest_independent(config.rope_parameters, config.max_position_embeddings)
    if longest is not None and profile.max_length > longest:
        kind = main_parameters(config.rope_parameters)["rope_type"]
        raise ConfigError(
            f"sequence_parallel: RoPE scaling {kind} depends on the longest row of a "
            f"batch beyond {longest:,} tokens, and ranks that share a row see a part of it; set sequence_parallel: 1, "
            "another superhot_config.type, or a shorter max_length"
        )


def join_sequence_group(size: int, *, timeout: timedelta) -> SequenceGroup | None:
    """Return this rank's group of `size` consecutive ranks, None for a size of 1; all ranks call this.

    Consecutive ranks are on one machine where its GPUs are enough, so that the exchange stays inside it.
    """
    if size == 1:
        return None
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = [torch.distributed.new_group(range(first, first + size), timeout) for first in range(0, ranks, size)]
    return SequenceGroup(groups[rank // size], rank % size, size)
