"""`ropeway reproduce`: produces a version again from its registry record, in a clone, and compares the two.

Code and params come from git at its revision, data from DVC by digest. Every other stage is computed again without
DVC's cache and run-cache, since their content is what has to be verified.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ropeway.config.addresses import without_secrets
from ropeway.config.edit import choose_profile
from ropeway.config.load_params import read_block
from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration.dvc_stage import LineWriter, Site, run_command, update_stage
from ropeway.orchestration.guarded_dvc import COMMAND as DVC
from ropeway.orchestration.revision import code_environment
from ropeway.registry import Provenance, Version
from ropeway.registry.version_manifest import build_version_manifest
from ropeway.runtime.errors import ConfigError, DataError, RegistryError
from ropeway.runtime.git import ask_git
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.lock import HeldLock, workspace_lock
from ropeway.runtime.manifest import Json, digest_of, load_manifest
from ropeway.runtime.workspace import Workspace

_FETCH = "fetch"  # the only stage whose output is restored, not computed: its sources may have changed
# Facts of a training attempt that can change rounding, and so the weights. Clock and host cannot.
_ENVIRONMENT = (
    "python", "torch", "deepspeed", "transformers", "device", "kernels", "ranks", "threads_per_rank", "attention",
)  # fmt: skip
_CLOCK = "/provenance.json"  # seconds and hosts: always differs
_WORDS = {
    "code": "its code differs",
    "sources": "the sources differ now (its data was restored by digest)",
    "base": "the base differs",
    "deepspeed": "the DeepSpeed JSON differs",
    "prompts": "the prompts differ",
    "contamination": "the evaluation prompts differ",
    "template": "the chat template differs",
}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The recorded facts of a run.

    Attributes:
        files: Path in the package -> sha256.
        facts: The package manifest without its files.
        block: The profile's block of params.yaml.
    """

    files: Mapping[str, str]
    facts: Json
    block: Json
    lock: Json
    timings: Json


@dataclass(frozen=True, slots=True)
class Reproduction:
    """The result of a reproduction.

    Attributes:
        folder: The clone with the new run, which is kept.
        weights: `same` or `other`.
        differences: Every difference as a sentence, causes first.
    """

    version: str
    digest: str
    folder: str
    weights: str
    other_weights: tuple[str, ...]
    differences: tuple[str, ...]
    seconds: float


def reproduce(root: Path, version: Version, *, target: Path | None, write_line: LineWriter) -> Reproduction:
    """Produce a version again and compare it with the published one.

    The clone is made in `target`, by default `.work/reproduce/NAME-DIGEST`. An existing clone of that revision, from an
    attempt that was stopped, is continued.

    Raises:
        RegistryError: The version was published from an uncommitted tree or without git.
        ConfigError: git does not have the revision, the target folder is not empty, or params at the revision are not
            the version's.
        DataError: The data can neither be restored nor fetched with the same digest, or the signature policy refuses
            the version.
    """
    began = time.monotonic()
    version.check_policy()  # before its params and code run
    label = str(version)
    commit = check_revision(version.record["provenance"], version.clean_commit, label)
    clone = target or root / ".work" / "reproduce" / f"{version.name}-{version.digest[:12]}"
    site_root = clone_revision(root, commit, clone.absolute(), write_line)
    workspace = Workspace(site_root, version.name)
    then = read_published(version, site_root)
    choose_profile(site_root, version.name)
    write_lock(version, site_root)
    with workspace_lock(site_root, command=f"ropeway reproduce {label}", profile=version.name) as held:
        site = Site(site_root, HeldLock(held.handle, {**held.environment, **plan_environment(clone, then)}))
        run_stages(site, root, workspace, version.manifest.facts["digests"]["raw"], write_line)
    now = read_reproduced(workspace)
    changed, differences = tuple(other_weights(then, now)), tuple(describe_differences(then, now))
    weights, seconds = "other" if changed else "same", round(time.monotonic() - began, 1)
    return Reproduction(label, version.digest, str(site_root), weights, changed, differences, seconds)


def check_revision(provenance: Provenance, clean_commit: str | None, label: str) -> str:
    """Return the commit a version was made from; raise RegistryError if git does not have all of its code."""
    commit, changed = clean_commit or provenance.get("git"), provenance.get("dirty_files", [])
    if commit and not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", str(commit)):
        raise RegistryError(
            f"{label} names {str(commit)[:80]!r} as its revision, expected a git commit of 40 hex digits"
        )
    if clean_commit:
        return clean_commit
    if not commit:
        raise RegistryError(f"{label} was published without git, so its code is unknown. Choose another version")
    if provenance.get("dirty"):
        raise RegistryError(
            f"{label} was published with uncommitted changes to revision {commit[:12]} in "
            f"{', '.join(changed) or 'files that were not recorded'}, so its code is not in git. Choose another version"
        )
    return str(commit)


