"""The stage graph of dvc.yaml and DVC's status of it. Only this module and `dvc_exchange.py` import DVC.

This process only queries DVC; stages run in their own processes (`dvc_stage.py`), which can be terminated.
Source of DVC's messages and shapes: dvc 3.67.1.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ropeway.config.frozen import read_version
from ropeway.config.load_params import load_profile
from ropeway.config.yaml_limits import check_limits
from ropeway.orchestration.guarded_dvc import COMMAND as DVC
from ropeway.orchestration.guarded_dvc import keep_state_private, refuse_outside_names
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.git import ask_git
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import Json, file_sha256
from ropeway.runtime.plain_http import check_encrypted
from ropeway.storage.s3_client import find_endpoint

if TYPE_CHECKING:  # DVC takes a second to import
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

_SHOWN_CHARACTERS = 60
_LOCK_REMEDY = "Restore it with `git checkout dvc.lock`, or remove it: the run-cache restores its entries"
_EVENTS = (
    (re.compile(r"Running stage '.+':"), "ran"),
    (re.compile(r"Stage '.+' is cached - skipping run, checking out outputs"), "restored"),
    (re.compile(r"Stage '.+' didn't change, skipping"), "unchanged"),
    (re.compile(r".*is busy, it is being blocked by:"), "busy"),
    (re.compile(r".*Unable to acquire lock"), "busy"),
    (re.compile(r"ERROR: failed to reproduce '.+': failed to run: .*, exited with (-?\d+)"), "failed"),
)

# Advice that DVC prints after every stage; it does not apply during a run.
_HINTS = (
    "To track the changes with git, run:",
    "git add ",
    "To enable auto staging, run:",
    "dvc config core.autostage",
    "Use `dvc push`",
    "Data and pipelines are up to date.",
    "Updating lock file",
    "Generating lock file",
)


class LockOut(TypedDict, total=False):
    """An output of a stage in dvc.lock and the run-cache; a folder's md5 ends in `.dir`."""

    path: str
    md5: str


class LockStage(TypedDict, total=False):
    """A stage in dvc.lock."""

    deps: list[LockOut]
    outs: list[LockOut]


class Lock(TypedDict, total=False):
    """The parts of a dvc.lock that are read; an entry of the run-cache has only `outs`."""

    stages: dict[str, LockStage]
    outs: list[LockOut]


class BusyError(TemporaryError):
    """Another dvc process holds DVC's locks, e.g. while it hashes outputs; retry later."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of dvc.yaml.

    Attributes:
        name: Its DVC address.
        deps: The stages whose outputs it reads, in the graph's order.
        parents: Those of `deps` that no other of `deps` depends on: the edges of a drawing (transitive reduction).
        refreshes: It runs at every start and reads no other stage: it fingerprints the inputs before the plan is made.
    """

    name: str
    deps: tuple[str, ...]
    parents: tuple[str, ...]
    refreshes: bool


@dataclass(frozen=True, slots=True)
class StagePlan(Stage):
    """What the run will do with a stage, and why.

    Attributes:
        will_run: Whether `dvc repro` will be called for it. DVC may still skip it if a stage before it ran and wrote
            the same bytes.
        reasons: Why it will run, or why not.
    """

    will_run: bool
    reasons: tuple[str, ...]


def load_graph(root: Path) -> list[Stage]:
    """Return the stages of a workspace, each after those it depends on, otherwise in the order of dvc.yaml.

    Raises:
        ConfigError: Not a DVC workspace, or dvc.yaml cannot be read.
    """
    with open_repo(root) as repo:
        return [stage for stage, _ in ordered(repo)]


