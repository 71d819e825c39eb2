"""What repeats were found in a source, for the split and for the ledger: pure functions over numbers."""

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import Profile
from ropeway.data.ledger import Findings, Found
from ropeway.stages.prepare.contamination import IN_PROMPTS
from ropeway.stages.prepare.duplicates import Repeats


def removed_records(repeats: Repeats, profile: Profile) -> NDArray[np.bool_]:
    """Return `(R,)`, True for each record that params remove before the split."""
    exact, near = profile.duplicates.exact == "remove", profile.duplicates.near == "remove"
    return (repeats.exact & exact) | (repeats.near & near)


def count_findings(
    records: NDArray[np.int64],
    lengths: NDArray[np.int32],
    repeats: Repeats,
    hits: NDArray[np.uint8],
    profile: Profile,
) -> Findings:
    """Return what one source's ledger says.

    Args:
        records: `(N,)` record of each sequence, ascending.
        lengths: `(N,)` tokens of each sequence.
        repeats: By record.
        hits: `(N,)` bits of `ropeway.stages.prepare.contamination`.
        profile: Says what was done.
    """

    def found(action: str, which: NDArray[np.bool_]) -> Found:
        tokens = int(lengths[which].sum(dtype=np.int64))
        return Found(action, int((np.diff(records[which], prepend=-1) > 0).sum()), int(which.sum()), tokens)

    return Findings(
        exact=found(profile.duplicates.exact, repeats.exact[records]),
        near=found(profile.duplicates.near, repeats.near[records]),
        contaminated=found(profile.contamination.action, hits > 0),
        with_prompts=int(((hits & IN_PROMPTS) > 0).sum()),
    )


def describe_findings(name: str, findings: Findings, profile: Profile) -> list[str]:
    """Return lines for the log: none where nothing repeats."""
    lines, done = [], {"count": "kept", "remove": "removed"}
    for how, found in (("exact", findings.exact), ("near", findings.near)):
        if found.records:
            lines.append(
                f"{name}: {how} duplicates of earlier records: {found.records:,} ({found.sequences:,} sequences, "
                f"{found.tokens:,} tokens), {done[found.action]} (duplicates.{how}: {found.action})"
            )
    found = findings.contaminated
    if found.sequences:
        lines.append(
            f"{name}: training sequences that share {profile.contamination.ngram} words in a row with validation or a "
            f"prompt: {found.sequences:,} ({found.tokens:,} tokens), {findings.with_prompts:,} of them with a prompt; "
            f"{done[found.action]} (contamination.action: {found.action})"
        )
    return lines
