"""Checkpoints in a store (`ROPEWAY_CHECKPOINT_STORE`), for a run that resumes on another machine.

A thread of the process that started the ranks uploads each checkpoint after it is complete; training does not wait.
Files are stored under their sha256, the manifest last, so a checkpoint whose upload was cut short is not found.

checkpoints/<profile>/<fingerprint>/blobs/<sha256>
checkpoints/<profile>/<fingerprint>/steps/000200-<digest of the manifest>.json
checkpoints/<profile>/<fingerprint>/uploads/00000007.json          {key}: the manifest of the seventh upload

A listing can show an older state of the store. So the newest uploads are found by reading their numbers, and nothing
is removed because a listing leaves out the manifest that needs it. They also order checkpoints of one step: after a
rewind the later upload is the valid one.

Two projects with a profile of one name need a prefix each: the retention counts runs by profile.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ropeway.runtime.errors import DataError, NotFoundError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import (
    NAME,
    Json,
    check_file,
    check_file_facts,
    digest_of,
    load_manifest,
    sync_file,
    sync_folder,
    sync_folders,
    write_json,
)
from ropeway.runtime.workspace import format_bytes
from ropeway.stages.train import checkpoints
from ropeway.storage import TRANSFER_BYTES, Store, open_store

VARIABLE = "ROPEWAY_CHECKPOINT_STORE"
_FOLDER = "checkpoints/"  # nothing else of a store, such as a registry, is read or removed
_KEPT_STEPS = 2  # of each run: the newest, and the one before it in case that is damaged
_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 30.0
_RECENT_UPLOADS = 8  # more than are kept, since those of one step can be several after rewinds
_UPLOAD = re.compile(r".*/uploads/(\d{8})\.json")
_STEP = re.compile(r".*/steps/(\d{6,})-[0-9a-f]{12}\.json")


@dataclass(frozen=True, slots=True)
class StoredRun:
    """The checkpoints of one run in a store.

    Attributes:
        store: The store.
        prefix: The run's folder in it, ending in `/`.
    """

    store: Store
    prefix: str

    @classmethod
    def open(cls, url: str, profile: str, fingerprint: str) -> "StoredRun":
        """Return the checkpoints of a run; raise ConfigError for a URL that is no store."""
        return cls(open_store(url), f"{_FOLDER}{profile}/{fingerprint}/")

    def steps(self) -> list[tuple[int, str]]:
        """Return (step, key of the manifest) of every complete checkpoint, by step, then in the order of uploads."""
        order = {key: number for number, key in self._recent_uploads()}
        keys = {*self.store.list_keys(f"{self.prefix}steps/"), *order}
        found = [(_STEP.fullmatch(key), key) for key in keys]
        steps = sorted((int(match.group(1)), order.get(key, 0), key) for match, key in found if match)
        return [(step, key) for step, _, key in steps if self.store.exists(key)]

    def last_upload(self) -> int:
        """Return the number of the last upload; 0 if there is none. The listing is a hint."""
        keys = self.store.list_keys(f"{self.prefix}uploads/")
        number = max((int(match.group(1)) for key in keys if (match := _UPLOAD.fullmatch(key))), default=0)
        while self.store.exists(self._upload_key(number + 1)):
            number += 1
        return number

    def written_at(self) -> datetime | None:
        """Return when something of this run was stored last, by the store's clock; None for a run without objects."""
        times = [entry.modified_at for entry in self.store.list_entries(self.prefix)]
        if number := self.last_upload():
            with suppress(NotFoundError):
                times.append(self.store.modified_at(self._upload_key(number)))
        return max(times, default=None)

    def upload(self, folder: Path, step: int) -> int:
        """Upload a checkpoint and remove older ones; return the bytes that its files have.

        Raises:
            DataError: The checkpoint was removed or changed meanwhile.
            RopewayError: The store does not take it.
        """
        manifest = load_manifest(folder, remedy="It is skipped", verify=False)
        for name, facts in manifest["files"].items():
            self.store.put_if_absent(f"{self.prefix}blobs/{facts['sha256']}", folder / name, sha256=facts["sha256"])
        key = f"{self.prefix}steps/{step:06d}-{digest_of(manifest)[:12]}.json"
        entry, number = json.dumps({"key": key}).encode(), self.last_upload() + 1
        while not self.store.put_if_absent(self._upload_key(number), entry):
            number += 1
        self.store.put_if_absent(key, json.dumps(manifest).encode())
        self._rotate(step)
        return sum(int(facts["bytes"]) for facts in manifest["files"].values())

    def download_newest(self, root: Path, *, above: int) -> int | None:
        """Put the newest checkpoint after step `above` into a run's folder, verified; return its step.

        Damaged or incomplete ones are printed and skipped; None if no other is left.
        """
        for step, key in reversed(self.steps()):
            if step <= above:
                return None
            try:
                self._download(root, step, self._read(key))
            except (DataError, NotFoundError, OSError) as error:
                print(f"checkpoint of step {step} in {self.store.url} cannot be used: {error}", flush=True)
                continue
            return step
        return None

    def _upload_key(self, number: int) -> str:
        return f"{self.prefix}uploads/{number:08d}.json"

    def _recent_uploads(self) -> list[tuple[int, str]]:
        """Return (number, key of the manifest) of the newest uploads, oldest first, with those removed since."""
        last, found = self.last_upload(), []
        for number in range(max(1, last - _RECENT_UPLOADS + 1), last + 1):
            with suppress(NotFoundError, ValueError, KeyError, TypeError):
                key = parse_json(self.store.get(self._upload_key(number)))["key"]
                if isinstance(key, str) and key.startswith(f"{self.prefix}steps/") and _STEP.fullmatch(key):
                    found.append((number, key))
        return found

    def _read(self, key: str) -> dict[str, Any]:
        """Return a manifest; raise DataError if it is none of a checkpoint."""
        try:
            manifest = parse_json(self.store.get(key))
            check_file_facts(manifest["files"])
            complete = bool(manifest["files"]) and isinstance(manifest["ranks"], int)
            same = manifest["step"] == int(key.rpartition("/")[2].partition("-")[0])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"its manifest is damaged ({type(error).__name__})") from None
        if not (complete and same):
            raise DataError("its manifest is incomplete or of another step")
        return dict(manifest)

    def _download(self, root: Path, step: int, manifest: Json) -> None:
        partial = checkpoints.partial_folder(root, step)
        shutil.rmtree(partial, ignore_errors=True)
        for name, facts in manifest["files"].items():
            target = partial / name
            if not target.resolve().is_relative_to(partial.resolve()):
                raise DataError(f"its manifest names {name!r}, a path outside the checkpoint")
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.store.open_stream(f"{self.prefix}blobs/{facts['sha256']}") as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, TRANSFER_BYTES)
            sync_file(target)
            check_file(target, facts, remedy="It is skipped")
        sync_folders(partial)
        write_json(partial / NAME, manifest)
        place = checkpoints.step_folder(root, step)
        shutil.rmtree(place, ignore_errors=True)  # a damaged one; the caller asks for steps above the newest valid one
        partial.rename(place)
        sync_folder(root)

    def _rotate(self, uploaded: int) -> None:
        """Remove all but the newest checkpoints of this run, their manifests first.

        Steps after the one just uploaded are from before a rewind.
        """
        steps = self.steps()
        for step, key in steps:
            if step > uploaded:
                self.store.delete(key)
        steps = [one for one in steps if one[0] <= uploaded]
        kept = []
        for step, key in steps[-_KEPT_STEPS:]:
            try:
                kept.append(self._read(key))
            except NotFoundError:  # removed meanwhile
                continue
            except DataError as error:
                print(f"checkpoint of step {step} in {self.store.url} was removed: {error}", flush=True)
                self.store.delete(key)
        for _, key in steps[:-_KEPT_STEPS]:
            self.store.delete(key)
        needed = {facts["sha256"] for manifest in kept for facts in manifest["files"].values()}
        for key in self.store.list_keys(f"{self.prefix}blobs/"):
            if key.rpartition("/")[2] not in needed:
                self.store.delete(key)


