"""Questions to git about a workspace."""

import subprocess
from pathlib import Path


def ask_git(root: Path, *arguments: str) -> str | None:
    """Return git's output without the last newline; None if git is missing or fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, encoding="utf-8"
        )
    except FileNotFoundError:
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
