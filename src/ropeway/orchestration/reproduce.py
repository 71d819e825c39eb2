"""`ropeway reproduce`: a version made again from what the registry keeps of it, in a clone, and held against it.

git gives the code and params of its revision, DVC the data by digest. Every other stage is computed again: neither
DVC's cache of outputs nor its run-cache is asked, since what they hold is what is to be proved.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ropeway.config.addresses import without_secrets
from ropeway.config.edit import choose_profile
from ropeway.config.load_params import read_block
from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration.dvc_stage import Say, Site, bring_up, run_command
from ropeway.orchestration.revision import ask_git
from ropeway.registry import Provenance, Version
from ropeway.registry.version_manifest import build_version_manifest
from ropeway.runtime.errors import ConfigError, DataError, RegistryError
from ropeway.runtime.lock import Held, workspace_lock
from ropeway.runtime.manifest import Json, digest_of, load_manifest
from ropeway.runtime.workspace import Workspace

_FETCH = "fetch"  # the one stage whose result is restored rather than made: data changes where it came from
# Of an attempt at training: what can change its rounding, hence its weights. Clock and host cannot.
_ENVIRONMENT = (
    "python", "torch", "deepspeed", "transformers", "device", "kernels", "ranks", "threads_per_rank", "attention",
)  # fmt: skip
_CLOCK = "/provenance.json"  # seconds and hosts: another one every time
_WORDS = {
    "code": "its code means something else",
    "sources": "the sources are others now (its data was restored by digest all the same)",
    "base": "the base is another one",
    "deepspeed": "the DeepSpeed JSON is another one",
    "prompts": "the prompts are others",
    "contamination": "the evaluation prompts are others",
}


@dataclass(frozen=True, slots=True)
class Record:
    """A run in writing.

    Attributes:
        files: Path in the package -> sha256.
        facts: What the package's manifest says beside its files.
        block: The profile's block of params.yaml.
    """

    files: Mapping[str, str]
    facts: Json
    block: Json
    lock: Json
    timings: Json


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What came of it.

    Attributes:
        folder: The clone with the new run, left for a look.
        weights: `same`, or `other`.
        differences: All that differs, in words, causes first.
    """

    version: str
    digest: str
    folder: str
    weights: str
    other_weights: tuple[str, ...]
    differences: tuple[str, ...]
    seconds: float


def reproduce(root: Path, version: Version, *, target: Path | None, say: Say) -> Reproduction:
    """Make a version again and compare.

    The clone goes to `target`, by default `.work/reproduce/NAME-DIGEST`; a clone of that revision that is there
    already, of an attempt that was stopped, is continued.

    Raises:
        RegistryError: It was published from a changed tree or without git.
        ConfigError: git does not know the revision, the target is taken, or params there are not the version's.
        DataError: The data can neither be restored nor fetched again with the same digest.
    """
    began = time.monotonic()
    label = str(version)
    commit = check_revision(version.record["provenance"], version.clean_commit, label)
    clone = target or root / ".work" / "reproduce" / f"{version.name}-{version.digest[:12]}"
    site_root = clone_revision(root, commit, clone.absolute(), say)
    workspace = Workspace(site_root, version.name)
    then = read_then(version, site_root)
    choose_profile(site_root, version.name)
    write_lock(version, site_root)
    with workspace_lock(site_root, command=f"ropeway reproduce {label}", profile=version.name) as held:
        site = Site(site_root, Held(held.handle, {**held.environment, **plan_environment(clone, then)}))
        run_stages(site, root, workspace, version.manifest.facts["digests"]["raw"], say)
    now = read_now(workspace)
    changed, differences = tuple(other_weights(then, now)), tuple(describe_differences(then, now))
    weights, seconds = "other" if changed else "same", round(time.monotonic() - began, 1)
    return Reproduction(label, version.digest, str(site_root), weights, changed, differences, seconds)


