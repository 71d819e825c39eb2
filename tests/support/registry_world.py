"""Packages, moves and deaths for the registry's tests; `python -m tests.support.registry_world ROLE …` is one child.

It imports no pytest: a child must start at once.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ropeway.registry import ANY, Artifact, Registry
from ropeway.registry.layout import Log, alias_log, blob_key, list_models, versions_log
from ropeway.registry.log import read_events, seal_event
from ropeway.registry.version_manifest import load_version_manifest
from ropeway.runtime.errors import RegistryError
from ropeway.runtime.manifest import canonical_json, file_sha256, write_json, write_manifest
from ropeway.storage import FileStore, Store, open_store
from tests.support.memory_store import MemoryStore

PROMOTIONS = 5
# What changes a disk, as the interpreter announces it just before it does it.
CHANGES = {"os.link", "os.remove", "os.rename", "os.mkdir", "os.rmdir"}


def safetensors(weights: bytes) -> bytes:
    header = b'{"__metadata__":{}}'
    return len(header).to_bytes(8, "little") + header + weights


def make_pages(package, pages, card):
    """Make the pages of a package, as report_package does."""
    manifest = json.loads((package / "manifest.json").read_bytes())
    pages.mkdir(parents=True, exist_ok=True)
    (pages / "manifest.json").unlink(missing_ok=True)
    (pages / "README.md").write_text(card)
    own = write_manifest(pages, {})["files"]
    whole = {"package": file_sha256(package / "manifest.json"), "files": {**manifest["files"], **own}}
    write_json(pages / "manifest.json", whole)


def make_package(folder: Path, weights: bytes = b"weights", **facts: object) -> Path:
    (folder / "plots").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(safetensors(weights))
    (folder / "config.json").write_text("{}")
    (folder / "plots" / "loss.svg").write_text("<svg/>")
    write_manifest(folder, {"kind": "package", **facts})
    return folder


def tiny(store: Store) -> Artifact:
    return Registry(store).artifact("tiny")


def put(store: Store, package: Path, name: str = "tiny"):
    return Registry(store).artifact(name).publish(package, provenance={"git": "abc", "dirty": False}, attachments={})


def move(store: Store, digest: str, expect=ANY, alias: str = "candidate"):
    return tiny(store).version(digest).promote(alias, expect=expect, by="a test", reason="it was time")


def grow(store: Store, count: int) -> None:
    """Give a registry whose one version is `tiny@v1` `count` versions, each once `tiny@candidate`: their events alone.

    v1's event becomes the last, so that the newest version is whole. Heads are those that the last writer leaves.
    """
    record = own_fields(store, versions_log("tiny").key(1))
    digests = [*(hashlib.sha256(b"%d" % number).hexdigest() for number in range(1, count)), record["digest"]]
    promotion = {"prev": None, "by": "a test", "reason": "it was time", "review": None, "at": record["published_at"]}
    for key in store.list_keys("models/tiny/heads/"):
        store.delete(key)
    store.delete(versions_log("tiny").key(1))
    for log, facts in ((versions_log("tiny"), record), (alias_log("tiny", "candidate"), promotion)):
        events, head, previous = [], b"", None
        for number, digest in enumerate(digests, 1):
            head += f"{digest}\n".encode()
            document = canonical_json(seal_event({**facts, "digest": digest}, head, previous))
            events.append((log.key(number), document))
            previous = hashlib.sha256(document).hexdigest()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(store.put_if_absent, *zip(*events, (log.head_key(count), head), strict=True)))


@contextmanager
def count_requests(store: Store) -> Iterator[Counter[str]]:
    """Count what is asked of a store, by kind: requests on the wire of S3, operations of a folder or of memory."""
    counted: Counter[str] = Counter()
    if not isinstance(store, FileStore | MemoryStore):
        events, lock, reader = store.client.meta.events, threading.Lock(), store._documents

        def count(model, **_: object) -> None:
            with lock:
                counted[model.name] += 1

        def read_counted(path: str, *, max_bytes: int) -> bytes | None:
            with lock:
                counted["GetObject"] += reader._is_usable
            return type(reader).read(reader, path, max_bytes=max_bytes)

        events.register("before-call.s3", count)
        reader.read = read_counted
        yield counted
        del reader.read
        events.unregister("before-call.s3", count)
        return
    within = 0

    def counting(name: str, method: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal within
            counted[name] += not within  # one operation may be made of others
            within += 1
            try:
                return method(*arguments, **options)
            finally:
                within -= 1

        return call

    names = {"put_if_absent", "get", "open_stream", "exists", "size", "list_keys", "list_entries", "list_folders"}
    names |= {"first_key", "delete", "list_names"}
    for name in names:
        setattr(store, name, counting(name, getattr(store, name)))
    yield counted
    for name in names:
        delattr(store, name)


def flip(store: Store, key: str) -> None:
    """Flip one bit in the middle of an object, as a bad disk would."""
    data = bytearray(read(store, key))
    data[len(data) // 2] ^= 1
    replace(store, key, bytes(data))


def read(store: Store, key: str) -> bytes:
    with store.open_stream(key) as stream:
        return stream.read()


def replace(store: Store, key: str, data: bytes) -> None:
    """Overwrite an object, as only a user with the store's keys can."""
    store.delete(key)
    store.put_if_absent(key, data)


