"""Aliases: movable pointers, each a log whose last event is where it points; and what a reference means."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final

from ropeway.registry.blobs import blob_fault
from ropeway.registry.core import load_core
from ropeway.registry.layout import (
    Reference,
    alias_log,
    aliases_folder,
    check_alias,
    check_registry,
    read_reference,
    versions_log,
)
from ropeway.registry.log import Event, Events, append_event, read_event, read_events
from ropeway.registry.publishing import find_number, is_withdrawn
from ropeway.registry.reviews import PRODUCTION, check_clean
from ropeway.registry.signing import check_policy
from ropeway.runtime.errors import AbsentError, RegistryError
from ropeway.storage import Store

_MAX_WORDS = 2000


class Anything(Enum):
    """The type of `ANY`, so that no digest and no None can be mistaken for it."""

    ANY = "any"


ANY: Final = Anything.ANY
"""As `expect`: wherever the alias points now."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """Where an alias points after a promotion.

    Attributes:
        name: The model.
        alias: The pointer.
        digest: What it points to.
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


def promote(  # noqa: PLR0913 - one event's fields
    store: Store,
    name: str,
    alias: str,
    digest: str,
    *,
    expect: str | Anything | None,
    by: str,
    reason: str,
    review: Mapping[str, Any] | None = None,
) -> Promotion:
    """Point an alias at a published version; of racing promoters that expect the same, one wins.

    Args:
        store: Where.
        name: The model.
        alias: E.g. `candidate` or `production`.
        digest: The version, by its whole digest.
        expect: The digest the alias must point to now, None if it must not exist yet, or `ANY`.
        by: Who did it.
        reason: Why, in words.
        review: A reviewer's answers, kept with the event.

    Raises:
        RegistryError: The version is not published, withdrawn or not whole, one from a dirty tree is to become
            `production`, or the alias is not where `expect` says; the message names where it is.
    """
    check_alias(alias)
    check_words("by", by)
    check_words("reason", reason)
    _check_promotable(store, name, digest)
    if alias == PRODUCTION:
        check_clean(store, name, digest)
    event = {
        "digest": digest,
        "by": by,
        "reason": reason,
        "review": None if review is None else dict(review),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }

    def plan(events: Events) -> Event | int:
        if is_withdrawn(store, name, digest):
            raise RegistryError(f"{name} {digest[:12]}… is withdrawn; '{alias}' was not moved. Choose another version")
        return plan_promotion(events, event, expect, where=f"{name}@{alias}")

    done = append_event(store, alias_log(name, alias), plan)
    return Promotion(name, alias, digest, done.event["prev"], done.number, moved=done.created)


def plan_promotion(
    events: Sequence[Event], event: Mapping[str, Any], expect: str | Anything | None, *, where: str
) -> Event | int:
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


def rollback(store: Store, name: str, alias: str, *, by: str, reason: str, expect: str | Anything = ANY) -> Promotion:
    """Point an alias back at what it pointed to before its current version; a promotion like any other.

    Raises:
        RegistryError: There is nothing to go back to, that version is withdrawn, or the alias moved meanwhile.
    """
    check_alias(alias)
    check_registry(store)
    events = read_events(store, alias_log(name, alias))
    target = plan_rollback(events.digests, where=f"{name}@{alias}")
    current = events[-1]["digest"]
    if expect not in (ANY, current):
        raise RegistryError(f"{name}@{alias} points to {current}, expected {expect}; it was not moved")
    return promote(store, name, alias, target, expect=current, by=by, reason=reason)


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
    if len(trail) < 2:  # noqa: PLR2004 - a place to go back from and one to go back to
        raise RegistryError(f"{where}: no version before the current one to go back to. Promote one by its number")
    return trail[-2]


def read_alias(store: Store, name: str, alias: str) -> str | None:
    """Return the digest an alias points to, or None while it does not exist. For `expect`."""
    check_alias(alias)
    events = read_events(store, alias_log(name, alias))
    return str(events[-1]["digest"]) if events else None


def list_aliases(store: Store, name: str) -> dict[str, str]:
    """Return every alias of a model and the digest it points to."""
    pointers = {alias: read_alias(store, name, alias) for alias in store.list_folders(aliases_folder(name))}
    return {alias: digest for alias, digest in pointers.items() if digest}


def alias_history(store: Store, name: str, alias: str) -> list[Event]:
    """Return an alias's events, oldest first: `{digest, prev, by, reason, review, at}`."""
    check_alias(alias)
    return list(read_events(store, alias_log(name, alias)))


def resolve(store: Store, reference: str) -> str:
    """Return the digest that `laptop@candidate`, `laptop@v3`, `laptop@3` or `laptop@<digest prefix>` means now.

    Raises:
        RegistryError: Nothing or more than one version is meant.
    """
    wanted = read_reference(reference)
    check_registry(store)
    found = _find(store, wanted)
    if not found:
        raise RegistryError(f"{reference}: {store.url} holds no such version. {_what_there_is(store, wanted.name)}")
    if len(found) > 1:
        raise RegistryError(f"{reference}: {len(found)} versions begin so; give more digits")
    return found[0]


def _find(store: Store, wanted: Reference) -> list[str]:
    if wanted.alias:
        digest = read_alias(store, wanted.name, wanted.alias)
        return [digest] if digest else []
    log = versions_log(wanted.name)
    if wanted.prefix:
        return [digest for digest in read_events(store, log).digests if digest.startswith(wanted.prefix)]
    with suppress(AbsentError):
        return [str(read_event(store, log, wanted.number or 0)["digest"])]
    return []


def _what_there_is(store: Store, name: str) -> str:
    count = len(read_events(store, versions_log(name)))
    if not count:
        return f"Nothing named {name} was published there"
    aliases = ", ".join(list_aliases(store, name)) or "no alias"
    return f"{name} has v1 to v{count} and {aliases}"


def _check_promotable(store: Store, name: str, digest: str) -> None:
    """Raise RegistryError unless a version is published and every file of it is there, by size."""
    core = load_core(store, name, digest)
    check_policy(store, core)
    if find_number(store, name, digest) is None:
        raise RegistryError(f"{name} {digest[:12]}… was never published to its end. Publish it again, then promote it")
    if faults := [fault for file in core.files if (fault := blob_fault(store, file, rehash=False))]:
        raise RegistryError(f"{name} {digest[:12]}… is not whole in {store.url}: {faults[0]}. Publish it again")


def check_words(what: str, words: str) -> None:
    """Raise RegistryError unless a name or reason, kept for ever and shown in terminals, is text that steers none."""
    if not words.strip() or len(words) > _MAX_WORDS or not words.replace("\n", " ").isprintable():
        raise RegistryError(f"registry: {what} is {words[:60]!r}, expected 1 to {_MAX_WORDS:,} printable characters")
