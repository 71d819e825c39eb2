"""What a workspace has gathered on disk, and `ropeway clean`: a plan of what nothing needs any more, then its removal.

Kept are: every output that the present dvc.lock names; of each stage of each profile the newest results that DVC's
run-cache knows; the data of every version in the registry, which `ropeway reproduce` restores by digest; checkpoints,
which have a rule of their own (ROPEWAY_KEEP_RUNS); W&B runs that were not synced. A cache outside the workspace, which
others may share, is not touched, nor is a DVC remote.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ropeway.config.load_params import load_profiles
from ropeway.orchestration import dvc_graph as graph
from ropeway.registry import Registry, Version
from ropeway.runtime.errors import ConfigError, DataError, RegistryError, TemporaryError
from ropeway.runtime.lock import is_held, workspace_lock
from ropeway.runtime.terminal import AlignedTable, show
from ropeway.runtime.workspace import Workspace, count_bytes, format_bytes

_FETCH = "fetch"  # the stage whose output is a version's data
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """A part of a workspace, the bytes of all its files, and the rule that keeps it small."""

    name: str
    path: Path
    bytes: int
    rule: str


@dataclass(frozen=True, slots=True)
class Removal:
    """Something that nothing needs any more: its kind, e.g. `DVC cache`, the bytes of all its files, why it may go."""

    kind: str
    path: Path
    bytes: int
    why: str


def measure(root: Path) -> list[DiskUsage]:
    """Return what a workspace's parts take, those that are there, largest first."""
    workspace = Workspace(root.resolve(), "")
    parts = (
        ("runs", workspace.root / "runs", "nothing to remove: current outputs"),
        ("DVC cache", workspace.root / ".dvc" / "cache", "`ropeway clean`"),
        ("checkpoints", workspace.checkpoints, "ROPEWAY_KEEP_RUNS runs of each profile stay, 3 by default"),
        ("registry", workspace.root / "registry", "`ropeway registry gc`"),
        ("W&B runs", workspace.work / "wandb", "`wandb sync` sends them, `ropeway clean` removes what was sent"),
        ("work files", workspace.work, "`ropeway clean`"),
        (
            "Prefect database",
            workspace.root / ".prefect",
            "runs that ended 90 days ago leave it (PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD)",
        ),
    )
    sizes = {name: count_bytes(path) for name, path, _ in parts if path.exists()}
    if "work files" in sizes:
        sizes["work files"] -= sizes.get("W&B runs", 0)  # these lie in the same folder
    places = [DiskUsage(name, path, sizes[name], rule) for name, path, rule in parts if name in sizes]
    return sorted(places, key=lambda place: -place.bytes)


def format_sizes(root: Path) -> str:
    """Return a workspace's parts in one line, those below a MiB left out."""
    parts = [f"{place.name} {format_bytes(place.bytes)}" for place in measure(root) if place.bytes >= _MIB]
    return ", ".join(parts) or "less than 1 MiB"


def plan_clean(root: Path, *, keep: int, unsynced: bool) -> list[Removal]:
    """Return what nothing needs any more. Nothing is removed.

    `keep` results of each stage and profile stay in DVC's cache, beside those that are needed; `unsynced` counts W&B
    runs that were not sent to W&B.

    Raises:
        RopewayError: The registry or the DVC workspace cannot be used, so what is needed cannot be known.
    """
    root = root.resolve()
    workspace = Workspace(root, "")
    return [
        *plan_cache(root, Registry.open(workspace.registry_url), keep=keep),
        *plan_wandb(workspace.work / "wandb", unsynced=unsynced),
        *plan_work(workspace, set(load_profiles(root / "params.yaml")[1])),
    ]


def plan_cache(root: Path, registry: Registry, *, keep: int) -> Iterator[Removal]:
    """Yield objects of DVC's cache that nothing needs, and run-cache entries whose result would be gone with them."""
    cache = graph.cache_folder(root)
    if not cache.is_relative_to(root):  # shared, perhaps: others' outputs are not known here
        return
    objects, runs = cache / "files" / "md5", cache / "runs"
    results = sorted(_read_results(runs), key=lambda result: -result.path.stat().st_mtime_ns)
    needed = set(_outs(_read_lock(root))) | set(_data_of_versions(registry))
    seen: dict[tuple[str, ...], int] = {}
    kept = []
    for result in results:
        place = tuple(sorted(out["path"] for out in result.outs))
        seen[place] = seen.get(place, 0) + 1
        if seen[place] <= keep or {str(out.get("md5")) for out in result.outs} <= needed:
            kept.append(result)
    needed |= {str(out["md5"]) for result in kept for out in result.outs if out.get("md5")}
    needed |= {member for name in needed if name.endswith(".dir") for member in graph.folder_members(objects, name)}
    for result in results:
        if result not in kept:
            yield Removal("DVC run-cache", result.path, count_bytes(result.path), "a result that is not kept")
    for path in sorted(objects.glob("??/*")) if objects.is_dir() else ():
        if path.parent.name + path.name not in needed:
            yield Removal("DVC cache", path, count_bytes(path), "no present result and no version's data")


@dataclass(frozen=True, slots=True)
class _CachedResult:
    path: Path
    outs: list[graph.LockOut]


def _read_results(runs: Path) -> Iterator[_CachedResult]:
    for path in sorted(runs.glob("??/*/*")) if runs.is_dir() else ():
        with suppress(ConfigError, OSError):  # a damaged entry is DVC's to pass over
            yield _CachedResult(path, list(graph.parse_lock(path.read_bytes()).get("outs", [])))


