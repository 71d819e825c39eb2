"""Select the training and validation sequences of all sources: dedup, then split, then decontamination.

Dedup compares the records of all sources and comes first. The split is over the records that remain. Decontamination
is last, because it compares the training part with the validation part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import PrepareParams
from ropeway.data.ledger import FindingCounts, Findings
from ropeway.data.tokenized import TokenizedSource
from ropeway.stages.prepare.contamination import IN_PROMPTS, find_contaminated
from ropeway.stages.prepare.duplicates import DuplicateMasks, find_duplicates
from ropeway.stages.prepare.split import Split, plan_split


@dataclass(frozen=True, slots=True)
class SplitSource:
    """One source's split, the counts of its duplicates and contamination, and which records are duplicates."""

    split: Split
    findings: Findings
    duplicates: DuplicateMasks


def split_sources(
    sources: Mapping[str, TokenizedSource], profile: PrepareParams, *, prompts: Sequence[str], work: Path
) -> dict[str, SplitSource]:
    """Return each source's split and findings.

    Args:
        sources: By name, in any order; the order of `profile.mixture` counts.
        profile: The params that prepare reads.
        prompts: The texts of the files in `contamination.prompts`.
        work: An empty folder for temporary files.
    """
    generator = np.random.RandomState(profile.rng_seed)  # shared by all sources in order, as in the original
    duplicates = find_duplicates(sources, profile.duplicates, work=work)
    records = {name: source.column("records") for name, source in sources.items()}
    # Several sequences of one conversation stay together: each repeats the beginning of the next.
    by_record = {
        name: profile.split_by == "document" or source.facts["kind"] == "conversation"
        for name, source in sources.items()
    }
    splits = {
        name: plan_split(
            records[name] if by_record[name] else np.arange(len(records[name])),
            sources[name].column("record_keys" if by_record[name] else "keys"),
            profile,
            max_val_set=options.max_val_set,
            generator=generator,
            removed=_removed_records(duplicates[name], profile)[records[name]],
        )
        for name, options in profile.mixture
    }
    hits = find_contaminated(sources, splits, profile.contamination, prompts)
    if profile.contamination.action == "remove":
        splits = {name: split.without_contaminated(hits[name] > 0) for name, split in splits.items()}
    lengths = {name: source.column("lengths") for name, source in sources.items()}
    return {
        name: SplitSource(
            split,
            _count_findings(records[name], lengths[name], duplicates[name], hits[name], profile),
            duplicates[name],
        )
        for name, split in splits.items()
    }


def _removed_records(duplicates: DuplicateMasks, profile: PrepareParams) -> NDArray[np.bool_]:
    """Return `(R,)`, True for each record that dedup removes before the split."""
    exact, near = profile.duplicates.exact == "remove", profile.duplicates.near == "remove"
    return (duplicates.exact & exact) | (duplicates.near & near)


def _count_findings(
    records: NDArray[np.int64],
    lengths: NDArray[np.int32],
    duplicates: DuplicateMasks,
    hits: NDArray[np.uint8],
    profile: PrepareParams,
) -> Findings:
    """Return one source's findings, from each sequence's record (ascending), length and contamination bits, `(N,)`."""

    def found(action: str, which: NDArray[np.bool_]) -> FindingCounts:
        tokens = int(lengths[which].sum(dtype=np.int64))
        return FindingCounts(action, int((np.diff(records[which], prepend=-1) > 0).sum()), int(which.sum()), tokens)

    return Findings(
        exact=found(profile.duplicates.exact, duplicates.exact[records]),
        near=found(profile.duplicates.near, duplicates.near[records]),
        contaminated=found(profile.contamination.action, hits > 0),
        with_prompts=int(((hits & IN_PROMPTS) > 0).sum()),
    )