def own_fields(store: Store, key: str) -> dict[str, object]:
    """Return a stored event without what an append adds: as a Ropeway without heads wrote it."""
    return {name: value for name, value in json.loads(read(store, key)).items() if name not in ("head", "seal")}


def change_event(store: Store, log: Log, number: int, **changes: object) -> None:
    """Change fields of a stored event, as only a user with the store's keys can: it becomes one without a seal."""
    replace(store, log.key(number), canonical_json(own_fields(store, log.key(number)) | changes))


def copy_store(source: Store, target: Store) -> None:
    """Fill an empty store with another's objects; faster than publishing, which waits for the disk."""
    if isinstance(source, FileStore) and isinstance(target, FileStore):
        shutil.copytree(source.root, target.root)
        return
    for key in source.list_keys(""):
        target.put_if_absent(key, read(source, key))


def is_untouched(store: Store) -> bool:
    """Return whether nothing was ever written to a store, not even aside."""
    if isinstance(store, FileStore):
        return not store.root.exists()
    return not store.list_keys("") and not store.list_incomplete_uploads()


def nothing_left(target: Path) -> bool:
    """Return whether neither a pull's target nor anything beside it is there."""
    return not target.parent.exists() or list(target.parent.iterdir()) == []


# The children's side


def check_whole(store: Store) -> None:
    """What a reader at this moment relies on: every number and alias leads to a version that is whole."""
    for name in list_models(store):
        for number in range(1, len(read_events(store, versions_log(name))) + 1):
            Registry(store).version(f"{name}@v{number}").verify()
        for alias in Registry(store).artifact(name).aliases():
            Registry(store).version(f"{name}@{alias}").verify()
        for key in store.list_keys(f"models/{name}/manifests/"):
            for file in load_version_manifest(store, name, Path(key).stem).files:
                assert store.size(blob_key(file.sha256)) == file.bytes


def die_at(moment: int, root: Path) -> None:
    """From now on, kill -9 this process just before its `moment`-th change of anything below `root`.

    A name alone is of a folder that is open, as those of a registry are.
    """
    left = moment

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and (str(root) in (place := str(arguments[0])) or "/" not in place):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def sweep(act: Callable[[Path], None], after: Callable[[Path], None], tmp_path: Path) -> int:
    """Run `act` in a child that dies at its first, second, … change until one lives; return how many died."""
    for moment in range(1000):
        place = tmp_path / str(moment)
        place.mkdir()
        if (pid := os.fork()) == 0:
            die_at(moment, place)
            act(place)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        after(place)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return moment
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("it never came to an end")


def sweep_publish(tmp_path: Path) -> int:
    package = make_package(tmp_path / "package")

    def act(place: Path) -> None:
        done = put(open_store((place / "registry").as_uri()), package)
        move(open_store((place / "registry").as_uri()), done.digest, expect=None)

    def after(place: Path) -> None:
        store = open_store((place / "registry").as_uri())
        check_whole(store)
        keys = set(store.list_keys(""))
        again = put(store, package)
        assert again.number == 1
        assert not move(store, again.digest).moved or len(tiny(store).alias("candidate").events) == 1
        assert keys <= set(store.list_keys("")), "a retry removes nothing"
        check_whole(store)
        assert len(store.list_keys("intents/")) <= 1

    return sweep(act, after, tmp_path)


def sweep_pull(tmp_path: Path) -> int:
    store = open_store((tmp_path / "registry").as_uri())
    package = make_package(tmp_path / "package")
    put(store, package)

    def after(place: Path) -> None:
        target = place / "model"
        if target.exists():  # then it is whole
            assert not Registry(store).version("tiny@v1").pull(target).created
        Registry(store).version("tiny@v1").pull(target)
        assert [path.name for path in place.iterdir()] == ["model"]

    return sweep(lambda place: Registry(store).version("tiny@v1").pull(place / "model"), after, tmp_path)


def promote_in_turn(store: Store, digests: list[str]) -> list[int]:
    """Promote the one of two digests that is not there, each time with what was there expected; return the numbers."""
    numbers: list[int] = []
    while len(numbers) < PROMOTIONS:
        expect = tiny(store).alias("candidate").digest
        digest = digests[digests[0] == expect]
        reason = f"move {len(numbers)} of {os.getpid()}"  # else two racers' events would be one and the same act
        try:
            numbers.append(
                tiny(store).version(digest).promote("candidate", expect=expect, by="racer", reason=reason).number
            )
        except RegistryError as error:
            if "points to" not in str(error):
                raise
    return numbers


def main(role: str, place: str, *rest: str) -> object:
    if role.startswith("sweep"):
        return {"sweep-publish": sweep_publish, "sweep-pull": sweep_pull}[role](Path(place))
    store = open_store(place)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    if role == "promote":
        return promote_in_turn(store, list(rest))
    done = tiny(store).publish(Path(rest[0]), provenance={"pid": os.getpid()}, attachments={})
    return done.digest, done.number, done.created


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
