"""Publishes a finished package as a version and moves `candidate` if the gate passes. Repeat it after any failure.

The registry decides what is published, not whether a stage ran: a package made during an outage is published later.
"""

import getpass
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from ropeway.config.params import Profile
from ropeway.config.sections import Gate
from ropeway.data.data_profile import FILE
from ropeway.data.drift import DriftEvidence
from ropeway.orchestration.drift_evidence import compare_with_earlier
from ropeway.orchestration.dvc_stage import LineWriter, Site, run_command
from ropeway.orchestration.gate import GateVerdict, describe_change, gate, sections_to_measure
from ropeway.orchestration.provenance_statement import write_statements
from ropeway.orchestration.revision import Revision
from ropeway.registry import PRODUCTION, Artifact, Registry, Version
from ropeway.reporting.evidence import named_damage
from ropeway.runtime.errors import DataError, TemporaryError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import Json, digest_of, json_mapping
from ropeway.runtime.progress import StageProgress
from ropeway.runtime.workspace import Workspace, count_bytes

CANDIDATE = "candidate"
Measure = Callable[[Version, Mapping[str, str]], Mapping[str, object] | None]


@dataclass(frozen=True, slots=True)
class Publication:
    """The result of publishing.

    Attributes:
        state: `Published`: a new version, and `candidate` points to it. `Rejected`: a new version, but the gate did not
            pass and no alias moved. `Unchanged`: this package was published before.
        verdict: The gate's verdict, None if the gate did not run.
        comparison: One sentence: whether it is better than production, or than the candidate where there is none.
        reviewable: Whether it is `candidate` and not `production`, so a review is due.
        drift: The comparison of its data with that of earlier versions; None if the gate did not run.
    """

    state: str
    version: str
    digest: str
    verdict: GateVerdict | None
    words: str
    comparison: str = ""
    reviewable: bool = False
    drift: DriftEvidence | None = None

    def to_json(self) -> Json:
        """Return the publication as JSON, for the run that asked a worker to publish."""
        facts: Json = TypeAdapter(Publication).dump_python(self, mode="json")
        return facts

    @staticmethod
    def from_json(facts: Json) -> "Publication":
        """Return a publication that `to_json` wrote."""
        return TypeAdapter(Publication).validate_python(facts)


@contextmanager
def _upload_progress(artifact: Artifact, workspace: Workspace) -> Iterator[None]:
    """Show how many bytes the store received while the block publishes a package."""
    path = workspace.progress("publish")
    path.unlink(missing_ok=True)
    total = count_bytes(workspace.package) + (count_bytes(workspace.pages) if workspace.pages.is_dir() else 0)
    with StageProgress("bytes", total, path=path) as progress:
        artifact.store.on_bytes = progress.advance
        try:
            yield
        finally:
            del artifact.store.on_bytes


def check_publishing(workspace: Workspace) -> None:
    """Raise, before anything is computed, what would refuse the finished package; an outage is only printed."""
    try:
        artifact = _artifact(workspace)
        artifact.check_publishing()
        _find_champion(artifact)
    except TemporaryError as error:
        print(f"the registry cannot be reached now; the run continues and needs it at the end: {error}", flush=True)


