"""Makes what DVC wrote for a stage survive a power loss, and removes what a kill or a power loss left incomplete.

DVC flushes nothing to disk (dvc 3.67.1): after a power loss a file of its cache can be empty or hold zeros, and be
protected as if it were complete. DVC then always trusts it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ruamel.yaml.error import YAMLError

from ropeway.config.yaml_limits import LimitError, load_yaml
from ropeway.orchestration import dvc_graph as graph
from ropeway.runtime.boot import read_boot
from ropeway.runtime.errors import TemporaryError
from ropeway.runtime.manifest import sync_file, sync_folder, sync_tree, write_json

DURABLE = Path("ropeway", "durable.json")  # in the cache, which workspaces can share; DVC leaves it alone
_OBJECTS = Path("files", "md5")
_OBJECT = re.compile(r"files/md5/[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?")  # its MD5; a folder's listing has `.dir` after it
_THREADS = 4  # fsync and hashing release the GIL


def repair(root: Path) -> list[str]:
    """Remove incomplete files from a workspace and its DVC cache; return a line for each. Hold the workspace lock.

    Raises:
        BusyError: Another dvc process is writing one of them.
    """
    return [*repair_after_kill(root), *_repair_cache(root)]


def repair_after_kill(root: Path) -> list[str]:
    """Remove files that a killed dvc truncated, unless a dvc is writing them; return a line for each.

    DVC rewrites both in place (dvc 3.67.1, `_edit_rwlock` and `_dump_data`) and fails every command after a truncation.
    They hold the locks of dead processes, and entries of dvc.lock that the run-cache holds as well.

    Raises:
        BusyError: Another dvc process is writing one of them.
    """
    locks, lock = root / ".dvc" / "tmp" / "rwlock", root / "dvc.lock"
    said = []
    if not _is_whole(locks, json.loads) and _remove(root, locks, json.loads, guard="rwlock.lock"):
        said.append(f"removed {locks}: a killed dvc or a power loss truncated it, and a dead process holds no lock")
    if not _is_whole(lock, load_yaml) and _remove(root, lock, load_yaml, guard="lock"):
        said.append(f"removed {lock}: a killed dvc or a power loss truncated it; the run-cache restores its entries")
    return said


def _is_whole(path: Path, parse: Callable[[bytes], object]) -> bool:
    """Return whether a file holds a mapping or does not exist."""
    with suppress(FileNotFoundError):
        data = path.read_bytes()
        try:
            return bool(data) and isinstance(parse(data), dict)
        except LimitError:  # not truncated: its reader refuses it, and the user keeps the file
            return True
        except (ValueError, YAMLError):
            return False
    return True


def _remove(root: Path, path: Path, parse: Callable[[bytes], object], *, guard: str) -> bool:
    """Remove a file while holding the lock under which DVC writes it, unless it is complete by then."""
    with graph.exclusive(root, guard=guard):
        if _is_whole(path, parse):
            return False
        path.unlink()
        return True


def sync_results(root: Path, stage: str, outcome: str) -> None:
    """Flush to disk what DVC wrote for a stage: its objects in the cache, the run-cache, dvc.lock, restored outputs.

    A stage that ran has flushed its outputs itself, before their manifest. `outcome` is that of `update_stage`.

    Raises:
        TemporaryError: The disk did not take it; the stage's result may not survive a power loss.
    """
    cache = graph.cache_folder(root)
    boot, durable = _read_durable(cache)
    outs = [out for out in _outs(root, stage) if out.get("md5")]
    present = _list_files(cache, _names(cache, outs))
    new = {path: at for path, at in present.items() if durable.get(path) != at}
    folders = {parent for path in new for parent in (cache / path).parents if parent.is_relative_to(cache)}
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(sync_file, [*(cache / path for path in new), root / "dvc.lock"]))
        for place in (root / out["path"] for out in outs if outcome == "restored"):
            if place.is_dir():
                sync_tree(place)
            else:
                sync_file(place)
            folders.add(place.parent)
    except OSError as error:
        raise TemporaryError(
            f"stage {stage}: the disk did not store its result ({error.strerror}: {error.filename or root}). Look "
            "after the disk, then run the same command again"
        ) from None
    for folder in sorted({*folders, root}, key=lambda path: -len(path.parts)):
        sync_folder(folder)
    if boot is not None:  # else no run has looked at the cache yet
        _write_durable(cache, {**durable, **new})


def _outs(root: Path, stage: str) -> list[graph.LockOut]:
    lock = load_yaml((root / "dvc.lock").read_bytes())
    return list(lock["stages"].get(stage, {}).get("outs", [])) if isinstance(lock, dict) else []


def _names(cache: Path, outs: Iterable[graph.LockOut]) -> set[str]:
    """Return the names of the objects of these outputs."""
    names = {str(out["md5"]) for out in outs}
    folders = [name for name in names if name.endswith(".dir")]
    return names | {member for name in folders for member in graph.folder_members(cache / _OBJECTS, name)}


def repair_for_dvc(root: Path) -> Iterator[str]:
    """Repair the cache in the first stage of a bare `dvc repro`; yield a line for each object that was removed."""
    default, boot = root / ".dvc" / "cache", read_boot()
    known = boot and _read_durable(default)[0] == boot  # then DVC, which takes a second to import, is not needed
    if (root / ".dvc").is_dir() and not known:
        yield from _repair_cache(root)


def _repair_cache(root: Path) -> Iterator[str]:
    """Remove damaged objects from DVC's cache after a restart of the machine; yield a line for each.

    Only objects that no `sync_results` has flushed are read: those of the work that a power loss interrupted. DVC
    itself passes over a damaged entry of the run-cache.
    """
    cache = graph.cache_folder(root)
    present = _list_files(cache)
    boot, durable = _read_durable(cache)
    if boot is None:  # the first run that records it; what is there was trusted before
        durable = present
    elif not boot or boot != read_boot():
        unknown = sorted(path for path in present if durable.get(path) != present[path] and _is_object(path))
        with ThreadPoolExecutor(_THREADS) as pool:
            whole = dict(zip(unknown, pool.map(lambda path: is_named(cache / path), unknown), strict=True))
        for path in unknown:
            file = cache / path
            if not whole[path]:
                yield f"removed {file}: a power loss damaged it ({file.stat().st_size:,} bytes of another content)"
                file.unlink()
        durable = {**durable, **{path: present[path] for path in unknown if whole[path]}}
    _write_durable(cache, {path: at for path, at in durable.items() if present.get(path) == at})


def _read_durable(cache: Path) -> tuple[str | None, Mapping[str, int]]:
    """Return the start of the machine and the files of the cache that were on disk then, with their times in ns.

    The start is None if nothing was recorded, and empty if the record is damaged.
    """
    try:
        found = json.loads((cache / DURABLE).read_bytes())
        return str(found["boot"]), {str(path): int(at) for path, at in found["files"].items()}
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", {}


def _write_durable(cache: Path, files: Mapping[str, int]) -> None:
    write_json(cache / DURABLE, {"boot": read_boot(), "files": dict(files)})
    for folder in (cache, cache.parent, cache.parent.parent):  # DVC may just have created them
        sync_folder(folder)


def _list_files(cache: Path, names: Collection[str] | None = None) -> dict[str, int]:
    """Return the time of change in ns of each object (of these names only) and each entry of the run-cache."""
    found = [
        *(
            (cache / _OBJECTS).glob("??/*")
            if names is None
            else (graph.object_path(cache / _OBJECTS, name) for name in names)
        ),
        *(cache / "runs").glob("??/*/*"),
    ]
    files = ((path, path.relative_to(cache).as_posix()) for path in found if path.is_file())
    return {name: path.stat().st_mtime_ns for path, name in files if name.startswith("runs/") or _is_object(name)}


def _is_object(path: str) -> bool:
    """Return whether a path in the cache is that of an object, rather than one that is being written."""
    return _OBJECT.fullmatch(path) is not None


def is_named(path: Path) -> bool:
    """Return whether an object's bytes have the MD5 that is its name."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return found == path.parent.name + path.name.removesuffix(".dir")
