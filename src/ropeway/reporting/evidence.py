"""What a reviewer has to see of a version, read from the registry alone: the workspace may have moved on since."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ropeway import registry
from ropeway.registry.blobs import read_blob
from ropeway.registry.comparing import compare
from ropeway.registry.layout import list_models
from ropeway.registry.rules import PackageFile
from ropeway.registry.tables import describe_version, describe_versions
from ropeway.runtime.errors import RegistryError
from ropeway.storage import MAX_DOCUMENT_BYTES, Store

Json = Mapping[str, Any]
_SHORT = 12


@dataclass(frozen=True, slots=True)
class Version:
    """One version and the small files that tell of it; what it has no file for is empty.

    Attributes:
        facts: As `describe_version` has them.
        metrics: Its eval.json.
        samples: Its samples.json.
        ledger: Its ledger.json.
        steps: Its steps.csv, one mapping per optimizer step.
        history: The provenance.json beside it: one record per start of its training.
        run: Its run.json: parameters, sources, base.
    """

    facts: Json
    metrics: Json
    samples: Json
    ledger: Json
    steps: tuple[Mapping[str, str], ...]
    history: Json
    run: Json

    @property
    def label(self) -> str:
        """E.g. `laptop@v3`."""
        return f"{self.facts['name']}@v{self.facts['number']}"


@dataclass(frozen=True, slots=True)
class Case:
    """A question to a reviewer: may this version become production?

    Attributes:
        name: The model.
        digest: The version.
        expect: What production was when the evidence was gathered, None if there was none.
        url: Of the registry.
        new: The version.
        old: Production; None when there was none, or when it is this version.
        changes: What differs between them: `run.json: params.seed` -> [old, new].
        dirt: Why no commit makes this version; None when one does.
        reviews: Earlier answers about it.
    """

    name: str
    digest: str
    expect: str | None
    url: str
    new: Version
    old: Version | None
    changes: Mapping[str, list[Any]]
    dirt: str | None
    reviews: tuple[Json, ...]


def find_version(store: Store, wanted: str) -> tuple[str, str]:
    """Return the model and digest that `NAME@…`, a digest, or the first 8 or more digits of one mean.

    Raises:
        RegistryError: Nothing is meant, or more than one version.
    """
    if "@" in wanted:
        return wanted.partition("@")[0], registry.resolve(store, wanted)
    prefix = wanted.lower()
    found = [
        (name, str(version["digest"]))
        for name in (list_models(store) if len(prefix) >= 8 else ())  # noqa: PLR2004 - as registry references
        for version in describe_versions(store, name)
        if version["digest"].startswith(prefix)
    ]
    if len(found) == 1:
        return found[0]
    many = f"{len(found)} versions begin so; give more digits, or NAME@DIGEST"
    raise RegistryError(
        f"{wanted}: "
        + (many if found else f"{store.url} holds no such version; expected a digest (8 digits or more) or NAME@v3")
    )


def open_case(store: Store, wanted: str, *, expect: str | registry.Anything | None = registry.ANY) -> Case:
    """Return everything about a version that a decision needs.

    Args:
        store: The registry.
        wanted: As `find_version` takes it.
        expect: The digest that production is compared and expected to be; default: what it is now.

    Raises:
        RegistryError: No such version, or it is withdrawn.
        DataError: The registry's copy is damaged.
    """
    name, digest = find_version(store, wanted)
    known = registry.read_alias(store, name, registry.PRODUCTION) if isinstance(expect, registry.Anything) else expect
    new = read_version(store, name, digest)
    if new.facts["withdrawn"]:
        raise RegistryError(f"{new.label} ({digest[:_SHORT]}…) is withdrawn; there is nothing to review")
    old = read_version(store, name, known) if known and known != digest else None
    changes = compare(store, f"{name}@{known}", f"{name}@{digest}")["facts"] if old else {}
    dirt = registry.find_dirt(store, name, digest)
    reviews = tuple(registry.list_reviews(store, name, digest))
    return Case(name, digest, known, store.url, new, old, changes, dirt, reviews)


def read_version(store: Store, name: str, digest: str) -> Version:
    """Return a version with its small files."""
    facts = describe_version(store, f"{name}@{digest}")

    def read(path: str, place: str = "files") -> Any:  # noqa: ANN401 - JSON
        entry = facts[place].get(path)
        if entry is None or entry["bytes"] > MAX_DOCUMENT_BYTES:
            return {}
        data = read_blob(store, PackageFile(path, entry["sha256"], entry["bytes"]))
        return data if path.endswith(".csv") else _parse(data)

    rows = csv.DictReader(io.StringIO((read("steps.csv") or b"").decode()))
    return Version(
        facts=facts,
        metrics=facts["provenance"].get("evaluation") or read("eval.json"),
        samples=read("samples.json"),
        ledger=read("ledger.json"),
        steps=tuple(rows),
        history=read("provenance.json", "attachments"),
        run=read("run.json"),
    )


def _parse(data: bytes) -> Json:
    """Return a JSON mapping, empty for anything else: a report shows what there is."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
