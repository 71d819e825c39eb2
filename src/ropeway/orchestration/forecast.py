"""What `ropeway run` would do now, computed from files alone: no DVC, no lock, no network, and nothing is written.

`dvc_graph.plan` asks DVC, after the stage `identity` has refreshed `.identity/`. This module computes the content that
`.identity/` would have in memory and compares files with dvc.lock itself. What it cannot know this way is a note: what
a server would answer, large files (compared by size), stages that use more of DVC than this project does.
Source of the formats: dvc 3.67.1, dvc.yaml and dvc.lock (schema 2.0); tests compare the result with DVC's.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from ropeway.config.frozen import build_values, encode_value, read_version
from ropeway.config.params import Profile
from ropeway.config.sections import FilesSource, HubBase, HuggingfaceSource, Source
from ropeway.config.yaml_limits import load_yaml
from ropeway.orchestration.dvc_graph import changed_leaves, describe_change
from ropeway.orchestration.stage_process import STAGE_NAMES, base_identity, collect_inputs
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import file_sha256, json_mapping
from ropeway.stages.fetch.local import find_files
from ropeway.stages.fetch.sources import source_identity

_HASHED_BYTES = 64 << 20  # all files of a forecast together, about 0.2 s; larger ones are compared by size
_KEYS = {"cmd", "deps", "outs", "metrics", "plots", "params", "always_changed", "desc", "meta", "frozen"}
_OUTPUTS = ("outs", "metrics", "plots")
_VARIABLE = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")
_DIGESTS = ".work/sha256.json"  # the cache of `ropeway.stages.fetch.local`


@dataclass(frozen=True, slots=True)
class StageForecast:
    """What a run would do with one stage, and why.

    Attributes:
        will_run: Whether it would run or be restored from DVC's cache; None if that is not known without DVC.
        reasons: Why it would run, why not, or why that is not known.
    """

    name: str
    will_run: bool | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """The stages of a run in its order, without those that refresh fingerprints, and what was not compared exactly."""

    stages: tuple[StageForecast, ...]
    notes: tuple[str, ...]


def forecast_run(root: Path, profile: str) -> Forecast:
    """Return what a run of a profile would do with each stage; see the module for what that rests on.

    Raises:
        ConfigError: params.yaml or dvc.yaml cannot be read, or params.yaml names a file that does not exist.
    """
    root = root.resolve()
    values = {**_load_yaml(root / "params.yaml"), "profile": profile}
    stages = _load_stages(root, values)
    lock = _load_stage_bodies(root / "dvc.lock") if (root / "dvc.lock").is_file() else {}
    compared = _Comparison(root, profile)
    if lock:  # else every stage is new, whatever its inputs are
        refreshing = [stage.cmd for stage in stages if stage.refreshes]
        compared.take_inputs(refreshed=any("ropeway stage identity" in cmd for cmd in refreshing))
    found: dict[str, StageForecast] = {}
    for stage in stages:
        above = stage.deps_on(stages)
        if stage.refreshes:
            continue
        will_run, reasons = _forecast_stage(stage, lock.get(stage.name), compared, values)
        if will_run is False and not stage.frozen:
            reasons = [f"{one} will run" for one in above if one in found and found[one].will_run]
            will_run = bool(reasons)
        found[stage.name] = StageForecast(stage.name, will_run, tuple(reasons or ["nothing changed"]))
    return Forecast(tuple(found.values()), tuple(compared.notes))


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage of dvc.yaml with its variables replaced; `unread` names what this module does not evaluate."""

    name: str
    cmd: str
    deps: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    frozen: bool = False
    always: bool = False
    unread: tuple[str, ...] = ()

    @property
    def refreshes(self) -> bool:
        """Whether it runs at every start and reads no other stage."""
        return self.always and not self.deps

    def deps_on(self, stages: "Sequence[_Stage]") -> list[str]:
        """Return the names of the stages whose outputs it reads."""
        return [other.name for other in stages if any(_overlap(dep, out) for dep in self.deps for out in other.outs)]


def _forecast_stage(
    stage: _Stage, known: Mapping[str, Any] | None, compared: "_Comparison", values: Mapping[str, Any]
) -> tuple[bool | None, list[str]]:
    if stage.frozen:
        return False, ["frozen in dvc.yaml"]
    if stage.unread:  # first: dvc.lock has the stages of `foreach` under other names
        return None, [f"not known: it uses {', '.join(stage.unread)} of dvc.yaml. `dvc status {stage.name}` tells"]
    if not known:
        return True, ["it has not run before"]
    deps, outs = (_entries(known.get(kind)) for kind in ("deps", "outs"))
    reasons = ["runs always"] if stage.always else []
    if known.get("cmd") != stage.cmd:
        reasons.append("its command changed")
    for dep in stage.deps:
        reasons += compared.explain_dep(dep, deps.get(dep))
    reasons += changed_leaves(*_params_of(stage, known, values))
    missing: list[str] = []
    for out in stage.outs:
        change = compared.find_change(out, outs.get(out))
        (missing if change == "is missing" else reasons).extend([f"its output {out} {change}"] if change else [])
    if (reasons or missing) and (other := compared.other_profile(stage.deps, deps)):
        return True, [f"the last run in this workspace was of profile '{other}'"]
    reasons = reasons or missing
    return bool(reasons), reasons


