"""Loss, perplexity and accuracy as sums over tokens, so that no batch size and no order can change them.

Shapes: B rows, T tokens, N supervised positions of a batch, H hidden, V vocabulary, S sources.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel

from ropeway.config.params import EvaluateParams
from ropeway.data.batches import Batch, Row, collate, validation_rows
from ropeway.data.shards import Shards
from ropeway.models.open_model import backbone, output_head
from ropeway.models.rope import longest_independent
from ropeway.runtime.errors import DataError
from ropeway.stages.evaluate.evaluation_workers import Share

Sums = NDArray[np.float64]  # (3, groups): loss in nats, correct positions, positions

# Positions that pass the head at once: 256 x 32,016 x 4 bytes = 33 MB of logits, whatever the row's length. On a CPU
# (8,192 entries) head, loss and accuracy of 2,048 positions took 160 ms in parts of 256, 173 in 512, 236 in 1,024.
HEAD_POSITIONS = 256
_LARGEST_EXPONENT = 700.0  # e^700 is the end of a double; JSON has no infinity


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the supervised positions of one source."""

    loss_sum: float  # nats
    correct: int  # positions whose most likely token is the target
    tokens: int  # supervised positions

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.loss_sum / self.tokens

    def metrics(self, size_bytes: int) -> dict[str, float]:
        """Return what eval.json holds: six decimals, perplexity six digits, so that the last bits of a sum stay out.

        Args:
            size_bytes: Of the supervised text; without any there is no loss per byte.

        >>> Score(2.0, 1, 4).metrics(16)
        {'loss': 0.5, 'perplexity': 1.64872, 'accuracy': 0.25, 'nats_per_byte': 0.125, 'tokens': 4, 'bytes': 16}
        """
        per_byte = {"nats_per_byte": round(self.loss_sum / size_bytes, 6)} if size_bytes else {}
        return {
            "loss": round(self.loss, 6),
            "perplexity": float(f"{math.exp(min(self.loss, _LARGEST_EXPONENT)):.6g}"),
            "accuracy": round(self.correct / self.tokens, 6),
            **per_byte,
            "tokens": self.tokens,
            "bytes": size_bytes,
        }


