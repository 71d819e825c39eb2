"""A version of a model: its manifest, its events, and the operations pull, verify, promote, sign and withdraw."""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal, TypedDict

from ropeway.registry.aliases import Alias, AnyDigest, Promotion, check_text, list_aliases, plan_promotion
from ropeway.registry.blobs import blob_fault, read_blob
from ropeway.registry.layout import clean_key, manifest_key, reviews_log, tombstone_key, versions_log
from ropeway.registry.log import Event, Events, append_event, event_document, read_events, verify_log
from ropeway.registry.names import model_logs, register_alias
from ropeway.registry.publishing import attached_files, find_number
from ropeway.registry.pulling import PullResult, StatementTrust, VerifyResult, check_folder, fetch_package
from ropeway.registry.rules import PackageFile
from ropeway.registry.signing import Signer, check_policy, check_statement, list_signatures, read_bundles, sign
from ropeway.registry.signing_keys import load_trusted
from ropeway.registry.version_manifest import Facts, VersionManifest, load_version_manifest
from ropeway.runtime.errors import DataError, NotFoundError, RegistryError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.login import Identity
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import Store

PRODUCTION = "production"
STATEMENT = "provenance.intoto.json"  # attachments that other tools read
ML_BOM = "mlbom.cdx.json"
EVALUATION = "eval.json"
Decision = Literal["approve", "reject"]
_SHOWN_FILES = 3
# run.json has parameters, metrics and ledger. Tokenizer files are excluded: they would add 100,000 lines.
COMPARED = ("run.json", "config.json", "generation_config.json")
_MAX_COMPARED_BYTES = 8 << 20
_ABSENT = "absent"


class Provenance(TypedDict, total=False):
    """The facts about the git revision in the provenance of a version."""

    git: str | None
    dirty: bool
    dirty_files: list[str]


