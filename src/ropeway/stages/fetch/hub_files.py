"""The files of a Hub source: those of one commit that its patterns match, downloaded into the Hub's own cache."""

from pathlib import Path

from ropeway.config.params import HuggingfaceSource
from ropeway.runtime.errors import ConfigError
from ropeway.stages.fetch.files import check_format
from ropeway.stages.fetch.globs import match_names
from ropeway.stages.fetch.splits import check_splits
from ropeway.storage import hub

_SHOWN = 20


def bring_files(source: HuggingfaceSource, commit: str) -> dict[str, Path]:
    """Return a commit's matching files by the name they have in the repository, sorted.

    Raises:
        ConfigError: A pattern matches nothing, files of several splits or of no known format, or the Hub does not show
            the repository.
        TemporaryError: The Hub does not answer.
    """
    there = hub.list_files(source.repo, commit, kind="dataset")
    matched = match_names(source.files, there)
    if lost := [pattern for pattern in source.files if not matched[pattern]]:
        whose = "in the cache (HF_HUB_OFFLINE is set)" if hub.is_offline() else "there"
        more = f" and {len(there) - _SHOWN:,} more" if len(there) > _SHOWN else ""
        raise ConfigError(
            f"sources: {source.repo} at {commit[:12]}: '{lost[0]}' matches none of the {len(there):,} files {whose}: "
            f"{', '.join(there[:_SHOWN]) or 'none'}{more}; mend `files`"
        )
    for pattern in source.files:
        check_splits(pattern, matched[pattern], source.splits)
    names = sorted({name for some in matched.values() for name in some})
    for name in names:
        check_format(name)
    folder = hub.download_files(source.repo, commit, names, kind="dataset", revision=source.revision)
    return {name: folder / name for name in names}
