"""Hugging Face Hub client: resolve revisions to commits, list and download files into the cache, upload models.

The environment variables are those of huggingface_hub: HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_CACHE (or HF_HOME) and
HF_ENDPOINT. Messages never include text of a request or response, which can have the token.
"""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ropeway.runtime.errors import ConfigError, TemporaryError, is_disk_full
from ropeway.runtime.manifest import write_atomic
from ropeway.runtime.plain_http import check_encrypted

if TYPE_CHECKING:  # a slow import
    from huggingface_hub import DatasetInfo, ModelInfo

Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TIMEOUT_SECONDS = 10
_KEYS = {"model": "model_name", "dataset": "sources"}


def resolve_commit(repo: str, revision: str, *, kind: Kind) -> str:
    """Return the commit (40 hex digits) of a branch or tag; offline, the commit in the cache.

    Raises:
        ConfigError: The repository or revision does not exist, access is denied, or offline and not in the cache.
        TemporaryError: The Hub is unavailable.
    """
    if COMMIT.fullmatch(revision):
        return revision
    if is_offline():
        return _cached_commit(repo, revision, kind)
    found = _request_repo_info(repo, revision, kind).sha
    if not found or not COMMIT.fullmatch(found):
        raise ConfigError(
            f"{_KEYS[kind]}: {repo} at '{revision}': the server at HF_ENDPOINT returned no commit. Correct HF_ENDPOINT"
        )
    return found


def list_files(repo: str, commit: str, *, kind: Kind) -> list[str]:
    """Return the sorted names of the files of a commit; offline, of the files in the cache.

    Raises:
        ConfigError: As in `resolve_commit`.
        TemporaryError: The Hub does not answer.
    """
    if is_offline():
        folder = _cache_folder(repo, kind) / "snapshots" / commit
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(one.rfilename for one in _request_repo_info(repo, commit, kind).siblings or [])


def find_cached(repo: str, revision: str, *, kind: Kind) -> Path | None:
    """Return the cache's folder of a branch, tag or commit, with the files that were downloaded; None if it has none.

    No request is made.
    """
    try:
        commit = revision if COMMIT.fullmatch(revision) else _cached_commit(repo, revision, kind)
    except ConfigError:
        return None
    folder = _cache_folder(repo, kind) / "snapshots" / commit
    return folder if folder.is_dir() else None


def download_files(repo: str, commit: str, names: list[str], *, kind: Kind, revision: str) -> Path:
    """Download the missing files of a commit into the cache; return the folder of the snapshot.

    The cache also records the commit of `revision`, so that the same run works offline later.

    Raises:
        ConfigError: As in `resolve_commit`.
        TemporaryError: The Hub is unavailable, or the disk is full; downloaded files stay in the cache.
    """
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    with _translate_errors(repo, commit, kind):
        folder = Path(snapshot_download(repo, repo_type=kind, revision=commit, allow_patterns=patterns))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise _not_cached(repo, commit, kind, f"{missing[0]} ({len(missing)} of {len(names)} files)")
    if not COMMIT.fullmatch(revision) and not is_offline():
        write_atomic(_cache_folder(repo, kind) / "refs" / revision, commit.encode())
    return folder


def check_repo(repo: str) -> None:
    """Raise ConfigError unless `repo` is a valid repository name."""
    if not _REPO.fullmatch(repo):
        raise ConfigError(f"{repo}: expected owner/name, e.g. OpenAssistant/llama2-13b-orca-8k-3319")


def upload_model(repo: str, folder: Path, *, message: str, private: bool) -> str:
    """Upload a folder to a model repository in one commit and delete all other weights in it; return the commit.

    Raises:
        ConfigError: Offline, no token, or the token has no write access.
        TemporaryError: The Hub is unavailable.
    """
    import huggingface_hub.errors as refusals
    from huggingface_hub import HfApi, get_token

    if is_offline():
        raise ConfigError(f"{repo}: HF_HUB_OFFLINE is set. Unset it to upload")
    check_endpoint()
    if not get_token():
        raise ConfigError(f"{repo}: no Hub token found. Set HF_TOKEN to a token with write access")
    stale = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=stale)
    except refusals.HfHubHTTPError as error:  # its text can have the request with the token
        status = error.response.status_code
        if status in (401, 403, 404):
            raise ConfigError(
                f"{repo}: HF_TOKEN has no write access ({status}). Use a token with write access to this repository"
            ) from None
        raise TemporaryError(
            f"{repo}: the Hub returned {status}. Run the command again; uploaded files are kept"
        ) from None
    except (OSError, refusals.HTTPError) as error:  # type: ignore[attr-defined]  # httpx's base class
        raise TemporaryError(
            f"{repo}: cannot connect to the Hub ({type(error).__name__}). Run the command again"
        ) from None
    return str(done.oid)


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) disables requests to the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _request_repo_info(repo: str, revision: str, kind: Kind) -> "DatasetInfo | ModelInfo":
    """Return the Hub's info about a repository at a revision; one request without retries."""
    from huggingface_hub import HfApi

    with _translate_errors(repo, revision, kind):
        request = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        return request(repo, revision=revision, timeout=_TIMEOUT_SECONDS)