def plan_batches(lengths: Sequence[int], size: int, *, mix_below: int | None = None) -> list[list[int]]:
    """Return row numbers, `size` at most in a batch, shortest rows first and rows of similar length together.

    Args:
        lengths: Tokens of each row.
        size: Rows of a batch.
        mix_below: Rows of this length or longer only share a batch with rows of just their length.

    >>> plan_batches([3, 9, 4, 9, 8], 2), plan_batches([3, 9, 4, 9, 8], 2, mix_below=5)
    ([[0, 2], [4, 1], [3]], [[0, 2], [4], [1, 3]])
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        first = lengths[batches[-1][0]] if batches and len(batches[-1]) < size else None
        mixes = mix_below is None or lengths[row] < mix_below
        if first is not None and (mixes or first == lengths[row]):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def plan_mixing(profile: EvaluateParams, config: PreTrainedConfig) -> int | None:
    """Return the length from which a row's loss would depend on its neighbours in a batch; None when none does.

    Under `document_end: published` the last target of a row is padding or its own first token, by the width of the
    batch; rows of one length always see the latter, which is what the original's evaluation (one row a batch) saw.
    Under some RoPE scalings transformers stretches the whole batch by its longest row; below the base's context it does
    not, and shortest first, in a share of the batches too, means that it never has to
    shrink again.
    """
    if profile.document_end == "published":
        return 0
    longest = longest_independent(config.rope_parameters, config.max_position_embeddings)
    return None if longest is None else longest + 1


def all_rows(shards: Shards, profile: EvaluateParams) -> list[Row]:
    """Return the validation rows of all sources."""
    return [row for _, rows in validation_rows(shards, profile) for row in rows]


def sum_batches(model: PreTrainedModel, shards: Shards, profile: EvaluateParams, *, share: Share) -> list[Sums]:
    """Return the sums of each batch in a share of all batches of validation rows.

    Which rows share a batch, and in which order, does not depend on the shares.
    """
    rows = all_rows(shards, profile)
    lengths = [sum(piece.end - piece.begin for piece in row) for row in rows]
    batches = plan_batches(lengths, profile.per_device_eval_batch_size, mix_below=plan_mixing(profile, model.config))
    mine = share.of(batches)
    # One block beforehand: small ones made between the batches keep the heap from closing where their tensors were.
    sums = np.empty((len(mine), 3, len(shards.sources)))
    for number, batch in enumerate(mine):
        inputs = collate([rows[row] for row in batch], shards, profile, pad_to_multiple_of=None)
        sums[number] = sum_batch(model, inputs, groups=len(shards.sources))
    return list(sums)


def score_sources(batches: Sequence[Sums], shards: Shards, *, name: str) -> list[Score]:
    """Return one score per source, from the sums of all batches in the order of `plan_batches`.

    Raises:
        DataError: A source has no supervised validation token, or its loss is not finite.
    """
    scores = add_sums([np.zeros((3, len(shards.sources))), *batches])
    for source, score in zip(shards.sources, scores, strict=True):
        _check_score(score, source.name, rows=len(source.validation), model=name)
    return scores


def add_sums(parts: Sequence[Sums]) -> list[Score]:
    """Return one score per group; one part after the other, since another order would round otherwise."""
    return [Score(float(loss), int(correct), int(tokens)) for loss, correct, tokens in reduce(np.add, parts).T]


@torch.inference_mode()
def sum_batch(model: PreTrainedModel, batch: Batch, *, groups: int) -> Sums:
    """Return `(3, groups)` sums of one batch by its `sources`: loss in nats, correct positions, positions.

    Neither attention mask nor cache: rows are padded on the right, so causal attention never sees the padding, and
    with either transformers 5 stops telling packed rows apart. Only supervised positions pass the head, and their
    logits are gone before the next ones are made.
    """
    head = output_head(model)
    mask = torch.from_numpy(batch.loss_mask)
    hidden = backbone(model)(
        input_ids=torch.from_numpy(batch.input_ids).to(model.device), use_cache=False
    ).last_hidden_state
    hidden = hidden[mask.to(model.device)]  # (N, H)
    targets = torch.from_numpy(batch.targets)[mask].to(model.device)
    losses, hits = [], []
    for states, wanted in zip(hidden.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True):
        logits = head(states).float()  # (HEAD_POSITIONS, V)
        losses.append(cross_entropy(logits, wanted, reduction="none"))
        hits.append(_hits(logits, wanted))
    sources = batch.sources[batch.loss_mask]
    values = (_as_numbers(losses), _as_numbers(hits), np.ones(len(sources)))
    return np.stack([np.bincount(sources, weights=one, minlength=groups) for one in values])


def _hits(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return `(N,)` whether the target is the argmax; on a CPU that takes five times as long as the maximum."""
    hits = logits.gather(1, wanted[:, None])[:, 0] == logits.amax(dim=-1)
    likely = hits.nonzero()[:, 0]
    hits[likely] = logits[likely].argmax(dim=-1) == wanted[likely]
    return hits


def _as_numbers(parts: list[torch.Tensor]) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = torch.cat(parts).double().cpu().numpy()
    return numbers


def check_supervised(shards: Shards, profile: EvaluateParams) -> None:
    """Raise DataError for a source whose validation rows hold no supervised token; one row of each may tell."""
    for name, rows in validation_rows(shards, profile):
        if not any(collate([row], shards, profile, pad_to_multiple_of=None).loss_mask.any() for row in rows):
            raise _nothing_to_measure(name, len(rows))


def _nothing_to_measure(source: str, rows: int) -> DataError:
    return DataError(
        f"source {source}: its {rows:,} validation rows hold no supervised token, so there is nothing to measure. "
        "Give it a validation part (val_split, max_val_set), or look in ledger.json what label_masking and "
        "what_counts leave of it"
    )


def _check_score(score: Score, source: str, *, rows: int, model: str) -> None:
    if score.tokens == 0:
        raise _nothing_to_measure(source, rows)
    if not math.isfinite(score.loss_sum):
        raise DataError(
            f"source {source}: the loss of the {model} model is {score.loss_sum} over {score.tokens:,} tokens, "
            "expected a finite number; its weights are broken. Train again from the last good checkpoint, or with a "
            "lower learning_rate"
        )