def clone_revision(root: Path, commit: str, clone: Path, write_line: LineWriter) -> Path:
    """Clone this repository at a commit and return the workspace in the clone; raise ConfigError if that fails."""
    top = ask_git(root, "rev-parse", "--show-toplevel")
    prefix = ask_git(root, "rev-parse", "--show-prefix")
    if top is None or prefix is None:
        raise ConfigError(
            f"{root} is not in a git repository. Run this in a clone of the project that produced the version"
        )
    if ask_git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        raise ConfigError(
            f"{root}: git does not have revision {commit}. `git fetch` it from the repository that produced it, or run "
            "this there"
        )
    if clone.is_dir() and any(clone.iterdir()):
        if (clone / ".git").is_dir() and ask_git(clone, "rev-parse", "HEAD") == commit:
            write_line(f"continuing in {clone}")
            return clone / prefix
        raise ConfigError(
            f"{clone} is not a clone of revision {commit[:12]}. Remove it, or choose another folder with --to"
        )
    clone.parent.mkdir(parents=True, exist_ok=True)
    write_line(f"cloning {commit[:12]} to {clone}")
    for command in (
        ("clone", "--quiet", "--no-checkout", top, str(clone)),
        ("-C", str(clone), "-c", "advice.detachedHead=false", "checkout", "--quiet", "--detach", commit),
    ):
        done = subprocess.run(["git", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"{clone}: git {command[0]} failed: {done.stderr.strip()}. Remove {clone} and try again")
    return clone / prefix


def read_published(version: Version, site_root: Path) -> RunRecord:
    """Return the published run's record; raise ConfigError if params at its revision are not the package's."""
    name = version.name
    kept = site_root / ".work" / "published.yaml"
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(version.read_file("run.yaml") or b"")
    block = read_block(kept, name)
    if block != without_secrets(read_block(site_root / "params.yaml", name)):
        raise ConfigError(
            f"{site_root / 'params.yaml'}: the block '{name}' at that revision differs from the package's run.yaml; "
            "the version was published with params that are not in git. Choose another version"
        )
    return RunRecord(
        files={file.path: file.sha256 for file in version.manifest.files},
        facts=dict(version.manifest.facts),
        block=block,
        lock=graph.parse_lock(version.read_file("dvc.lock", attached=True) or b""),
        timings=parse_json(version.read_file("provenance.json", attached=True) or b"{}"),
    )


def read_reproduced(workspace: Workspace) -> RunRecord:
    """Return the record of the new run."""
    # Revisions before `pages/` existed have the pages in their package.
    pages = workspace.pages if workspace.pages.is_dir() else None
    manifest, _ = build_version_manifest(workspace.package, pages, workspace.profile)
    return RunRecord(
        files={file.path: file.sha256 for file in manifest.files},
        facts=manifest.facts,
        block=without_secrets(read_block(workspace.root / "params.yaml", workspace.profile)),
        lock=graph.parse_lock((workspace.root / "dvc.lock").read_bytes()),
        timings=parse_json(workspace.timings.read_bytes()),
    )


def write_lock(version: Version, site_root: Path) -> None:
    """Put the version's dvc.lock into the clone; raise RegistryError if none was recorded."""
    lock = version.read_file("dvc.lock", attached=True)
    if lock is None:
        raise RegistryError(
            f"{version}: no dvc.lock was recorded with it, so its data cannot be restored. Choose another version"
        )
    (site_root / "dvc.lock").write_bytes(lock)


def plan_environment(clone: Path, then: RunRecord) -> dict[str, str]:
    """Return the environment of the stages: the revision's own code and the published run's rank count."""
    planned = code_environment(clone)
    ranks = [attempt.get("ranks") for attempt in then.timings.get("attempts", [])]
    if ranks and ranks[-1] and "ROPEWAY_RANKS" not in os.environ:
        planned["ROPEWAY_RANKS"] = str(ranks[-1])
    return planned


def run_stages(site: Site, root: Path, workspace: Workspace, raw: str, write_line: LineWriter) -> None:
    """Restore the data and run every other stage; raise DataError if fetched data differs from the published run's."""
    restored = restore_data(site, root, workspace, raw, write_line)
    for stage in graph.load_graph(site.root):
        if stage.name == _FETCH and restored:
            write_line(f"{stage.name}: restored by digest")
            continue
        write_line(f"{stage.name}: running")
        update_stage(site, stage.name, write_line, force=not stage.refreshes)
        if stage.name == _FETCH and (found := _digest(workspace.raw)) != raw:
            raise DataError(
                f"{workspace.raw}: the sources now give data with digest {found[:12]}…, expected {raw[:12]}…, which is "
                "neither in DVC's cache nor on a remote. Restore the sources, or run `dvc push` where the cache is"
            )


def restore_data(site: Site, root: Path, workspace: Workspace, raw: str, write_line: LineWriter) -> bool:
    """Restore `raw/` from this workspace's DVC cache or the remote; return whether it has the version's digest."""
    graph.share_cache(root, site.root)
    place = workspace.raw.relative_to(site.root).as_posix()
    for verb in ("checkout", *(["pull"] if graph.has_remote(site.root) else [])):
        code, _ = run_command(site, verb, [*DVC, verb, place], write_line)
        if not code and workspace.raw.is_dir() and _digest(workspace.raw) == raw:
            return True
    write_line("the data is not in DVC's cache or remote; fetching it from its sources")
    return False


def _digest(folder: Path) -> str:
    return digest_of(load_manifest(folder, remedy="Remove the clone and reproduce again"))


def other_weights(then: RunRecord, now: RunRecord) -> list[str]:
    """Return the weight files that differ or exist in only one of the two."""
    return [name for name in _other_files(then, now) if name.endswith(".safetensors")]


def describe_differences(then: RunRecord, now: RunRecord) -> list[str]:
    """Return a sentence for every difference, causes before consequences; empty for equal runs."""
    return [
        *(f"params: {line}" for line in _compare(_leaves(then.block), _leaves(now.block))),
        *_environment(then.timings, now.timings),
        *_stages(then.lock, now.lock),
        *(f"{line}" for line in _compare(_leaves(then.facts), _leaves(now.facts))),
        *(f"{name}: bytes differ" for name in _other_files(then, now)),
    ]


def _other_files(then: RunRecord, now: RunRecord) -> list[str]:
    names = sorted({*then.files, *now.files})
    return [name for name in names if then.files.get(name) != now.files.get(name)]


def _environment(then: Json, now: Json) -> Iterator[str]:
    old, new = (list(timings.get("attempts", [])) for timings in (then, now))
    if not old:
        yield "environment: not recorded for the published run"
        return
    if not new:
        yield "environment: not recorded for this run"
        return
    for key in _ENVIRONMENT:
        seen = [list(dict.fromkeys(str(attempt.get(key)) for attempt in attempts)) for attempts in (old, new)]
        if seen[0] != seen[1] and any(key in attempt for attempt in old):
            yield f"{key.replace('_', ' ')}: published with {', then '.join(seen[0])}, now {', then '.join(seen[1])}"


def _stages(then: Json, now: Json) -> Iterator[str]:
    """Yield stages whose external inputs differ, and stages that wrote different outputs from equal inputs."""
    new = now.get("stages", {})
    for name, old in then.get("stages", {}).items():
        if name not in new:
            continue
        read = [path for path in _other_entries(old, new[name], "deps") if path.startswith(".identity/")]
        for path in read:
            kind = path.removeprefix(".identity/").removesuffix(".json").split("-")[0]
            yield f"stage {name}: {_WORDS.get(kind, path)}"
        left = [path for path in _other_entries(old, new[name], "outs") if not path.endswith(_CLOCK)]
        if left and not _other_entries(old, new[name], "deps"):
            yield f"stage {name}: equal inputs, different output {', '.join(left)}"


def _other_entries(then: Json, now: Json, kind: str) -> list[str]:
    old, new = ({one["path"]: one.get("md5") for one in stage.get(kind, [])} for stage in (then, now))
    return [path for path in old if path in new and old[path] != new[path]]


def _compare(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for key in dict.fromkeys([*then, *now]):
        if then.get(key) != now.get(key):
            yield f"{key}: published with {then.get(key, 'no value')}, now {now.get(key, 'no value')}"


def _leaves(value: object, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        return {name: text for inner, one in value.items() for name, text in _leaves(one, f"{key}.{inner}").items()}
    return {key.removeprefix("."): str(value)}
