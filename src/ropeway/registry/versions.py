"""A version: what it is, where it stands in its artifact's logs, and what can be done with it."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal, TypedDict

from ropeway.registry.aliases import Alias, AnyDigest, Promotion, check_text, list_aliases, plan_promotion
from ropeway.registry.blobs import blob_fault, read_blob
from ropeway.registry.layout import clean_key, model_logs, reviews_log, tombstone_key, versions_log
from ropeway.registry.log import Event, Events, append_event, event_document, read_events, verify_log
from ropeway.registry.publishing import attached_files, find_number
from ropeway.registry.pulling import PullResult, VerifyResult, check_folder, fetch_package
from ropeway.registry.rules import PackageFile
from ropeway.registry.signing import Signer, check_policy, list_signatures, sign
from ropeway.registry.version_manifest import Facts, VersionManifest, load_version_manifest
from ropeway.runtime.errors import AbsentError, DataError, RegistryError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import Store

PRODUCTION = "production"
Decision = Literal["approve", "reject"]
_SHOWN_FILES = 3
# run.json holds parameters, metrics and ledger; a tokenizer's table would be a hundred thousand lines.
COMPARED = ("run.json", "config.json", "generation_config.json")
_MAX_COMPARED_BYTES = 8 << 20
_ABSENT = "absent"


class Provenance(TypedDict, total=False):
    """Of the facts beside a version, what says which git revision made it."""

    git: str | None
    dirty: bool
    dirty_files: list[str]


class Version:
    """One version of an artifact. Made by `Registry.version`; each fact is read once, when it is first asked for.

    Attributes:
        reference: What the caller asked for, for messages.
    """

    def __init__(
        self, store: Store, name: str, digest: str, *, reference: str | None = None, versions: Events | None = None
    ) -> None:
        """Stand for a digest that was resolved; `versions` is the artifact's log, if that was read for it."""
        self.store, self.name, self.digest = store, name, digest
        self.reference = reference or f"{name}@{digest}"
        if versions is not None:
            self._versions = versions

    def __str__(self) -> str:
        """Return e.g. `laptop@v3`."""
        return f"{self.name}@v{self.number}"

    @cached_property
    def manifest(self) -> VersionManifest:
        """What determines the model; raises DataError unless it hashes to the digest and keeps every rule."""
        return load_version_manifest(self.store, self.name, self.digest)

    @cached_property
    def number(self) -> int:
        """Its place in the order of publishing; raises RegistryError when it was never published to its end."""
        number = find_number(self._versions, self.digest)
        if number is None:
            raise RegistryError(
                f"{self.name} {self._short_digest} was never published to its end. Publish it again, then promote it"
            )
        return number

    @cached_property
    def record(self) -> Event:
        """What is known of it and does not determine it: `{digest, published_at, provenance, attachments}`."""
        return self._versions[self.number - 1]

    @property
    def aliases(self) -> list[str]:
        """The aliases that point to it now."""
        return sorted(alias for alias, digest in list_aliases(self.store, self.name).items() if digest == self.digest)

    @property
    def is_withdrawn(self) -> bool:
        """Whether a tombstone stands for it."""
        return self.store.exists(tombstone_key(self.name, self.digest))

    @property
    def reviews(self) -> list[Event]:
        """What reviewers answered about it, oldest first."""
        events = read_events(self.store, reviews_log(self.name))
        return [events[index] for index, digest in enumerate(events.digests) if digest == self.digest]

    @property
    def attachments(self) -> list[PackageFile]:
        """The files kept beside it."""
        return attached_files(self.record)

    @property
    def clean_commit(self) -> str | None:
        """The commit that reproduced this version, published from a dirty tree, byte for byte; None if there is none.

        `record_clean_commit` writes it.

        Raises:
            DataError: The note that says so is damaged.
        """
        key = clean_key(self.name, self.digest)
        try:
            return str(json.loads(self.store.get(key))["git"])
        except AbsentError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.store.url}: {key} is not a note on a clean revision ({error})") from None

    @property
    def dirty_reason(self) -> str | None:
        """Why no commit makes this version; None when one does or nothing is known of git."""
        facts: Provenance = self.record["provenance"]
        known = "git" in facts or "dirty" in facts
        if not known or (facts.get("git") and not facts.get("dirty")) or self.clean_commit:
            return None
        files = facts.get("dirty_files", [])
        more = f" and {len(files) - _SHOWN_FILES} more" if len(files) > _SHOWN_FILES else ""
        shown = ", ".join(files[:_SHOWN_FILES]) + more or "which, is not recorded"
        return f"uncommitted changes ({shown})" if facts.get("dirty") else "no git commit"

    def describe(self) -> Facts:
        """Return everything the registry says of it."""
        return {
            "name": self.name,
            "number": self.number,
            "digest": self.digest,
            "bytes": self.manifest.total_bytes,
            "aliases": self.aliases,
            "withdrawn": self.is_withdrawn,
            "signed_by": list_signatures(self.store, self.name, self.digest),
            "files": {file.path: {"sha256": file.sha256, "bytes": file.bytes} for file in self.manifest.files},
            "facts": self.manifest.facts,
            "published_at": self.record["published_at"],
            "provenance": self.record["provenance"],
            "made_again_by": self.clean_commit,
            "attachments": {file.path: {"sha256": file.sha256, "bytes": file.bytes} for file in self.attachments},
        }

    def read_file(self, path: str) -> bytes | None:
        """Return a small file of its package, else of its attachments, hashed; None when it has no such file."""
        for file in (*self.manifest.files, *self.attachments):
            if file.path == path:
                return read_blob(self.store, file)
        return None

    def compare(self, new: "Version") -> Facts:
        """Return how a newer version differs: `compare_manifests`, and which two they are."""
        ends = {side: {"reference": one.reference, "digest": one.digest} for side, one in (("old", self), ("new", new))}
        return ends | compare_manifests(self.store, self.manifest, new.manifest)

    def pull(self, target: Path) -> PullResult:
        """Return the version's folder, `target`, every byte verified. It appears whole, or not at all.

        A pull that was killed leaves `.<target>.<digest>.partial` beside it; the next one continues there.

        If `target` exists it must be empty or hold exactly this version.

        Raises:
            RegistryError: It is withdrawn, or `target` holds something else.
            DataError: A manifest or a blob is not what it should be, or a path breaks a rule; nothing is left behind.
            TemporaryError: Another process is pulling it to the same place.
            ConfigError: The disk cannot hold it.
        """
        self._check_usable()
        return fetch_package(self.store, self.manifest, target)

    def verify(self) -> VerifyResult:
        """Re-hash the manifest, every blob and every attachment, read every log whole; return how much that was.

        Raises:
            RegistryError: It is withdrawn.
            DataError: A log is damaged; or all faults of the version, one per line.
        """
        self._check_usable()
        versions, *_ = [verify_log(self.store, log) for log in model_logs(self.store, self.name)]
        attached = [file for event in versions if event["digest"] == self.digest for file in attached_files(event)]
        files = [*self.manifest.files, *attached]
        if faults := [f"  {fault}" for file in files if (fault := blob_fault(self.store, file, rehash=True))]:
            raise DataError(
                "\n".join(
                    [
                        f"{self.store.url}: {self.reference} ({self._short_digest}) is damaged; do not use it:",
                        *faults,
                        "Remove the damaged blobs from the store and publish the same package again",
                    ]
                )
            )
        return VerifyResult(self.name, self.digest, len(files), sum(file.bytes for file in files))

    def verify_folder(self, folder: Path) -> VerifyResult:
        """Re-hash a pulled folder against the manifest; nothing may be missing, added, changed or linked.

        Raises:
            RegistryError: It is withdrawn.
            DataError: The folder is not exactly this version.
        """
        self._check_usable()
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no folder there. `ropeway registry pull {self.reference} --to {folder}` makes it"
            )
        check_folder(self.manifest, folder)
        return VerifyResult(self.name, self.digest, len(self.manifest.files), self.manifest.total_bytes)

    def promote(
        self,
        alias: str,
        *,
        expect: str | AnyDigest | None,
        by: str,
        reason: str,
        review: Event | None = None,
    ) -> Promotion:
        """Point an alias at this version; of racing promoters that expect the same, one wins.

        `expect` is the digest the alias must point to now, None if it must not exist yet, or `ANY`; `review` is a
        reviewer's answer, kept with the event.

        Raises:
            RegistryError: It is not published, withdrawn or not whole, one from a dirty tree is to become `production`,
                or the alias is not where `expect` says; the message names where it is.
        """
        pointer = Alias(self.store, self.name, alias)
        check_text("by", by)
        check_text("reason", reason)
        self._check_promotable()
        if alias == PRODUCTION and (dirty_reason := self.dirty_reason):
            raise RegistryError(
                f"{self.name} {self._short_digest} was built with {dirty_reason}; '{PRODUCTION}' accepts only versions "
                "that a commit reproduces. Commit the changes and run `ropeway run`: if it builds the same package, "
                "the version can be promoted"
            )
        act = {
            "digest": self.digest,
            "by": by,
            "reason": reason,
            "review": None if review is None else dict(review),
            "at": _now(),
        }

        def plan(events: Events) -> Event | int:
            if self.is_withdrawn:
                raise RegistryError(
                    f"{self.name} {self._short_digest} is withdrawn; '{alias}' was not moved. Choose another version"
                )
            return plan_promotion(events, act, expect, where=str(pointer))

        done = append_event(self.store, pointer.log, plan)
        return Promotion(self.name, alias, self.digest, done.event["prev"], done.number, moved=done.created)

    def review(self, decision: Decision, answer: Mapping[str, object]) -> Event:
        """Keep a reviewer's answer; return it as it is kept. The same answer twice is kept once.

        A review is a fact of its own: a rejection moves no alias, an approval may find production moved meanwhile.

        An answer is `by`, `comment`, `production` (what it was when the report was made), `via` (which run or command).
        """
        said = {"digest": self.digest, "decision": decision, **answer}

        def plan(events: Events) -> Event | int:
            about = [number for number, digest in enumerate(events.digests, 1) if digest == self.digest]
            same = (number for number in about if {**events[number - 1], "at": None} == {**said, "at": None})
            return next(same, None) or {**said, "at": _now()}

        return append_event(self.store, reviews_log(self.name), plan).event

    def record_clean_commit(self, commit: str) -> None:
        """Note that it, published from a dirty tree, was made again, byte for byte, by a commit."""
        self.store.put_if_absent(clean_key(self.name, self.digest), canonical_json({"git": commit, "at": _now()}))

    def sign(self, signer: Signer) -> bool:
        """Store a signature; return False when that key had signed it before."""
        return sign(self.store, self.manifest, signer)

    def withdraw(self, *, by: str, reason: str) -> bool:
        """Say for ever that nobody may use it; return False when it was withdrawn before.

        Raises:
            RegistryError: The registry does not hold it, or an alias points to it.
        """
        check_text("by", by)
        check_text("reason", reason)
        tombstone = event_document({"digest": self.manifest.digest, "by": by, "reason": reason, "at": _now()})
        if pointing := self._alias_names():
            raise RegistryError(
                f"{self.name} {self._short_digest}: {pointing} points to it; it was not withdrawn. Promote another "
                "version or roll back first"
            )
        created = self.store.put_if_absent(tombstone_key(self.name, self.digest), tombstone)
        if pointing := self._alias_names():  # a promotion that checked for the tombstone before it was written
            raise RegistryError(
                f"{self.name} {self._short_digest} is withdrawn, but {pointing} was moved to it at the same time. Roll "
                "the alias back: pulls of it are refused"
            )
        return created

    @property
    def _short_digest(self) -> str:
        return f"{self.digest[:12]}…"

    @cached_property
    def _versions(self) -> Events:
        return read_events(self.store, versions_log(self.name))

    def _alias_names(self) -> str:
        return ", ".join(f"{self.name}@{alias}" for alias in self.aliases)

    def _check_usable(self) -> None:
        """Raise unless it may be used: manifest's hash, rules, tombstone, signature policy."""
        core = self.manifest
        if self.is_withdrawn:
            raise RegistryError(
                f"{self.reference} ({self._short_digest}) is withdrawn: {self.store.url} holds "
                f"{tombstone_key(self.name, self.digest)}. Choose another version"
            )
        check_policy(self.store, core)

    def _check_promotable(self) -> None:
        """Raise RegistryError unless it is published and every file of it is there, by size."""
        check_policy(self.store, self.manifest)
        label = str(self)
        if faults := [fault for file in self.manifest.files if (fault := blob_fault(self.store, file, rehash=False))]:
            raise RegistryError(
                f"{label} {self._short_digest} is not whole in {self.store.url}: {faults[0]}. Publish it again"
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def compare_manifests(store: Store, old: VersionManifest, new: VersionManifest) -> Facts:
    """Return `{facts: {"run.json: params.seed": [1, 2]}, files: {path: added | removed | changed}}`."""
    before, after = _facts(store, old), _facts(store, new)
    changed = {
        key: [before.get(key, _ABSENT), after.get(key, _ABSENT)]
        for key in sorted({*before, *after})
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    }
    return {"facts": changed, "files": compare_files(old.files, new.files)}


def compare_files(old: tuple[PackageFile, ...], new: tuple[PackageFile, ...]) -> dict[str, str]:
    """Return what became of every path that is not the same in both."""
    before, after = ({file.path: file.sha256 for file in files} for files in (old, new))
    kinds = dict.fromkeys(before.keys() - after.keys(), "removed")
    kinds |= dict.fromkeys(after.keys() - before.keys(), "added")
    kinds |= {path: "changed" for path in before.keys() & after.keys() if before[path] != after[path]}
    return dict(sorted(kinds.items()))


def flatten(tree: object, prefix: str = "") -> Facts:
    """Return a JSON tree's leaves under dotted keys.

    >>> flatten({"a": {"b": 1}, "c": [2, 3]})
    {'a.b': 1, 'c.0': 2, 'c.1': 3}
    """
    if isinstance(tree, list):
        tree = {str(number): item for number, item in enumerate(tree)}
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves: Facts = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _facts(store: Store, core: VersionManifest) -> Facts:
    facts = flatten(dict(core.facts), "facts") if core.facts else {}
    for file in core.files:
        if file.path in COMPARED and file.bytes <= _MAX_COMPARED_BYTES:
            facts |= flatten(_read_json(store, file), f"{file.path}: ")
    return {key.replace(": .", ": "): value for key, value in facts.items()}


def _read_json(store: Store, file: PackageFile) -> object:
    try:
        tree: object = json.loads(read_blob(store, file))
    except ValueError as error:
        raise DataError(f"{store.url}: {file.path} is not JSON ({error})") from None
    return tree
