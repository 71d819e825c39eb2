"""What a run asks of a work pool: which stages it places there, and the request that a worker receives.

`ROPEWAY_POOL_<STAGE>` places a stage, e.g. `ROPEWAY_POOL_TRAIN=gpu`; `ROPEWAY_POOL_PUBLISH` the step that publishes.
"""

import json
import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ropeway.config.suggestion import unknown_name
from ropeway.orchestration.revision import Revision
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.git import ask_git
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import digest_of
from ropeway.runtime.plain_http import check_encrypted

PREFIX = "ROPEWAY_POOL_"
PUBLISH = "publish"
GIT_URL = "ROPEWAY_GIT_URL"
REPOSITORIES = "ROPEWAY_WORKER_REPOSITORIES"
_FORMAT = 1
_SHOWN = 5  # files in a message
_ENCRYPTED = "Use https or ssh"
# Prefect passes a request on as text; a git option or a path that leaves the clone must not come in with it.
_VALID = {
    "step": re.compile(r"[\w./:@-]+"),
    "profile": re.compile(r"[^/\x00]+"),
    "repository": re.compile(r"[^-].*"),
    "commit": re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}"),
    "folder": re.compile(r"(?:(?!\.\.?/)[^/\x00]+/)*"),
    "handover": re.compile(r"[0-9a-f]{32}"),
    "registry": re.compile(r"(?:s3://.+)?"),
}


