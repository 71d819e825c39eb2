"""A folder's manifest: JSON that lists every file with sha256, bytes and rows, written last.

A folder with a manifest is complete; a folder without one is unfinished. Readers verify the files that they open.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic checks typing.TypedDict only from Python 3.12 on

from ropeway.runtime.errors import DataError, disk_error
from ropeway.runtime.json_text import parse_json

NAME = "manifest.json"
_BLOCK_BYTES = 1 << 20
_THREADS = 4  # for hashing the files of a folder


Json = Mapping[str, Any]  # a mapping read from a JSON file, not validated


class FileFacts(TypedDict):
    """The entry of a file in a manifest."""

    bytes: int
    sha256: str
    rows: NotRequired[int]


def canonical_json(value: object) -> bytes:
    r"""Return `value` as sorted, compact UTF-8 JSON: equal values give equal bytes.

    >>> canonical_json({"b": 1, "a": [True]})
    b'{"a":[true],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def json_mapping(data: bytes) -> Json:
    """Return the mapping in JSON bytes; empty if they are not a JSON mapping."""
    try:
        found = parse_json(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def digest_of(value: object) -> str:
    """Return the sha256 of a JSON-like value's canonical form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """Return a file's sha256 in hex."""
    digest = hashlib.sha256()
    with _named(path), path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name a file in an error of the disk that reading it, or flushing it, raises."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file atomically: a reader sees the old or the new bytes, even after a power failure.

    Args:
        path: The file.
        data: Its bytes.
        mode: Its permissions, before the process's umask; 0o600 for secrets.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def json_bytes(value: object) -> bytes:
    """Return sorted, indented JSON; raise ValueError for NaN, which JSON does not support."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: object) -> None:
    """Write sorted, indented JSON atomically."""
    write_atomic(path, json_bytes(value))


def sync_file(path: Path) -> None:
    """Flush a file to disk (fsync)."""
    with _named(path), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable (fsync); do nothing if the platform does not support it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if disk_error(error):  # nothing may be called durable
            raise


def sync_folders(folder: Path) -> None:
    """Make the names in a folder, and in every folder below it, durable."""
    for place, _, _ in os.walk(folder):
        sync_folder(Path(place))


def sync_tree(folder: Path) -> None:
    """Flush every file in a folder to disk, then make every name durable."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(sync_file, iterate_files(folder)))
    sync_folders(folder)


def make_folder(folder: Path) -> None:
    """Create a folder with its parents; make the name of each new one durable."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def iterate_files(folder: Path) -> Iterator[Path]:
    """Yield every file below `folder` except the manifest, sorted by relative path."""
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and path != folder / NAME:
            yield path


def write_manifest(
    folder: Path, facts: Mapping[str, object], *, rows: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Write and return `folder/manifest.json`: `{"files": {name: {sha256, bytes, rows?}}, **facts}`; call it last.

    Every file is flushed to disk first, so that after a power loss a manifest never describes bytes that are not there.
    """
    files = describe_files(folder, [path.relative_to(folder).as_posix() for path in iterate_files(folder)], sync=True)
    sync_folders(folder)
    for name, count in (rows or {}).items():
        if name in files:
            files[name]["rows"] = count
    manifest = {**facts, "files": files}
    write_json(folder / NAME, manifest)
    return manifest


def describe_files(folder: Path, names: Sequence[str], *, sync: bool = False) -> dict[str, FileFacts]:
    """Return the manifest's entry of each of these files of a folder, hashed in parallel.

    With `sync` each file is also flushed to disk (fsync) while others are hashed. Both release the GIL.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        synced = [pool.submit(sync_file, folder / name) for name in names] if sync else []
        digests = list(pool.map(lambda name: file_sha256(folder / name), names))
        for one in synced:
            one.result()
    return {
        name: {"sha256": digest, "bytes": (folder / name).stat().st_size}
        for name, digest in zip(names, digests, strict=True)
    }


def load_manifest(folder: Path, *, remedy: str, verify: bool = True) -> dict[str, Any]:
    """Return a folder's manifest after verifying its files.

    Args:
        folder: The folder with the manifest.
        remedy: Sentence of the error message that says what to do, e.g. "Run `dvc repro prepare`".
        verify: Compare the sha256 of each file; if False, only its size.

    Raises:
        DataError: No manifest (unfinished work), or a file is missing, unlisted or has another size or sha256.
    """
    try:
        manifest: dict[str, Any] = parse_json((folder / NAME).read_bytes())
        files = manifest["files"]
        check_file_facts(files)
    except FileNotFoundError:
        raise DataError(f"{folder}: no {NAME}, so the folder is missing or unfinished. {remedy}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / NAME}: not a manifest ({error}). {remedy}") from None
    present = {path.relative_to(folder).as_posix() for path in iterate_files(folder)}
    if extra := sorted(present - set(files)):
        raise DataError(f"{folder}: {extra[0]} is not in the manifest ({len(extra)} unlisted files). {remedy}")
    named = sorted(files.items())
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the GIL; map raises the first error in order of names
        list(pool.map(lambda one: check_file(folder / one[0], one[1], remedy=remedy, verify=verify), named))
    return manifest


def check_file_facts(files: object) -> None:
    """Raise TypeError unless a manifest's `files` maps each name to `bytes` and `sha256`."""
    if not isinstance(files, dict):
        raise TypeError(f"files: expected a mapping, found {type(files).__name__}")
    for name, facts in files.items():
        stated = facts if isinstance(facts, dict) else {}
        if not (isinstance(stated.get("bytes"), int) and isinstance(stated.get("sha256"), str)):
            raise TypeError(f"files.{name}: expected bytes (integer) and sha256 (string), found {facts!r}")


def check_listed(folder: Path, expected: Iterable[str], files: Mapping[str, FileFacts], *, remedy: str) -> None:
    """Raise DataError unless a folder's manifest lists every expected file."""
    if missing := sorted(set(expected) - files.keys()):
        raise DataError(f"{folder / NAME}: {missing[0]} is not listed ({len(missing)} missing entries). {remedy}")


def check_file(path: Path, facts: FileFacts, *, remedy: str, verify: bool = True) -> None:
    """Raise DataError unless `path` has the size and, with `verify`, the sha256 of its manifest entry."""
    if not path.is_file():
        raise DataError(f"{path}: missing, its manifest says {facts['bytes']:,} bytes. {remedy}")
    if (size := path.stat().st_size) != facts["bytes"]:
        raise DataError(f"{path}: {size:,} bytes, its manifest says {facts['bytes']:,}. {remedy}")
    if verify and (found := file_sha256(path)) != facts["sha256"]:
        raise DataError(
            f"{path}: sha256 is {found[:12]}…, its manifest says {facts['sha256'][:12]}…; "
            f"the file changed after it was written. Remove the file, then: {remedy}"
        )


def link_file(path: Path, target: Path) -> None:
    """Hard-link a file; copy it if the file system does not support hard links."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that replaces it in one rename on success and is removed on failure.

    Write the manifest inside it last.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(target.parent)
