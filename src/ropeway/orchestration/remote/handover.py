"""The hand-over of a stage: dvc.lock and the frozen inputs, sent through the DVC remote under their digest.

A worker cannot compute them: dvc.lock is often not in git, and the identities of local files hold their times. It uses
them as given; the stage itself compares its code with the recorded digests. Signed URLs are left out, except for fetch.
"""

import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ropeway.config.frozen import ADDRESSES, FrozenInputs, encode_value
from ropeway.orchestration import dvc_exchange as exchange
from ropeway.orchestration.stage_process import CHECKED_BEFORE_TRAINING
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import NAME, FileFacts, Json, json_bytes, write_atomic
from ropeway.runtime.workspace import Workspace

_FORMAT = 1
_LOCK = "dvc.lock"
_FILE = re.compile(r"[A-Za-z0-9_][\w.-]*")
# Libraries whose version can change a stage's bytes.
_LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "peft", "numpy", "pyarrow", "polars", "liger-kernel")
_READS_ADDRESSES = "fetch"


@dataclass(frozen=True, slots=True)
class Handover:
    """What a worker needs besides the commit and the inputs in the DVC remote.

    Attributes:
        python: Major and minor version of Python, on which the digests of code depend.
        versions: Installed versions of the libraries that compute.
        lock: The text of dvc.lock; empty if nothing ran yet.
        identity: The text of each file of `.identity`.
    """

    python: str
    versions: Mapping[str, str]
    lock: str
    identity: Mapping[str, str]

    @classmethod
    def collect(cls, root: Path, step: str) -> "Handover":
        """Return the hand-over of a step.

        Raises:
            DataError: The frozen inputs are missing.
        """
        frozen = FrozenInputs.load(root)
        files = {path.name: path.read_bytes() for path in sorted(frozen.folder.iterdir()) if path.name != NAME}
        if step != _READS_ADDRESSES:
            files[f"{ADDRESSES}.json"] = encode_value({})
        manifest = {**frozen.manifest, "files": {name: _facts_of(data) for name, data in files.items()}}
        files[NAME] = json_bytes(manifest)
        lock = root / _LOCK
        return cls(
            python_version(),
            library_versions(),
            lock.read_text(encoding="utf-8") if lock.is_file() else "",
            {name: data.decode() for name, data in files.items()},
        )

    def send(self, root: Path) -> str:
        """Store the hand-over in the DVC remote; return its MD5. Equal hand-overs have equal digests."""
        return exchange.push_document(root, json_bytes({"format": _FORMAT, **self._facts()}))

    @classmethod
    def receive(cls, root: Path, digest: str) -> "Handover":
        """Return a hand-over from the DVC remote.

        Raises:
            ConfigError: It has another format, or this machine has another Python than the caller.
            TemporaryError: The remote does not have it.
        """
        try:
            facts: dict[str, Any] = parse_json(exchange.pull_document(root, digest))
            version = facts.pop("format", None)
            found = TypeAdapter(cls).validate_python(facts)
        except (ValueError, AttributeError) as error:
            raise DataError(f"hand-over {digest}: it was not written by Ropeway ({type(error).__name__})") from None
        if version != _FORMAT:
            raise ConfigError("the hand-over has another format. Use the same version of Ropeway on both machines")
        if wrong := [name for name in found.identity if not _FILE.fullmatch(name)]:
            raise DataError(f"hand-over {digest}: it names {wrong[0]!r}, which is no file of .identity")
        if found.python != python_version():
            raise ConfigError(
                f"this worker has Python {python_version()}, the calling run Python {found.python}, and the digests of "
                "code differ between the two. Make the worker's environment with the same Python"
            )
        return found

    def write(self, root: Path) -> None:
        """Write dvc.lock and the frozen inputs into a worker's clone; the caller holds its lock."""
        folder = Workspace(root, "").identity
        folder.mkdir(exist_ok=True)
        for name in {path.name for path in folder.iterdir()} - {*self.identity}:
            (folder / name).unlink()
        for name in sorted(self.identity, key=lambda each: each == NAME):  # the manifest last
            mode = 0o600 if name == f"{ADDRESSES}.json" else 0o666
            write_atomic(folder / name, self.identity[name].encode(), mode=mode)
        write_atomic(root / _LOCK, self.lock.encode()) if self.lock else (root / _LOCK).unlink(missing_ok=True)

    def other_versions(self) -> list[str]:
        """Return a sentence for each library of another version here than where the run was called."""
        here = library_versions()
        names = sorted({*here, *self.versions})
        return [
            f"{name} {here.get(name, 'is not installed')} here, {self.versions.get(name, 'not installed')} at the "
            "calling run"
            for name in names
            if here.get(name) != self.versions.get(name)
        ]

    def _facts(self) -> Json:
        return {
            "python": self.python,
            "versions": dict(self.versions),
            "lock": self.lock,
            "identity": dict(self.identity),
        }


def inputs_of(root: Path, step: str) -> tuple[str, ...]:
    """Return the outputs of other stages that a worker needs for a stage."""
    return exchange.inputs(root, step, of_others=CHECKED_BEFORE_TRAINING if step == "train" else ())


def _facts_of(data: bytes) -> FileFacts:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def python_version() -> str:
    """Return major and minor version of this Python."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that compute."""
    found = {}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
