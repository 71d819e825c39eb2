"""Whether the gate's verdict in an event follows from files of the versions, which their digests and signatures cover.

Nothing signs an event: a writer of the store can state another verdict there.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ropeway.config.load_params import load_profile
from ropeway.orchestration.gate import GateVerdict, gate, sections_to_measure
from ropeway.orchestration.publish import CANDIDATE
from ropeway.registry import Registry, Version
from ropeway.registry.signing_keys import load_trusted
from ropeway.runtime.errors import RopewayError

_MOST_CHARACTERS = 300  # of an error


def check_verdict(registry: Registry, version: Version, production: str | None) -> str:
    """Return a warning if the recorded verdict does not follow from the files; empty if it does, or if there is none.

    So is a verdict against another version than `production` (its label; None if there is none): it says nothing about
    the version that an approval would replace, and which version it was is the event's statement alone.

    The gate is computed again from the eval.json of both versions and the limits in run.yaml, with the rules of this
    Ropeway. Where that is impossible, there is a warning under a signature policy alone.
    """
    verdict = version.record["provenance"].get("verdict")
    if not isinstance(verdict, Mapping):
        return ""
    recorded = "passed" if verdict.get("passed") is True else "not passed"
    try:
        again = _compute(registry, version, verdict.get("against"))
    except RopewayError as error:
        if load_trusted() is None:
            return ""
        words = re.sub(r"\s+", " ", str(error))[:_MOST_CHARACTERS]
        return f"The gate's verdict ({recorded}) is the event's statement, which no signature covers: {words}"
    if again.passed is (verdict.get("passed") is True):
        against = verdict.get("against")
        if production in (None, str(version), against):
            return ""
        return f"The gate compared this version with {against or 'no other'}, not with {production}, production now"
    why = f" ({again.failed[0]})" if again.failed else ""
    return (
        f"The gate's verdict does not follow from the version's files: its event says {recorded}; computed again from "
        f"eval.json and run.yaml, it is {'passed' if again.passed else 'not passed'}{why}. Another Ropeway computed "
        "it, or the event was changed: `ropeway registry verify` may tell"
    )


def _compute(registry: Registry, version: Version, against: object) -> GateVerdict:
    """Return the verdict that follows from the files; raise RopewayError, with the reason, if none does."""
    text = version.read_file("run.yaml")
    if text is None:
        raise RopewayError("the package has no run.yaml with the limits of the gate")
    if version.read_file("eval.json") is None:
        raise RopewayError("the package has no eval.json")
    _, profile = load_profile(Path("run.yaml"), text=text.decode(errors="replace"))
    champion = None
    if against is None and (earlier := _find_earlier_candidate(registry, version)):
        raise RopewayError(f"it names no version that it compared with, although {earlier} was candidate")
    if against is not None:
        rival = registry.version(str(against))
        rival.check_policy()
        champion = rival.metrics
        if again := sections_to_measure(version.metrics, champion, profile.gate):
            raise RopewayError(f"{against} was measured again on this version's rows or questions ({', '.join(again)})")
    return gate(
        version.metrics,
        champion,
        profile.gate,
        max_length=profile.max_length,
        champion_name=str(against or "no champion"),
    )


def _find_earlier_candidate(registry: Registry, version: Version) -> str | None:
    """Return an older version that was `candidate` once; None if there is none, so the gate had no champion."""
    artifact = registry.artifact(version.name)
    older = (artifact.version(digest) for digest in dict.fromkeys(artifact.alias(CANDIDATE).events.digests))
    return next((str(one) for one in older if one.number < version.number), None)
