"""The inputs of a run as they were when its digests were taken: what stages read, and what DVC records.

DVC records a stage's dependencies after its command has ended (3.67.1, `save_deps`): a file that is edited while the
stage runs would be recorded as what the stage used, in dvc.lock and in the run-cache. So the stage `identity`, which
always runs first, writes copies, and every other stage depends on these and reads only these:

.identity/params-<stage>.json                the values of the keys of params.yaml that the stage reads
.identity/deepspeed.json, prompts.json,
          contamination.json                 the text of the files that params name
.identity/sources.json, base.json, tasks.json  what is read in place: hashes, commits, versions
.identity/code-<stage>.json                  digests of the stage's package and of what it imports of data and models
.identity/settings.json, params.yaml         no stage's dependency: keys that change no result, and the file as it was
.identity/addresses.json                     nor this: signed addresses, which are shown and recorded without signature
.identity/manifest.json                      sha256 of each of them, written last

What is read in place (code, local sources, the base) is compared again when a stage ends: `check_unchanged`.
.work/inputs/<md5>.json keeps every version of a JSON file above under the hash that dvc.lock has of it, so that a plan
can say which value changed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import create_model

from ropeway.config.addresses import find_secrets, map_addresses, without_secrets, without_signatures
from ropeway.config.params import (
    BaseParams,
    EvaluateParams,
    FetchParams,
    PackageParams,
    PrepareParams,
    Profile,
    Section,
    TrainParams,
)
from ropeway.config.stages import READS, UNHASHED
from ropeway.config.tokenize_params import TokenizeParams
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import NAME, check_file, digest_of, file_sha256, json_bytes, write_atomic, write_json
from ropeway.runtime.workspace import Workspace

PARAMS_FILE = "params.yaml"
_SETTINGS = "settings"
_ADDRESSES = "addresses"
_REMEDY = "Run `dvc repro` or `ropeway run`, which take the digests first"
_KEPT_VERSIONS = 500  # of JSON files in .work/inputs; some 5 kB each


@dataclass(frozen=True, slots=True)
class FrozenInputs:
    """What `freeze` wrote into the folder `.identity`, verified."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, root: Path) -> "FrozenInputs":
        """Return the workspace's frozen inputs.

        Raises:
            DataError: There are none, they are unfinished, or one was changed after it was written.
        """
        folder = Workspace(root, "").identity
        try:
            manifest = json.loads((folder / NAME).read_bytes())
            files = manifest["files"]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{folder}: no digests of this run's inputs, or unfinished ones. {_REMEDY}") from None
        for name, facts in files.items():
            check_file(folder / name, facts, remedy=_REMEDY)
        return cls(folder, manifest)

    @property
    def profile_name(self) -> str:
        """The profile whose inputs these are."""
        return str(self.manifest["profile"])

    @property
    def params_file(self) -> Path:
        """params.yaml as it was."""
        return self.folder / PARAMS_FILE

    def digest(self, name: str) -> str:
        """Return the digest of one of the JSON files, e.g. `code-train`."""
        return self._read(name).digest

    def value(self, name: str) -> dict[str, Any]:
        """Return what one of the JSON files holds, e.g. `sources`."""
        return self._read(name).of

    def text(self, name: str, path: str) -> str:
        """Return the text that a file named by params had, e.g. `text("deepspeed", profile.deepspeed_config)`.

        Raises:
            DataError: Params named no such file when the digests were taken.
        """
        try:
            text: str = self.value(name)[path]
        except KeyError:
            raise DataError(f"{self.folder / name}.json: holds no {path}. {_REMEDY}") from None
        return text

    def tokenize_params(self) -> TokenizeParams:
        """Return what tokenize reads: parts of some keys, see `ropeway.config.tokenize_params`."""
        return TokenizeParams.model_validate(self.value("params-tokenize")["params"])

    @overload
    def profile(self, stage: Literal["fetch"]) -> FetchParams: ...
    @overload
    def profile(self, stage: Literal["base"]) -> BaseParams: ...
    @overload
    def profile(self, stage: Literal["prepare"]) -> PrepareParams: ...
    @overload
    def profile(self, stage: Literal["train"]) -> TrainParams: ...
    @overload
    def profile(self, stage: Literal["evaluate"]) -> EvaluateParams: ...
    @overload
    def profile(self, stage: Literal["package"]) -> PackageParams: ...
    @overload
    def profile(self, stage: str) -> Section: ...
    def profile(self, stage: str) -> Section:
        """Return a profile with the keys that the stage reads, train's with its settings, and no others."""
        params = dict(self.value(f"params-{stage}")["params"])
        if stage == "train":
            params |= self.value(_SETTINGS)["params"]
        if stage == "fetch":  # the one that needs signatures
            signed = self.value(_ADDRESSES)
            params["sources"] = map_addresses(params["sources"], lambda path: signed.get(path, path))
        read = _model_of(tuple(params)).model_validate_json(json.dumps(params))
        return Profile.model_construct(**{name: getattr(read, name) for name in params})

    def _read(self, name: str) -> "_Frozen":
        return _Frozen(**json.loads((self.folder / f"{name}.json").read_bytes()))


