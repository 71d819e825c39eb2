"""Names for shell completion: profiles, stages, versions. Each reads a few files, imports little and never fails.

A shell runs them at every press of the tab key, so a fault is no message: there is nothing to complete.
"""

import io
import re
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ropeway.runtime.workspace import Workspace, find_root

_NO_PROFILES = ("profile", "presets")
_TOP_KEY = re.compile(r"(?m)^([A-Za-z0-9_][A-Za-z0-9_.-]*):")
_STAGE_KEY = re.compile(r"(?m)^  ([A-Za-z0-9_][A-Za-z0-9_-]*):")
_COMPLETE = "_ROPEWAY_COMPLETE"  # the variable of typer's scripts


def complete_profile(incomplete: str) -> list[str]:
    """Return the profiles of params.yaml that begin so."""
    return _matching(_profiles, incomplete)


def complete_block(incomplete: str) -> list[str]:
    """Return the profiles and presets of params.yaml that begin so."""
    return sorted({*_matching(_profiles, incomplete), *_matching(_presets, incomplete)})


def complete_stage(incomplete: str) -> list[str]:
    """Return the stages of dvc.yaml that begin so."""
    return _matching(_stages, incomplete)


def complete_model(incomplete: str) -> list[str]:
    """Return the models of a registry in a folder that begin so."""
    return _matching(_models, incomplete)


def complete_version(incomplete: str) -> list[str]:
    """Return NAME@ALIAS and NAME@v3 of a registry in a folder that begin so; a registry on S3 is not asked."""
    return _matching(_versions, incomplete)


def complete_alias(incomplete: str) -> list[str]:
    """Return NAME@ALIAS of a registry in a folder that begin so."""
    return _matching(_aliases, incomplete)


def _matching(list_names: Callable[[Path], Iterator[str]], incomplete: str) -> list[str]:
    try:
        return sorted({name for name in list_names(find_root()) if name.startswith(incomplete)})
    except Exception:  # noqa: BLE001 - whatever is wrong, the command itself reports it
        return []


def _profiles(root: Path) -> Iterator[str]:
    keys = _TOP_KEY.findall((root / "params.yaml").read_text(encoding="utf-8"))
    yield from (key for key in keys if key not in _NO_PROFILES)


def _presets(root: Path) -> Iterator[str]:
    _, _, body = (root / "params.yaml").read_text(encoding="utf-8").partition("\npresets:\n")
    end = re.search(r"(?m)^[A-Za-z]", body)
    yield from _STAGE_KEY.findall(body[: end.start()] if end else body)


def _stages(root: Path) -> Iterator[str]:
    text = (root / "dvc.yaml").read_text(encoding="utf-8")
    _, _, body = text.partition("\nstages:\n")
    end = re.search(r"(?m)^[A-Za-z]", body)
    yield from _STAGE_KEY.findall(body[: end.start()] if end else body)


def _model_folders(root: Path) -> list[Path]:
    address = urlsplit(Workspace(root, "").registry_url)
    return sorted((Path(unquote(address.path)) / "models").iterdir()) if address.scheme == "file" else []


def _models(root: Path) -> Iterator[str]:
    yield from (folder.name for folder in _model_folders(root))


def _aliases(root: Path) -> Iterator[str]:
    for folder in _model_folders(root):
        yield from (f"{folder.name}@{alias.name}" for alias in folder.glob("aliases/*"))


def _versions(root: Path) -> Iterator[str]:
    yield from _aliases(root)
    for folder in _model_folders(root):
        yield from (f"{folder.name}@v{int(event.stem)}" for event in folder.glob("versions/*.json"))


def complete_split_words(environment: MutableMapping[str, str], run: Callable[[], object]) -> bool:
    """Complete a word that bash has split at its `@`; return False, and run nothing, if this is not that.

    Bash counts `laptop@ca` as three words and replaces only the last one (COMP_WORDBREAKS has `@`).

    Args:
        environment: Variables of the process, among them those of typer's script for bash.
        run: Prints the completions of the words in `environment`, one per line.
    """
    if environment.get(_COMPLETE) != "complete_bash":
        return False
    words, at = environment.get("COMP_WORDS", "").split("\n"), int(environment.get("COMP_CWORD") or 0)
    mark = at if words[at : at + 1] == ["@"] else at - 1
    if mark < 1 or words[mark : mark + 1] != ["@"]:
        return False
    prefix = f"{words[mark - 1]}@"
    joined = prefix + "".join(words[mark + 1 : at + 1])
    environment.update(COMP_WORDS="\n".join([*words[: mark - 1], joined]), COMP_CWORD=str(mark - 1))
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        run()
    found = (line.removeprefix(prefix) for line in printed.getvalue().splitlines())
    print("\n".join(found), flush=True)
    return True
