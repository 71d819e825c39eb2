"""Loss, perplexity and accuracy from sums over tokens, independent of batch size and order.

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
from ropeway.models.open_model import backbone, compute_logits
from ropeway.models.rope import longest_independent
from ropeway.runtime.errors import DataError
from ropeway.runtime.progress import track
from ropeway.stages.evaluate.evaluation_workers import Share

Sums = NDArray[np.float64]  # (3, groups): loss in nats, correct positions, positions

# Positions per pass through the head: 256 x 32,016 x 4 bytes = 33 MB of logits, whatever the row's length. On a CPU
# (8,192 entries) head, loss and accuracy of 2,048 positions took 160 ms in parts of 256, 173 in 512, 236 in 1,024.
HEAD_POSITIONS = 256
_LARGEST_EXPONENT = 700.0  # e^700 is close to the largest double; JSON has no infinity


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the supervised positions of one source."""

    loss_sum: float  # nats
    correct: int  # positions at which the most likely token is the target
    tokens: int  # supervised positions

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.loss_sum / self.tokens

    def metrics(self, size_bytes: int) -> dict[str, float]:
        """Return the metrics of eval.json, rounded to six decimals (perplexity: six significant digits).

        Args:
            size_bytes: Size of the supervised text; with 0 there is no `nats_per_byte`.

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
    """Return batches of at most `size` row numbers, shortest rows first, so that similar lengths are together.

    Args:
        lengths: Tokens of each row.
        size: Rows per batch.
        mix_below: Rows of this length or more share a batch only with rows of equal length.

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


def mixing_limit(profile: EvaluateParams, config: PreTrainedConfig) -> int | None:
    """Return the length from which a row's loss depends on the other rows of its batch; None if it never does.

    Under `document_end: published` the last target of a row is padding or the row's first token, depending on the width
    of the batch; among rows of equal length it is the first token, as in the original's evaluation (batch size 1).
    Under some RoPE scalings the longest row of a batch decides the scaling of all rows, but not below the base's
    context length; and since the shortest rows come first, the scaling never has to decrease again.
    """
    if profile.document_end == "published":
        return 0
    longest = longest_independent(config.rope_parameters, config.max_position_embeddings)
    return None if longest is None else longest + 1


def all_rows(shards: Shards, profile: EvaluateParams) -> list[Row]:
    """Return the validation rows of all sources."""
    return [row for _, rows in validation_rows(shards, profile) for row in rows]


def sum_batches(model: PreTrainedModel, shards: Shards, profile: EvaluateParams, *, share: Share) -> list[Sums]:
    """Return the sums of each batch in a share.

    Batches and their order do not depend on the number of shares.
    """
    rows = all_rows(shards, profile)
    lengths = [sum(piece.end - piece.begin for piece in row) for row in rows]
    batches = plan_batches(lengths, profile.per_device_eval_batch_size, mix_below=mixing_limit(profile, model.config))
    mine = share.of(batches)
    # Allocated once: small arrays allocated between batches fragment the heap.
    sums = np.empty((len(mine), 3, len(shards.sources)))
    for number, batch in enumerate(track(mine, "validation batches")):
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
    """Return one score per group, summed in the order of the parts, since another order rounds differently."""
    return [Score(float(loss), int(correct), int(tokens)) for loss, correct, tokens in reduce(np.add, parts).T]


@torch.inference_mode()
def sum_batch(model: PreTrainedModel, batch: Batch, *, groups: int) -> Sums:
    """Return `(3, groups)` sums of one batch by its `sources`: loss in nats, correct positions, positions.

    No attention mask and no cache: rows are padded on the right, where causal attention does not see the padding, and
    with either of them transformers 5 does not separate packed sequences. Only supervised positions go through the
    head, in chunks, to bound the memory of the logits.
    """
    mask = torch.from_numpy(batch.loss_mask)
    hidden = backbone(model)(
        input_ids=torch.from_numpy(batch.input_ids).to(model.device), use_cache=False
    ).last_hidden_state
    hidden = hidden[mask.to(model.device)]  # (N, H)
    targets = torch.from_numpy(batch.targets)[mask].to(model.device)
    losses, hits = [], []
    for states, wanted in zip(hidden.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True):
        logits = compute_logits(model, states).float()  # (HEAD_POSITIONS, V)
        losses.append(cross_entropy(logits, wanted, reduction="none"))
        hits.append(_is_correct(logits, wanted))
    sources = batch.sources[batch.loss_mask]
    values = (_as_numbers(losses), _as_numbers(hits), np.ones(len(sources)))
    return np.stack([np.bincount(sources, weights=one, minlength=groups) for one in values])


def _is_correct(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return `(N,)` whether the target is the argmax; the maximum goes first, since argmax is 5x slower on a CPU."""
    hits = logits.gather(1, wanted[:, None])[:, 0] == logits.amax(dim=-1)
    likely = hits.nonzero()[:, 0]
    hits[likely] = logits[likely].argmax(dim=-1) == wanted[likely]
    return hits


def _as_numbers(parts: list[torch.Tensor]) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = torch.cat(parts).double().cpu().numpy()
    return numbers


def check_supervised(shards: Shards, profile: EvaluateParams) -> None:
    """Raise DataError for a source without a supervised token in its validation rows."""
    for name, rows in validation_rows(shards, profile):
        if not any(collate([row], shards, profile, pad_to_multiple_of=None).loss_mask.any() for row in rows):
            raise _no_supervised_tokens(name, len(rows))


def _no_supervised_tokens(source: str, rows: int) -> DataError:
    return DataError(
        f"source {source}: {rows:,} validation rows with 0 supervised tokens, expected 1 or more. Enlarge its "
        "validation split (val_split, max_val_set), or check in ledger.json what label_masking and what_counts mask"
    )


def _check_score(score: Score, source: str, *, rows: int, model: str) -> None:
    if score.tokens == 0:
        raise _no_supervised_tokens(source, rows)
    if not math.isfinite(score.loss_sum):
        raise DataError(
            f"source {source}: the loss of the {model} model is {score.loss_sum} over {score.tokens:,} tokens, "
            "expected a finite number. Its weights are broken: train again from the last good checkpoint, or with a "
            "lower learning_rate"
        )