def remove_old_runs(store: Store, profile: str, *, current: str, keep: int) -> list[str]:
    """Remove a profile's runs from a store except the `keep` written last; return the fingerprints removed."""
    root = f"{_FOLDER}{profile}/"
    times = {run: StoredRun(store, f"{root}{run}/").written_at() for run in store.list_folders(root)}
    written = {run: at for run, at in times.items() if at}
    order = sorted(written, key=lambda run: (run == current, written[run]))
    old = order[: max(0, len(order) - keep)]
    for run in old:
        for key in [*store.list_keys(f"{root}{run}/steps/"), *store.list_keys(f"{root}{run}/")]:
            store.delete(key)
    return old


@dataclass
class Uploader:
    """Uploads the checkpoints of a run, one at a time and the newest first, while the ranks train.

    A store that fails is printed and tried again; it does not end the training.
    """

    run: StoredRun
    folder: Path
    uploaded: set[int] = field(default_factory=set)
    _done: threading.Event = field(default_factory=threading.Event)
    _failed: str = ""
    _seen: set[tuple[int, int, int]] = field(default_factory=set)
    _newest: tuple[int, Path] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Upload while the block runs; then wait until the newest checkpoint is in the store, or say that it is not."""
        thread = threading.Thread(target=self._upload_all, name="checkpoint-upload", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            if self._failed:
                print(f"{self._failed}; the newest checkpoint is on this machine only", flush=True)

    def _upload_all(self) -> None:
        while True:
            ends = self._done.is_set()  # read first: what was saved before it is uploaded
            newest = self._find_newest()
            if newest is not None and newest[0] not in self.uploaded and newest[0] > 0:
                self._upload(*newest)
            if ends:
                return
            self._done.wait(_RETRY_SECONDS if self._failed else _LOOK_SECONDS)

    def _find_newest(self) -> tuple[int, Path] | None:
        """Return (step, folder) of the checkpoint completed last.

        After a rewind that is not the one of the highest step, so it is the one that was not there at the last look. At
        the first look the run resumes from the highest step. Times decide only between several that are new at once,
        since the clock can have been set back meanwhile.
        """
        found = {identity: one for one in checkpoints.list_steps(self.folder) if (identity := _identify(*one))}
        new = found.keys() - self._seen
        if new:
            first = not self._seen
            chosen = max(new, key=lambda one: (one[0],) if first else (one[2], one[0]))
            self._newest = found[chosen]
            self.uploaded.discard(chosen[0])  # one of this step is older
        self._seen = self._seen | found.keys()
        return self._newest

    def _upload(self, step: int, folder: Path) -> None:
        began = time.monotonic()
        try:
            size = self.run.upload(folder, step)
        except (DataError, OSError) as error:
            gone = not (folder / NAME).is_file()
            why = "it was replaced by a newer one during the upload" if gone else str(error)
            print(f"checkpoint of step {step} was not uploaded: {why}", flush=True)
            self.uploaded.add(step)
            return
        except Exception as error:  # noqa: BLE001 - said here, since this thread must not end silently
            text = f"checkpoint of step {step} was not uploaded: {error or type(error).__name__}"
            if text != self._failed:
                print(text, flush=True)
            self._failed = text
            return
        self._failed = ""
        self.uploaded.add(step)
        how = f"{format_bytes(size)} in {self.run.store.url} after {time.monotonic() - began:.1f} s"
        print(f"checkpoint of step {step}: {how}", flush=True)


def _identify(step: int, folder: Path) -> tuple[int, int, int] | None:
    """Return step, file number and time of a checkpoint's manifest; None if it was removed meanwhile."""
    with suppress(OSError):
        facts = (folder / NAME).stat()
        return step, facts.st_ino, facts.st_mtime_ns
    return None