@dataclass(frozen=True, slots=True)
class StageRequest:
    """One stage, or publishing, at a commit with given inputs; every field may be read on the page of the flow run.

    Attributes:
        step: The stage's name, or `publish`.
        profile: The profile.
        repository: The git repository that the worker clones.
        commit: The full hash of the commit.
        folder: The workspace's folder in the repository; empty for its top.
        handover: The MD5 of the hand-over (`handover.py`) in the DVC remote.
        registry: The registry's URL, if the caller's environment names one.
        run_seconds: How long the run took before it publishes; recorded with the version.
    """

    step: str
    profile: str
    repository: str
    commit: str
    folder: str
    handover: str
    registry: str = ""
    run_seconds: float | None = None

    @property
    def key(self) -> str:
        """A digest of the request: a run that was killed finds by it what it asked for."""
        return digest_of({"format": _FORMAT, **asdict(self), "run_seconds": None})

    def to_json(self) -> str:
        """Return the request as JSON."""
        return json.dumps({"format": _FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "StageRequest":
        """Return a request that `to_json` wrote; raise ConfigError for another format."""
        try:
            facts = dict[str, Any](parse_json(text))
        except (ValueError, TypeError):
            raise ConfigError("a request that is no JSON object; it was not written by Ropeway") from None
        if (found := facts.pop("format", None)) != _FORMAT:
            raise ConfigError(
                f"the calling run sends requests of format {found}, this worker's code reads format {_FORMAT}. Use the "
                "same version of Ropeway on both machines"
            )
        known = {one.name for one in fields(cls)}
        if not isinstance(facts.get("run_seconds"), int | float | None) or facts.keys() - known or known - facts.keys():
            raise ConfigError(
                "a request with other fields than this worker's code knows. Use the same version of Ropeway"
            )
        if wrong := [
            name for name in _VALID if not isinstance(facts[name], str) or not _VALID[name].fullmatch(facts[name])
        ]:
            raise ConfigError(f"a request whose {wrong[0]} is not valid; it was not written by Ropeway")
        return cls(**facts)


def read_pools(environment: Mapping[str, str], stages: Collection[str]) -> dict[str, str]:
    """Return the work pool of each step that the environment places in one.

    Raises:
        ConfigError: A variable names no stage, or its value no pool.
    """
    steps = {name.upper(): name for name in (*stages, PUBLISH)}
    pools = {}
    for variable, value in sorted(environment.items()):
        if not variable.startswith(PREFIX):
            continue
        step = steps.get(variable.removeprefix(PREFIX))
        if step is None:
            wrong = variable.removeprefix(PREFIX).lower()
            raise ConfigError(f"{variable}: '{wrong}' {unknown_name(wrong, list(steps.values()))}")
        if not value.strip():
            raise ConfigError(f"{variable} is empty. Name a Prefect work pool, or unset it to run {step} here")
        pools[step] = value.strip()
    return pools


def find_repository(root: Path, revision: Revision, data: Collection[str], environment: Mapping[str, str]) -> str:
    """Return the repository that workers clone: `ROPEWAY_GIT_URL`, else the remote `origin`.

    Args:
        root: The workspace.
        revision: Its revision.
        data: Local sources and base files, which workers receive through DVC.
        environment: The environment.

    Raises:
        ConfigError: There is no commit, no address, an address with a password, or an uncommitted change.
    """
    if revision.commit is None:
        raise ConfigError(
            f"{root}: stages in work pools run at a commit, and there is none here. Commit this workspace"
        )
    if dirty := [name for name in revision.dirty if name not in data]:
        more = f" and {len(dirty) - _SHOWN} more" if len(dirty) > _SHOWN else ""
        raise ConfigError(
            f"uncommitted: {', '.join(dirty[:_SHOWN])}{more}. Stages in work pools run at a commit; commit and push "
            f"them, or unset {PREFIX}*"
        )
    url = environment.get(GIT_URL) or ask_git(root, "remote", "get-url", "origin")
    if not url:
        raise ConfigError(
            f"{root}: this clone has no remote `origin` that a worker could clone. Add one, or set {GIT_URL}"
        )
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError(f"{GIT_URL}, or the git remote `origin`: not an address that git can clone") from None
    if url.startswith("-") or "::" in url.partition("/")[0]:
        raise ConfigError(
            f"{GIT_URL}, or the git remote `origin`: {url[:40]!r} is not an address that workers may clone"
        )
    is_token = parts.scheme in ("http", "https") and parts.username
    if "://" in url and (parts.password or is_token or parts.query):
        raise ConfigError(
            "the address of the git remote contains a password or token, which everyone who can open the Prefect UI "
            f"could read. Use a credential helper on the workers, or set {GIT_URL} to an address without it"
        )
    check_encrypted(url, what=f"{GIT_URL}, or the git remote `origin`", remedy=_ENCRYPTED)
    branches = ask_git(root, "branch", "--remotes", "--contains", revision.commit)
    if not environment.get(GIT_URL) and not branches:
        raise ConfigError(
            f"{root}: commit {revision.commit[:12]} was not pushed to the git remote `origin`, which workers clone. "
            "Run `git push`"
        )
    local = root / url
    return str(local.resolve()) if "://" not in url and local.exists() else url


def check_repository(repository: str, environment: Mapping[str, str]) -> None:
    """Raise ConfigError unless `ROPEWAY_WORKER_REPOSITORIES` of this worker allows a repository, or is not set.

    A repository on another machine without encryption is refused, too.

    A prefix ends where a part of the address does: `https://git.example.org/team` allows no repository of
    `https://git.example.org/team2`.
    """
    check_encrypted(repository, what="the repository that the calling run names", remedy=_ENCRYPTED)
    stated = environment.get(REPOSITORIES)
    if stated is None:
        return
    prefixes = [prefix.strip() for prefix in stated.split(",") if prefix.strip()]
    if not prefixes:
        raise ConfigError(f"{REPOSITORIES} is empty. State the repositories that this worker may clone, or unset it")
    leaves = re.search(r"\\|%|(?:^|[/:])\.\.?(?:/|$)", repository)  # parts that a server may resolve to another path
    if leaves or not any(_is_below(repository, prefix) for prefix in prefixes):
        raise ConfigError(
            f"the calling run asks for the repository {repository!r}, which {REPOSITORIES} of this worker does not "
            f"allow. Allowed are {', '.join(prefixes)}"
        )


def _is_below(repository: str, prefix: str) -> bool:
    return repository == prefix or repository.startswith(prefix if prefix[-1] in "/:" else f"{prefix}/")


def check_committed_remote(root: Path, name: str | None) -> None:
    """Raise ConfigError unless the commit's .dvc/config names the default DVC remote, which workers read.

    `name` is the default remote of this workspace, None if there is none.
    """
    remedy = (
        "Workers exchange inputs and outputs through a DVC remote that git knows: `ropeway doctor --fix --remote "
        "s3://bucket/dvc`, then commit and push .dvc/config"
    )
    if not name:
        raise ConfigError(f"{root}: no DVC remote is configured. {remedy}")
    text = ask_git(root, "show", "HEAD:./.dvc/config") or ""
    if f'"{name}"' not in text:
        raise ConfigError(f"{root}: the DVC remote '{name}' is not in the committed .dvc/config. {remedy}")


def run_git(*arguments: str, cwd: Path | None = None) -> None:
    """Run git; raise ConfigError with its message if it fails."""
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"`git {' '.join(arguments[:2])}` failed: {done.stderr.strip()}")