@dataclass(frozen=True, slots=True)
class _Frozen:
    """One of the JSON files: what it holds, and the digest of that."""

    digest: str
    of: dict[str, Any]


def freeze(workspace: Workspace, profile: Profile, params_text: str, facts: Mapping[str, object]) -> None:
    """Write the frozen inputs of a run; call it under the workspace lock.

    `facts` is what else is recorded, by file name: digests of code, sources and base, texts of files.

    Raises:
        ConfigError: A signed address is written in a way that hides it.
    """
    secrets = find_secrets(profile.model_dump(mode="json", include={"sources"}))
    if len(set(secrets.values())) < len(secrets):
        twice = sorted({told for told in secrets.values() if list(secrets.values()).count(told) > 1})
        raise ConfigError(
            f"params.yaml, sources: addresses differ only in parameters that sign them ({', '.join(twice)}), so "
            "they would be read as one file. If they are different files, download them and name the files"
        )
    params_text = _hide(params_text, workspace.profile, secrets)
    facts = {**facts, _ADDRESSES: {told: address for address, told in secrets.items()}}
    values = {f"params-{stage}": _dump(workspace.profile, profile, names) for stage, names in READS.items()}
    values["params-tokenize"]["params"] = TokenizeParams.of(profile).model_dump(mode="json")
    write_values(workspace, params_text, {**values, _SETTINGS: _dump(workspace.profile, profile, UNHASHED), **facts})
    kept = [path for path in workspace.identity.glob("*.json") if path.stem not in (_SETTINGS, _ADDRESSES)]
    _keep_versions(kept, _versions_folder(workspace.root))


def write_values(workspace: Workspace, params_text: str, values: Mapping[str, object]) -> None:
    """Write `.identity/<name>.json` for each value, params.yaml as it is, and the manifest last."""
    folder = workspace.identity
    (folder / NAME).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():  # not synced to the disk one by one: the manifest tells what is whole
        (folder / f"{name}.json").write_bytes(json_bytes({"digest": digest_of(value), "of": value}))
    (folder / PARAMS_FILE).write_text(params_text, encoding="utf-8")
    paths = [folder / PARAMS_FILE, *(folder / f"{name}.json" for name in sorted(values))]
    files = {path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in paths}
    write_json(folder / NAME, {"profile": workspace.profile, "files": files})


def read_texts(root: Path, paths: Iterable[str], *, key: str) -> dict[str, str]:
    """Return the texts of files that params name, by the name they have there.

    Raises:
        ConfigError: One is not a file, or is not UTF-8.
    """
    texts = {}
    for path in paths:
        try:
            texts[path] = (root / path).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"params.yaml: {key} names {path}, which is not UTF-8 text: {error}") from None
        except OSError as error:
            why = f"which is not a file below {root}" if not (root / path).is_file() else f"{error.strerror}"
            raise ConfigError(f"params.yaml: {key} names {path}, {why}") from None
    return texts


def read_version(root: Path, md5: str) -> dict[str, Any] | None:
    """Return what a frozen JSON file held when its bytes had this MD5; None when that version is not kept here."""
    try:
        return _Frozen(**json.loads((_versions_folder(root) / f"{md5}.json").read_bytes())).of
    except (OSError, ValueError, TypeError):
        return None


def _dump(profile_name: str, profile: Profile, names: Iterable[str]) -> dict[str, object]:
    values = profile.model_dump(mode="json", include=set(names), exclude_unset=True)
    return {"profile": profile_name, "params": without_secrets(values)}


def _hide(text: str, profile_name: str, secrets: Mapping[str, str]) -> str:
    """Return the text of params.yaml with signed addresses as they are shown; it goes into packages and cards."""
    for address, told in secrets.items():
        if address not in text:
            raise ConfigError(
                f"params.yaml, profile '{profile_name}': the signed address {told} cannot be found in the text, so it "
                "could not be kept out of packages. Write it as plain text in one line, without escapes"
            )
        text = text.replace(address, told)
    return without_signatures(text)  # those of other profiles, and of comments


@cache
def _model_of(names: tuple[str, ...]) -> type[Section]:
    fields: dict[str, Any] = {
        name: (Profile.model_fields[name].annotation, Profile.model_fields[name]) for name in names
    }
    return create_model("FrozenParams", __base__=Section, **fields)


def _versions_folder(root: Path) -> Path:
    return Workspace(root, "").work / "inputs"


def _keep_versions(paths: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        data = path.read_bytes()
        kept = folder / f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}.json"
        if kept.is_file():
            kept.touch()
        else:
            write_atomic(kept, data)
    oldest = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)[:-_KEPT_VERSIONS]
    for path in oldest:
        path.unlink(missing_ok=True)