def publish_package(
    workspace: Workspace, profile: Profile, revision: Revision, measure: Measure, *, run_seconds: float | None = None
) -> Publication:
    """Publish `runs/<profile>/package` unless the registry has it, and move `candidate` if the gate passes.

    `run_seconds` is how long the run took so far; it is recorded.

    `measure` returns sections of a champion's metrics, which are named as by `sections_to_measure`, for a champion that
    was evaluated on other rows or questions; None if that fails.

    Raises:
        DataError: The package or eval.json is invalid, or the signature policy refuses the champion.
        RegistryError: The registry refused, or another writer moved the alias.
        TemporaryError: The store does not answer.
    """
    artifact = _artifact(workspace)
    known = artifact.find_package(workspace.package)
    if known and revision.commit and not revision.dirty and known.dirty_reason:
        known.record_clean_commit(revision.commit)
    if known and (settled := _settled(artifact, known)):
        reviewable = _is_open(artifact, known.digest)
        comparison = _describe_known(artifact, known)
        return Publication("Unchanged", str(known), known.digest, None, settled, comparison, reviewable=reviewable)
    metrics = _read_metrics(workspace.evaluation)
    expected, champion = _find_champion(artifact)
    opponent = _find_metrics(champion, metrics, profile.gate, measure) if champion else None
    label = str(champion) if champion else None
    comparison = describe_change(metrics, opponent, _name_champion(artifact, champion))
    verdict = gate(metrics, opponent, profile.gate, max_length=profile.max_length, champion_name=label or "no champion")
    named = (
        {PRODUCTION if artifact.alias(PRODUCTION).digest == champion.digest else CANDIDATE: champion}
        if champion
        else {}
    )
    drift = compare_with_earlier(
        artifact, workspace.pages / FILE, named, profile.gate.drift, own=known.digest if known else None
    )
    verdict = replace(verdict, needs_person=drift.reasons)
    with _upload_progress(artifact, workspace):
        done = artifact.publish(
            workspace.package,
            provenance=_provenance(revision, metrics, verdict, label)
            | {
                "opponent": dict(opponent or {}),
                "drift": drift.to_json(),
                "run": _describe_run(workspace.timings, run_seconds),
            },
            # needed to reproduce it, the training's timings, the digests of its records, and statements for other tools
            attachments={
                path.name: path
                for path in (workspace.root / "dvc.lock", workspace.timings, workspace.record_index)
                if path.is_file()
            }
            | write_statements(workspace, revision),
            pages=workspace.pages if workspace.pages.is_dir() else None,
        )
    digest = done.digest
    if not verdict.passed:
        words = f"registered {done}; the gate did not pass, so '{CANDIDATE}' was not moved"
        return Publication("Rejected", str(done), digest, verdict, words + _ask_person(drift), comparison, drift=drift)
    artifact.version(digest).promote(CANDIDATE, expect=expected, by=_user(), reason="passed the gate of ropeway run")
    words = f"registered {done} and moved {artifact.alias(CANDIDATE)} to it"
    reviewable = _is_open(artifact, digest)
    words += _ask_person(drift)
    return Publication("Published", str(done), digest, verdict, words, comparison, reviewable=reviewable, drift=drift)


def _ask_person(drift: DriftEvidence) -> str:
    """Return what a publication's sentence says about drift above a limit; empty if there is none."""
    drifted = [one.version for one in drift.references if one.flagged]
    return f"; a person must look at its data: drift above a limit from {', '.join(drifted)}" if drifted else ""


def _artifact(workspace: Workspace) -> Artifact:
    return Registry.open(workspace.registry_url).artifact(workspace.profile)


def _settled(artifact: Artifact, version: Version) -> str | None:
    """Return why a known version needs no action, or None if a run died between publishing and promoting it."""
    label = f"{version} is already registered"
    if version.is_withdrawn:
        return f"{label} and is withdrawn"
    candidates = artifact.alias(CANDIDATE).events.digests
    if version.digest in candidates:
        # It was candidate before. If it is not now, a person or a later version moved the alias: keep that.
        moved = version.digest != candidates[-1]
        return f"{label}; '{CANDIDATE}' was moved to another version since and is kept there" if moved else label
    with named_damage(f"{artifact.store.url}: {version}"):
        verdict = version.record["provenance"].get("verdict")
        passed = verdict is not None and verdict["passed"]
    if not passed:
        return f"{label}; the gate did not pass then, so '{CANDIDATE}' was not moved"
    return None


def _is_open(artifact: Artifact, digest: str) -> bool:
    candidate, production = (artifact.alias(name).digest for name in (CANDIDATE, PRODUCTION))
    return candidate == digest != production


def _find_champion(artifact: Artifact) -> tuple[str | None, Version | None]:
    """Return the digest of `candidate` and the champion to compare with: production, or else candidate.

    Raises:
        DataError: The signature policy refuses the champion: its metrics would decide about the new version.
    """
    candidate = artifact.alias(CANDIDATE).digest
    digest = artifact.alias(PRODUCTION).digest or candidate
    champion = artifact.version(digest) if digest else None
    if champion:
        _ = champion.manifest  # that it is lost must not look like a first version, which has no champion
        champion.check_policy()
    return candidate, champion


def _name_champion(artifact: Artifact, champion: Version | None) -> str:
    if champion is None:
        return f"earlier version of {artifact.name}"
    if artifact.alias(PRODUCTION).digest == champion.digest:
        return f"production ({champion})"
    return f"{CANDIDATE} ({champion}; there is no production yet)"


