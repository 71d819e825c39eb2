"""Which sequences of all sources train, which validate, and which go because something repeats them.

In this order: duplicates, among records of all sources; the split, over what stays; contamination, which only the
split brings about.
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
from ropeway.stages.prepare.duplicates import Repeats, find_repeats
from ropeway.stages.prepare.split import Split, plan_split


@dataclass(frozen=True, slots=True)
class SplitSource:
    """One source's split, and what was found in it."""

    split: Split
    findings: Findings


def split_sources(
    sources: Mapping[str, TokenizedSource], profile: PrepareParams, *, prompts: Sequence[str], work: Path
) -> dict[str, SplitSource]:
    """Return each source's part; `work` is an empty folder, `prompts` are of the files in `contamination.prompts`."""
    generator = np.random.RandomState(profile.rng_seed)  # one for all sources in their order, as in the original
    repeats = find_repeats(sources, profile.duplicates, work=work)
    records = {name: source.column("records") for name, source in sources.items()}
    splits = {
        name: plan_split(
            records[name],
            sources[name].column("record_keys" if profile.split_by == "document" else "keys"),
            profile,
            max_val_set=options.max_val_set,
            generator=generator,
            removed=_removed_records(repeats[name], profile)[records[name]],
        )
        for name, options in profile.mixture
    }
    hits = find_contaminated(sources, splits, profile.contamination, prompts)
    if profile.contamination.action == "remove":
        splits = {name: split.without_contaminated(hits[name] > 0) for name, split in splits.items()}
    lengths = {name: source.column("lengths") for name, source in sources.items()}
    return {
        name: SplitSource(split, _count_findings(records[name], lengths[name], repeats[name], hits[name], profile))
        for name, split in splits.items()
    }


def _removed_records(repeats: Repeats, profile: PrepareParams) -> NDArray[np.bool_]:
    """Return `(R,)`, True for each record that params remove before the split."""
    exact, near = profile.duplicates.exact == "remove", profile.duplicates.near == "remove"
    return (repeats.exact & exact) | (repeats.near & near)


def _count_findings(
    records: NDArray[np.int64],
    lengths: NDArray[np.int32],
    repeats: Repeats,
    hits: NDArray[np.uint8],
    profile: PrepareParams,
) -> Findings:
    """Return what one source's ledger says, from each sequence's record (ascending), tokens and hit, `(N,)` each."""

    def found(action: str, which: NDArray[np.bool_]) -> FindingCounts:
        tokens = int(lengths[which].sum(dtype=np.int64))
        return FindingCounts(action, int((np.diff(records[which], prepend=-1) > 0).sum()), int(which.sum()), tokens)

    return Findings(
        exact=found(profile.duplicates.exact, repeats.exact[records]),
        near=found(profile.duplicates.near, repeats.near[records]),
        contaminated=found(profile.contamination.action, hits > 0),
        with_prompts=int(((hits & IN_PROMPTS) > 0).sum()),
    )