class Version:
    """One version of an artifact, created by `Registry.version`. Each fact is read once, on first access.

    Attributes:
        reference: The reference that the caller gave, for messages.
    """

    def __init__(
        self, store: Store, name: str, digest: str, *, reference: str | None = None, versions: Events | None = None
    ) -> None:
        """Represent a resolved digest; `versions` is the log of versions, if it was read already."""
        self.store, self.name, self.digest = store, name, digest
        self.reference = reference or f"{name}@{digest}"
        if versions is not None:
            self._versions = versions

    def __str__(self) -> str:
        """Return e.g. `laptop@v3`."""
        return f"{self.name}@v{self.number}"

    @cached_property
    def manifest(self) -> VersionManifest:
        """The manifest of the version.

        Raises:
            RegistryError: There is no such version.
            DataError: The manifest of a published version is missing, does not match the digest, or breaks a rule.
        """
        try:
            return load_version_manifest(self.store, self.name, self.digest)
        except RegistryError:
            if find_number(self._versions, self.digest) is None:
                raise
            raise DataError(
                f"{self.store.url}: {manifest_key(self.name, self.digest)} is missing, which lists the files of a "
                "published version. Restore it from a backup of the registry, or publish the same "
                "package again (`ropeway registry publish`)"
            ) from None

    @cached_property
    def number(self) -> int:
        """The version number; raises RegistryError if its publish did not finish."""
        number = find_number(self._versions, self.digest)
        if number is None:
            raise RegistryError(
                f"{self.name} {self._short_digest} has no version number: its publish did not finish. Publish it again"
            )
        return number

    @cached_property
    def record(self) -> Event:
        """The event of the version: `{digest, published_at, provenance, attachments}`."""
        return self._versions[self.number - 1]

    @property
    def aliases(self) -> list[str]:
        """The aliases that point to this version."""
        return sorted(alias for alias, digest in list_aliases(self.store, self.name).items() if digest == self.digest)

    @property
    def is_withdrawn(self) -> bool:
        """Whether the version has a tombstone."""
        return self.store.exists(tombstone_key(self.name, self.digest))

    @property
    def reviews(self) -> list[Event]:
        """The reviews of the version, oldest first."""
        events = read_events(self.store, reviews_log(self.name))
        return [events[index] for index, digest in enumerate(events.digests) if digest == self.digest]

    @property
    def attachments(self) -> list[PackageFile]:
        """The attachments of the version."""
        return attached_files(self.record)

    @property
    def clean_commit(self) -> str | None:
        """The commit that reproduced this version, published from a dirty tree, byte for byte; None if there is none.

        `record_clean_commit` writes it.

        Raises:
            DataError: The stored entry is damaged.
        """
        key = clean_key(self.name, self.digest)
        try:
            return str(parse_json(self.store.get(key))["git"])
        except NotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.store.url}: {key} does not name a git commit ({error}). Delete it and run again"
            ) from None

    @property
    def dirty_reason(self) -> str | None:
        """Why no commit reproduces this version; None if one does, or if no git facts were recorded."""
        facts: Provenance = self.record["provenance"]
        known = "git" in facts or "dirty" in facts
        if not known or (facts.get("git") and not facts.get("dirty")) or self.clean_commit:
            return None
        files = facts.get("dirty_files", [])
        more = f" and {len(files) - _SHOWN_FILES} more" if len(files) > _SHOWN_FILES else ""
        shown = ", ".join(files[:_SHOWN_FILES]) + more or "files not recorded"
        return f"uncommitted changes ({shown})" if facts.get("dirty") else "no git commit"

    @cached_property
    def metrics(self) -> Facts:
        """The metrics in the eval.json of the package, which the digest covers; without one, those of the event.

        Raises:
            DataError: eval.json is damaged.
        """
        file = next((file for file in self.manifest.files if file.path == EVALUATION), None)
        if file is None:
            recorded = self.record["provenance"].get("evaluation")
            return dict(recorded) if isinstance(recorded, Mapping) else {}
        metrics = _read_json(self.store, file)
        if not isinstance(metrics, dict):
            raise DataError(f"{self.store.url}: {EVALUATION} of {self.reference} is not a JSON object")
        return metrics

    def check_policy(self) -> None:
        """Raise DataError unless there is no signature policy or a trusted key signed the version."""
        check_policy(self.store, self.manifest)

    def describe(self) -> Facts:
        """Return all facts about the version."""
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
            "clean_commit": self.clean_commit,
            "reviews": [dict(review) for review in self.reviews],
            "attachments": {file.path: {"sha256": file.sha256, "bytes": file.bytes} for file in self.attachments},
        }

    def read_file(self, path: str, *, attached: bool = False) -> bytes | None:
        """Return the verified bytes of a small file of the package, or None if it does not exist.

        `attached`: of an attachment, which the event of the version names and no signature covers.
        """
        for file in self.attachments if attached else self.manifest.files:
            if file.path == path:
                return read_blob(self.store, file)
        return None

    def compare(self, new: "Version") -> Facts:
        """Return the differences to another version (see `compare_manifests`), with both references and digests."""
        ends = {side: {"reference": one.reference, "digest": one.digest} for side, one in (("old", self), ("new", new))}
        return ends | compare_manifests(self.store, self.manifest, new.manifest)

    def pull(self, target: Path) -> PullResult:
        """Download the version into the folder `target` and verify every byte; `target` appears only when complete.

        An interrupted pull keeps `.<target>.<digest>.partial` next to `target`; the next pull resumes from it.
        If `target` exists, it must be empty or contain exactly this version.

        Raises:
            RegistryError: The version is withdrawn, or `target` has other content.
            DataError: A manifest or blob is corrupt, or a path breaks a rule; no file is kept.
            TemporaryError: Another process is pulling the version to the same path.
            ConfigError: The disk has too little free space.
        """
        self._check_usable()
        return fetch_package(self.store, self.manifest, target)

    def verify(self) -> VerifyResult:
        """Hash the manifest, every blob and every attachment, and verify every log of the model.

        Raises:
            RegistryError: The version is withdrawn.
            DataError: A log is damaged, or blobs are: all faults, one per line; or a trusted key signed a provenance
                statement about other files.
        """
        self._check_usable()
        versions, *_ = [verify_log(self.store, log) for log in model_logs(self.store, self.name)]
        attached = [file for event in versions if event["digest"] == self.digest for file in attached_files(event)]
        files = [*self.manifest.files, *attached]
        if faults := [f"  {fault}" for file in files if (fault := blob_fault(self.store, file, rehash=True))]:
            head = f"{self.store.url}: {self.reference} ({self._short_digest}) is damaged; do not use it:"
            remedy = (
                "Delete those of these blobs that exist, then publish the same package again: `ropeway registry "
                f"publish FOLDER --name {self.name}`"
            )
            raise DataError("\n".join([head, *faults, remedy]))
        total = sum(file.bytes for file in files)
        return VerifyResult(self.name, self.digest, len(files), total, provenance=self._check_statement(attached))

    def verify_folder(self, folder: Path) -> VerifyResult:
        """Verify a pulled folder against the manifest; no file may be missing, added, changed or a link.

        Raises:
            RegistryError: The version is withdrawn.
            DataError: The folder does not contain exactly this version.
        """
        self._check_usable()
        if not folder.is_dir():
            raise DataError(
                f"{folder}: expected a pulled folder, found none. `ropeway registry pull {self.reference} --to "
                f"{folder}` creates it"
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
        identity: Identity = "claimed",
        review: Event | None = None,
    ) -> Promotion:
        """Move an alias to this version; if several processes expect the same digest, exactly one succeeds.

        `expect` is the digest that the alias must point to, None if it must not exist, or `ANY`; `review` is the review
        that is stored with the event. `identity` states whether `by` was authenticated or is only claimed.

        Raises:
            RegistryError: The version is not published, withdrawn or incomplete, is from a dirty tree and the alias is
                `production`, or the alias does not point to `expect`; the message names the current digest.
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
        promotion = {
            "digest": self.digest,
            "by": by,
            "identity": identity,
            "reason": reason,
            "review": None if review is None else dict(review),
            "at": _now(),
        }

        def plan(events: Events) -> Event | int:
            if self.is_withdrawn:
                raise RegistryError(
                    f"{self.name} {self._short_digest} is withdrawn; '{alias}' was not moved. Choose another version"
                )
            return plan_promotion(events, promotion, expect, where=str(pointer))

        known = pointer.events
        if not known:
            plan(known)  # a refusal comes before the first write
            register_alias(self.store, self.name, alias)
        done = append_event(self.store, pointer.log, plan, known=known)
        return Promotion(self.name, alias, self.digest, done.event["prev"], done.number, moved=done.created)

    def review(self, decision: Decision, answer: Mapping[str, object]) -> Event:
        """Append a review to the log of reviews and return its event; an identical review is stored once.

        A review moves no alias: an approval can fail to promote if `production` moved since the report.

        `answer` has `by`, `identity`, `comment`, `production` (its digest when the report was made) and `via` (the run
        or command).
        """
        review = {"digest": self.digest, "decision": decision, **answer}

        def plan(events: Events) -> Event | int:
            own = [number for number, digest in enumerate(events.digests, 1) if digest == self.digest]
            same = (number for number in own if {**events[number - 1], "at": None} == {**review, "at": None})
            return next(same, None) or {**review, "at": _now()}

        return append_event(self.store, reviews_log(self.name), plan).event

    def record_clean_commit(self, commit: str) -> None:
        """Record the commit that reproduced this version, published from a dirty tree, byte for byte."""
        self.store.put_if_absent(clean_key(self.name, self.digest), canonical_json({"git": commit, "at": _now()}))

    def sign(self, signer: Signer) -> bool:
        """Store a signature; return False if this key already signed the version."""
        return sign(self.store, self.manifest, signer)

    def attestations(self) -> dict[str, bytes]:
        """Return the files by which other tools check the version, by name: signatures, provenance, ML-BOM.

        A signature is a Sigstore bundle named `<key id>.sigstore.json`. The files that the version has not are absent.
        """
        bundles = read_bundles(self.store, self.name, self.digest)
        found = {f"{keyid}.sigstore.json": data for keyid, data in bundles.items()}
        attached = [file for file in self.attachments if file.path in (STATEMENT, ML_BOM)]
        return found | {file.path: read_blob(self.store, file) for file in attached}

    def withdraw(self, *, by: str, reason: str) -> bool:
        """Withdraw the version permanently by a tombstone; return False if it was withdrawn before.

        Raises:
            RegistryError: The registry does not have the version, or an alias points to it.
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
        pointing = list_aliases(self.store, self.name, complete=True).items()
        return ", ".join(f"{self.name}@{alias}" for alias, digest in pointing if digest == self.digest)

    def _check_usable(self) -> None:
        """Raise unless the version is usable: manifest digest, package rules, tombstone, signature policy."""
        _ = self.manifest  # first: a damaged manifest is named before anything else
        if self.is_withdrawn:
            raise RegistryError(
                f"{self.reference} ({self._short_digest}) is withdrawn: {self.store.url} has "
                f"{tombstone_key(self.name, self.digest)}. Choose another version"
            )
        self.check_policy()

    def _check_statement(self, attached: list[PackageFile]) -> StatementTrust:
        file = next((file for file in attached if file.path == STATEMENT), None)
        if file is None:
            return "none"
        if (trust := load_trusted()) is None:
            return "not checked"
        return "trusted" if check_statement(read_blob(self.store, file), self.manifest, trust) else "not trusted"

    def _check_promotable(self) -> None:
        """Raise RegistryError unless the version is published and the blob of every file exists with its size."""
        self.check_policy()
        label = str(self)
        if faults := [fault for file in self.manifest.files if (fault := blob_fault(self.store, file, rehash=False))]:
            raise RegistryError(
                f"{label} {self._short_digest} is incomplete in {self.store.url}: {faults[0]}. Publish it again"
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
    """Return `added`, `removed` or `changed` for every path that differs."""
    before, after = ({file.path: file.sha256 for file in files} for files in (old, new))
    kinds = dict.fromkeys(before.keys() - after.keys(), "removed")
    kinds |= dict.fromkeys(after.keys() - before.keys(), "added")
    kinds |= {path: "changed" for path in before.keys() & after.keys() if before[path] != after[path]}
    return dict(sorted(kinds.items()))


def flatten(tree: object, prefix: str = "") -> Facts:
    """Return the leaves of a JSON tree under dotted keys.

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


def _facts(store: Store, manifest: VersionManifest) -> Facts:
    facts = flatten(dict(manifest.facts), "facts") if manifest.facts else {}
    for file in manifest.files:
        if file.path in COMPARED and file.bytes <= _MAX_COMPARED_BYTES:
            facts |= flatten(_read_json(store, file), f"{file.path}: ")
    return {key.replace(": .", ": "): value for key, value in facts.items()}


def _read_json(store: Store, file: PackageFile) -> object:
    try:
        tree: object = parse_json(read_blob(store, file))
    except ValueError as error:
        raise DataError(f"{store.url}: {file.path} is not valid JSON ({error})") from None
    return tree
