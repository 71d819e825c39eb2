"""The door to the Hugging Face Hub: a branch to its commit, the files of a commit, downloads into its cache, uploads.

Where and as whom is environment, by huggingface_hub's names: HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_CACHE (or HF_HOME) and
HF_ENDPOINT. No word of a request or an answer gets into a message: a request holds the token.
"""

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ropeway.runtime.errors import ConfigError, TemporaryError, is_disk_full
from ropeway.runtime.manifest import write_atomic

if TYPE_CHECKING:  # a slow import
    from huggingface_hub import DatasetInfo, ModelInfo

Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TIMEOUT_SECONDS = 10
_KEYS = {"model": "model_name", "dataset": "sources"}


def resolve_commit(repo: str, revision: str, *, kind: Kind) -> str:
    """Return the commit (40 hex digits) that a branch or tag stands at now; offline, the one that the cache knows.

    Raises:
        ConfigError: No such repository or revision, no access, or offline and not in the cache.
        TemporaryError: The Hub does not answer.
    """
    if COMMIT.fullmatch(revision):
        return revision
    if is_offline():
        return _cached_commit(repo, revision, kind)
    found = _request_repo_info(repo, revision, kind).sha
    if not found or not COMMIT.fullmatch(found):
        raise ConfigError(f"{_KEYS[kind]}: {repo} at '{revision}': HF_ENDPOINT answers without a commit; correct it")
    return found


def list_files(repo: str, commit: str, *, kind: Kind) -> list[str]:
    """Return the names of a commit's files, sorted; offline, of those that the cache holds.

    Raises:
        ConfigError: As in `resolve_commit`.
        TemporaryError: The Hub does not answer.
    """
    if is_offline():
        folder = _cache_folder(repo, kind) / "snapshots" / commit
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(one.rfilename for one in _request_repo_info(repo, commit, kind).siblings or [])


def download_files(repo: str, commit: str, names: list[str], *, kind: Kind, revision: str) -> Path:
    """Return a folder that holds these files of a commit, once those are in the cache that were not.

    The cache is told that `revision` stands at this commit, so that the same run works offline afterwards.

    Raises:
        ConfigError: As in `resolve_commit`.
        TemporaryError: The Hub does not answer, or the disk is full; what has come stays in the cache.
    """
    from huggingface_hub import snapshot_download

    exactly = [glob.escape(name) for name in names]
    with _translate_errors(repo, commit, kind):
        folder = Path(snapshot_download(repo, repo_type=kind, revision=commit, allow_patterns=exactly))
    if lost := [name for name in names if not (folder / name).is_file()]:
        raise _not_cached(repo, commit, kind, f"{lost[0]} ({len(lost)} of {len(names)} files)")
    if not COMMIT.fullmatch(revision) and not is_offline():
        write_atomic(_cache_folder(repo, kind) / "refs" / revision, commit.encode())
    return folder


def check_repo(repo: str) -> None:
    """Raise ConfigError unless `repo` can be a repository's name."""
    if not _REPO.fullmatch(repo):
        raise ConfigError(f"{repo}: expected owner/name, as in OpenAssistant/llama2-13b-orca-8k-3319")