def plan(root: Path, *, elsewhere: Collection[str] = ()) -> list[StagePlan]:
    """Return the plan of a run, in the graph's order. Stages that refresh must have run before.

    Of a stage in `elsewhere` a missing output is no reason to run it: the DVC remote has it, under the digest in
    dvc.lock.

    Raises:
        ConfigError: As in `load_graph`.
        BusyError: Another dvc process is writing in the workspace.
    """
    with open_repo(root) as repo:
        status, plans = repo.status(), dict[str, StagePlan]()
        for stage, own in ordered(repo):
            if stage.refreshes:
                will_run, reasons = False, ["refreshes fingerprints at every start"]
            elif own.frozen:
                will_run, reasons = False, ["frozen in dvc.yaml"]
            else:
                entries = status.get(own.addressing, [])
                reasons = _explain(own, _without_absent(own, entries, repo, elsewhere) if elsewhere else entries, root)
                reasons = reasons or [f"{name} will run" for name in stage.deps if plans[name].will_run]
                will_run = bool(reasons)
            why = tuple(reasons or ["nothing changed"])
            plans[stage.name] = StagePlan(stage.name, stage.deps, stage.parents, stage.refreshes, will_run, why)
        return list(plans.values())


def _without_absent(
    stage: "PipelineStage", entries: Sequence[Any], repo: "Repo", elsewhere: Collection[str]
) -> list[Any]:
    """Return DVC's status without outputs of stages that run elsewhere, if they are only absent here."""
    made = {
        str(out): (out.hash_info.value, not out.exists)
        for own in repo.index.stages
        if not own.is_data_source and _address(own) in elsewhere
        for out in own.outs
    }
    recorded = {str(item): item.hash_info.value for item in [*stage.deps, *stage.outs] if item.hash_info}
    kept: list[Any] = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            kept.append(entry)
            continue
        left = {
            kind: {
                path: change
                for path, change in changes.items()
                if made.get(path) != (recorded.get(path, ""), True)  # absent, and of the recorded digest
            }
            for kind, changes in entry.items()
        }
        kept += [{kind: changes} for kind, changes in left.items() if changes]
    return kept


def has_remote(root: Path) -> bool:
    """Return whether a DVC remote is configured, to pull from before a run and push to after it.

    Raises:
        ConfigError: The remote has no `verify`: DVC would accept any bytes it returns under a digest's name. Or its
            connection is not encrypted.
    """
    name, remotes = read_remotes(root)
    if name:
        check_remote_is_encrypted(name, remotes)
    if name and not remotes.get(name, {}).get("verify"):
        raise ConfigError(
            f"{root}: the DVC remote '{name}' is not verified, so a damaged object would be pulled as valid. Run "
            f"`dvc remote modify {name} verify true` (or `ropeway doctor --fix`) and commit .dvc/config"
        )
    return bool(name)


def check_remote_is_encrypted(name: str, remotes: Mapping[str, Mapping[str, object]]) -> None:
    """Raise ConfigError if a remote is reached on another machine without TLS, and the environment does not allow it.

    Where the remote of an S3 bucket names no server, the one of the environment or of the AWS configuration counts. Of
    other remotes the scheme of `url` is looked at.
    """
    facts = remotes.get(name, {})
    url, what = str(facts.get("url", "")), f"the DVC remote '{name}'"
    scheme, _, rest = url.partition("://")
    if scheme == "remote":  # remote://NAME/path is below another remote
        check_remote_is_encrypted(rest.partition("/")[0], {one: remotes[one] for one in remotes if one != name})
    elif scheme == "webhdfs" and facts.get("use_https"):
        return
    elif scheme == "s3":
        stated, profile, config_file = (
            None if facts.get(name) is None else str(facts[name]) for name in ("endpointurl", "profile", "configpath")
        )
        endpoint = find_endpoint(stated, profile, config_file, use_ssl=facts.get("use_ssl") is not False)
        check_encrypted(endpoint, what=f"the S3 server of {what}")
    else:
        check_encrypted(url, what=what)


def read_remotes(root: Path) -> tuple[str | None, dict[str, dict[str, object]]]:
    """Return the default remote's name (None if there is none) and the settings of each remote."""
    with open_repo(root) as repo:
        return repo.config["core"].get("remote"), {name: dict(facts) for name, facts in repo.config["remote"].items()}


def configure_remote(root: Path, *arguments: str) -> None:
    """Run `dvc remote` with these arguments; raise ConfigError if it fails."""
    keep_state_private()
    command = [*DVC, "remote", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"`dvc remote {' '.join(arguments)}` failed: {done.stderr.strip()}")


