"""Frozen inputs: copies of what a run reads, made at its start. Stages read them, and DVC records them.

DVC records a stage's dependencies after its command has ended (3.67.1, `save_deps`). A file that is edited while the
stage runs would be recorded in dvc.lock and the run cache as the file that the stage used. So the stage `identity`,
which always runs first, writes copies. Every other stage depends on these copies and reads only them:

.identity/params-<stage>.json                the values of the keys of params.yaml that the stage reads
.identity/deepspeed.json, prompts.json,
          contamination.json, template.json  the text of the files that params name
.identity/sources.json, base.json, tasks.json  hashes, commits and versions of what is read in place
.identity/code-<stage>.json                  digests of the stage's package and of its imports from data and models
.identity/settings.json, params.yaml         not dependencies: keys that change no result, and a copy of the file
.identity/addresses.json                     not a dependency: signed URLs; elsewhere their signatures are removed
.identity/manifest.json                      sha256 of each file, written last

What is read in place (code, local sources, the base) is compared again when a stage ends: `check_unchanged`.
.work/inputs/<md5>.json keeps the last versions of these JSON files under the MD5 that dvc.lock records, so that
Ropeway can report which value changed.
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
from ropeway.config.edit import without_comments
from ropeway.config.load_params import list_blocks, read_block
from ropeway.config.params import (
    BaseParams,
    EvaluateParams,
    FetchParams,
    PackageParams,
    PrepareParams,
    Profile,
    TrainParams,
)
from ropeway.config.sections import Section
from ropeway.config.stages import READS, UNHASHED
from ropeway.config.tokenize_params import TokenizeParams
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import NAME, check_file, digest_of, file_sha256, json_bytes, write_atomic, write_json
from ropeway.runtime.workspace import Workspace

PARAMS_FILE = "params.yaml"
_SETTINGS = "settings"
ADDRESSES = "addresses"  # signed URLs
_REMEDY = "Run `dvc repro` or `ropeway run`; both write the frozen inputs first"
_KEPT_VERSIONS = 500  # files in .work/inputs, about 5 kB each


@dataclass(frozen=True, slots=True)
class FrozenInputs:
    """The verified contents of `.identity`, written by `freeze`."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, root: Path) -> "FrozenInputs":
        """Return the workspace's frozen inputs.

        Raises:
            DataError: They are missing or incomplete, or a file was changed after it was written.
        """
        folder = Workspace(root, "").identity
        try:
            manifest = json.loads((folder / NAME).read_bytes())
            files = manifest["files"]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{folder}: the frozen inputs are missing or incomplete. {_REMEDY}") from None
        for name, facts in files.items():
            check_file(folder / name, facts, remedy=_REMEDY)
        return cls(folder, manifest)

    def edited_params(self, root: Path) -> tuple[str, ...]:
        """Return the keys of this profile that changed in the workspace's params.yaml since the inputs were frozen."""
        try:
            now, then = (
                without_secrets(read_block(path, self.profile_name))
                for path in (root / "params.yaml", self.params_file)
            )
        except (ConfigError, KeyError):
            return ("params.yaml",)
        return tuple(key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key))

    @property
    def profile_name(self) -> str:
        """Name of the profile."""
        return str(self.manifest["profile"])

    @property
    def params_file(self) -> Path:
        """Path of the frozen copy of params.yaml."""
        return self.folder / PARAMS_FILE

    def digest(self, name: str) -> str:
        """Return the digest of one of the JSON files, e.g. `code-train`."""
        return self._read(name).digest

    def value(self, name: str) -> dict[str, Any]:
        """Return the content of one of the JSON files, e.g. `sources`."""
        return self._read(name).of

    def text(self, name: str, path: str) -> str:
        """Return the frozen text of a file that params.yaml names, e.g. `text("deepspeed", profile.deepspeed_config)`.

        Raises:
            DataError: The frozen params.yaml does not name this file.
        """
        try:
            text: str = self.value(name)[path]
        except KeyError:
            raise DataError(f"{self.folder / name}.json: {path} is missing. {_REMEDY}") from None
        return text

    def tokenize_params(self) -> TokenizeParams:
        """Return the params of tokenize, which are parts of keys: see `ropeway.config.tokenize_params`."""
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
        """Return a profile with only the keys that the stage reads; that of train also has `TrainSettings`."""
        params = dict(self.value(f"params-{stage}")["params"])
        if stage == "train":
            params |= self.value(_SETTINGS)["params"]
        if stage == "fetch":  # the only stage that needs the signatures
            signed = self.value(ADDRESSES)
            params["sources"] = map_addresses(params["sources"], lambda path: signed.get(path, path))
        read = _create_section(tuple(params)).model_validate_json(json.dumps(params))
        return Profile.model_construct(**{name: getattr(read, name) for name in params})

    def _read(self, name: str) -> "_FrozenValue":
        return _FrozenValue(**json.loads((self.folder / f"{name}.json").read_bytes()))


@dataclass(frozen=True, slots=True)
class _FrozenValue:
    """Content of one JSON file, and the digest of `of`."""

    digest: str
    of: dict[str, Any]


def freeze(workspace: Workspace, profile: Profile, params_text: str, facts: Mapping[str, object]) -> None:
    """Write the frozen inputs of a run; the caller holds the workspace lock. Arguments as in `build_values`."""
    text, values = build_values(workspace, profile, params_text, facts)
    write_values(workspace, text, values)
    kept = [path for path in workspace.identity.glob("*.json") if path.stem not in (_SETTINGS, ADDRESSES)]
    _keep_versions(kept, _versions_folder(workspace.root))