def upload_model(repo: str, folder: Path, *, message: str, private: bool) -> str:
    """Make a model repository hold a folder's files in one commit, no weights beside them; return that commit.

    Raises:
        ConfigError: Offline, no token, or one that may not write there.
        TemporaryError: The Hub does not answer.
    """
    import huggingface_hub.errors as refusals
    from huggingface_hub import HfApi, get_token

    if is_offline():
        raise ConfigError(f"{repo}: HF_HUB_OFFLINE is set; take it away to upload")
    if not get_token():
        raise ConfigError(f"{repo}: nobody is logged in to the Hub; set HF_TOKEN to a token that may write there")
    stale = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=stale)
    except refusals.HfHubHTTPError as error:  # its text may hold the request, and that the token
        status = error.response.status_code
        if status in (401, 403, 404):
            raise ConfigError(f"{repo}: the Hub does not let this HF_TOKEN write there ({status})") from None
        raise TemporaryError(f"{repo}: the Hub answers {status}; run it again, what has arrived stays") from None
    except (OSError, refusals.HTTPError) as error:  # type: ignore[attr-defined]  # httpx's base class
        raise TemporaryError(f"{repo}: the Hub cannot be reached ({type(error).__name__}); run it again") from None
    return str(done.oid)


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids to ask the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _request_repo_info(repo: str, revision: str, kind: Kind) -> "DatasetInfo | ModelInfo":
    """Return what the Hub says of a repository at a revision: one request, not repeated."""
    from huggingface_hub import HfApi

    with _translate_errors(repo, revision, kind):
        ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        return ask(repo, revision=revision, timeout=_TIMEOUT_SECONDS)


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
        raise ConfigError(f"{reference}: expected a commit of 40 hex digits; delete it and run once with a network")
    return found


def _not_cached(repo: str, revision: str, kind: Kind, what: str) -> ConfigError:
    folder = _cache_folder(repo, kind)
    return ConfigError(
        f"{_KEYS[kind]}: {repo} at '{revision}': HF_HUB_OFFLINE is set and the cache {folder} does not hold {what}. "
        "Run once without HF_HUB_OFFLINE where there is a network, or copy a warm cache and point HF_HUB_CACHE to it"
    )


@contextmanager
def _translate_errors(repo: str, revision: str, kind: Kind) -> Iterator[None]:
    """Translate the Hub's answers into decisions."""
    import huggingface_hub.errors as hub

    where = f"{_KEYS[kind]}: {repo} at '{revision}'"
    try:
        yield
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        if is_offline():
            raise _not_cached(repo, revision, kind, "all of its files") from None
        raise _unavailable_error(where, "does not answer") from None
    except hub.HfHubHTTPError as error:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
        raise _refused(where, type(error).__name__, error.response.status_code, page) from None
    except ValueError as error:  # a name that cannot be one; its text may hold the token, if that cannot be sent
        raise ConfigError(f"{where}: {type(error).__name__}; correct the name (owner/name) and HF_TOKEN") from None
    except OSError as error:
        if is_disk_full(error):
            full = f"the disk of {_cache_folder(repo, kind)} is full; free space there"
            raise TemporaryError(f"{where}: {full}") from None
        raise _unavailable_error(where, f"or its cache cannot be used ({type(error).__name__})") from None
    except hub.HTTPError as error:  # type: ignore[attr-defined]  # httpx's base class, under whichever name it has
        raise _unavailable_error(where, f"cannot be reached ({type(error).__name__})") from None


# Source: huggingface_hub 2.4's errors, told apart by the Hub's header X-Error-Code; then plain HTTP.
_NAMED = {
    "GatedRepoError": "is gated: accept its licence on {page}, then set HF_TOKEN to a token of that account",
    "RepositoryNotFoundError": "the Hub shows no such repository to this user; correct the name, or set HF_TOKEN to a "
    "token that may read it",
    "RevisionNotFoundError": "there is no such revision; see {page}/commits/main and pin a commit",
}
_BY_STATUS = {
    401: "the Hub does not show it to this user (401); correct the name, or set HF_TOKEN to a valid token that may "
    "read it",
    403: "the Hub does not let this HF_TOKEN in (403); accept the repository's licence on {page} with that account, or "
    "give the token the right to read it",
    404: "not on the Hub (404); correct the name, the revision or HF_ENDPOINT",
}


def _refused(where: str, kind: str, status: int, page: str) -> ConfigError | TemporaryError:
    text = _NAMED.get(kind) or _BY_STATUS.get(status)
    return ConfigError(f"{where}: {text.format(page=page)}") if text else _unavailable_error(where, f"answers {status}")


def _unavailable_error(where: str, how: str) -> TemporaryError:
    return TemporaryError(
        f"{where}: the Hub {how}. Try again later; or pin the commit as revision and, with its files in the cache, set "
        "HF_HUB_OFFLINE=1"
    )