def read_definition(root: Path) -> dict[str, str]:
    """Return what determines the graph: the sha256 of every dvc.yaml, and the chosen profile."""
    with open_repo(root) as repo:
        files = sorted({root / own.path_in_repo for own in repo.index.stages if own.path_in_repo.endswith("dvc.yaml")})
    return {**{str(path): file_sha256(path) for path in files}, "profile": load_profile(root / "params.yaml")[0]}


def check_definition(root: Path, known: Mapping[str, str]) -> None:
    """Raise ConfigError if the graph or the line `profile:` was edited during a run.

    Each stage is its own DVC process, which reads them again and would run something else than planned.
    """
    files = {path: file_sha256(Path(path)) if Path(path).is_file() else "" for path in known if path != "profile"}
    now = {**files, "profile": load_profile(root / "params.yaml")[0]}
    if changed := [key for key in known if now[key] != known[key]]:
        what = f"profile, {known['profile']} -> {now['profile']}" if changed == ["profile"] else ", ".join(changed)
        raise ConfigError(
            f"{what}: was edited during this run of {known['profile']}. Completed stages are recorded with the inputs "
            f"they used; no further stage runs. Continue with `ropeway run --profile {known['profile']}`"
        )


def reproduce_command(name: str, *, force: bool = False, pull: bool = False) -> list[str]:
    """Return the command that updates one stage; it waits for DVC's lock instead of failing.

    `force` ignores DVC's caches. `pull` fetches outputs that the run-cache names; `dvc pull` fetches only its index
    (dvc 3.67.1).
    """
    options = [*(["--force", "--no-commit"] if force else []), *(["--pull"] if pull and not force else [])]
    return [*DVC, "--wait-for-lock", "repro", *options, "--single-item", name]


def parse_lock(data: bytes) -> Lock:
    """Return the content of a dvc.lock, which may be empty; raise ConfigError if it cannot be parsed.

    That of a version is named by its event, which nothing signs: the limits on YAML are checked before DVC reads it.
    """
    from dvc.utils.serialize import parse_yaml

    try:
        check_limits(data)
        lock: Lock = parse_yaml(data.decode(), "dvc.lock")
    except Exception as error:  # noqa: BLE001 - DVC and ruamel raise many classes
        raise ConfigError(f"dvc.lock: cannot be read ({type(error).__name__}). {_LOCK_REMEDY}") from None
    if lock and not isinstance(lock, dict):
        raise ConfigError(
            f"dvc.lock: cannot be read (expected a mapping, found a {type(lock).__name__}). {_LOCK_REMEDY}"
        )
    return lock or {}


def cache_folder(root: Path) -> Path:
    """Return the folder of a workspace's DVC cache."""
    with open_repo(root) as repo:
        return Path(repo.cache.local_cache_dir).resolve()


def object_path(objects: Path, name: str) -> Path:
    """Return the path of an object in the folder `files/md5` of a DVC cache."""
    return objects / name[:2] / name[2:]


def folder_members(objects: Path, name: str) -> Iterator[str]:
    """Yield the names of the objects of a folder (`….dir`); none where its listing is not in this cache."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        yield from (str(one["md5"]) for one in parse_json(object_path(objects, name).read_bytes()))


@contextmanager
def exclusive(root: Path, *, guard: str = "lock") -> Iterator[None]:
    """Hold one of DVC's locks, so that no other dvc process uses the cache; raise BusyError if one holds it."""
    from dvc.lock import make_lock

    with open_repo(root) as repo:
        hard = bool(repo.config["core"].get("hardlink_lock", False))
        with make_lock(str(Path(repo.tmp_dir) / guard), tmp_dir=repo.tmp_dir, hardlink_lock=hard):
            yield


def share_cache(root: Path, clone: Path) -> None:
    """Configure a clone to use this workspace's cache, remotes and private DVC settings."""
    private = root / ".dvc" / "config.local"
    if private.is_file():
        shutil.copyfile(private, clone / ".dvc" / private.name)
    with open_repo(root) as repo:
        cache = str(repo.cache.local_cache_dir)
    with open_repo(clone) as repo, repo.config.edit("local") as settings:
        settings.setdefault("cache", {})["dir"] = cache