def _params_of(
    stage: _Stage, known: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[dict[str, object], dict[str, object]]:
    """Return the values of a stage's own params in dvc.lock and in params.yaml."""
    recorded = (known.get("params") or {}).get("params.yaml") or {}
    return {key: recorded.get(key) for key in stage.params}, {key: _look_up(values, key) for key in stage.params}


@dataclass
class _Comparison:
    """Compares files with their entries in dvc.lock, and the inputs as they are now with those frozen before."""

    root: Path
    profile: str
    notes: list[str] = field(default_factory=list)
    _inputs: dict[str, Any] = field(default_factory=dict)  # path below the root -> content that a run would freeze
    _unknown: set[str] = field(default_factory=set)  # those of them that count as unchanged
    _budget: int = field(default_factory=lambda: _HASHED_BYTES)
    _changes: dict[str, str] = field(default_factory=dict)

    def take_inputs(self, *, refreshed: bool) -> None:
        """Compute what a run would freeze; without `refreshed`, use what is on disk."""
        if not refreshed:
            self.notes.append("fingerprints are those of the last run; a run refreshes them first")
            return
        offline = _OfflineIdentity(self.root)
        inputs = collect_inputs(
            self.root,
            self.profile,
            identify_base=offline.identify_base,
            identify_source=offline.identify_source,
            parses_all=False,
        )
        _, values = build_values(inputs.workspace, inputs.profile, inputs.params_text, inputs.facts)
        self._inputs = {f".identity/{name}.json": value for name, value in values.items()}
        self._unknown = {f".identity/{name}.json" for name in offline.notes}
        if "code-fetch" not in inputs.facts:
            self._unknown |= {f".identity/code-{stage}.json" for stage in STAGE_NAMES}
            self.notes.append("code was not compared: Python or Ropeway changed since the last run; a run compares it")
        self.notes += offline.notes.values()

    def explain_dep(self, path: str, known: Mapping[str, Any] | None) -> list[str]:
        """Return what changed in a dependency: the values of a frozen input, otherwise only that it changed."""
        change = self.find_change(path, known)
        if change == "changed" and path in self._inputs:
            old = read_version(self.root, str((known or {}).get("md5")))
            if old is not None:
                return describe_change(Path(path).stem, old, self._inputs[path])
        return [f"{path} {change}"] if change else []

    def other_profile(self, deps: Sequence[str], known: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return the profile that dvc.lock records for a stage, if it differs from this one and is known."""
        for path in deps:
            if path.startswith(".identity/params-") and path in known:
                then = read_version(self.root, str(known[path].get("md5")))
                if then is not None and then.get("profile") != self.profile:
                    return str(then["profile"])
        return None

    def find_change(self, path: str, known: Mapping[str, Any] | None) -> str:
        """Return how a file or folder differs from its entry: changed or is missing; empty if it does not."""
        if path in self._unknown:
            return ""
        if known is None:
            return "changed" if (self.root / path).exists() or path in self._inputs else "is missing"
        if (value := self._inputs.get(path)) is not None:
            digest = hashlib.md5(encode_value(value), usedforsecurity=False).hexdigest()
            return "" if digest == known.get("md5") else "changed"
        key = f"{path} {known.get('md5')}"
        if key not in self._changes:
            self._changes[key] = self._compare(self.root / path, known)
        return self._changes[key]

    def _compare(self, path: Path, known: Mapping[str, Any]) -> str:
        if not path.exists():
            return "is missing"
        files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        size = sum(one.stat().st_size for one in files)
        if size != known.get("size") or len(files) != known.get("nfiles", 1):
            return "changed"
        if size > self._budget:
            note = "outputs that are large were compared by size and number of files; a run compares their content"
            self.notes += [note] if note not in self.notes else []
            return ""
        self._budget -= size
        return "" if _md5(path, files) == known.get("md5") else "changed"


@dataclass
class _OfflineIdentity:
    """Identities of base and sources without a server; `notes` names the inputs that are not known, and why."""

    root: Path
    notes: dict[str, str] = field(default_factory=dict)

    def identify_base(self, profile: Profile, root: Path) -> object:
        """Return a base's identity; None for one on the Hub."""
        if not isinstance(profile.base, HubBase):
            return base_identity(profile, root)
        self.notes["base"] = f"base {profile.model_name}: the Hub was not asked for its commit; a run asks"
        return None

    def identify_source(self, source: Source, root: Path) -> object:
        """Return a source's identity; None for one on a server, and for local files that take long to hash."""
        on_server = isinstance(source, HuggingfaceSource) or (
            isinstance(source, FilesSource) and any("://" in path for path in source.paths)
        )
        if on_server:
            self.notes["sources"] = "sources: servers were not asked for changes; a run asks"
            return None
        if not isinstance(source, FilesSource):
            return source_identity(source, root)
        digests = self._digest(find_files(source.paths, root, source.splits))
        return None if digests is None else {"kind": source.kind, "files": digests}

    def _digest(self, files: Mapping[str, Path]) -> dict[str, str] | None:
        """Return each file's sha256, from the digest cache if its size and times are the same; None if that is long."""
        path = self.root / _DIGESTS
        cache = json_mapping(path.read_bytes()) if path.is_file() else {}
        digests, new = {}, 0
        for name, file in files.items():
            stat = file.stat()
            key = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            entry = cache.get(str(file))
            if isinstance(entry, list) and entry[:1] == [key]:
                digests[name] = str(entry[1])
                continue
            new += stat.st_size
            if new > _HASHED_BYTES:
                self.notes["sources"] = "sources: new or changed local files were not hashed; a run hashes them"
                return None
            digests[name] = file_sha256(file)
        return digests


def _load_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML 1.2 file that DVC wrote or reads."""
    try:
        found = load_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Run this inside a clone of the project") from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {str(error).splitlines()[0]}. `ropeway run` reports more") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a mapping, found a {type(found).__name__}. `git checkout {path.name}`")
    return found


def _load_stage_bodies(path: Path) -> dict[str, dict[str, Any]]:
    """Return name -> body of the stages in dvc.yaml or dvc.lock."""
    stages = _load_yaml(path).get("stages") or {}
    bodies = {name: body or {} for name, body in stages.items()} if isinstance(stages, dict) else None
    if bodies is None or not all(isinstance(body, dict) for body in bodies.values()):
        raise ConfigError(f"{path}: `stages` is no mapping of mappings. `dvc status` reports more")
    return bodies


def _load_stages(root: Path, values: Mapping[str, Any]) -> list[_Stage]:
    """Return the stages of dvc.yaml, each after those whose outputs it reads, otherwise in the file's order."""
    defined = _load_stage_bodies(root / "dvc.yaml")
    waiting = [_read_stage(name, body, values) for name, body in defined.items()]
    ordered: list[_Stage] = []
    while waiting:
        done = {stage.name for stage in ordered}
        ready = next((stage for stage in waiting if set(stage.deps_on(waiting)) <= done), None)
        if ready is None:
            raise ConfigError(f"{root / 'dvc.yaml'}: stages depend on each other in a circle. `dvc dag` names them")
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _read_stage(name: str, body: Mapping[str, Any], values: Mapping[str, Any]) -> _Stage:
    unread = sorted(set(body) - _KEYS)
    texts = {kind: [_fill(text, values) for text in _paths(body.get(kind))] for kind in ("deps", *_OUTPUTS, "params")}
    cmd = body.get("cmd")
    filled = _fill(cmd, values) if isinstance(cmd, str) else ""
    if not isinstance(cmd, str) or any("${" in text for some in ([filled], *texts.values()) for text in some):
        unread.append("variables")
    if any(not isinstance(param, str) for param in body.get("params") or []):
        unread.append("params of other files")
    outs = tuple(text for kind in _OUTPUTS for text in texts[kind])
    frozen, always = bool(body.get("frozen")), bool(body.get("always_changed"))
    return _Stage(name, filled, tuple(texts["deps"]), outs, tuple(texts["params"]), frozen, always, tuple(unread))


def _paths(entries: object) -> Iterator[str]:
    """Yield the paths of a list in dvc.yaml, whose entries are paths or mappings of one path to its settings."""
    for entry in entries if isinstance(entries, list) else ():
        yield from entry if isinstance(entry, dict) else [str(entry)]


def _fill(text: str, values: Mapping[str, Any]) -> str:
    """Replace `${a.b}` by the value in params.yaml; a variable that is not there stays."""

    def value_of(match: re.Match[str]) -> str:
        value = _look_up(values, match[1])
        return match[0] if value is None or isinstance(value, dict | list) else str(value)

    return _VARIABLE.sub(value_of, text)


def _look_up(values: Mapping[str, Any], key: str) -> object:
    here: object = values
    for part in key.split("."):
        here = here.get(part) if isinstance(here, dict) else None
    return here


def _overlap(dep: str, out: str) -> bool:
    return dep == out or dep.startswith(f"{out}/") or out.startswith(f"{dep}/")


def _entries(entries: object) -> dict[str, Mapping[str, Any]]:
    return {str(entry["path"]): entry for entry in entries if "path" in entry} if isinstance(entries, list) else {}


def _md5(path: Path, files: Sequence[Path]) -> str:
    """Return DVC's digest of a file, or of a folder: that of the sorted list of its files."""
    if path.is_file():
        return _file_md5(path)
    listed = [{"md5": _file_md5(one), "relpath": one.relative_to(path).as_posix()} for one in files]
    listed.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
