"""The output of `ropeway contains` and `ropeway forget`."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType

from ropeway.data.record_index import RecordOutcome
from ropeway.orchestration.record_search import RecordAnswer, VersionRecords
from ropeway.runtime.manifest import Json
from ropeway.runtime.terminal import AlignedTable, Command, Paragraph, format_count

_WORTH_SAYING = 1e-9  # probability of a false match
_WORDS = {"trained": "trained on it", "validation": "only validated on it", "dropped": "dropped"}


def describe_answer(answer: RecordAnswer) -> list[RenderableType]:
    """Return the parts to show: a table of the versions whose records are known, and what is not known."""
    sought = answer.sought
    known = [one for one in answer.versions if not one.unknown]
    parts: list[RenderableType] = []
    if len(sought.records) == 1:
        digests = " or ".join(digest.hex() for digest in sought.records[0].digests)
        rows = [(*_name(one), *_describe_outcome(one.outcomes[0])) for one in known]
        parts.append(AlignedTable(("version", "aliases", "record", "source", "why"), rows, title=f"record {digests}"))
    else:
        heads = ("version", "aliases", "trained", "validation", "dropped", "absent", "why dropped")
        rows_of_many = [(*_name(one), *_count_outcomes(one)) for one in known]
        parts.append(AlignedTable(heads, rows_of_many, title=format_count(len(sought.records), "record")))
    parts += [Paragraph(line) for line in _list_notes(answer)]
    return parts


def _name(found: VersionRecords) -> tuple[str, str]:
    return found.version, ", ".join([*found.aliases, *(["withdrawn"] if found.is_withdrawn else [])])


def _describe_outcome(outcome: RecordOutcome | None) -> tuple[str, str, str]:
    return (_WORDS[outcome.role], outcome.source, outcome.reason) if outcome else ("absent", "", "")


def _count_outcomes(found: VersionRecords) -> Sequence[str]:
    dropped = found.dropped
    counts = (found.count("trained"), found.count("validation"), sum(dropped.values()), found.outcomes.count(None))
    return (*(f"{count:,}" for count in counts), "; ".join(f"{reason}: {count:,}" for reason, count in dropped.items()))


def _list_notes(answer: RecordAnswer) -> Iterator[str]:
    for reason, count in answer.sought.unreadable.items():
        yield f"not looked up: {format_count(count, 'record')}: {reason}"
    for one in answer.versions:
        if one.unknown:
            yield f"{one.version}: not known: {one.unknown}"
    if not answer.versions:
        yield "the registry has no versions"
    if answer.false_match_probability >= _WORTH_SAYING:
        yield (
            f"digests are shortened to 72 bits: with probability {answer.false_match_probability:.0e} at least one of "
            "these matches is another text"
        )


def describe_forgotten(
    profile: str,
    digests: Sequence[str],
    new: Sequence[str],
    unreadable: Mapping[str, int],
    holders: Sequence[VersionRecords],
    *,
    was_added: bool,
) -> list[RenderableType]:
    """Return the parts to show: what was added, the versions that hold the records, and how to withdraw them."""
    if was_added:
        known = len(digests) - len(new)
        parts: list[RenderableType] = [
            Paragraph(f"params.yaml, profile {profile}: {len(new):,} added to forget, {known:,} were there already")
        ]
    else:
        parts = [AlignedTable(("forget",), [(digest,) for digest in digests], title=f"profile {profile}")]
    parts += [
        Paragraph(f"not added: {format_count(count, 'record')}: {reason}") for reason, count in unreadable.items()
    ]
    found = [one for one in holders if one.holds_any and not one.is_withdrawn]
    if found:
        rows = [(*_name(one), f"{one.count('trained'):,}", f"{one.count('validation'):,}") for one in found]
        parts += [
            "",
            AlignedTable(("version", "aliases", "trained", "validation"), rows, title="versions that hold them"),
        ]
        parts += ["", Paragraph("No alias may point to a version that is withdrawn: promote another one first.")]
        parts += [Command(f"ropeway registry withdraw {one.version} --reason 'TEXT'") for one in found]
    else:
        gone = [one.version for one in holders if one.holds_any]
        nothing = "no version is known to hold them" if any(one.unknown for one in holders) else "no version holds them"
        parts.append(Paragraph(f"every version that holds them is withdrawn: {', '.join(gone)}" if gone else nothing))
    if dropped := [one.version for one in holders if one.dropped]:
        parts.append(Paragraph(f"dropped, so no step read them: {', '.join(dropped)}"))
    unknown = [one.version for one in holders if one.unknown]
    if unknown:
        parts.append(Paragraph(f"not known, since these versions have no index of records: {', '.join(unknown)}"))
    if was_added:
        parts.append(Paragraph("the next run reads none of them: `ropeway run`; its ledger says how many records left"))
    return parts


def forgotten_json(
    profile: str,
    digests: Sequence[str],
    new: Sequence[str],
    unreadable: Mapping[str, int],
    holders: Sequence[VersionRecords],
) -> Json:
    """Return the same for programs."""
    return {
        "profile": profile,
        "digests": list(digests),
        "added": list(new),
        "unreadable": dict(unreadable),
        "holders": [
            {
                "version": one.version,
                "digest": one.digest,
                "aliases": list(one.aliases),
                "withdrawn": one.is_withdrawn,
                "trained": one.count("trained"),
                "validation": one.count("validation"),
            }
            for one in holders
            if one.holds_any
        ],
        "unknown": [one.version for one in holders if one.unknown],
    }