def _describe_known(artifact: Artifact, version: Version) -> str:
    """Return the comparison recorded when a version was published, or that it is production."""
    if artifact.alias(PRODUCTION).digest == version.digest:
        return "this version is production"
    facts = version.record["provenance"]
    against = (facts.get("verdict") or {}).get("against")
    opponent = facts.get("opponent") or None if against else None
    return describe_change(version.metrics, opponent, against or f"earlier version of {artifact.name}")


def _find_metrics(
    champion: Version, ours: Mapping[str, object], limits: Gate, measure: Measure
) -> Mapping[str, object]:
    """Return a champion's metrics on this run's rows and questions: recorded, measured now, or else as recorded.

    Only the first two can pass the gate, which compares what was measured.
    """
    kept: Mapping[str, object] = champion.metrics
    needed = sections_to_measure(ours, kept, limits)
    found = measure(champion, needed) if needed else None
    if found is None:
        return kept
    identities = [side.get("identities", {}) for side in (kept, found)]
    merged = {name: value for one in identities if isinstance(one, Mapping) for name, value in one.items()}
    return {**kept, **found, "identities": merged}


def _provenance(
    revision: Revision, metrics: Mapping[str, object], verdict: GateVerdict, champion: str | None
) -> dict[str, object]:
    return {
        "git": revision.commit,
        "dirty": bool(revision.dirty),
        "dirty_files": list(revision.dirty),
        "evaluation": dict(metrics),
        "verdict": {
            "passed": verdict.passed,
            "against": champion,
            "lines": list(verdict.lines),
            "needs_person": list(verdict.needs_person),
            "checks": [asdict(check) for check in verdict.checks],
        },
    }


def _describe_run(timings: Path, run_seconds: float | None) -> dict[str, object]:
    """Return what the history shows of a training: time, speed, GPUs, W&B; what was not recorded is None."""
    attempts = json_mapping(timings.read_bytes()).get("attempts") if timings.is_file() else None
    listed = [one for one in attempts if isinstance(one, dict)] if isinstance(attempts, list) else []
    last = listed[-1] if listed else {}
    totals = {key: sum(one.get(key) or 0 for one in listed) for key in ("seconds", "tokens")}
    kind, link = last.get("accelerator"), (last.get("wandb") or {}).get("link")
    return {
        "run_seconds": run_seconds,
        "train_seconds": sum(one.get("wall_seconds") or one.get("seconds") or 0 for one in listed) if listed else None,
        "tokens_per_second": totals["tokens"] / totals["seconds"] if totals["seconds"] and totals["tokens"] else None,
        "ranks": last.get("ranks"),
        "gpus": None if kind is None else last.get("ranks") if kind == "cuda" else 0,
        "device": last.get("device"),
        "wandb": link if isinstance(link, str) and link.startswith(("https://", "http://")) else None,
    }


def _read_metrics(path: Path) -> dict[str, object]:
    try:
        metrics = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected the metrics of evaluate ({error}). Run `dvc repro evaluate`") from None
    if not isinstance(metrics, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(metrics).__name__}. Run `dvc repro evaluate`")
    return metrics


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return "ropeway run"


def measure_champion(
    site: Site, workspace: Workspace, champion: Version, sections: Mapping[str, str], write_line: LineWriter
) -> Mapping[str, object] | None:
    """Return these sections of the champion's metrics, or print why they cannot be measured and return None.

    `sections` is as `sections_to_measure` returns it. The champion's package is pulled, verified, and removed
    afterwards.
    """
    key = digest_of(sorted(sections.items()))
    place = site.root / ".work" / "champion" / f"{champion.digest[:12]}-{key[:12]}"
    out = place.with_suffix(".json")  # kept, since the same champion and rows may be needed again
    if not out.exists():
        what = ", ".join(sections)
        write_line(f"{champion} was evaluated on other rows, questions or tasks; evaluating it on these ({what})")
        champion.pull(place)
        try:
            code, _ = run_command(site, "champion", command(workspace, place, out, sections), write_line)
        finally:
            shutil.rmtree(place)
        if code:
            write_line(f"{champion} cannot be evaluated on these ({what}), so the two models cannot be compared")
            return None
    metrics: Mapping[str, object] = parse_json(out.read_bytes())
    return metrics


def command(workspace: Workspace, folder: Path, out: Path, sections: Iterable[str]) -> list[str]:
    """Return the command that evaluates sections of a package on a workspace's rows and questions."""
    program = [sys.executable, "-m", "ropeway.stages.evaluate.champion"]
    return [*program, str(workspace.root), workspace.profile, str(folder), str(out), *sections]
