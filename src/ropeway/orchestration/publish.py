"""From a finished package to a version, and to `candidate` if the gate lets it pass. Repeat it freely after a failure.

What decides is the registry, not whether a stage ran: one that was away when a package was made loses no version.
"""

import getpass
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ropeway.config.params import Profile
from ropeway.orchestration.dvc_stage import Say, Site, run_command
from ropeway.orchestration.gate import GateVerdict, gate
from ropeway.orchestration.revision import Revision
from ropeway.registry import PRODUCTION, Artifact, Registry, Version
from ropeway.runtime.errors import DataError, TemporaryError
from ropeway.runtime.workspace import Workspace

CANDIDATE = "candidate"
Measure = Callable[[Version, str], Mapping[str, object] | None]


@dataclass(frozen=True, slots=True)
class Publication:
    """What publishing came to.

    Attributes:
        state: `Published`: a new version, `candidate` points to it. `Rejected`: a new version, but the gate did not let
            it pass and no alias moved. `Unchanged`: this package was dealt with before.
        verdict: The gate's, when it was asked.
        reviewable: Whether it is `candidate` and not `production`: somebody should decide.
    """

    state: str
    version: str
    digest: str
    verdict: GateVerdict | None
    words: str
    reviewable: bool = False


def check_publishing(workspace: Workspace) -> None:
    """Raise before anything is computed what would refuse the finished package; an outage may pass until then."""
    try:
        _artifact(workspace).check_publishing()
    except TemporaryError as error:
        print(f"the registry cannot be reached now; the run goes on, it is needed at the end: {error}", flush=True)


def publish_package(workspace: Workspace, profile: Profile, revision: Revision, measure: Measure) -> Publication:
    """Publish `runs/<profile>/package` unless the registry has it, and move `candidate` if the gate lets it pass.

    `measure` returns the metrics of a version on the validation rows of a digest, for a champion that was measured on
    others; None if that cannot be done.

    Raises:
        DataError: The package or eval.json is not what it should be.
        RegistryError: The registry refused; another writer moved the alias meanwhile.
        TemporaryError: The store is away.
    """
    artifact = _artifact(workspace)
    known = artifact.find_package(workspace.package)
    if known and revision.commit and not revision.dirty and known.dirty_reason:
        known.record_clean_commit(revision.commit)
    if known and (settled := _settled(artifact, known)):
        return Publication(
            "Unchanged", str(known), known.digest, None, settled, reviewable=_is_open(artifact, known.digest)
        )
    metrics = _read_metrics(workspace.evaluation)
    expected, champion = _find_champion(artifact)
    opponent = _find_metrics(champion, metrics, measure) if champion else None
    label = str(champion) if champion else None
    verdict = gate(metrics, opponent, profile.gate, champion_name=label or "no champion")
    done = artifact.publish(
        workspace.package,
        provenance=_provenance(revision, metrics, verdict, label) | {"opponent": dict(opponent or {})},
        # enough to make it again, and how the training went
        attachments={path.name: path for path in (workspace.root / "dvc.lock", workspace.timings) if path.is_file()},
        pages=workspace.pages if workspace.pages.is_dir() else None,
    )
    digest = done.digest
    if not verdict.passed:
        words = f"{done} is registered; the gate did not let it pass, '{CANDIDATE}' was not moved"
        return Publication("Rejected", str(done), digest, verdict, words)
    artifact.version(digest).promote(
        CANDIDATE, expect=expected, by=_user(), reason="the gate of ropeway run let it pass"
    )
    words = f"{done} is registered and is {artifact.alias(CANDIDATE)}"
    return Publication("Published", str(done), digest, verdict, words, reviewable=_is_open(artifact, digest))


def _artifact(workspace: Workspace) -> Artifact:
    return Registry.open(workspace.registry_url).artifact(workspace.profile)


def _settled(artifact: Artifact, version: Version) -> str | None:
    """Return why nothing is left to do for a known version; None when a run died between publishing and promoting."""
    label = f"{version} was registered before"
    if version.is_withdrawn:
        return f"{label} and is withdrawn"
    candidates = artifact.alias(CANDIDATE).events.digests
    if version.digest in candidates:
        # It was candidate once. If it is not now, somebody or a later version moved the alias: that stands.
        moved = version.digest != candidates[-1]
        return f"{label}; '{CANDIDATE}' has moved on since and stays there" if moved else label
    verdict = version.record["provenance"].get("verdict")
    if verdict is None or not verdict["passed"]:
        return f"{label}; '{CANDIDATE}' was not moved to it then"
    return None


def _is_open(artifact: Artifact, digest: str) -> bool:
    candidate, production = (artifact.alias(name).digest for name in (CANDIDATE, PRODUCTION))
    return candidate == digest != production


def _find_champion(artifact: Artifact) -> tuple[str | None, Version | None]:
    """Return where `candidate` points now, and the version to beat: production's, else the candidate's."""
    candidate = artifact.alias(CANDIDATE).digest
    champion = artifact.alias(PRODUCTION).digest or candidate
    return candidate, artifact.find(champion) if champion else None


def _find_metrics(champion: Version, ours: Mapping[str, object], measure: Measure) -> Mapping[str, object]:
    """Return a champion's metrics on this run's rows: those kept beside it, else measured now, else those on its own.

    Only the first two can pass the gate: it looks at the rows again.
    """
    kept: Mapping[str, object] = champion.record["provenance"].get("evaluation", {})
    rows = ours.get("validation")
    if not isinstance(rows, str) or kept.get("validation") == rows:
        return kept
    return measure(champion, rows) or kept


def _provenance(
    revision: Revision, metrics: Mapping[str, object], verdict: GateVerdict, champion: str | None
) -> dict[str, object]:
    return {
        "git": revision.commit,
        "dirty": bool(revision.dirty),
        "dirty_files": list(revision.dirty),
        "evaluation": dict(metrics),
        "verdict": {"passed": verdict.passed, "against": champion, "lines": list(verdict.lines)},
    }


def _read_metrics(path: Path) -> dict[str, object]:
    try:
        metrics = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected evaluate's metrics ({error}). Run `dvc repro evaluate`") from None
    if not isinstance(metrics, dict):
        raise DataError(f"{path}: expected a JSON mapping, found a {type(metrics).__name__}")
    return metrics


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "ropeway run"


def measure_champion(
    site: Site, workspace: Workspace, champion: Version, rows: str, say: Say
) -> Mapping[str, object] | None:
    """Return the champion's metrics on the rows whose digest is `rows`; None, with the reason said, if it cannot be.

    The champion's package is pulled, every byte verified, and removed afterwards.
    """
    place = site.root / ".work" / "champion" / f"{champion.digest[:12]}-{rows[:12]}"
    out = place.with_suffix(".json")  # kept: the same question may come again
    if not out.exists():
        say(f"{champion} was measured on other validation rows; measuring it on these")
        champion.pull(place)
        try:
            code, _ = run_command(site, "champion", command(workspace, place, out), say)
        finally:
            shutil.rmtree(place)
        if code:
            say(f"{champion} cannot be measured on these rows, so nothing can be said against it or for it")
            return None
    metrics: Mapping[str, object] = json.loads(out.read_bytes())
    return metrics


def command(workspace: Workspace, folder: Path, out: Path) -> list[str]:
    """Return the command that measures a package on a workspace's rows."""
    program = [sys.executable, "-m", "ropeway.stages.evaluate.champion"]
    return [*program, str(workspace.root), workspace.profile, str(folder), str(out)]