def build_values(
    workspace: Workspace, profile: Profile, params_text: str, facts: Mapping[str, object]
) -> tuple[str, dict[str, object]]:
    """Return the text of params.yaml as it is published, and the content of each JSON file by name; write nothing.

    Args:
        workspace: The workspace and profile name.
        profile: The profile of the run.
        params_text: Text of params.yaml.
        facts: Other content by file name: digests of code, sources and base, texts of files.

    Raises:
        ConfigError: Two signed URLs differ only in their signatures, or one cannot be found in the text.
    """
    secrets = find_secrets(profile.model_dump(mode="json", include={"sources"}))
    if len(set(secrets.values())) < len(secrets):
        equal = sorted({redacted for redacted in secrets.values() if list(secrets.values()).count(redacted) > 1})
        raise ConfigError(
            f"params.yaml, sources: URLs differ only in their signature parameters ({', '.join(equal)}) and would "
            "count as one file; if they are different files, download them and list the local paths"
        )
    params_text = _redact_params(params_text, workspace.profile, secrets)
    facts = {**facts, ADDRESSES: {redacted: address for address, redacted in secrets.items()}}
    values = {f"params-{stage}": _dump_params(workspace.profile, profile, names) for stage, names in READS.items()}
    values["params-tokenize"]["params"] = TokenizeParams.of(profile).model_dump(mode="json")
    return params_text, {**values, _SETTINGS: _dump_params(workspace.profile, profile, UNHASHED), **facts}


def encode_value(value: object) -> bytes:
    """Return the bytes of one JSON file of `.identity`."""
    return json_bytes({"digest": digest_of(value), "of": value})


def write_values(workspace: Workspace, params_text: str, values: Mapping[str, object]) -> None:
    """Write `.identity/<name>.json` for each value, the text of params.yaml, and the manifest last."""
    folder = workspace.identity
    (folder / NAME).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():  # no fsync per file: the manifest detects incomplete files
        path = folder / f"{name}.json"
        if name == ADDRESSES:
            path.unlink(missing_ok=True)  # that of an older Ropeway was readable by all users of the machine
            path.touch(mode=0o600)
        path.write_bytes(encode_value(value))
    (folder / PARAMS_FILE).write_text(params_text, encoding="utf-8")
    paths = [folder / PARAMS_FILE, *(folder / f"{name}.json" for name in sorted(values))]
    files = {path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in paths}
    write_json(folder / NAME, {"profile": workspace.profile, "files": files})


def read_texts(root: Path, paths: Iterable[str], *, key: str) -> dict[str, str]:
    """Return the texts of files that params.yaml names, by path as written there.

    Raises:
        ConfigError: A path is not a file, or the file is not UTF-8.
    """
    texts = {}
    for path in paths:
        try:
            texts[path] = (root / path).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"params.yaml: {key} names {path}, which is not UTF-8 text: {error}. Save it as UTF-8"
            ) from None
        except OSError as error:
            why = f"which is not a file below {root}" if not (root / path).is_file() else f"{error.strerror}"
            raise ConfigError(f"params.yaml: {key} names {path}, {why}. Create the file or correct the path") from None
    return texts


def read_version(root: Path, md5: str) -> dict[str, Any] | None:
    """Return the content of the frozen JSON file with this MD5; None if that version is not kept."""
    try:
        return _FrozenValue(**json.loads((_versions_folder(root) / f"{md5}.json").read_bytes())).of
    except (OSError, ValueError, TypeError):
        return None


def _dump_params(profile_name: str, profile: Profile, names: Iterable[str]) -> dict[str, object]:
    values = profile.model_dump(mode="json", include=set(names), exclude_unset=True)
    return {"profile": profile_name, "params": without_secrets(values)}


def _redact_params(text: str, profile_name: str, secrets: Mapping[str, str]) -> str:
    """Return the text of params.yaml without signatures and comments; packages and model cards contain it."""
    for block in list_blocks(Path(PARAMS_FILE), text):  # a package has those that the profile's block uses, too
        secrets = {**find_secrets(block), **secrets}
    for address, redacted in sorted(secrets.items(), reverse=True):  # the longer first of two that begin alike
        if address not in text:
            raise ConfigError(
                f"params.yaml, profile '{profile_name}': the signed URL {redacted} was not found in the file's text, "
                "so its signature cannot be removed from packages; write the URL on one line without YAML escapes"
            )
        text = text.replace(address, redacted)
    return without_signatures(without_comments(text))  # user names and passwords


@cache
def _create_section(names: tuple[str, ...]) -> type[Section]:
    fields: dict[str, Any] = {
        name: (Profile.model_fields[name].annotation, Profile.model_fields[name]) for name in names
    }
    return create_model("FrozenParams", __base__=Section, **fields)


def _versions_folder(root: Path) -> Path:
    return Workspace(root, "").work / "inputs"


def _keep_versions(paths: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    current = set[Path]()
    for path in paths:
        data = path.read_bytes()
        kept = folder / f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}.json"
        current.add(kept)
        if kept.is_file():
            kept.touch()
        else:
            write_atomic(kept, data)
    oldest = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)[:-_KEPT_VERSIONS]
    for path in oldest:
        if path not in current:  # after the clock was set back, these look oldest
            path.unlink(missing_ok=True)