def read_event(line: str) -> tuple[str, int | None] | None:
    """Return the event in a line of `dvc repro`: ran, restored, unchanged, busy, or failed with the exit code.

    >>> read_event("Stage 'train' didn't change, skipping")
    ('unchanged', None)
    """
    for pattern, event in _EVENTS:
        if match := pattern.match(line):
            return event, int(match.group(1)) if event == "failed" else None
    return None


def is_hint(line: str) -> bool:
    """Return whether a line of DVC needs no action during a run."""
    # After a kill DVC also reports that it cleared the dead process from its rwlock (dvc 3.67.1, `rwlock.py`).
    return line.strip().startswith(_HINTS) or "in RWLock-file" in line


@contextmanager
def open_repo(root: Path) -> "Iterator[Repo]":
    """Open a workspace's DVC repository; raise BusyError or ConfigError if that is not possible."""
    keep_state_private()
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    refuse_outside_names()
    try:
        with Repo(str(root)) as repo:
            yield repo
    except LockError as error:
        raise BusyError(
            f"{root}: another dvc process is running in this workspace. Wait for it or stop it: {error}"
        ) from None
    except DvcException as error:
        remedy = ". Run `git init` there" if "not a git repository" in str(error) else ""
        raise ConfigError(f"{root}: DVC cannot read this workspace: {error}{remedy}") from None


def ordered(repo: "Repo") -> "Iterator[tuple[Stage, PipelineStage]]":
    """Yield each stage with DVC's own object, in the graph's order.

    Raises:
        ConfigError: A file that git does not have contains stages, i.e. commands.
    """
    import networkx as nx

    _check_origin(repo)
    graph = repo.index.graph  # an edge goes from a consumer to its producer
    place = {own: number for number, own in enumerate(repo.index.stages)}
    order = list(nx.lexicographical_topological_sort(graph.reverse(), key=place.__getitem__))
    for own in order:
        if own.is_data_source:  # a file tracked by `dvc add`: a dependency that cannot run
            continue
        above = [other for other in order if graph.has_edge(own, other) and not other.is_data_source]
        refreshes = own.always_changed and not above
        parents = [other for other in above if not any(other in nx.descendants(graph, one) for one in above)]
        deps, direct = (tuple(_address(other) for other in some) for some in (above, parents))
        yield Stage(_address(own), deps, direct, refreshes), own


def _check_origin(repo: "Repo") -> None:
    """Raise ConfigError for what is not of `dvc add` in a file other than dvc.yaml that git does not have.

    DVC reads every `dvc.yaml` and `.dvc` file below the root that git does not ignore, those of a pulled package and of
    unpacked data, too. A stage that is always changed would be run at the start of every run, and an output that is not
    beside its `.dvc` file could be new code of the workspace.
    """
    root = Path(repo.root_dir)
    unusual = [
        own
        for own in repo.index.stages
        if own.cmd or own.is_import or any(Path(out.fs_path).parent != Path(own.path).parent for out in own.outs)
    ]
    for name in sorted({str(own.path_in_repo) for own in unusual}):
        if name != "dvc.yaml" and not ask_git(root, "--literal-pathspecs", "ls-files", "--", name):
            raise ConfigError(
                f"{root / name}: has commands, imports or outputs elsewhere for DVC and is not in git, so somebody "
                "else may have written it, e.g. with a package or with data. If it is yours, `git add` it; if not, "
                "move its folder out of this workspace"
            )


def _address(stage: "PipelineStage") -> str:
    """Return a stage's address relative to the root; `stage.addressing` is relative to this process's folder."""
    return stage.name if stage.path_in_repo == "dvc.yaml" else f"{stage.path_in_repo}:{stage.name}"


