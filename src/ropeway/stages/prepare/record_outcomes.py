"""What became of each record: whether a step reads it, validation reads it, or why it was dropped."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import PrepareParams
from ropeway.data.batches import EpochPlan
from ropeway.data.record_index import RecordGroup, RecordOutcome, Role
from ropeway.data.tokenized import TokenizedSource
from ropeway.stages.prepare.split_sources import SplitSource

# Of a record with several sequences the first of these counts.
_OUTCOMES: tuple[tuple[Role, str], ...] = (
    ("trained", ""),
    ("validation", ""),
    ("dropped", "in training, but no step of any epoch reads it"),
    ("dropped", "validation beyond max_val_set"),
    ("dropped", "contaminated"),
    ("dropped", "exact duplicate"),
    ("dropped", "near duplicate"),
    ("dropped", "empty"),
)
_TRAINED, _VALIDATION, _NOT_READ, _UNUSED, _CONTAMINATED, _EXACT, _NEAR, _EMPTY = range(len(_OUTCOMES))


def find_trained(plans: Sequence[EpochPlan]) -> dict[str, NDArray[np.bool_]]:
    """Return for each source `(N,)`, True for the sequences that a step of an epoch reads."""
    shards = plans[0].shards
    found = [np.zeros(len(source.lengths), np.bool_) for source in shards.sources]
    for plan in plans:
        owners, sequences = plan.trained_sequences()
        for number, mask in enumerate(found):
            mask[sequences[owners == number]] = True
    return {source.name: mask for source, mask in zip(shards.sources, found, strict=True)}


def group_records(
    source: TokenizedSource,
    part: SplitSource,
    trained: NDArray[np.bool_],
    profile: PrepareParams,
    forgotten: Sequence[str] = (),
) -> Iterator[RecordGroup]:
    """Yield the digests of a source's records by outcome, those that tokenize refused and fetch dropped last.

    `trained` is `(N,)`, of the source's sequences; `forgotten` has digests in hex.
    """
    name, split = source.facts["name"], part.split
    of_sequences = np.full(len(trained), _NOT_READ, np.uint8)
    of_sequences[trained] = _TRAINED
    of_sequences[split.unused] = _UNUSED
    of_sequences[split.validation] = _VALIDATION
    of_sequences[split.contaminated] = _CONTAMINATED
    keys = source.column("exact")
    found = np.full(len(keys), _EMPTY, np.uint8)
    np.minimum.at(found, source.column("records"), of_sequences)
    options = profile.duplicates
    # A near duplicate that is removed as an exact one is among the exact ones.
    for action, mask, outcome in (
        (options.near, part.duplicates.near, _NEAR),
        (options.exact, part.duplicates.exact, _EXACT),
    ):
        if action == "remove":
            found[mask] = outcome
    for number, (role, reason) in enumerate(_OUTCOMES):
        yield RecordGroup(RecordOutcome(name, role, reason), keys[found == number])
    refused, numbers = source.column("refused_exact"), source.column("refused_reasons")
    for number, reason in enumerate(sorted(source.facts["records"]["refused"])):
        yield RecordGroup(RecordOutcome(name, "dropped", f"refused: {reason}"), refused[numbers == number])
    keys = np.frombuffer(bytes.fromhex("".join(forgotten)), "<u8").reshape(-1, 2)
    yield RecordGroup(RecordOutcome(name, "dropped", "forgotten"), keys)
