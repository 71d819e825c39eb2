"""The public API of the registry: artifacts (models), their versions and aliases, and the events of both."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ropeway.config.suggestion import did_you_mean
from ropeway.registry import garbage_collection
from ropeway.registry.aliases import ANY, Alias, AnyDigest, Promotion, list_aliases, plan_rollback
from ropeway.registry.layout import (
    Reference,
    check_digest,
    check_name,
    check_name_case,
    check_registry,
    init_registry,
    is_digest,
    list_models,
    manifest_key,
    package_key,
    read_reference,
    reviews_log,
    tombstones_folder,
    versions_log,
)
from ropeway.registry.log import Event, Events, LogPage, read_event, read_events
from ropeway.registry.publishing import PublishResult, find_number, publish_package
from ropeway.registry.signing import load_signer
from ropeway.registry.version_manifest import Facts, build_package_manifest
from ropeway.registry.versions import PRODUCTION, Version
from ropeway.runtime.errors import DataError, NotFoundError, RegistryError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.login import Identity
from ropeway.storage import Store, open_store

_MIN_DIGITS = 8  # of a digest prefix
_MAX_SHOWN = 120  # characters of what was asked for


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model: a name, its numbered versions and the aliases that point to them."""

    store: Store
    name: str

    def __post_init__(self) -> None:
        """Raise ConfigError unless `name` is a valid model name."""
        check_name(self.name)

    def publish(
        self,
        package_folder: Path,
        *,
        provenance: Mapping[str, object],
        attachments: Mapping[str, Path],
        pages: Path | None = None,
    ) -> PublishResult:
        """Publish a package as a version; return the existing version if it was published before. Safe to retry.

        Args:
            package_folder: A package with its manifest.json. Every byte is hashed before anything is written.
            provenance: JSON facts that do not determine the model: git revision, dirty, timings, W&B link. They are
                stored in the version's event by the publish that creates it. Do not include secrets.
            attachments: Files stored with the version for its lineage, by name: `{"dvc.lock": path}`.
            pages: Folder with README.md and report pages that become part of the version, and a manifest.json of all
                its files.

        Raises:
            DataError: The package, or a blob of it in the registry, does not match its manifest or breaks a rule.
            RegistryError: A model's name differs from this one only in case.
            TemporaryError: The store is unavailable, or garbage collection is running.
            ConfigError: ROPEWAY_SIGNING_KEY is not a usable private key.
        """
        return publish_package(self.store, package_folder, self.name, provenance, attachments, pages)

    def check_publishing(self) -> None:
        """Preflight check of a publish, independent of the package; writes registry.json if it is missing.

        Raises:
            RegistryError: The store has a registry of another format, or a name that differs only in case.
            ConfigError: The store is not writable or ignores preconditions, or ROPEWAY_SIGNING_KEY is not usable.
            TemporaryError: The store is unavailable.
        """
        load_signer()
        init_registry(self.store)
        check_name_case(self.store, self.name)

    def find(self, digest: str) -> Version | None:
        """Return the version with this digest; None if it was not published completely."""
        check_digest(digest)
        if not self.store.exists(manifest_key(self.name, digest)):
            return None
        versions = read_events(self.store, versions_log(self.name))
        if find_number(versions, digest) is None:
            return None
        return Version(self.store, self.name, digest, versions=versions)

    def find_package(self, folder: Path) -> Version | None:
        """Return the version that was published from a package, with any report pages; None if there is none.

        Raises:
            DataError: The package is incomplete, or its entry in the registry names a version of another package.
        """
        package = build_package_manifest(folder, self.name, verify=False)
        key = package_key(self.name, package.digest)
        try:
            entry = parse_json(self.store.get(key))
            digest = entry["digest"] if isinstance(entry, dict) else None
        except NotFoundError:
            return self.find(package.digest)
        except (ValueError, KeyError):
            digest = None
        if not isinstance(digest, str) or not is_digest(digest):
            raise DataError(f"{self.store.url}: {key} does not contain a digest. Delete it and run again")
        found = self.find(digest)
        if found and not found.manifest.includes(package):  # the entry is not signed, so check the version
            raise DataError(
                f"{self.store.url}: {key} names {found}, which does not have the files of {folder}. Delete it and run "
                "again"
            )
        return found

    def version(self, digest: str) -> Version:
        """Return the version with a full digest without reading the store."""
        return Version(self.store, self.name, digest)

    def versions(self) -> Iterator[Version]:
        """Yield every version, oldest first; their events are read on access."""
        versions = read_events(self.store, versions_log(self.name))
        for number, digest in enumerate(versions.digests, 1):
            yield self._numbered(versions, number, digest)

    def latest(self, count: int) -> list[Version]:
        """Return up to `count` versions, newest first; their events are read on access, so this is a few requests."""
        versions = read_events(self.store, versions_log(self.name))
        numbered = list(enumerate(versions.digests, 1))[-count:]
        return [self._numbered(versions, number, digest) for number, digest in reversed(numbered)]

    def retirable(self, keep: int) -> list[Version]:
        """Return the versions that a retention of `keep` would withdraw, oldest first.

        Kept are the newest `keep`, every version that an alias points to, and every version that was ever production,
        which a rollback may need.
        """
        withdrawn = self._withdrawn()
        versions = [version for version in self.versions() if version.digest not in withdrawn]
        kept = {*list_aliases(self.store, self.name, complete=True).values(), *self.alias(PRODUCTION).events.digests}
        return [version for version in versions[: max(0, len(versions) - keep)] if version.digest not in kept]

    def alias(self, name: str) -> Alias:
        """Return an alias, which does not have to exist yet."""
        return Alias(self.store, self.name, name)

    def aliases(self) -> dict[str, str]:
        """Return the digest that each alias points to."""
        return list_aliases(self.store, self.name)

    def rollback(
        self,
        alias: str,
        *,
        by: str,
        reason: str,
        identity: Identity = "claimed",
        expect: str | AnyDigest | None = ANY,
    ) -> Promotion:
        """Move an alias to the version before its current one; writes a promotion event.

        Raises:
            NotFoundError: There is no such alias.
            RegistryError: There is no earlier version, it is withdrawn, or another process moved the alias.
        """
        pointer = self.alias(alias)
        check_registry(self.store)
        events = pointer.events
        target = plan_rollback(events.digests, where=str(pointer))
        current = events[-1]["digest"]
        if expect not in (ANY, current):
            raise RegistryError(
                f"{pointer} points to {current}, expected {expect or 'no version'}; it was not moved. `ropeway "
                f"registry history {pointer}` shows its moves. To roll back from there, expect "
                f"{current[:12]} (--expect)"
            )
        target_version = Version(self.store, self.name, target)
        return target_version.promote(alias, expect=current, by=by, reason=reason, identity=identity)

    def describe(self) -> Facts | None:
        """Return name, versions, latest, published_at and aliases; None if there is no version."""
        events = read_events(self.store, versions_log(self.name))
        if not events:
            return None
        return {
            "name": self.name,
            "versions": len(events),
            "latest": events[-1]["digest"],
            "published_at": events[-1]["published_at"],
            "aliases": self.aliases(),
        }

    def describe_versions(self, limit: int | None = None, before: int | None = None) -> LogPage:
        """Return the facts of the newest `limit` versions below number `before`; by default of all versions.

        Reads the events of these versions only.
        """
        versions = read_events(self.store, versions_log(self.name))
        first, events = _read_page(versions, limit, before)
        aliases, withdrawn = self.aliases(), self._withdrawn()
        facts = [
            {
                "number": number,
                "digest": event["digest"],
                "published_at": event["published_at"],
                "aliases": sorted(alias for alias, digest in aliases.items() if digest == event["digest"]),
                "withdrawn": event["digest"] in withdrawn,
                "git": event["provenance"].get("git"),
            }
            for number, event in enumerate(events, first)
        ]
        return LogPage(len(versions), first, facts)

    def describe_recent(self, count: int) -> tuple[int, list[Facts]]:
        """Return (number of versions, the newest `count` of them), oldest first, with what the logs say about each.

        Reads `count` events of the versions, the reviews and moves of `production` that are about them, and no file.
        """
        versions = read_events(self.store, versions_log(self.name))
        first = max(len(versions) - count, 0)
        recent = versions[first:]
        shown = {event["digest"] for event in recent}
        moves = self.alias(PRODUCTION).events.about(shown)
        reviews = read_events(self.store, reviews_log(self.name)).about(shown)
        aliases, withdrawn = self.aliases(), self._withdrawn()
        moves_of, reviews_of = _by_digest(moves), _by_digest(reviews)
        return len(versions), [
            {
                "number": number,
                "digest": event["digest"],
                "published_at": event["published_at"],
                "provenance": event["provenance"],
                "aliases": sorted(alias for alias, digest in aliases.items() if digest == event["digest"]),
                "withdrawn": event["digest"] in withdrawn,
                "promotions": moves_of.get(event["digest"], []),
                "reviews": reviews_of.get(event["digest"], []),
            }
            for number, event in enumerate(recent, first + 1)
        ]

    def describe_history(self, alias: str, limit: int | None = None, before: int | None = None) -> LogPage:
        """Return the newest `limit` events of an alias below number `before`, each with the number of its version.

        By default all events. Reads the events of the page only.
        """
        moves = self.alias(alias).events
        first, events = _read_page(moves, limit, before)
        digests = read_events(self.store, versions_log(self.name)).digests if events else []
        numbers = {digest: number for number, digest in enumerate(digests, 1)}
        return LogPage(len(moves), first, [{**event, "version": numbers.get(event["digest"])} for event in events])

    def _withdrawn(self) -> set[str]:
        """Return the digests of the withdrawn versions: one request per 1,000 of them."""
        return {name.removesuffix(".json") for name in self.store.list_names(tombstones_folder(self.name), "")}

    def _numbered(self, versions: Events, number: int, digest: str) -> Version:
        version = Version(self.store, self.name, digest, reference=f"{self.name}@v{number}", versions=versions)
        version.number = number
        return version


