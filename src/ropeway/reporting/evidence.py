"""Evidence for a review, read from the registry only, because the workspace may have changed since."""

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ropeway.data.data_profile import FILE
from ropeway.registry import ANY, PRODUCTION, AnyDigest, Registry, Version
from ropeway.runtime.errors import DataError, RegistryError
from ropeway.runtime.manifest import Json, json_mapping
from ropeway.storage import MAX_DOCUMENT_BYTES

_SHORT = 12
_MOST_CHARACTERS = 80  # of an error in a message


@dataclass(frozen=True, slots=True)
class VersionEvidence:
    """One version with its small files; a missing file is empty.

    Attributes:
        facts: The result of `Version.describe`.
        metrics: Its eval.json.
        steps: Its steps.csv, one mapping per optimizer step.
        history: Its provenance.json: one record per start of its training.
        data_profile: Counts and sketches of its data.
    """

    facts: Json
    metrics: Json
    samples: Json
    ledger: Json
    steps: tuple[Mapping[str, str], ...]
    history: Json
    run: Json
    data_profile: Json

    @property
    def label(self) -> str:
        """E.g. `laptop@v3`."""
        return f"{self.facts['name']}@v{self.facts['number']}"


@dataclass(frozen=True, slots=True)
class ReviewCase:
    """A version under review and the production version it is compared with.

    Attributes:
        expect: Digest of production when the evidence was gathered, None if there was none.
        old: Production; None if there was none or if it is this version.
        changes: Differences between them: `run.json: params.seed` -> [old, new].
        dirty_reason: Why no commit makes this version; None when one does.
        gate_warning: Why the recorded verdict of the gate is not certain; empty if it follows from the versions' files.
    """

    name: str
    digest: str
    expect: str | None
    url: str
    new: VersionEvidence
    old: VersionEvidence | None
    changes: Mapping[str, list[Any]]
    dirty_reason: str | None
    reviews: tuple[Json, ...]
    gate_warning: str = ""


@contextmanager
def named_damage(where: str) -> Iterator[None]:
    """Raise DataError for a record of a version that Ropeway did not write, instead of what reading it leads to."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise DataError(
            f"{where}: its record in the registry, or one of its small files, is damaged ({type(error).__name__}: "
            f"{str(error)[:_MOST_CHARACTERS]!r}). Do not rely on it; restore it from a backup of the registry"
        ) from error


def open_case(registry: Registry, wanted: str, *, expect: str | AnyDigest | None = ANY) -> ReviewCase:
    """Return a version with everything that the decision needs.

    `expect` is the digest that production is expected to have; default: its current one.

    Raises:
        RegistryError: The version does not exist or is withdrawn.
        DataError: The registry's copy of the version or of production is damaged, or the signature policy refuses it.
    """
    version = registry.find(wanted)
    version.check_policy()
    production = registry.artifact(version.name).alias(PRODUCTION)
    known = production.digest if isinstance(expect, AnyDigest) else expect
    champion = registry.version(f"{version.name}@{known}") if known and known != version.digest else None
    if champion:
        champion.check_policy()
    with named_damage(f"{registry.url}: {version}"):
        new = gather_evidence(version)
    if new.facts["withdrawn"]:
        raise RegistryError(f"{new.label} ({version.digest[:_SHORT]}…) is withdrawn; there is nothing to review")
    old = None
    if champion:
        with named_damage(f"{registry.url}: {champion}"):
            old = gather_evidence(champion)
    return ReviewCase(
        version.name,
        version.digest,
        known,
        registry.url,
        new,
        old,
        champion.compare(version)["facts"] if champion else {},
        version.dirty_reason,
        tuple(version.reviews),
    )


def gather_evidence(version: Version) -> VersionEvidence:
    """Return a version with its small files.

    Raises:
        DataError: A file is damaged, or the event of the version records other metrics than its eval.json.
    """
    facts = version.describe()
    recorded = facts["provenance"].get("evaluation")
    if recorded and recorded != version.metrics:
        raise DataError(
            f"{version.store.url}: the event of {version} records other metrics than its eval.json, which its digest "
            "covers. The event was changed; do not rely on its verdict. Restore it from a backup of the registry"
        )

    def read_bytes(path: str, place: str = "files") -> bytes:
        entry = facts[place].get(path)
        small = entry is not None and entry["bytes"] <= MAX_DOCUMENT_BYTES
        return (version.read_file(path, attached=place == "attachments") if small else None) or b""

    def read(path: str, place: str = "files") -> Json:
        return json_mapping(read_bytes(path, place))

    rows = csv.DictReader(io.StringIO(read_bytes("steps.csv").decode()))
    return VersionEvidence(
        facts=facts,
        metrics=version.metrics,
        samples=read("samples.json"),
        ledger=read("ledger.json"),
        steps=tuple(rows),
        history=read("provenance.json", "attachments"),
        run=read("run.json"),
        data_profile=read(FILE),
    )
