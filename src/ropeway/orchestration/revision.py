"""What git says of a workspace: the revision, and whether what a run reads differs from it in a way that counts."""

import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ropeway.config.load_params import load_profile
from ropeway.orchestration.stage_process import name_files
from ropeway.runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Revision:
    """A commit, and what differs from it.

    Attributes:
        commit: Its whole hash; None outside git or before the first commit.
        dirty: Tracked files that differ from it, but for dvc.lock and the line `profile:` of params.yaml: both
            change with every run and say nothing that the version does not say itself. Then files that the profile
            names and git does not have: code and texts, also those that git ignores, since a clone would lack them;
            of local sources and base those that git does not ignore: DVC keeps their content by digest.
    """

    commit: str | None
    dirty: tuple[str, ...]

    def __str__(self) -> str:
        """Return the first seven digits, with a `+` when the tree is dirty.

        >>> str(Revision("0123456789", ("a.py",)))
        '0123456+'
        """
        return (self.commit[:7] if self.commit else "no-git") + ("+" if self.dirty else "")


def read_revision(root: Path, profile: str | None = None) -> Revision:
    """Return the revision of a workspace, now; files that the profile names count beside the tracked ones."""
    commit = ask_git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return Revision(None, ())
    changed = (ask_git(root, "diff", "--name-only", "--relative", "-z", "HEAD") or "").split("\0")
    counted = [name for name in changed if name and _counts(root, name)]
    return Revision(commit, tuple(dict.fromkeys([*counted, *_untracked(root, profile)])))


def _untracked(root: Path, profile: str | None) -> list[str]:
    named = None
    with suppress(ConfigError):  # whoever needs params.yaml says what is wrong with it
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


def ask_git(root: Path, *arguments: str) -> str | None:
    """Return git's answer without the end of its last line; None where there is no git, or it refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, encoding="utf-8"
        )
    except FileNotFoundError:
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
