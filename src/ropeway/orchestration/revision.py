"""The git revision of a workspace, and whether files that a run reads differ from it."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ropeway.config.load_params import load_profile
from ropeway.orchestration.stage_process import name_files
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.git import ask_git


@dataclass(frozen=True, slots=True)
class Revision:
    """A commit and the files that differ from it.

    Attributes:
        commit: The full hash; None outside git or before the first commit.
        dirty: Tracked files that differ from the commit, except dvc.lock and the line `profile:` of params.yaml, which
            change with every run and are recorded in the version itself. Then files that the profile names and git does
            not track: code and texts, even if ignored, since a clone would lack them; local sources and base files only
            if not ignored, since DVC stores their content by digest.
    """

    commit: str | None
    dirty: tuple[str, ...]

    def __str__(self) -> str:
        """Return the first seven digits, with a `+` if the tree is dirty.

        >>> str(Revision("0123456789", ("a.py",)))
        '0123456+'
        """
        return (self.commit[:7] if self.commit else "no-git") + ("+" if self.dirty else "")


def read_revision(root: Path, profile: str | None = None) -> Revision:
    """Return the current revision of a workspace; files that the profile names count like tracked ones."""
    commit = ask_git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return Revision(None, ())
    changed = (ask_git(root, "diff", "--name-only", "--relative", "-z", "HEAD") or "").split("\0")
    counted = [name for name in changed if name and _counts(root, name)]
    return Revision(commit, tuple(dict.fromkeys([*counted, *_untracked(root, profile)])))


def _untracked(root: Path, profile: str | None) -> list[str]:
    named = None
    with suppress(ConfigError):  # the reader of params.yaml reports its faults
        named = name_files(root, load_profile(root / "params.yaml", profile)[1])
    if named is None:
        return []
    tracked, loose = (
        set((ask_git(root, "ls-files", "-z", *options) or "").split("\0"))
        for options in ((), ("--others", "--exclude-standard"))
    )
    return sorted(
        {name for name in named.texts if name not in tracked} | {name for name in named.data if name in loose}
    )


def _counts(root: Path, name: str) -> bool:
    if name == "params.yaml":
        lines = (ask_git(root, "diff", "--unified=0", "--relative", "HEAD", "--", name) or "").splitlines()
        edits = [line[1:] for line in lines if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]
        return not all(edit.startswith("profile:") for edit in edits)
    return name != "dvc.lock"


def code_environment(clone: Path) -> dict[str, str]:
    """Return the environment in which Python runs a clone's own code; empty if the clone has none."""
    if not (clone / "src" / "ropeway").is_dir():
        return {}
    ours = [str(clone / "src"), str(clone), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, ours))}
