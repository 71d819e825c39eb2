"""What people answered when they were asked about a version, and what keeps a version out of production.

A review is a fact of its own: a rejection moves no alias, and an approval may find production moved meanwhile.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from ropeway.registry.layout import clean_key, reviews_log, versions_log
from ropeway.registry.log import Event, Events, append_event, read_events
from ropeway.runtime.errors import DataError, RegistryError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import Store

PRODUCTION = "production"
Decision = Literal["approve", "reject"]


def record_review(
    store: Store, name: str, digest: str, decision: Decision, *, answer: Mapping[str, Any]
) -> dict[str, Any]:
    """Keep a reviewer's answer for ever; return it as it is kept. The same answer twice is kept once.

    Args:
        store: Where.
        name: The model.
        digest: The version that was reviewed.
        decision: What was decided.
        answer: `by`, `comment`, `production` (what it was when the report was made), `via` (which run or command).
    """
    review = {"digest": digest, "decision": decision, **answer}
    event = {**review, "at": datetime.now(UTC).isoformat(timespec="seconds")}

    def plan(events: Events) -> Event | int:
        about = [number for number, known in enumerate(events.digests, 1) if known == digest]
        same = (number for number in about if {**events[number - 1], "at": None} == {**review, "at": None})
        return next(same, None) or event

    return dict(append_event(store, reviews_log(name), plan).event)


def list_reviews(store: Store, name: str, digest: str) -> list[Event]:
    """Return the answers about one version, oldest first."""
    events = read_events(store, reviews_log(name))
    return [events[index] for index, known in enumerate(events.digests) if known == digest]


def vouch_clean(store: Store, name: str, digest: str, *, git: str) -> None:
    """Note that a version published from a dirty tree was made again, byte for byte, by a commit."""
    note = {"git": git, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    store.put_if_absent(clean_key(name, digest), canonical_json(note))


def clean_commit(store: Store, name: str, digest: str) -> str | None:
    """Return the commit that made a version again, byte for byte, after it was published from a dirty tree.

    Raises:
        DataError: The note that says so is damaged.
    """
    key = clean_key(name, digest)
    if not store.exists(key):
        return None
    try:
        return str(json.loads(store.get(key))["git"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store.url}: {key} is not a note on a clean revision ({error})") from None


def find_dirt(store: Store, name: str, digest: str) -> str | None:
    """Return why no commit makes this version, or None when one does or nothing is known of git."""
    events = read_events(store, versions_log(name))
    facts: Mapping[str, Any] = events[events.digests.index(digest)]["provenance"] if digest in events.digests else {}
    known = "git" in facts or "dirty" in facts
    if not known or (facts.get("git") and not facts.get("dirty")) or store.exists(clean_key(name, digest)):
        return None
    files = [str(name) for name in facts.get("dirty_files", ())]
    shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")  # noqa: PLR2004
    return f"uncommitted changes ({shown or 'which, is not recorded'})" if facts.get("dirty") else "no git commit"


def check_clean(store: Store, name: str, digest: str) -> None:
    """Raise RegistryError when a version comes from a dirty tree: it never reaches production."""
    if dirt := find_dirt(store, name, digest):
        raise RegistryError(
            f"{name} {digest[:12]}… was made with {dirt}; what nobody can make again does not reach '{PRODUCTION}'. "
            "Commit what it was made with and run `ropeway run`: if the same package comes out, it may be promoted"
        )