def check_endpoint() -> None:
    """Raise ConfigError if HF_ENDPOINT is a server on another machine without encryption."""
    check_encrypted(os.environ.get("HF_ENDPOINT", ""), what="HF_ENDPOINT")


def _cache_folder(repo: str, kind: Kind) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"


def _cached_commit(repo: str, revision: str, kind: Kind) -> str:
    # Source of the layout: huggingface_hub 2.4, "Understand caching": refs/<revision> holds the commit.
    reference = _cache_folder(repo, kind) / "refs" / revision
    if ".." in Path(revision).parts or not reference.is_file():
        raise _not_cached(repo, revision, kind, "the commit of that revision")
    found = reference.read_text(encoding="utf-8").strip()
    if not COMMIT.fullmatch(found):
        raise ConfigError(
            f"{reference}: expected a commit of 40 hex digits. Delete the file, then run once with network access"
        )
    return found


def _not_cached(repo: str, revision: str, kind: Kind, what: str) -> ConfigError:
    folder = _cache_folder(repo, kind)
    return ConfigError(
        f"{_KEYS[kind]}: {repo} at '{revision}': HF_HUB_OFFLINE is set and the cache {folder} does not have {what}. "
        "Run once without HF_HUB_OFFLINE, or set HF_HUB_CACHE to a copy of a complete cache"
    )


@contextmanager
def _translate_errors(repo: str, revision: str, kind: Kind) -> Iterator[None]:
    """Translate Hub errors into Ropeway errors, after `check_endpoint`."""
    check_endpoint()
    import huggingface_hub.errors as hub

    where = f"{_KEYS[kind]}: {repo} at '{revision}'"
    try:
        yield
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        if is_offline():
            raise _not_cached(repo, revision, kind, "all of its files") from None
        raise _unavailable_error(where, "does not respond") from None
    except hub.HfHubHTTPError as error:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
        raise _response_error(where, type(error).__name__, error.response.status_code, page) from None
    except ValueError as error:  # an invalid name or token; its text can have the token
        raise ConfigError(
            f"{where}: invalid name or token ({type(error).__name__}). Correct the name (owner/name) and HF_TOKEN"
        ) from None
    except OSError as error:
        if is_disk_full(error):
            full = f"the disk of {_cache_folder(repo, kind)} is full. Free space, then run the command again"
            raise TemporaryError(f"{where}: {full}") from None
        raise _unavailable_error(where, f"or its cache is not usable ({type(error).__name__})") from None
    except hub.HTTPError as error:  # type: ignore[attr-defined]  # httpx's base class
        raise _unavailable_error(where, f"is not reachable ({type(error).__name__})") from None


# Source: errors of huggingface_hub 2.4, by the response header X-Error-Code; then by HTTP status.
_BY_ERROR_NAME = {
    "GatedRepoError": "the repository is gated. Accept its license on {page}, then set HF_TOKEN to a token of that "
    "account",
    "RepositoryNotFoundError": "the repository does not exist or is private. Correct the name, or set HF_TOKEN to a "
    "token with read access",
    "RevisionNotFoundError": "the revision does not exist. Pin a commit from {page}/commits/main",
}
_BY_STATUS = {
    401: "access denied (401). Correct the name, or set HF_TOKEN to a valid token with read access",
    403: "access denied for this HF_TOKEN (403). Accept the license on {page} with that account, or grant the token "
    "read access",
    404: "not found on the Hub (404). Correct the name, the revision or HF_ENDPOINT",
}


def _response_error(where: str, kind: str, status: int, page: str) -> ConfigError | TemporaryError:
    text = _BY_ERROR_NAME.get(kind) or _BY_STATUS.get(status)
    return (
        ConfigError(f"{where}: {text.format(page=page)}") if text else _unavailable_error(where, f"returned {status}")
    )


def _unavailable_error(where: str, how: str) -> TemporaryError:
    return TemporaryError(
        f"{where}: the Hub {how}. Try again later, or, if the files are in the cache, pin the commit as revision and "
        "set HF_HUB_OFFLINE=1"
    )