def _read_lock(root: Path) -> graph.Lock:
    try:
        return graph.parse_lock((root / "dvc.lock").read_bytes())
    except FileNotFoundError:
        return {}


def _outs(lock: graph.Lock, *, of: str | None = None) -> Iterator[str]:
    stages = lock.get("stages") or {}
    if not isinstance(stages, Mapping) or not all(isinstance(stage, Mapping) for stage in stages.values()):
        raise ConfigError("dvc.lock: expected a mapping of stages; `git checkout dvc.lock`, or run `dvc repro`")
    for name, stage in stages.items():
        if of in (None, name):
            yield from (str(out["md5"]) for out in stage.get("outs", []) if out.get("md5"))


def _read_version_lock(version: Version) -> bytes | None:
    """Return a version's dvc.lock; None if it has none, or is withdrawn and its files were collected."""
    try:
        return version.read_file("dvc.lock", attached=True)
    except DataError:
        if version.is_withdrawn:
            return None
        raise


def _data_of_versions(registry: Registry) -> Iterator[str]:
    """Yield the digests of every version's data, withdrawn ones too, as its dvc.lock names them."""
    for artifact in registry.artifacts():
        locks = registry.store.run_each(_read_version_lock, list(artifact.versions()))
        for lock in locks:
            if lock is not None:
                yield from _outs(graph.parse_lock(lock), of=_FETCH)


def plan_wandb(folder: Path, *, unsynced: bool) -> Iterator[Removal]:
    """Yield the offline runs that were sent to W&B, which leaves `<run>.wandb.synced` in them; with `unsynced`, all."""
    for path in sorted(folder.glob("*run-*")) if folder.is_dir() else ():
        if path.is_symlink() or not path.is_dir():
            continue
        if any(path.glob("*.synced")):
            yield Removal("W&B run", path, count_bytes(path), "was sent to W&B")
        elif unsynced:
            yield Removal("W&B run", path, count_bytes(path), "not sent to W&B; --unsynced")


def plan_work(workspace: Workspace, profiles: set[str]) -> Iterator[Removal]:
    """Yield what earlier commands left in `.work`: clones of `ropeway reproduce`, units of profiles that are gone."""
    for path in sorted((workspace.work / "reproduce").glob("*")):
        # A workspace can be a folder of the clone.
        if not any(is_held(lock.parent.parent) for lock in path.rglob(".work/lock")):
            yield Removal("reproduced run", path, count_bytes(path), "`ropeway reproduce` makes it again")
    for path in sorted((workspace.work / "rehearse").glob("*/workspace")):
        if not is_held(path.parent):
            yield Removal("rehearsal", path, count_bytes(path), "kept by a rehearsal that failed, or by --keep")
    for path in sorted(workspace.work.glob("tokenize-*")):
        if path.is_dir() and path.name.removeprefix("tokenize-").rpartition("-")[0] not in profiles:
            yield Removal("units of tokens", path, count_bytes(path), "of a profile that params.yaml does not have")
    for path in sorted(workspace.work.glob("prepare-*")):  # the lock is held, so no prepare is at work
        if path.is_dir():
            yield Removal("prepare's work", path, count_bytes(path), "left by a killed prepare or an older Ropeway")


def clean(root: Path, *, keep: int, unsynced: bool, without_registry: bool = False) -> list[Removal]:
    """Remove what `plan_clean` finds while no run and no dvc is at work; return it.

    `without_registry` says that nothing was ever published, so there is no registry whose versions need data.

    Raises:
        RegistryError: There is no registry, and it was not said that there is none.
        TemporaryError: A run holds the workspace, or a file could not be removed: the same command continues.
    """
    with workspace_lock(root, command="ropeway clean"), graph.exclusive(root):
        if not without_registry:
            _check_registry(Registry.open(Workspace(root, "").registry_url))
        removals = plan_clean(root, keep=keep, unsynced=unsynced)
        for removal in removals:
            try:
                if removal.path.is_dir():
                    shutil.rmtree(removal.path)
                else:
                    removal.path.unlink(missing_ok=True)
            except OSError as error:
                raise TemporaryError(
                    f"{removal.path}: cannot be removed ({error.strerror}). Give this user write access, "
                    "then run the same command again"
                ) from None
    return removals


def _check_registry(registry: Registry) -> None:
    """An empty place for a registry is not known to be a registry of no versions: it may stand elsewhere."""
    try:
        registry.check()
    except RegistryError as error:
        raise RegistryError(
            f"{error}. Which data its versions need is not known, so nothing was removed: name it with "
            "ROPEWAY_REGISTRY, or, if nothing was ever published, add --no-registry"
        ) from None


def print_cleanup(places: list[DiskUsage], removals: list[Removal], *, removed: bool) -> None:
    """Print what takes disk space, then what is or would be removed: a line per kind and reason, and the total."""
    show(
        AlignedTable(
            ("part", "size", "how to reduce it"),
            [(place.name, format_bytes(place.bytes), place.rule) for place in places],
        ),
        "",
    )
    groups: dict[tuple[str, str], list[Removal]] = {}
    for removal in removals:
        groups.setdefault((removal.kind, removal.why), []).append(removal)
    rows = [
        (kind, f"{len(some):,}", format_bytes(sum(one.bytes for one in some)), why)
        for (kind, why), some in groups.items()
    ]
    total = format_bytes(sum(removal.bytes for removal in removals))
    if not rows:
        show("nothing was removed: everything is needed" if removed else "nothing to remove: everything is needed")
        return
    show(
        AlignedTable(("removed" if removed else "would be removed", "number", "size", "why"), rows),
        f"{total} freed" if removed else f"{total} would be freed. To remove it: ropeway clean --apply",
    )
