"""Loss by position, up to `max_length` and beyond, with and without RoPE scaling: the effect of the scaling.

The rows are longer than the training context, so validation texts are concatenated, longest first. Every model is
measured on the same rows. Shapes: T tokens, K buckets.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ropeway.config.params import EvaluateParams
from ropeway.config.sections import Positions
from ropeway.data.batches import Batch
from ropeway.data.loss_mask import loss_mask
from ropeway.data.shards import Shards
from ropeway.models.open_model import rope_of
from ropeway.models.rope import has_layer_types
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import digest_of
from ropeway.runtime.progress import track
from ropeway.stages.evaluate.evaluation_workers import Share
from ropeway.stages.evaluate.token_scores import Score, Sums, add_sums, sum_batch

UNSCALED = "_unscaled"


@dataclass(frozen=True, slots=True)
class LongRow:
    """Concatenated validation texts."""

    ids: NDArray[np.int64]  # `(T,)` tokens; one BOS, at the start
    mask: NDArray[np.bool_]  # `(T,)` True where the next token is supervised


def plan_long_rows(shards: Shards, profile: EvaluateParams) -> list[LongRow]:
    """Return `evaluation.positions.rows` rows of `row_tokens` tokens, or as many as the validation texts fill.

    The texts are documents where the run has any, else conversations; longest first, so that a row has few of them. The
    last text of a row is truncated. The first token of a text is not a target of the text before it.

    Raises:
        DataError: The validation texts do not fill one row.
    """
    wanted = profile.evaluation.positions
    rows: list[LongRow] = []
    ids: list[NDArray[np.int64]] = []
    masks: list[NDArray[np.bool_]] = []
    total = 0
    for tokens, mask in _read_longest(shards, profile):
        skip = int(bool(ids) and tokens[0] == shards.special.get("bos"))
        ids.append(tokens[skip:])
        masks.append(mask[skip:])
        total += len(tokens)
        if sum(map(len, ids)) >= wanted.row_tokens:
            row = LongRow(np.concatenate(ids)[: wanted.row_tokens], np.concatenate(masks)[: wanted.row_tokens])
            row.mask[-1] = False
            rows.append(row)
            ids, masks = [], []
        if len(rows) == wanted.rows:
            break
    if not rows:
        raise DataError(
            f"evaluation.positions.row_tokens: {wanted.row_tokens:,} tokens, but all validation texts together have "
            f"{total:,}; lower row_tokens, or enlarge the validation split (val_split, max_val_set)"
        )
    return rows


def _read_longest(shards: Shards, profile: EvaluateParams) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield (tokens, mask) of whole validation sequences, longest first; equal lengths in source order."""
    documents = any(source.is_document and len(source.validation) for source in shards.sources)
    found = [
        (-int(source.lengths[sequence]), number, int(sequence))
        for number, source in enumerate(shards.sources)
        if source.is_document or not documents
        for sequence in source.validation
    ]
    for _, number, sequence in sorted(found):
        tokens, kinds = shards.sources[number].read(sequence)
        mask = loss_mask(kinds, profile)
        mask[-1] = False
        yield tokens, mask


def sum_positions(
    model: PreTrainedModel, rows: Sequence[LongRow], wanted: Positions, *, share: Share
) -> list[tuple[str, Sums]]:
    """Return (kind, sums by bucket of positions) of each long row in a share.

    The kind is `""` with the model's own scaling and `_unscaled` without; a model without scaling, or with another RoPE
    for each layer type, has only the first.
    Rows run one at a time, to bound memory. The rows of both kinds are divided among the shares.
    """
    own = dict(model.config.rope_parameters)
    kinds = {"": own}
    if not has_layer_types(own) and own["rope_type"] != "default":
        kept = ("rope_theta", "partial_rotary_factor")
        kinds[UNSCALED] = {"rope_type": "default", **{name: own[name] for name in kept if name in own}}
    buckets = -(-wanted.row_tokens // wanted.bucket_tokens)
    sums = []
    for kind, row in track(share.of([(kind, row) for kind in kinds for row in rows]), "long rows"):
        with rope_of(model, kinds[kind]):
            sums.append((kind, sum_batch(model, _batch(row, wanted.bucket_tokens), groups=buckets)))
    return sums


def score_positions(found: Sequence[tuple[str, Sums]]) -> dict[str, list[Score]]:
    """Return one score per bucket for each kind, summed in the order of the rows."""
    kinds = dict.fromkeys(kind for kind, _ in found)
    return {kind: add_sums([sums for one, sums in found if one == kind]) for kind in kinds}


def _batch(row: LongRow, bucket_tokens: int) -> Batch:
    """Return a row as a batch whose `sources` are buckets, so that sums by source are sums by bucket."""
    positions = np.arange(len(row.ids))
    return Batch(
        input_ids=row.ids[None],
        position_ids=positions[None],
        targets=np.roll(row.ids, -1)[None],
        loss_mask=row.mask[None],
        sources=(positions // bucket_tokens).astype(np.int16)[None],
    )


def identify_rows(rows: Sequence[LongRow], wanted: Positions, max_length: int) -> str:
    """Return a digest of rows, buckets and `max_length`: reports with equal digests are comparable."""
    parts = [[hashlib.sha256(part.astype("<i8").tobytes()).hexdigest() for part in (row.ids, row.mask)] for row in rows]
    return digest_of([parts, wanted.bucket_tokens, max_length])


def report_positions(curves: Mapping[str, Sequence[Score]], wanted: Positions, max_length: int) -> dict[str, object]:
    """Return the positions section of eval.json: each curve's mean loss up to `max_length` and beyond."""
    border = -(-max_length // wanted.bucket_tokens)
    return {
        part: {
            name: round(sum(one.loss_sum for one in scores[span]) / sum(one.tokens for one in scores[span]), 6)
            for name, scores in curves.items()
        }
        for part, span in (("up_to_max_length", slice(border)), ("beyond", slice(border, None)))
        if any(score.tokens for score in next(iter(curves.values()))[span])
    }


def table_positions(curves: Mapping[str, Sequence[Score]], wanted: Positions) -> list[dict[str, object]]:
    """Return one line per bucket: its middle position, its supervised tokens, and each curve's loss."""
    lines: list[dict[str, object]] = []
    for number, tokens in enumerate(score.tokens for score in next(iter(curves.values()))):
        begin, end = (min((number + one) * wanted.bucket_tokens, wanted.row_tokens) for one in (0, 1))
        losses = {name: round(scores[number].loss, 6) if tokens else "" for name, scores in curves.items()}
        lines.append({"position": (begin + end) // 2, "tokens": tokens, **losses})
    return lines
