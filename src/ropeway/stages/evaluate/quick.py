"""A quick look at the scores of a few validation rows; it writes nothing that could be taken for the evaluation."""

from dataclasses import replace

from ropeway.config.params import Profile
from ropeway.data.shards import Shards, open_shards
from ropeway.runtime.workspace import Workspace
from ropeway.stages.evaluate.evaluation_workers import ALONE
from ropeway.stages.evaluate.measuring import Asked, measure_folder
from ropeway.stages.evaluate.opening import check_data
from ropeway.stages.evaluate.text import count_bytes


def look(workspace: Workspace, profile: Profile, *, limit: int) -> str:
    """Return a table of base and tuned, a line per source, over its first `limit` validation rows.

    Raises:
        DataError: As in `check_data` and `measure_folder`.
    """
    shards = first_rows(open_shards(workspace.data), limit)
    sizes = count_bytes(shards, profile, workspace.base)
    lines = []
    for name, folder in (("base", workspace.base), ("tuned", workspace.model)):
        check_data(folder, shards)
        scores = measure_folder(folder, workspace.model, Asked(shards, profile), cards=ALONE, name=name).scores
        for source, score, size in zip(shards.sources, scores, sizes, strict=True):
            found = score.metrics(size)
            per_byte = f"{found['nats_per_byte']:.4f}" if "nats_per_byte" in found else "-"
            lines.append(
                f"{source.name:<16} {name:<6} {found['loss']:>9.4f} {found['perplexity']:>11.5g} "
                f"{found['accuracy']:>9.4f} {per_byte:>10} {score.tokens:>9,}"
            )
    head = f"{'source':<16} {'model':<6} {'nats/token':>9} {'perplexity':>10} {'accuracy':>9} {'nats/byte':>10}"
    of = f"the first {limit} validation rows of each source; nothing was written"
    return "\n".join([of, f"{head} {'tokens':>9}", *sorted(lines)])


def first_rows(shards: Shards, limit: int) -> Shards:
    """Return the shards with `limit` validation rows a source at most."""
    return replace(
        shards,
        sources=tuple(replace(source, validation=source.validation[:limit]) for source in shards.sources),
    )
