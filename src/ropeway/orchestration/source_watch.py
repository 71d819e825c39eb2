"""What a watch of data sources decides: whether a source changed since the last run, and whether to ask for a run.

A look computes the identities that the stage `identity` would write, without the workspace lock and without writing
`.identity`, so it may happen during a run. Everything here works on files and values; `source_watcher` asks Prefect.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ropeway.config.load_params import load_profile
from ropeway.registry import Registry
from ropeway.runtime.errors import ConfigError, DataError, NotFoundError, RopewayError
from ropeway.runtime.lock import read_last_holder
from ropeway.runtime.manifest import digest_of, json_mapping, write_json
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.sources import source_identity

Identities = Mapping[str, Any]  # source -> its identity
_RUN = "run.json"  # of a package: what its run read
_SHORT = 12
_SHOWN = 5  # changed files of a source
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
NOTIFIED = "notified"


def parse_interval(text: str) -> float | None:
    """Return the seconds of e.g. `10m`; None for `notified`: look only after `ropeway notify-data`.

    >>> [parse_interval(text) for text in ("90s", "10m", "1.5h", "notified")]
    [90.0, 600.0, 5400.0, None]

    Raises:
        ConfigError: Another text, or less than a second.
    """
    if text == NOTIFIED:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text)
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if seconds < 1:
        raise ConfigError(f"--watch '{text}': expected e.g. 90s, 10m, 1h, 1d or {NOTIFIED}")
    return seconds


@dataclass(frozen=True, slots=True)
class SourceLook:
    """The sources of a profile at one moment.

    Attributes:
        identities: Source -> its identity, for those that could be read.
        unreadable: Source -> why it could not be read.
    """

    identities: Identities
    unreadable: Mapping[str, str] = field(default_factory=dict)


def look_at_sources(root: Path, profile: str) -> SourceLook:
    """Return the current identities of a profile's sources; writes only the digest cache of local files.

    Raises:
        ConfigError: params.yaml cannot be read or does not have the profile.
    """
    identities: dict[str, Any] = {}
    unreadable: dict[str, str] = {}
    for name, source in sorted(load_profile(root / "params.yaml", profile)[1].sources.items()):
        try:
            identities[name] = json.loads(json.dumps(source_identity(source, root)))
        except (RopewayError, OSError) as error:
            unreadable[name] = str(error)
    return SourceLook(identities, unreadable)


@dataclass(slots=True)
class WatchState:
    """What a watch remembers of one profile, in `.work/watch/<profile>.json`; it survives restarts.

    Attributes:
        handled: The identities for which a run was asked, or that a run was found to use; None: unknown.
        handled_at: When, ISO.
        package: What `identify_package` returned then; if it differs now, a run has completed since, whatever the
            clock says. Empty in a state of an older Ropeway, where times decide.
        seen: Digest of changed identities at the previous look; they count as settled once two looks agree.
        run: Id of the flow run that was asked for last.
        words: What that run was told to be started by.
        crashes: How often a run for these identities was asked for again, because the one before crashed.
    """

    handled: dict[str, Any] | None = None
    handled_at: str = ""
    package: str = ""
    seen: str | None = None
    run: str | None = None
    words: str = ""
    crashes: int = 0

    @classmethod
    def load(cls, root: Path, profile: str) -> "WatchState":
        """Return the stored state; an empty one if there is none or its file is damaged."""
        try:
            found = json_mapping(state_path(root, profile).read_bytes())
            state = cls(**found)
            if state.handled is not None:
                datetime.fromisoformat(state.handled_at)
        except (OSError, TypeError, ValueError):
            return cls()
        handled = state.handled or {}
        return state if isinstance(handled, dict) and all(isinstance(one, dict) for one in handled.values()) else cls()

    def save(self, root: Path, profile: str) -> None:
        """Store the state."""
        path = state_path(root, profile)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    def handle(self, identities: Identities, *, run: str | None = None, words: str = "") -> None:
        """Record that a run uses these identities; sources that are not among them keep theirs."""
        self.handled = {**(self.handled or {}), **identities}
        self.handled_at = datetime.now(UTC).isoformat()
        self.package = ""
        self.seen = None
        self.run, self.words, self.crashes = run, words, 0


def state_path(root: Path, profile: str) -> Path:
    """Return the file of a profile's watch state."""
    return Workspace(root, profile).work / "watch" / f"{profile}.json"


@dataclass(frozen=True, slots=True)
class LookResult:
    """What follows from a look.

    Attributes:
        action: `nothing`; `settle`: look again soon; `wait`: look again, but later; `run`: ask for a run.
        changed: Source -> what changed, e.g. `a.jsonl 0123456789ab -> 9876543210ab`.
        words: What to print; each text once.
    """

    action: str
    changed: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()


