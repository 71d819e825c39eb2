"""Where everything in a registry lies, and how a person names a version. The layout is final.

registry.json                                     format, written once
blobs/sha256/ab/<64 hex>                          immutable
models/<name>/manifests/<64 hex>.json             canonical JSON; its sha256 is the version's identity
models/<name>/manifests/<64 hex>.<key id>.sig     Ed25519 signature over those bytes, one per key
models/<name>/versions/00000012.json              number -> digest, append-only
models/<name>/aliases/<alias>/00000007.json       {digest, prev, by, reason, review, at}: the last is the alias
models/<name>/tombstones/<64 hex>.json            withdrawn; pull refuses
models/<name>/reviews/00000003.json               {digest, decision, by, comment, ...}: every answer, append-only
models/<name>/heads/<log>/99999987.txt            digests of a log's first 12 events; a hint, named by 99999999 - 12
models/<name>/clean/<64 hex>.json                 made again, byte for byte, from a clean git tree
intents/<32 hex>.json                             a publish under way; a collector leaves what it names alone
collections/<32 hex>.json                         a collection under way; publishers step back
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ropeway.config.params import PROFILE_NAME
from ropeway.runtime.errors import AbsentError, RegistryError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import Store

FORMAT = "ropeway-registry/1"
INTENTS = "intents/"
COLLECTIONS = "collections/"
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
    """`NAME@SELECTOR` taken apart: the selector is an alias, a version number or the start of a digest.

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
    """An append-only log: its folder, that of its heads, and the keys that each event has, with their types."""

    folder: str
    heads: str
    fields: _Fields

    def key(self, number: int) -> str:
        """Return where an event lies; they count from 1."""
        return f"{self.folder}{number:08d}.json"

    def head_key(self, number: int) -> str:
        """Return where the head of the first `number` events lies: of all heads the newest comes first by name."""
        return f"{self.heads}{_LAST_NUMBER - number:08d}.txt"

    def head_number(self, key: str | None) -> int:
        """Return how many events a head is of, 0 for what is none."""
        match = _HEAD_KEY.fullmatch((key or "").removeprefix(self.heads))
        return _LAST_NUMBER - int(match[1]) if match else 0


def read_reference(text: str) -> Reference:
    """Return what NAME@ALIAS, NAME@v3, NAME@3 or NAME@DIGEST (8 digits or more) means; else raise RegistryError.

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
    raise RegistryError(
        f"{text[:120]!r}: expected NAME@ALIAS, NAME@v3 or NAME@DIGEST (its first 8 digits or more), "
        "e.g. laptop@candidate. `ropeway registry list` shows what there is"
    )


def check_name(name: str) -> None:
    """Raise RegistryError unless `name` can be a model's."""
    if not PROFILE_NAME.fullmatch(name) or ".." in name:
        raise RegistryError(f"model name {name[:80]!r}: expected 1 to 64 of A-Z a-z 0-9 . _ -, e.g. laptop")


def check_alias(alias: str) -> None:
    """Raise RegistryError unless `alias` can be one: not to be mistaken for a number or a digest."""
    if alias in ("none", "any") or not _ALIAS.fullmatch(alias) or _NUMBER.fullmatch(alias) or _PREFIX.fullmatch(alias):
        raise RegistryError(
            f"alias {alias[:80]!r}: expected 2 to 50 of a-z 0-9 -, starting with a letter, neither a version number "
            "nor a digest, and not `none` or `any`; e.g. candidate, production"
        )


def is_digest(value: object) -> bool:
    """Return whether a value is a sha256 in lower-case hex."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def check_digest(digest: str) -> None:
    """Raise RegistryError unless `digest` is a whole one."""
    if not is_digest(digest):
        raise RegistryError(f"digest {digest[:80]!r}: expected 64 lower-case hex digits")


def blob_key(sha256: str) -> str:
    """Return where a file's bytes lie; two levels, so that no folder grows without end."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def manifest_key(name: str, digest: str) -> str:
    """Return where a version's signed core lies."""
    return f"models/{name}/manifests/{digest}.json"


def package_key(name: str, package: str) -> str:
    """Return where it is noted which version was published from a package, whose pages are no part of its digest."""
    return f"models/{name}/packages/{package}.json"


def signatures_prefix(name: str, digest: str) -> str:
    """Return what the keys of a version's signatures begin with."""
    return f"models/{name}/manifests/{digest}."


def signature_key(name: str, digest: str, keyid: str) -> str:
    """Return where one key's signature of a version lies."""
    return f"{signatures_prefix(name, digest)}{keyid}.sig"


def versions_log(name: str) -> Log:
    """Return the log number → digest, with what is known of a version but does not make it."""
    return _log(name, "versions/", _VERSION)


def aliases_folder(name: str) -> str:
    """Return the folder with one log per alias."""
    return f"models/{name}/aliases/"


def alias_log(name: str, alias: str) -> Log:
    """Return an alias's log."""
    return _log(name, f"aliases/{alias}/", _PROMOTION)


def reviews_log(name: str) -> Log:
    """Return the log of what reviewers answered."""
    return _log(name, "reviews/", _REVIEW)


def model_logs(store: Store, name: str) -> list[Log]:
    """Return every log of a model, its versions' first."""
    aliases = store.list_folders(aliases_folder(name))
    return [versions_log(name), reviews_log(name), *(alias_log(name, alias) for alias in aliases)]


def _log(name: str, path: str, fields: _Fields) -> Log:
    return Log(f"models/{name}/{path}", f"models/{name}/heads/{path}", fields)


def clean_key(name: str, digest: str) -> str:
    """Return where it is noted that a version from a dirty tree was made again from a clean one."""
    return f"models/{name}/clean/{digest}.json"


def tombstones_folder(name: str) -> str:
    """Return the folder with one note per withdrawn version."""
    return f"models/{name}/tombstones/"


def tombstone_key(name: str, digest: str) -> str:
    """Return where the withdrawal of a version is noted."""
    return f"{tombstones_folder(name)}{digest}.json"


def intent_key(identifier: str) -> str:
    """Return where a publish under way names the blobs it counts on."""
    return f"{INTENTS}{identifier}.json"


def collection_key(identifier: str) -> str:
    """Return where a collection under way announces itself."""
    return f"{COLLECTIONS}{identifier}.json"


def init_registry(store: Store) -> None:
    """Write registry.json if this is the store's first publish, and check it."""
    store.put_if_absent(_FORMAT_KEY, canonical_json({"format": FORMAT}))
    check_registry(store)


def check_registry(store: Store) -> None:
    """Raise RegistryError when the store holds no registry, or one of another format."""
    try:
        found = store.get(_FORMAT_KEY)
    except AbsentError:
        raise RegistryError(
            f"{store.url}: no registry there yet. `ropeway run` publishes to it; or correct ROPEWAY_REGISTRY"
        ) from None
    if found != canonical_json({"format": FORMAT}):
        raise RegistryError(
            f"{store.url}: registry.json says {found[:80]!r}, expected format {FORMAT}. A newer Ropeway wrote it: "
            "use that one"
        )


def list_models(store: Store) -> list[str]:
    """Return the names under which something was published."""
    return store.list_folders("models/")


def check_name_case(store: Store, name: str) -> None:
    """Raise RegistryError when a model of that name in another case exists: some file systems hold them one."""
    check_name(name)
    clash = [other for other in list_models(store) if other != name and other.casefold() == name.casefold()]
    if clash:
        raise RegistryError(f"model name {name}: {clash[0]} exists and differs in case only. Choose another name")