def check_revision(provenance: Provenance, clean_commit: str | None, label: str) -> str:
    """Return the commit a version was made from; raise RegistryError when git does not hold all that made it."""
    if clean_commit:
        return clean_commit
    commit, changed = provenance.get("git"), provenance.get("dirty_files", [])
    if not commit:
        raise RegistryError(f"{label}: was published without git, so nobody knows its code. Choose another version")
    if provenance.get("dirty"):
        raise RegistryError(
            f"{label}: was published from a tree that differed from its revision {commit[:12]} in "
            f"{', '.join(changed) or 'files not recorded'}; git does not hold what made it. Choose another version"
        )
    return str(commit)


def clone_revision(root: Path, commit: str, clone: Path, say: Say) -> Path:
    """Return the workspace in a clone of this repository at a commit; raise ConfigError when there can be none."""
    top = ask_git(root, "rev-parse", "--show-toplevel")
    prefix = ask_git(root, "rev-parse", "--show-prefix")
    if top is None or prefix is None:
        raise ConfigError(f"{root}: not in a git repository; run this in a clone of the project that made the version")
    if ask_git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        raise ConfigError(
            f"{root}: git does not know revision {commit} here. `git fetch` it from where the version was made, or run "
            "this there"
        )
    if clone.is_dir() and any(clone.iterdir()):
        if (clone / ".git").is_dir() and ask_git(clone, "rev-parse", "HEAD") == commit:
            say(f"going on in {clone}")
            return clone / prefix
        raise ConfigError(f"{clone}: holds something else; remove it, or choose another folder with --to")
    clone.parent.mkdir(parents=True, exist_ok=True)
    say(f"cloning {commit[:12]} to {clone}")
    for command in (
        ("clone", "--quiet", "--no-checkout", top, str(clone)),
        ("-C", str(clone), "-c", "advice.detachedHead=false", "checkout", "--quiet", "--detach", commit),
    ):
        done = subprocess.run(["git", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"{clone}: git {command[0]} failed: {done.stderr.strip()}")
    return clone / prefix


def read_then(version: Version, site_root: Path) -> Record:
    """Return the published run in writing; raise ConfigError when params at its revision are not the package's."""
    name = version.name
    kept = site_root / ".work" / "published.yaml"
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(version.read_file("run.yaml") or b"")
    block = read_block(kept, name)
    if block != without_secrets(read_block(site_root / "params.yaml", name)):
        raise ConfigError(
            f"{site_root / 'params.yaml'}: the block '{name}' of that revision is not the one of the package (its "
            "run.yaml); the version was published with params that git does not hold"
        )
    return Record(
        files={file.path: file.sha256 for file in version.manifest.files},
        facts=dict(version.manifest.facts),
        block=block,
        lock=graph.parse_lock(version.read_file("dvc.lock") or b""),
        timings=json.loads(version.read_file("provenance.json") or b"{}"),
    )


def read_now(workspace: Workspace) -> Record:
    """Return the run made again in writing."""
    # A revision of before there were pages has them in its package.
    pages = workspace.pages if workspace.pages.is_dir() else None
    core, _ = build_version_manifest(workspace.package, pages, workspace.profile)
    return Record(
        files={file.path: file.sha256 for file in core.files},
        facts=core.facts,
        block=without_secrets(read_block(workspace.root / "params.yaml", workspace.profile)),
        lock=graph.parse_lock((workspace.root / "dvc.lock").read_bytes()),
        timings=json.loads(workspace.timings.read_bytes()),
    )


def write_lock(version: Version, site_root: Path) -> None:
    """Put the version's dvc.lock into the clone; raise RegistryError when none was kept."""
    lock = version.read_file("dvc.lock")
    if lock is None:
        raise RegistryError(f"{version}: no dvc.lock was kept beside it, so its data is lost")
    (site_root / "dvc.lock").write_bytes(lock)


def plan_environment(clone: Path, then: Record) -> dict[str, str]:
    """Return what the stages need: the revision's own code, and as many ranks as then."""
    planned: dict[str, str] = {}
    if (clone / "src" / "ropeway").is_dir():
        ours = [str(clone / "src"), str(clone), os.environ.get("PYTHONPATH", "")]
        planned["PYTHONPATH"] = os.pathsep.join(filter(None, ours))
    ranks = [attempt.get("ranks") for attempt in then.timings.get("attempts", [])]
    if ranks and ranks[-1] and "ROPEWAY_RANKS" not in os.environ:
        planned["ROPEWAY_RANKS"] = str(ranks[-1])
    return planned


def run_stages(site: Site, root: Path, workspace: Workspace, raw: str, say: Say) -> None:
    """Restore the data, then run everything else; raise DataError when data fetched again is not the data then."""
    restored = restore_data(site, root, workspace, raw, say)
    for stage in graph.load_graph(site.root):
        if stage.name == _FETCH and restored:
            say(f"{stage.name}: restored by digest")
            continue
        say(f"{stage.name}: running")
        bring_up(site, stage.name, say, anew=not stage.refreshes)
        if stage.name == _FETCH and (found := _digest(workspace.raw)) != raw:
            raise DataError(
                f"{workspace.raw}: the sources give data of digest {found[:12]}… now, the version was made from "
                f"{raw[:12]}…, and neither DVC's cache nor a remote holds that. Restore the sources, or `dvc push` "
                "from where the cache is"
            )


def restore_data(site: Site, root: Path, workspace: Workspace, raw: str, say: Say) -> bool:
    """Bring `raw/` back from this workspace's DVC cache, else from the remote; return whether it is the version's."""
    graph.share_cache(root, site.root)
    place = workspace.raw.relative_to(site.root).as_posix()
    for verb in ("checkout", *(["pull"] if graph.has_remote(site.root) else [])):
        code, _ = run_command(site, verb, ["dvc", verb, place], say)
        if not code and workspace.raw.is_dir() and _digest(workspace.raw) == raw:
            return True
    say("the data is in no cache; fetching it again from its sources")
    return False


def _digest(folder: Path) -> str:
    return digest_of(load_manifest(folder, remedy="Remove the clone and reproduce again"))


def other_weights(then: Record, now: Record) -> list[str]:
    """Return the weight files whose bytes differ, or that only one of both has."""
    return [name for name in _other_files(then, now) if name.endswith(".safetensors")]


def describe_differences(then: Record, now: Record) -> list[str]:
    """Return every difference in words, causes before consequences; none for equal runs."""
    return [
        *(f"params: {line}" for line in _compare(_leaves(then.block), _leaves(now.block))),
        *_environment(then.timings, now.timings),
        *_stages(then.lock, now.lock),
        *(f"{line}" for line in _compare(_leaves(then.facts), _leaves(now.facts))),
        *(f"{name}: other bytes" for name in _other_files(then, now)),
    ]


def _other_files(then: Record, now: Record) -> list[str]:
    names = sorted({*then.files, *now.files})
    return [name for name in names if then.files.get(name) != now.files.get(name)]


def _environment(then: Json, now: Json) -> Iterator[str]:
    old, new = (list(timings.get("attempts", [])) for timings in (then, now))
    if not old:
        yield "environment: nothing is recorded of the one then"
        return
    if not new:
        yield "environment: nothing is recorded of this one"
        return
    for key in _ENVIRONMENT:
        seen = [list(dict.fromkeys(str(attempt.get(key)) for attempt in attempts)) for attempts in (old, new)]
        if seen[0] != seen[1] and any(key in attempt for attempt in old):
            yield f"{key.replace('_', ' ')}: {', then '.join(seen[0])} then, {', then '.join(seen[1])} now"


def _stages(then: Json, now: Json) -> Iterator[str]:
    """Yield which stage read something else from outside, and which read the same and yet left something else."""
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
            yield f"stage {name}: read the same and left another {', '.join(left)}"


def _other_entries(then: Json, now: Json, kind: str) -> list[str]:
    old, new = ({one["path"]: one.get("md5") for one in stage.get(kind, [])} for stage in (then, now))
    return [path for path in old if path in new and old[path] != new[path]]


def _compare(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for key in dict.fromkeys([*then, *now]):
        if then.get(key) != now.get(key):
            yield f"{key}: {then.get(key, 'nothing')} then, {now.get(key, 'nothing')} now"


def _leaves(value: object, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        return {name: text for inner, one in value.items() for name, text in _leaves(one, f"{key}.{inner}").items()}
    return {key.removeprefix("."): str(value)}
