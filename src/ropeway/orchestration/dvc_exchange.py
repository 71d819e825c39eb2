"""What machines exchange through DVC: documents by digest, entries of dvc.lock, and which outputs a stage reads.

Source of DVC's shapes: dvc 3.67.1.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ropeway.orchestration.dvc_graph import exclusive, open_repo, ordered, parse_lock
from ropeway.runtime.errors import DataError, TemporaryError
from ropeway.runtime.manifest import NAME as MANIFEST
from ropeway.runtime.manifest import Json, write_atomic


def outputs(root: Path) -> dict[str, tuple[str, ...]]:
    """Return the paths of each stage's outputs, relative to the root; those of a stage that refreshes are left out."""
    with open_repo(root) as repo:
        return {
            stage.name: tuple(_relative(str(out.fs_path), root) for out in own.outs)
            for stage, own in ordered(repo)
            if not stage.refreshes
        }


def inputs(root: Path, name: str, *, of_others: Collection[str] = ()) -> tuple[str, ...]:
    """Return the paths that a stage reads and that another stage writes, relative to the root.

    With them what stages in `of_others` read of the stages that are before this one.
    """
    with open_repo(root) as repo:
        found = {stage.name: (stage, own) for stage, own in ordered(repo) if not stage.refreshes}
        above = [name]
        for each in above:  # grows: ancestors
            above += [dep for dep in found[each][0].deps if dep in found and dep not in above]
        made = [str(out.fs_path) for each in above[1:] for out in found[each][1].outs]
        read = [
            path
            for each in (name, *of_others)
            if each in found
            for path in _whole_folders([str(dep.fs_path) for dep in found[each][1].deps], made)
        ]
        return tuple(_relative(path, root) for path in dict.fromkeys(read) if _is_within(path, made))


def _whole_folders(paths: Sequence[str], made: Sequence[str]) -> list[str]:
    """Return what a stage reads, from its dependencies.

    A stage that depends on the manifest of an output and on no other file of it reads the whole output: the manifest
    stands for it, so that DVC need not hash it again.
    """
    found = []
    for path in paths:
        folder = str(Path(path).parent)
        alone = folder in made and sum(Path(each).is_relative_to(folder) for each in paths) == 1
        found.append(folder if alone and Path(path).name == MANIFEST else path)
    return found


def _is_within(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _relative(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix()


def push_document(root: Path, data: bytes) -> str:
    """Store bytes in the DVC cache and the DVC remote; return their MD5.

    Raises:
        TemporaryError: The remote does not take them.
    """
    from dvc_data.hashfile.hash_info import HashInfo

    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    with open_repo(root) as repo:
        cache = repo.cache.local
        if not cache.exists(digest):
            staged = root / ".work" / f"handover-{digest}"
            staged.parent.mkdir(exist_ok=True)
            staged.write_bytes(data)
            cache.add(str(staged), cache.fs, digest)
            staged.unlink(missing_ok=True)
        with _remote_failures("stored"):
            done = repo.cloud.push([HashInfo("md5", digest)])
        if done.failed:
            raise TemporaryError("the DVC remote did not take the hand-over of a stage. Run the same command again")
    return digest


def pull_document(root: Path, digest: str) -> bytes:
    """Return the bytes of this MD5 from the DVC cache or the DVC remote.

    Raises:
        TemporaryError: The remote does not have them, or has other bytes.
    """
    from dvc_data.hashfile.hash_info import HashInfo

    with open_repo(root) as repo:
        cache = repo.cache.local
        if not cache.exists(digest):
            with _remote_failures("fetched"):
                repo.cloud.pull([HashInfo("md5", digest)])
        try:
            data = Path(cache.oid_to_path(digest)).read_bytes()
        except OSError:
            data = b""
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != digest:
        raise TemporaryError(f"the DVC remote does not return the hand-over {digest[:12]}. Run the same command again")
    return data


@contextmanager
def _remote_failures(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - fsspec and the clients of stores raise many classes
        raise TemporaryError(f"the hand-over could not be {what}: {type(error).__name__}: {error}") from None


def read_lock_entry(root: Path, name: str) -> Json | None:
    """Return a stage's entry of dvc.lock; None if there is none."""
    path = root / "dvc.lock"
    stages = parse_lock(path.read_bytes()).get("stages", {}) if path.is_file() else {}
    entry = stages.get(name)
    return None if entry is None else json.loads(json.dumps(entry))


def check_entry(root: Path, name: str, entry: object) -> None:
    """Raise DataError unless an entry of dvc.lock, which a worker recorded, has the outputs of its stage."""
    outs = entry.get("outs") if isinstance(entry, Mapping) else None
    listed = [out for out in outs if isinstance(out, Mapping)] if isinstance(outs, list) else []
    expected = outputs(root)[name]
    if sorted(str(out.get("path")) for out in listed) != sorted(expected) or not all(
        isinstance(out.get("md5"), str) for out in listed
    ):
        raise DataError(
            f"{name}: the worker recorded other outputs than this stage has ({', '.join(expected)}). Find out what it "
            "runs; nothing was taken over"
        )


def write_lock_entry(root: Path, name: str, entry: Json) -> None:
    """Put a stage's entry, which a worker recorded, into dvc.lock.

    Raises:
        BusyError: Another dvc process is writing it.
    """
    from dvc.utils.serialize import dumps_yaml

    path = root / "dvc.lock"
    with exclusive(root):
        known = parse_lock(path.read_bytes()) if path.is_file() else {}
        lock = {"schema": "2.0", **known, "stages": {**known.get("stages", {}), name: entry}}
        write_atomic(path, dumps_yaml(lock).encode())
