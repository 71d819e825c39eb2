"""Keys of every object in a registry, and references such as `laptop@v3`. The layout is final.

registry.json                                     format of the registry, written once
blobs/sha256/ab/<64 hex>                          content of a file, immutable
models/<name>/manifests/<64 hex>.json             version manifest, canonical JSON; its sha256 is the version's identity
models/<name>/manifests/<64 hex>.<key id>.sig     Ed25519 signature of the manifest, one file per key
models/<name>/packages/<64 hex>.json              package digest -> digest of the version with report pages
models/<name>/versions/00000012.json              version number -> digest, append-only
models/<name>/aliases/<alias>/00000007.json       {digest, prev, by, reason, review, at}: the last event is current
models/<name>/tombstones/<64 hex>.json            the version is withdrawn; pull refuses it
models/<name>/reviews/00000003.json               {digest, decision, by, comment, ...}: all reviews, append-only
models/<name>/heads/<log>/99999987.txt            digests of the first 12 events of a log (a hint); name: 99999999 - 12
models/<name>/clean/<64 hex>.json                 the clean git commit that reproduced the version byte for byte
names/models/00000001.json                        {name}: every model, append-only (`names.py`)
names/aliases/<name>/00000001.json                {name}: every alias of a model, append-only
intents/slot-<000 to 127>.json                    a running publish; garbage collection keeps the objects it lists
collections/running.json                          the running garbage collection; publishes abort while it exists

An older Ropeway wrote intents/<32 hex>.json and collections/<32 hex>.json, which count where a listing shows them.

An event (of versions, aliases and reviews) also has `head`, the sha256 of the digests so far, and `seal`, the sha256 of
the event before it and of its own fields. Events of a Ropeway before 2026-12 have no seal, earlier ones no head.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ropeway.config.sections import PROFILE_NAME
from ropeway.runtime.errors import ConfigError, NotFoundError, RegistryError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import Store

FORMAT = "ropeway-registry/1"
INTENTS = "intents/"
INTENT_SLOTS = 128  # publishes at one time; a collection reads each slot, since a listing can leave out an intent
COLLECTIONS = "collections/"
COLLECTION_MARKER = f"{COLLECTIONS}running.json"
_FORMAT_KEY = "registry.json"
_LAST_NUMBER = 99_999_999
_HEAD_KEY = re.compile(r"([0-9]{8})\.txt")
_ALIAS = re.compile(r"[a-z][a-z0-9-]{0,48}[a-z0-9]")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"v[0-9]{1,8}|[0-9]{1,7}")
_PREFIX = re.compile(r"[0-9a-f]{8,64}")
_Fields = Mapping[str, type | tuple[type, ...]]
_VERSION: _Fields = {"digest": str, "published_at": str, "provenance": dict, "attachments": dict}
_REVIEW: _Fields = {
    "digest": str,
    "decision": str,
    "by": str,
    "comment": str,
    "production": (str, type(None)),
    "via": str,
    "at": str,
}
_PROMOTION: _Fields = {
    "digest": str,
    "prev": (str, type(None)),
    "by": str,
    "reason": str,
    "review": (dict, type(None)),
    "at": str,
}


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed `NAME@SELECTOR`; the selector is an alias, a version number or a digest prefix.

    Attributes:
        name: The model.
        alias: Set for `laptop@candidate`.
        number: Set for `laptop@v3` and `laptop@3`.
        prefix: Set for `laptop@9f2c41aa…`: 8 or more hex digits.
    """

    name: str
    alias: str | None = None
    number: int | None = None
    prefix: str | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """An append-only log: the folder of its events, the folder of its heads, and the types of an event's fields."""

    folder: str
    heads: str
    fields: _Fields

    def key(self, number: int) -> str:
        """Return the key of an event; numbers start at 1."""
        return f"{self.folder}{number:08d}.json"

    def head_key(self, number: int) -> str:
        """Return the key of the head of the first `number` events; the newest head has the first name."""
        return f"{self.heads}{_LAST_NUMBER - number:08d}.txt"

    def is_head(self, key: str) -> bool:
        """Return whether a key has the form of a head of this log, so that a writer may delete it."""
        return key.startswith(self.heads) and _HEAD_KEY.fullmatch(key.removeprefix(self.heads)) is not None

    def head_number(self, key: str | None) -> int:
        """Return the number of events that a head covers; 0 if `key` is not a head."""
        match = _HEAD_KEY.fullmatch((key or "").removeprefix(self.heads))
        return _LAST_NUMBER - int(match[1]) if match else 0