def _explain(stage: "PipelineStage", status: Sequence[Any], root: Path) -> list[str]:
    """Return why a stage must run, from DVC's status."""
    if not any(item.hash_info for item in [*stage.deps, *stage.outs]):
        return ["it has not run before"]
    if status and (other := _other_profile(stage, root)):
        return [f"the last run in this workspace was of profile '{other}'"]
    reasons: list[str] = []
    missing: list[str] = []
    for entry in status:
        if not isinstance(entry, Mapping):
            reasons.append(
                {"changed command": "its command changed", "always changed": "runs always"}.get(entry, entry)
            )
            continue
        for path, change in entry.get("changed deps", {}).items():
            if isinstance(change, Mapping):
                reasons += _explain_params(stage, path, change)
            else:
                reasons += _explain_dep(stage, path, change, root)
        outs = entry.get("changed outs", {}).items()
        missing += [f"its output {_place(path, root)} is missing" for path, change in outs if change == "deleted"]
        reasons += [f"its output {_place(path, root)} {_word(change)}" for path, change in outs if change != "deleted"]
    # DVC removes a stage's outputs before it runs, so after a kill they are missing besides the real reason.
    return reasons or missing


def _other_profile(stage: "PipelineStage", root: Path) -> str | None:
    """Return the profile that dvc.lock records for a stage, if it differs from the current one and is known."""
    for dep in stage.deps:
        place = _place(str(dep), root)
        if place.startswith(".identity/params-") and dep.hash_info and (root / place).is_file():
            then, now = read_version(root, dep.hash_info.value), json.loads((root / place).read_bytes())["of"]
            if then is not None and then["profile"] != now["profile"]:
                return str(then["profile"])
    return None


def _explain_dep(stage: "PipelineStage", path: str, change: str, root: Path) -> list[str]:
    """Return what changed in a dependency: the values of a frozen input, otherwise only that it changed."""
    place = _place(path, root)
    folder, _, name = place.rpartition("/")
    known = next((dep.hash_info.value for dep in stage.deps if str(dep) == path and dep.hash_info), None)
    if change == "modified" and folder == ".identity" and known and (old := read_version(root, known)) is not None:
        return describe_change(name.removesuffix(".json"), old, json.loads((root / place).read_bytes())["of"])
    return [f"{place} {_word(change)}"]


def describe_change(name: str, old: Json, new: Json) -> list[str]:
    """Return the differences in one of the frozen inputs, e.g. `learning_rate: 0.002 -> 0.003`.

    >>> describe_change("params-train", {"params": {"stop": {"a": 1}}}, {"params": {"stop": {"a": 2}}})
    ['stop.a: 1 -> 2']
    >>> describe_change("code-train", {"rows": "aa", "train.loss": "bb"}, {"rows": "aa", "train.loss": "cc"})
    ['code of train.loss changed']
    """
    if name.startswith("params-"):
        return list(changed_leaves(old["params"], new["params"]))
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    what = "code of " if name.startswith("code-") else {"sources": "source ", "base": "base: "}.get(name, "")
    return [f"{what}{key} changed" for key in keys]


def _explain_params(stage: "PipelineStage", path: str, changes: Mapping[str, str]) -> Iterator[str]:
    """Yield `key: old -> new` for each changed parameter; nested ones by their changed leaves."""
    dep = next(dep for dep in stage.deps if hasattr(dep, "read_params") and str(dep) == path)
    before, after = dep.hash_info.value or {}, dep.read_params()
    yield from changed_leaves(*({key: side.get(key) for key in changes} for side in (before, after)))


def changed_leaves(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    """Yield `key: old -> new` for each leaf that differs."""
    before, after = (dict(leaf for key in side for leaf in _leaves(key, side[key])) for side in (old, new))
    for leaf in dict.fromkeys([*before, *after]):
        if before.get(leaf) != after.get(leaf):
            yield f"{leaf}: {_shown(before.get(leaf))} -> {_shown(after.get(leaf))}"


def _leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _leaves(f"{key}[{number}]", inner)
    else:
        yield key, value


def _place(path: str, root: Path) -> str:
    """Return a path relative to the root; inside a workspace DVC prints it relative to this process's folder."""
    here = Path.cwd()
    return path if "://" in path or not here.is_relative_to(root) else os.path.relpath(here / path, root)


def _shown(value: object) -> str:
    text = "none" if value is None else str(value)  # null or a missing key, which DVC does not distinguish
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _word(change: str) -> str:
    return {
        "modified": "changed",
        "deleted": "is missing",
        "new": "is new",
        "not in cache": "is not in DVC's cache",
    }.get(change, change)
