"""Stage fetch: write the records of each source, pinned by its identity, as parquet, and count every record."""

import shutil
from collections import Counter
from typing import NotRequired

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import FetchParams
from ropeway.config.sections import Source
from ropeway.data.raw_records import RawSource, RawWriter
from ropeway.data.record_identity import record_digest
from ropeway.runtime.errors import DataError, full_disk_explained
from ropeway.runtime.manifest import whole_folder, write_manifest
from ropeway.runtime.progress import StageProgress
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.sources import (
    RefusedRecord,
    SourceCounts,
    download_folder,
    limit_names,
    open_source,
    record_kind,
)

_SHOWN_REFUSALS = 20
_SHOWN_FILES = 10


class FetchedFacts(RawSource):
    """A source's entry in raw/manifest.json, as fetch writes it."""

    first_refused: list[dict[str, str]]  # the first refused records: where, and why
    first_skipped: NotRequired[list[dict[str, str]]]  # the first skipped members of archives: where, and why
    identity: dict[str, object]  # which version of the source was read


def run(workspace: Workspace, profile: FetchParams) -> None:
    """Write `raw/`: one folder of parquet parts per source, and a manifest that counts records read, kept and refused.

    Raises:
        ConfigError: A source's files do not exist.
        DataError: A file is broken, or more than `max_refused_fraction` of a source's records were refused.
        TemporaryError: The disk is full.
    """
    identities = FrozenInputs.load(workspace.root).value("sources")
    sources: dict[str, FetchedFacts] = {}
    rows: dict[str, int] = {}
    with full_disk_explained(workspace.raw), whole_folder(workspace.raw) as folder:
        for name, source in profile.sources.items():
            with RawWriter(folder / name, record_kind(source)) as writer:
                facts = _write(source, workspace, identities[name], writer, frozenset(profile.forget))
            _check_refused(name, facts, profile.max_refused_fraction)
            sources[name] = facts
            rows |= {f"{name}/{part}": count for part, count in writer.parts.items()}
            print("\n".join(describe(name, facts)))
        write_manifest(folder, {"sources": sources}, rows=rows)
    shutil.rmtree(download_folder(workspace), ignore_errors=True)


def _check_refused(name: str, facts: FetchedFacts, limit: float) -> None:
    refused = sum(facts["refused"].values())
    if refused > limit * facts["read"]:
        first = {entry["reason"]: entry["where"] for entry in reversed(facts["first_refused"])}
        reasons = [
            f"  {reason}: {count:,} record{'s' if count != 1 else ''}"
            + (f", first {first[reason]}" if reason in first else "")
            for reason, count in facts["refused"].items()
        ]
        unused = any(reason.startswith("unused field") for reason in facts["refused"])
        raise DataError(
            f"source {name}: {refused:,} of {facts['read']:,} records refused, more than max_refused_fraction "
            f"{limit:g} allows. Correct the records, `rows` or `columns`"
            f"{', list unused fields in `ignored_keys`' if unused else ''}, or raise max_refused_fraction:\n"
            + "\n".join(reasons)
        )


def describe(name: str, facts: FetchedFacts) -> list[str]:
    """Return the log lines of one source: records read, kept and refused.

    >>> describe("talks", {"kind": "conversation", "read": 9, "kept": 9, "refused": {}, "ignored_keys": {"meta": 4}})
    ['talks: 9 records read, 9 conversations kept, 0 refused', 'talks: ignored keys: meta in 4 records']
    """
    refused = facts["refused"]
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in sorted(refused.items(), key=lambda pair: -pair[1]))
    total = f"{sum(refused.values()):,} refused" + (f" ({reasons})" if reasons else "")
    forgotten = sum(facts.get("forgotten", {}).values())
    dropped = f", {forgotten:,} forgotten (forget)" if forgotten else ""
    lines = [f"{name}: {facts['read']:,} records read, {facts['kept']:,} {facts['kind']}s kept, {total}{dropped}"]
    files = facts.get("files", {})
    lines += [f"{name}: {file}: {count:,} records" for file, count in list(files.items())[:_SHOWN_FILES]]
    if len(files) > _SHOWN_FILES:
        lines.append(f"{name}: {len(files) - _SHOWN_FILES:,} more files; ledger.json lists them")
    if ignored := facts.get("ignored_keys"):
        lines.append(
            f"{name}: ignored keys: {', '.join(f'{key} in {count:,} records' for key, count in ignored.items())}"
        )
    return lines + _describe_skipped(name, facts)


def _describe_skipped(name: str, facts: FetchedFacts) -> list[str]:
    count = sum(facts.get("skipped_members", {}).values())
    if not count:
        return []
    shown = [f"{one['where']} ({one['reason']})" for one in facts.get("first_skipped", [])[:_SHOWN_FILES]]
    more = f"; and {count - len(shown):,} more, in raw/manifest.json" if count > len(shown) else ""
    return [f"{name}: {count:,} members of archives skipped: {'; '.join(shown)}{more}"]


def _write(
    source: Source,
    workspace: Workspace,
    identity: dict[str, object],
    writer: RawWriter,
    forget: frozenset[str] = frozenset(),
) -> FetchedFacts:
    """Write one source's records, but none whose digest is in `forget`; return its manifest entry."""
    seen, reasons, forgotten = SourceCounts(), Counter[str](), Counter[str]()
    shown: list[dict[str, str]] = []
    expected = source.expected_rows if record_kind(source) == "conversation" else None  # of documents it counts chunks
    with StageProgress("records", expected) as progress:
        for record in open_source(source, workspace, identity, seen):
            if isinstance(record, RefusedRecord):
                reasons[limit_names(reasons, record.reason)] += 1
                shown += [{"where": record.where, "reason": record.reason}] * (len(shown) < _SHOWN_REFUSALS)
            elif forget and (digest := record_digest(record).hex()) in forget:
                forgotten[digest] += 1
            else:
                writer.add(record)
            progress.advance()
    facts: FetchedFacts = {
        "kind": record_kind(source),
        "read": writer.records + reasons.total() + forgotten.total(),
        "kept": writer.records,
        "refused": dict(sorted(reasons.items())),
        "first_refused": shown,
        "files": dict(seen.files),
        "ignored_keys": dict(sorted(seen.ignored.items())),
        "identity": identity,
    }
    if forgotten:
        facts["forgotten"] = dict(sorted(forgotten.items()))
    if seen.skipped:
        facts["skipped_members"] = dict(sorted(seen.skipped.items()))
        facts["first_skipped"] = [{"where": one.where, "reason": one.reason} for one in seen.first_skipped]
    return facts
