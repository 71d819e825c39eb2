"""Room: fetch. Sources to parquet, pinned by an identity, every record counted."""

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import Profile
from ropeway.data.raw_records import RawWriter, Record, RecordKind
from ropeway.runtime.errors import DataError, full_disk_explained
from ropeway.runtime.manifest import whole_folder, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.sources import Refused, Seen, bounded_name, download_folder, kind_of, open_source

_SHOWN_REFUSALS = 20
_SHOWN_FILES = 10


def run(workspace: Workspace, profile: Profile) -> None:
    """Leave `raw/`: one folder of parquet parts per source, and a manifest of what was read, kept and refused.

    Raises:
        ConfigError: A source's kind or files are not there.
        DataError: A file is broken, or more than `max_refused_fraction` of a source's records were refused.
        TemporaryError: The disk is full.
    """
    identities = FrozenInputs.load(workspace.root).value("sources")
    sources: dict[str, Any] = {}
    rows: dict[str, int] = {}
    with full_disk_explained(workspace.raw), whole_folder(workspace.raw) as folder:
        for name, source in profile.sources.items():
            identity = identities[name]
            seen = Seen()
            records = open_source(source, workspace, identity, seen)
            facts, parts = _write(name, records, kind_of(source), folder / name, profile.max_refused_fraction)
            more = {"files": dict(seen.files), "ignored_keys": dict(sorted(seen.ignored.items()))}
            sources[name] = {**facts, **more, "identity": identity}
            rows |= {f"{name}/{part}": count for part, count in parts.items()}
            print("\n".join(describe(name, sources[name])))
        write_manifest(folder, {"sources": sources}, rows=rows)
    shutil.rmtree(download_folder(workspace), ignore_errors=True)


def describe(name: str, facts: Mapping[str, Any]) -> list[str]:
    """Return what was read of a source, kept and refused, for the log.

    >>> describe("talks", {"kind": "conversation", "read": 9, "kept": 9, "refused": {}, "ignored_keys": {"meta": 4}})
    ['talks: 9 records read, 9 conversations kept, 0 refused', 'talks: ignored keys: meta in 4 records']
    """
    refused = facts["refused"]
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in sorted(refused.items(), key=lambda pair: -pair[1]))
    total = f"{sum(refused.values()):,} refused" + (f" ({reasons})" if reasons else "")
    lines = [f"{name}: {facts['read']:,} records read, {facts['kept']:,} {facts['kind']}s kept, {total}"]
    files = facts.get("files", {})
    lines += [f"{name}: {file}: {count:,} records" for file, count in list(files.items())[:_SHOWN_FILES]]
    if len(files) > _SHOWN_FILES:
        lines.append(f"{name}: {len(files) - _SHOWN_FILES:,} more files; ledger.json lists them")
    if ignored := facts["ignored_keys"]:
        lines.append(
            f"{name}: ignored keys: {', '.join(f'{key} in {count:,} records' for key, count in ignored.items())}"
        )
    return lines


def _write(
    name: str, records: Iterable[Record | Refused], kind: RecordKind, folder: Path, limit: float
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write one source's records; return its facts and the rows of each part."""
    reasons: Counter[str] = Counter()
    shown: list[dict[str, str]] = []
    with RawWriter(folder, kind) as writer:
        for record in records:
            if isinstance(record, Refused):
                reasons[bounded_name(reasons, record.reason)] += 1
                shown += [{"where": record.where, "reason": record.reason}] * (len(shown) < _SHOWN_REFUSALS)
            else:
                writer.add(record)
    read = writer.records + reasons.total()
    if reasons.total() > limit * read:
        raise DataError(
            f"source {name}: {reasons.total():,} of {read:,} records refused ({dict(sorted(reasons.items()))}), more "
            f"than max_refused_fraction {limit:g} allows; the first: {shown[0]['where']}: {shown[0]['reason']}"
        )
    facts = {
        "kind": kind,
        "read": read,
        "kept": writer.records,
        "refused": dict(sorted(reasons.items())),
        "first_refused": shown,
    }
    return facts, writer.parts
