"""The files of a dataset repository that patterns match, downloaded into the Hub's cache."""

from pathlib import Path, PurePosixPath

from ropeway.config.sections import HuggingfaceSource
from ropeway.runtime.errors import ConfigError
from ropeway.stages.fetch.formats import check_document, check_format, split_members
from ropeway.stages.fetch.local import add_members
from ropeway.stages.fetch.patterns import check_splits, match_names
from ropeway.stages.fetch.saved_folders import SPLITS, STATE, add_states, find_saved, without_splits_file
from ropeway.storage import hub

_SHOWN = 20


def download_matching(source: HuggingfaceSource, commit: str) -> tuple[dict[str, Path], dict[str, list[str] | None]]:
    """Download a commit's matching files; return them by their names in the repository, sorted, and members to read.

    The second value is as of `ropeway.stages.fetch.local.find_members`.

    Raises:
        ConfigError: A pattern matches nothing, files of several splits or of no supported format, or the Hub denies
            access to the repository.
        TemporaryError: The Hub does not respond.
    """
    there = hub.list_files(source.repo, commit, kind="dataset")
    names: set[str] = set()
    members: dict[str, list[str] | None] = {}
    saved = [pattern.rstrip("/") for pattern in source.files if not match_names([pattern], there)[pattern]]
    for pattern in source.files:
        matched, inner = _match_pattern(pattern, there)
        if not matched:
            raise _make_match_error(source, commit, pattern, there)
        check_splits(pattern, without_splits_file(matched), source.splits)
        for name in matched:
            check_format(name)
            check_document(name, source.rows)
            add_members(members, name, inner)
        names |= {*matched, *_list_states(matched, there)}
    folder = hub.download_files(source.repo, commit, sorted(names), kind="dataset", revision=source.revision)
    files = {name: folder / name for name in sorted(names)}
    for place in saved:
        data = find_saved(folder / place)
        files = {name: path for name, path in files.items() if data is None or _is_kept(name, path, place, data)}
    return dict(sorted(add_states(files).items())), members


def _match_pattern(pattern: str, there: list[str]) -> tuple[list[str], str | None]:
    """Return (the files that a pattern stands for, the pattern of members if they are archives)."""
    if found := match_names([pattern], there)[pattern]:
        return found, None
    outer, inner = split_members(pattern)
    if inner is not None:
        return match_names([outer], there)[outer], inner
    return _list_saved(PurePosixPath(pattern), there), None


def _list_saved(place: PurePosixPath, there: list[str]) -> list[str]:
    """Return the metadata and arrow files of a saved folder, also of one with several splits; none if it is not one."""
    paths = [PurePosixPath(name) for name in there]
    has_splits = place / SPLITS in paths
    folders = {path.parent for path in paths if path.name == STATE}
    wanted = {folder for folder in folders if place == folder or (has_splits and place == folder.parent)}
    files = [path for path in paths if path.parent in wanted and (path.name == STATE or path.suffix == ".arrow")]
    return [str(path) for path in (*files, *[place / SPLITS] * has_splits)]


def _list_states(names: list[str], there: list[str]) -> set[str]:
    """Return the state.json files beside arrow files; they tell which of them have rows."""
    states = {str(PurePosixPath(name).with_name(STATE)) for name in names if name.endswith(".arrow")}
    return states & set(there)


def _is_kept(name: str, path: Path, place: str, data: list[Path]) -> bool:
    """Return whether a file is outside of a saved folder that a pattern names, or one of its own."""
    return not name.startswith(f"{place}/") or path in data


def _make_match_error(source: HuggingfaceSource, commit: str, pattern: str, there: list[str]) -> ConfigError:
    place = "in the cache (HF_HUB_OFFLINE is set)" if hub.is_offline() else "in the repository"
    more = f" and {len(there) - _SHOWN:,} more" if len(there) > _SHOWN else ""
    return ConfigError(
        f"sources: {source.repo} at {commit[:12]}: '{pattern}' matches none of the {len(there):,} files {place}: "
        f"{', '.join(there[:_SHOWN]) or 'none'}{more}; correct `files`"
    )
