"""Aliases: movable pointers to versions. Each alias is an append-only log; its last event names the current version."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ropeway.registry.layout import Log, alias_log, aliases_folder, check_alias
from ropeway.registry.log import Event, Events, read_events
from ropeway.registry.names import all_alias_names
from ropeway.runtime.errors import ConfigError, NotFoundError, RegistryError
from ropeway.storage import Store

_MAX_TEXT_CHARACTERS = 2000


class AnyDigest(Enum):
    """The type of `ANY`; it differs from every digest and from None."""

    ANY = "any"


ANY: Final = AnyDigest.ANY
"""Value of `expect` that accepts any current target of the alias."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """The result of a promotion.

    Attributes:
        prev: The digest the alias pointed to before this event; None for its first event.
        number: The number of the event in the alias log.
        moved: Whether this call wrote the event; False if the alias already pointed to the version.
    """

    name: str
    alias: str
    digest: str
    prev: str | None
    number: int
    moved: bool


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable pointer to a version of an artifact. Every access reads the store; `Version.promote` moves it."""

    store: Store
    artifact: str
    name: str

    def __post_init__(self) -> None:
        """Raise ConfigError unless `name` is a valid alias name."""
        check_alias(self.name)

    def __str__(self) -> str:
        """Return e.g. `laptop@production`."""
        return f"{self.artifact}@{self.name}"

    @property
    def log(self) -> Log:
        """The log of the alias."""
        return alias_log(self.artifact, self.name)

    @property
    def events(self) -> Events:
        """The events of the alias, oldest first: `{digest, prev, by, reason, review, at}`, newer ones `identity`."""
        return read_events(self.store, self.log)

    @property
    def digest(self) -> str | None:
        """The digest the alias points to, or None if the alias does not exist. Pass it as `expect`."""
        events = self.events
        return str(events[-1]["digest"]) if events else None


def list_aliases(store: Store, artifact: str, *, complete: bool = False) -> dict[str, str]:
    """Return every alias of an artifact and the digest it points to.

    `complete` costs two requests and one per alias more, and also finds an alias that an outdated listing leaves out.
    """
    names = all_alias_names(store, artifact) if complete else store.list_folders(aliases_folder(artifact))
    return {name: digest for name in names if (digest := Alias(store, artifact, name).digest)}


def plan_promotion(events: Sequence[Event], event: Event, expect: str | AnyDigest | None, *, where: str) -> Event | int:
    """Return the next event of an alias, or the number of its last event if the alias does not have to move.

    The alias does not move if it already points to the version and `expect` agrees, or if the last event is the same
    promotion: a retry of a promotion whose response was lost succeeds.

    Raises:
        RegistryError: The alias does not point to `expect`.
    """
    last = events[-1] if events else None
    current = last["digest"] if last else None
    if last and current == event["digest"]:
        is_retry = all(last[key] == event[key] for key in ("by", "reason", "review")) and last["prev"] == expect
        if expect is ANY or expect == current or is_retry:
            return len(events)
    if expect is not ANY and expect != current:
        raise RegistryError(
            f"{where} points to {current or 'no version'}, expected {expect or 'no version'}; it was not moved. "
            f"`ropeway registry history {where}` shows its moves. To move it from there, expect "
            f"{f'{current[:12]}' if current else 'none'} (--expect)"
        )
    return {**event, "prev": current}


def plan_rollback(digests: Sequence[str], *, where: str) -> str:
    """Return the digest an alias pointed to before its current one.

    Args:
        digests: The digests of the alias's events, oldest first. An event that returns to the previous version is a
            rollback and cancels the event before it, so a second rollback goes one version further back.
        where: The alias, for the message.

    Raises:
        NotFoundError: The alias does not exist.
        RegistryError: The alias has no earlier version.
    """
    if not digests:
        raise NotFoundError(
            f"{where}: no such alias. `ropeway registry list {where.partition('@')[0]}` shows the aliases"
        )
    trail: list[str] = []
    for digest in digests:
        if len(trail) > 1 and trail[-2] == digest:
            trail.pop()
        elif trail[-1:] != [digest]:
            trail.append(digest)
    if not trail[1:]:
        raise RegistryError(f"{where}: no earlier version to roll back to. Promote a version by its number")
    return trail[-2]


def name_author(event: Event) -> str:
    """Return who caused an event; a name that nobody authenticated is said to be claimed, as in all older events.

    >>> name_author({"by": "maria"}), name_author({"by": "maria", "identity": "authenticated"})
    ('maria (claimed)', 'maria')
    """
    return str(event["by"]) if event.get("identity") == "authenticated" else f"{event['by']} (claimed)"


def check_text(what: str, text: str) -> None:
    """Raise ConfigError unless a name or reason is printable: it is stored permanently and shown in terminals."""
    if not text.strip() or len(text) > _MAX_TEXT_CHARACTERS or not text.replace("\n", " ").isprintable():
        raise ConfigError(
            f"registry: {what} is {text[:60]!r}, expected 1 to {_MAX_TEXT_CHARACTERS:,} printable characters"
        )
