"""Hand a version on to the Hugging Face Hub: exactly the bytes that the registry holds, verified on the way."""

from collections.abc import Mapping
from dataclasses import dataclass

from ropeway.cli.registry_commands import pull_cached
from ropeway.registry import Version
from ropeway.storage import hub


@dataclass(frozen=True, slots=True)
class Shared:
    """What goes to the Hub: path -> bytes of the files; the Hub's commit, None after a dry run."""

    repo: str
    version: str
    digest: str
    files: Mapping[str, int]
    commit: str | None


def push_hub(version: Version, repo: str, *, private: bool, dry_run: bool) -> Shared:
    """Upload a version to a model repository of the Hub, which is created if it is not there.

    Weights of an earlier version are taken away in the same commit: transformers would load stale ones beside new.

    Raises:
        RegistryError: It is withdrawn.
        DataError: Its bytes are not what was published.
        ConfigError: The Hub refuses: name, token, rights.
        TemporaryError: The Hub does not answer.
    """
    hub.check_repo(repo)
    pulled, label = pull_cached(version), str(version)
    paths = sorted(path for path in pulled.folder.rglob("*") if path.is_file())
    files = {path.relative_to(pulled.folder).as_posix(): path.stat().st_size for path in paths}
    commit = None
    if not dry_run:
        commit = hub.upload_model(repo, pulled.folder, message=f"{label} ({pulled.digest})", private=private)
    return Shared(repo, label, pulled.digest, files, commit)