def read_reference(text: str) -> Reference:
    """Parse NAME@ALIAS, NAME@v3, NAME@3 or NAME@DIGEST (8 digits or more); raise ConfigError if it is malformed.

    >>> read_reference("laptop@v3").number
    3
    """
    name, at, selector = text.partition("@")
    if at and PROFILE_NAME.fullmatch(name):
        if _NUMBER.fullmatch(selector):
            return Reference(name, number=int(selector.removeprefix("v")))
        if _PREFIX.fullmatch(selector):
            return Reference(name, prefix=selector)
        if _ALIAS.fullmatch(selector):
            return Reference(name, alias=selector)
    raise ConfigError(
        f"{text[:120]!r}: expected NAME@ALIAS, NAME@v3 or NAME@DIGEST (its first 8 digits or more), "
        "e.g. laptop@candidate. `ropeway registry list` shows the models"
    )


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is a valid model name."""
    if not PROFILE_NAME.fullmatch(name) or ".." in name:
        raise ConfigError(f"model name {name[:80]!r}: expected 1 to 64 characters of A-Z a-z 0-9 . _ -, e.g. laptop")


def check_alias(alias: str) -> None:
    """Raise ConfigError unless `alias` is a valid alias: neither a version number nor a digest."""
    if alias in ("none", "any") or not _ALIAS.fullmatch(alias) or _NUMBER.fullmatch(alias) or _PREFIX.fullmatch(alias):
        raise ConfigError(
            f"alias {alias[:80]!r}: expected 2 to 50 characters of a-z 0-9 -, starting with a letter, not a version "
            "number, a digest, `none` or `any`; e.g. candidate, production"
        )


def is_digest(value: object) -> bool:
    """Return whether a value is a lowercase hex sha256."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def check_digest(digest: str) -> None:
    """Raise ConfigError unless `digest` is a full sha256 digest."""
    if not is_digest(digest):
        raise ConfigError(f"digest {digest[:80]!r}: expected 64 lowercase hex digits")


def blob_key(sha256: str) -> str:
    """Return the key of a blob; the first two digits are a folder, which keeps folders small."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def manifest_key(name: str, digest: str) -> str:
    """Return the key of a version's manifest."""
    return f"models/{name}/manifests/{digest}.json"


def package_key(name: str, package: str) -> str:
    """Return the key of the entry that maps a package digest, without pages, to the version published from it."""
    return f"models/{name}/packages/{package}.json"


def signatures_prefix(name: str, digest: str) -> str:
    """Return the prefix of the keys of a version's signatures."""
    return f"models/{name}/manifests/{digest}."


def signature_key(name: str, digest: str, keyid: str) -> str:
    """Return the key of the signature of a version by one signing key."""
    return f"{signatures_prefix(name, digest)}{keyid}.sig"


def versions_log(name: str) -> Log:
    """Return the log of versions: number, digest, provenance and attachments."""
    return _log(name, "versions/", _VERSION)


def aliases_folder(name: str) -> str:
    """Return the folder with one log per alias."""
    return f"models/{name}/aliases/"


def alias_log(name: str, alias: str) -> Log:
    """Return the log of an alias."""
    return _log(name, f"aliases/{alias}/", _PROMOTION)


def reviews_log(name: str) -> Log:
    """Return the log of reviews."""
    return _log(name, "reviews/", _REVIEW)


def _log(name: str, path: str, fields: _Fields) -> Log:
    return Log(f"models/{name}/{path}", f"models/{name}/heads/{path}", fields)


def clean_key(name: str, digest: str) -> str:
    """Return the key of the clean commit that reproduced a version published from a dirty tree."""
    return f"models/{name}/clean/{digest}.json"


def tombstones_folder(name: str) -> str:
    """Return the folder of tombstones, one per withdrawn version."""
    return f"models/{name}/tombstones/"


def tombstone_key(name: str, digest: str) -> str:
    """Return the key of a version's tombstone."""
    return f"{tombstones_folder(name)}{digest}.json"


def intent_key(slot: int) -> str:
    """Return the key of the intent of a running publish, which lists its blobs; slots are 0 to `INTENT_SLOTS` - 1."""
    return f"{INTENTS}slot-{slot:03d}.json"


def init_registry(store: Store) -> None:
    """Write registry.json if it is missing, then check it."""
    store.put_if_absent(_FORMAT_KEY, canonical_json({"format": FORMAT}))
    check_registry(store)


def check_registry(store: Store) -> None:
    """Raise RegistryError if the store has no registry, or one of another format."""
    try:
        found = store.get(_FORMAT_KEY)
    except NotFoundError:
        raise RegistryError(
            f"{store.url}: no registry found. `ropeway run` creates it with the first publish; or correct "
            "ROPEWAY_REGISTRY"
        ) from None
    if found != canonical_json({"format": FORMAT}):
        raise RegistryError(
            f"{store.url}: registry.json contains {found[:80]!r}, expected format {FORMAT}. A newer Ropeway wrote it: "
            "upgrade Ropeway"
        )


def list_models(store: Store) -> list[str]:
    """Return the names of all models."""
    return store.list_folders("models/")


def check_name_case(store: Store, name: str, names: Sequence[str] = ()) -> None:
    """Raise RegistryError if a model name differs only in case: some file systems ignore it; ConfigError if invalid.

    `names` are compared in addition to the listed models.
    """
    check_name(name)
    known = sorted({*list_models(store), *names})
    clash = [other for other in known if other != name and other.casefold() == name.casefold()]
    if clash:
        raise RegistryError(f"model name {name}: model {clash[0]} exists and differs only in case. Choose another name")