def judge_look(state: WatchState, look: SourceLook, baseline: Identities | None, used: Identities | None) -> LookResult:
    """Return what follows from a look, and update the state.

    A run is asked for only if a source that the last run read has another identity now, two looks in a row agree on
    it, every source can be read, and no run that is active uses it already.

    Args:
        state: What the watch remembers.
        look: The sources now.
        baseline: The identities that the last run recorded; None if no run is known.
        used: The identities that a run uses that is active now; None if none is.
    """
    said = [f"source {name} cannot be read now, which is no change: {why}" for name, why in look.unreadable.items()]
    if baseline is None:
        if not look.unreadable:
            state.handle(look.identities)
            said.append(
                "no complete run is recorded yet; changes count from now on. Start the first run, unless one is running"
            )
        return LookResult("wait" if look.unreadable else "nothing", words=tuple(said))
    said += [
        f"source {name} is new in params.yaml; the next run reads it, the watch starts none for it"
        for name in look.identities
        if name not in baseline
    ]
    common = {name: value for name, value in look.identities.items() if name in baseline}
    changed = describe_changes(baseline, common)
    if changed and used is not None and not describe_changes(used, common):
        state.handle(common)
        changed, said = {}, [*said, "the active run reads the changed sources"]
    said += [f"source {name} changed: {what}" for name, what in changed.items()]
    if changed and look.unreadable:
        said.append("a run starts when every source can be read")
    action = _choose_action(state, look, changed)
    return LookResult(action, changed, tuple(said))


def _choose_action(state: WatchState, look: SourceLook, changed: Mapping[str, str]) -> str:
    seen, state.seen = state.seen, digest_of(look.identities) if changed and not look.unreadable else None
    if look.unreadable:
        return "wait"
    if not changed:
        return "nothing"
    return "run" if seen == state.seen else "settle"


def describe_changes(old: Identities, new: Identities) -> dict[str, str]:
    """Return source -> what changed, for each source of `new` that differs from `old`.

    >>> describe_changes({"a": {"files": {"x": "11"}}}, {"a": {"files": {"x": "22", "y": "33"}}})
    {'a': 'x 11 -> 22, y none -> 33'}
    """
    return {
        name: _describe(old.get(name) or {}, identity) for name, identity in new.items() if old.get(name) != identity
    }


def _describe(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, after = (
        {**{key: value for key, value in side.items() if not isinstance(value, dict)}, **(side.get("files") or {})}
        if isinstance(side.get("files"), dict)
        else dict(side)
        for side in (old, new)
    )
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    shown = [f"{key} {_short(before.get(key))} -> {_short(after.get(key))}" for key in keys[:_SHOWN]]
    return ", ".join([*shown, *([f"{len(keys) - _SHOWN:,} more"] if len(keys) > _SHOWN else [])])


def _short(value: object) -> str:
    """Return the first digits of a hash, or what a server states that changes with a file's bytes."""
    if isinstance(value, Mapping):
        value = value.get("etag") or value.get("modified") or digest_of(dict(value))
    return "none" if value is None else str(value).strip('"')[:_SHORT]


def find_baseline(root: Path, profile: str, state: WatchState) -> Identities | None:
    """Return what the last run read: recorded by its package or asked for by the watch, whichever is later.

    Without both, what the last published version records; None if there is none.

    Raises:
        RopewayError: The registry cannot be read.
    """
    workspace = Workspace(root, profile)
    path = workspace.package / _RUN
    try:
        recorded, at = json_mapping(path.read_bytes()).get("sources"), path.stat().st_mtime
    except OSError:
        recorded, at = None, 0.0
    if state.package:
        is_later = state.package == identify_package(root, profile)
    else:
        is_later = bool(state.handled_at) and datetime.fromisoformat(state.handled_at).timestamp() >= at
    if state.handled is not None and (not recorded or is_later):
        return state.handled
    return recorded or _last_published(workspace)


def identify_package(root: Path, profile: str) -> str:
    """Return what changes when a run writes the package's record again: file number, time and size."""
    try:
        facts = (Workspace(root, profile).package / _RUN).stat()
    except OSError:
        return "none"
    return f"{facts.st_ino} {facts.st_mtime_ns} {facts.st_size}"


def has_recorded_since(root: Path, profile: str, state: WatchState) -> bool:
    """Return whether a run has completed since the watch asked for one."""
    path = Workspace(root, profile).package / _RUN
    if state.package:
        return identify_package(root, profile) not in (state.package, "none")
    try:
        return path.stat().st_mtime > datetime.fromisoformat(state.handled_at).timestamp()
    except (OSError, ValueError):
        return False


def _last_published(workspace: Workspace) -> Identities | None:
    try:
        versions = list(Registry.open(workspace.registry_url).artifact(workspace.profile).versions())
    except NotFoundError:
        return None
    for version in reversed(versions):
        try:
            found = json_mapping(version.read_file(_RUN) or b"{}").get("sources")
        except DataError:
            continue
        if isinstance(found, dict):
            return found
    return None


def used_by_active_run(root: Path, profile: str) -> Identities | None:
    """Return the identities that the active run of a profile in this workspace froze; None if none is active."""
    holder = read_last_holder(root)
    if holder is None or not holder.holds or holder.profile != profile:
        return None
    folder = Workspace(root, profile).identity
    try:
        if json_mapping((folder / "manifest.json").read_bytes()).get("profile") != profile:
            return None
        if (folder / "manifest.json").stat().st_mtime < datetime.fromisoformat(holder.since).timestamp():
            return None  # of the run before
        found = json_mapping((folder / "sources.json").read_bytes()).get("of")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