def _read_page(log: Events, limit: int | None, before: int | None) -> tuple[int, list[Event]]:
    """Return the number of the first event of a page, and its events."""
    end = len(log) if before is None else max(0, min(len(log), before - 1))
    start = 0 if limit is None else max(0, end - limit)
    return start + 1, log[start:end]


def _by_digest(events: Iterable[Event]) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    for event in events:
        found.setdefault(event["digest"], []).append(event)
    return found


class Registry:
    """A model registry: immutable, content-addressed versions, aliases moved by compare-and-set, verified pulls."""

    def __init__(self, store: Store) -> None:
        """Use a store without connecting to it."""
        self.store, self.url = store, store.url

    @classmethod
    def open(cls, url: str) -> "Registry":
        """Return the registry at a URL; raises ConfigError as `ropeway.storage.open_store` does."""
        return cls(open_store(url))

    def check(self) -> None:
        """Raise RegistryError if the store has no registry, or one of another format."""
        check_registry(self.store)

    def artifact(self, name: str) -> Artifact:
        """Return a model, which does not have to have a version yet."""
        return Artifact(self.store, name)

    def artifacts(self) -> list[Artifact]:
        """Return every model in the registry."""
        return [Artifact(self.store, name) for name in list_models(self.store)]

    def describe(self) -> list[Facts]:
        """Return `Artifact.describe` of every model that has a version; an empty list for an empty store."""
        artifacts = self.artifacts()
        if artifacts:
            self.check()
        return [facts for facts in self.store.run_each(Artifact.describe, artifacts) if facts]

    def version(self, reference: str) -> Version:
        """Return the version of `laptop@candidate`, `laptop@v3`, `laptop@3` or `laptop@<digest prefix>`.

        An alias is resolved once: the returned version does not change when the alias moves.

        Raises:
            ConfigError: The reference is malformed.
            RegistryError: No version or more than one version matches.
        """
        wanted = read_reference(reference)
        self.check()
        found = self._find(wanted, reference)
        if not found:
            raise RegistryError(f"{reference}: no such version in {self.url}{self._describe_available(wanted)}")
        if len(found) > 1:
            raise RegistryError(f"{reference}: the prefix matches {len(found)} versions; give more digits")
        return found[0]

    def find(self, wanted: str) -> Version:
        """Return the version of a reference, digest or digest prefix (8 digits or more).

        Raises:
            RegistryError: No version or more than one version matches.
        """
        if "@" in wanted:
            return self.version(wanted)
        prefix = wanted.lower()
        names = list_models(self.store) if _MIN_DIGITS <= len(prefix) <= _MAX_SHOWN else ()
        found = [version for name in names for version in self._with_prefix(name, prefix)]
        if len(found) == 1:
            return found[0]
        many = f"the prefix matches {len(found)} versions; give more digits, or NAME@DIGEST"
        none = (
            f"no such version in {self.url}; expected a digest (8 digits or more) or NAME@v3. `ropeway registry list`"
        )
        raise RegistryError(f"{wanted[:_MAX_SHOWN]}: {many if found else none}")

    def find_garbage(self, *, grace: timedelta, withdrawn: bool) -> garbage_collection.Garbage:
        """Return what a collection would delete now; see `garbage_collection.find_garbage`."""
        return garbage_collection.find_garbage(self.store, grace=grace, withdrawn=withdrawn)

    def collect(self, *, grace: timedelta, withdrawn: bool) -> garbage_collection.Garbage:
        """Delete what `find_garbage` returns; see `garbage_collection.collect`."""
        return garbage_collection.collect(self.store, grace=grace, withdrawn=withdrawn)

    def _find(self, wanted: Reference, reference: str) -> list[Version]:
        if wanted.prefix:
            return self._with_prefix(wanted.name, wanted.prefix, reference)
        if wanted.alias:
            digest = Alias(self.store, wanted.name, wanted.alias).digest
            return [Version(self.store, wanted.name, digest, reference=reference)] if digest else []
        try:
            record = read_event(self.store, versions_log(wanted.name), wanted.number or 0)
        except NotFoundError:
            return []
        version = Version(self.store, wanted.name, str(record["digest"]), reference=reference)
        version.number, version.record = wanted.number or 0, record
        return [version]

    def _with_prefix(self, name: str, prefix: str, reference: str | None = None) -> list[Version]:
        versions = read_events(self.store, versions_log(name))
        digests = [digest for digest in versions.digests if digest.startswith(prefix)]
        return [Version(self.store, name, digest, reference=reference, versions=versions) for digest in digests]

    def _describe_available(self, wanted: Reference) -> str:
        name, artifact = wanted.name, self.artifact(wanted.name)
        count = len(read_events(self.store, versions_log(name)))
        if not count:
            models = list_models(self.store)
            near = did_you_mean(name, models)
            return f"{near or '.'} The registry has no version of {name}; models: {', '.join(models) or 'none'}"
        versions, aliases = "v1" if count == 1 else f"v1 to v{count}", artifact.aliases()
        near = did_you_mean(wanted.alias, aliases) if wanted.alias else ""
        return f"{near or '.'} Versions of {name}: {versions}; aliases: {', '.join(aliases) or 'none'}"
