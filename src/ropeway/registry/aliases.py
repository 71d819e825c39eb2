"""Aliases: movable pointers, each a log whose last event says where it points."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ropeway.registry.layout import Log, alias_log, aliases_folder, check_alias
from ropeway.registry.log import Event, Events, read_events
from ropeway.runtime.errors import RegistryError
from ropeway.storage import Store

_MAX_TEXT_CHARACTERS = 2000


class AnyDigest(Enum):
    """The type of `ANY`, so that no digest and no None can be mistaken for it."""

    ANY = "any"


ANY: Final = AnyDigest.ANY
"""As `expect`: wherever the alias points now."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """Where an alias points after a promotion.

    Attributes:
        prev: What it pointed to before that event; None for its first.
        number: The event's number in the alias's log.
        moved: Whether this call wrote the event; False when the alias was there already.
    """

    name: str
    alias: str
    digest: str
    prev: str | None
    number: int
    moved: bool


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable pointer to a version of an artifact, read each time it is asked; `Version.promote` moves it."""

    store: Store
    artifact: str
    name: str

    def __post_init__(self) -> None:
        """Raise RegistryError unless `name` can be an alias."""
        check_alias(self.name)

    def __str__(self) -> str:
        """Return e.g. `laptop@production`."""
        return f"{self.artifact}@{self.name}"

    @property
    def log(self) -> Log:
        """Where its events are."""
        return alias_log(self.artifact, self.name)

    @property
    def events(self) -> Events:
        """Where it has pointed, oldest first: `{digest, prev, by, reason, review, at}`."""
        return read_events(self.store, self.log)

    @property
    def digest(self) -> str | None:
        """What it points to, or None while it does not exist. For `expect`."""
        events = self.events
        return str(events[-1]["digest"]) if events else None


def list_aliases(store: Store, artifact: str) -> dict[str, str]:
    """Return every alias of an artifact and the digest it points to."""
    names = store.list_folders(aliases_folder(artifact))
    return {name: digest for name in names if (digest := Alias(store, artifact, name).digest)}


def plan_promotion(events: Sequence[Event], event: Event, expect: str | AnyDigest | None, *, where: str) -> Event | int:
    """Return the next event of an alias, or the number of its last one if nothing has to move.

    Nothing moves when the alias points there already and the caller did not expect otherwise, or when the last event is
    this same act: whoever repeats a promotion whose answer got lost is told that it succeeded.

    Raises:
        RegistryError: The alias is not where `expect` says.
    """
    last = events[-1] if events else None
    current = last["digest"] if last else None
    if last and current == event["digest"]:
        same_act = all(last[key] == event[key] for key in ("by", "reason", "review")) and last["prev"] == expect
        if expect is ANY or expect == current or same_act:
            return len(events)
    if expect is not ANY and expect != current:
        raise RegistryError(
            f"{where} points to {current or 'nothing yet'}, expected {expect or 'nothing yet'}; it was not moved. "
            "Look at what is there now, then promote with that as expected"
        )
    return {**event, "prev": current}


def plan_rollback(digests: Sequence[str], *, where: str) -> str:
    """Return the digest an alias pointed to before its current one.

    Args:
        digests: Of the alias's events, oldest first. A second rollback goes one further back and not forward again to
            the version that was just left: an event that returns to the version before undoes the one between.
        where: The alias, for the message.

    Raises:
        RegistryError: It has pointed to nothing else.
    """
    trail: list[str] = []
    for digest in digests:
        if len(trail) > 1 and trail[-2] == digest:
            trail.pop()
        elif trail[-1:] != [digest]:
            trail.append(digest)
    if not trail[1:]:
        raise RegistryError(f"{where}: no version before the current one to go back to. Promote one by its number")
    return trail[-2]


def check_text(what: str, words: str) -> None:
    """Raise RegistryError unless a name or reason, kept for ever and shown in terminals, is text that steers none."""
    if not words.strip() or len(words) > _MAX_TEXT_CHARACTERS or not words.replace("\n", " ").isprintable():
        raise RegistryError(
            f"registry: {what} is {words[:60]!r}, expected 1 to {_MAX_TEXT_CHARACTERS:,} printable characters"
        )
