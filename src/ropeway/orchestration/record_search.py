"""Which versions have a record: looks digests up in the index of records of each version, in the registry alone.

A record is looked up in every form that it may have had: in the layouts of the sources of these versions (run.json),
and in every layout with its own names of columns.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ropeway.config.sections import RECORD_DIGEST
from ropeway.data.record_identity import DIGEST_BYTES, record_digest
from ropeway.data.record_index import KEY_BYTES, ROLES, RecordIndex, RecordOutcome
from ropeway.registry import Registry, Version
from ropeway.registry.record_indexes import open_record_index
from ropeway.runtime.errors import ConfigError, DataError, NotFoundError
from ropeway.runtime.manifest import Json, json_mapping
from ropeway.stages.fetch.decompress import InputFile
from ropeway.stages.fetch.files import iterate_objects, parse
from ropeway.stages.fetch.formats import DOCUMENTS, find_format, is_archive
from ropeway.stages.fetch.records import ROW_KINDS, to_record
from ropeway.stages.fetch.values import UnreadableError

_DIGEST = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES},{2 * DIGEST_BYTES}}}")
_NO_TEXT = bytes(DIGEST_BYTES)
_THREADS = 8  # each version takes a few requests
_MAX_DIGEST_FILE = 64 << 20  # bytes


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """How the objects of a source are read; the fields are those of the source in params.yaml."""

    rows: str
    columns: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SoughtRecord:
    """A record to look up.

    Attributes:
        where: File and line, or what the caller gave.
        digests: Of each form that it may have had; of a digest that was given at least the first `KEY_BYTES` bytes.
    """

    where: str
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SoughtRecords:
    """The records to look up, and why others cannot be: reason -> records."""

    records: tuple[SoughtRecord, ...]
    unreadable: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionRecords:
    """What a version has of the records.

    Attributes:
        entries: Number of records in its index.
        outcomes: What became of each record that was looked up; None: it is not in the index.
        unknown: Why its records are not known; empty if they are.
    """

    version: str
    digest: str
    aliases: tuple[str, ...]
    is_withdrawn: bool
    entries: int = 0
    outcomes: tuple[RecordOutcome | None, ...] = ()
    unknown: str = ""

    def count(self, role: str) -> int:
        """Return the number of records with this role."""
        return sum(one is not None and one.role == role for one in self.outcomes)

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> records that were dropped."""
        return dict(Counter(one.reason for one in self.outcomes if one and one.role == "dropped"))

    @property
    def holds_any(self) -> bool:
        """Whether it was trained or validated on any of the records."""
        return any(one is not None and one.role != "dropped" for one in self.outcomes)


@dataclass(frozen=True, slots=True)
class RecordAnswer:
    """The answer about all versions, oldest first by model."""

    sought: SoughtRecords
    versions: tuple[VersionRecords, ...]

    @property
    def false_match_probability(self) -> float:
        """The probability that any of the matches is of another text with the same first `KEY_BYTES` bytes."""
        asked = sum(len(one.digests) for one in self.sought.records)
        return float(asked * sum(one.entries for one in self.versions) / 2 ** (8 * KEY_BYTES))

    def to_json(self) -> Json:
        """Return the answer for programs."""
        return {
            "records": [
                {
                    "where": one.where,
                    "digests": [digest.hex() for digest in one.digests],
                    "found": [
                        {"version": version.version, **asdict(outcome)}
                        for version in self.versions
                        if version.outcomes and (outcome := version.outcomes[number])
                    ],
                }
                for number, one in enumerate(self.sought.records)
            ],
            "unreadable": dict(self.sought.unreadable),
            "versions": [_version_json(one) for one in self.versions],
            "false_match_probability": self.false_match_probability,
        }


def _version_json(found: VersionRecords) -> Json:
    known = {
        "trained": found.count("trained"),
        "validation": found.count("validation"),
        "dropped": found.dropped,
        "absent": found.outcomes.count(None),
        "indexed": found.entries,
    }
    return {
        "version": found.version,
        "digest": found.digest,
        "aliases": list(found.aliases),
        "withdrawn": found.is_withdrawn,
        **({"unknown": found.unknown} if found.unknown else known),
    }


def search_records(registry: Registry, given: str, *, name: str | None = None) -> RecordAnswer:
    """Return which versions of one or all models have the records that `given` names; see `read_sought`.

    Raises:
        ConfigError: `given` is no record, digest or file.
        NotFoundError: The model has no version.
    """
    versions = list(_iterate_versions(registry, name))
    with ThreadPoolExecutor(_THREADS) as pool:
        runs = list(pool.map(lambda one: json_mapping(one[0].read_file("run.json") or b"{}"), versions))
        sought = read_sought(given, [layout for run in runs for layout in read_layouts(run)])
        found = pool.map(lambda one: _look_up(one[0], one[1], sought.records), versions)
        return RecordAnswer(sought, tuple(found))


def find_holders(
    registry: Registry, digests: Iterable[bytes], *, name: str | None = None
) -> tuple[VersionRecords, ...]:
    """Return what each version of one or all models has of these records."""
    records = tuple(SoughtRecord(digest.hex(), (digest,)) for digest in digests)
    versions = list(_iterate_versions(registry, name)) if name is None or registry.artifact(name).latest(1) else []
    with ThreadPoolExecutor(_THREADS) as pool:
        return tuple(pool.map(lambda one: _look_up(one[0], one[1], records), versions))


def _iterate_versions(registry: Registry, name: str | None) -> Iterator[tuple[Version, Json]]:
    """Yield each version with its facts: number, digest, aliases, withdrawn."""
    artifacts = [registry.artifact(name)] if name else registry.artifacts()
    if artifacts:
        registry.check()
    for artifact in artifacts:
        facts = artifact.describe_versions().events
        if name and not facts:
            raise NotFoundError(f"{registry.url}: no version of {name} was published there. `ropeway registry list`")
        yield from zip(artifact.versions(), facts, strict=False)


def _look_up(version: Version, facts: Json, records: Sequence[SoughtRecord]) -> VersionRecords:
    found = VersionRecords(
        version=str(version),
        digest=version.digest,
        aliases=tuple(facts["aliases"]),
        is_withdrawn=bool(facts["withdrawn"]),
    )
    try:
        index = open_record_index(version)
        outcomes = _find_outcomes(index, records)
    except (NotFoundError, DataError) as error:
        return replace(found, unknown=str(error))
    return replace(found, entries=index.count, outcomes=outcomes)


def _find_outcomes(index: RecordIndex, records: Sequence[SoughtRecord]) -> tuple[RecordOutcome | None, ...]:
    """Return the outcome of each record: of its forms the one that training comes first of."""
    flat = index.find([digest for one in records for digest in one.digests])
    outcomes, at = [], 0
    for one in records:
        forms = [form for form in flat[at : at + len(one.digests)] if form]
        at += len(one.digests)
        outcomes.append(min(forms, key=lambda form: ROLES.index(form.role), default=None))
    return tuple(outcomes)


def read_layouts(run: Json) -> list[RecordLayout]:
    """Return the layouts of the sources in a version's run.json."""
    params = run.get("params")
    sources = params.get("sources") if isinstance(params, dict) else None
    return [
        RecordLayout(
            str(one["rows"]),
            tuple(sorted((str(own), str(column)) for own, column in (one.get("columns") or {}).items())),
            tuple(sorted(map(str, one.get("ignored_keys") or ()))),
        )
        for one in (sources.values() if isinstance(sources, dict) else ())
        if isinstance(one, dict) and one.get("rows") in ROW_KINDS
    ]


def read_sought(given: str, layouts: Iterable[RecordLayout] = (), *, prefer: bool = False) -> SoughtRecords:
    """Return the records that a digest, a JSON record or a file names.

    A file has records in a form that sources read, or one digest per line. A JSON string is a document.

    Args:
        given: The digest, the JSON, or the path.
        layouts: How records may be read, besides every layout with its usual names.
        prefer: Use the usual names only for a record that none of `layouts` reads.

    Raises:
        ConfigError: It is neither of these, or no digest of its records can be computed.
    """
    usual = [RecordLayout(rows) for rows in ROW_KINDS]
    known = [[*dict.fromkeys(layouts)], usual] if prefer else [[*dict.fromkeys([*layouts, *usual])]]
    if _DIGEST.fullmatch(given):
        return SoughtRecords((SoughtRecord(given, (_read_digest(given),)),))
    if given.lstrip()[:1] in ("{", "[", '"'):
        items: Iterable[tuple[str, object]] = [("the record", parse(given.encode(errors="surrogateescape")))]
    elif _is_file(given):
        items = _read_file(Path(given))
    else:
        raise ConfigError(
            f"{given[:200]}: expected a record as JSON, the digest of a record ({2 * KEY_BYTES} to "
            f"{2 * DIGEST_BYTES} hex digits), or a file of records or digests; there is no such file"
        )
    records, unreadable = list[SoughtRecord](), Counter[str]()
    for where, value in items:
        digests: tuple[bytes, ...] = ()
        reason = ""
        for some in known:
            digests, reason = (digests, reason) if digests else _digest_forms(value, some)
        if digests:
            records.append(SoughtRecord(where, digests))
        else:
            unreadable[reason] += 1
    if not records:
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in unreadable.most_common(3))
        raise ConfigError(f"{given[:200]}: no record can be read ({reasons}); docs/sources.md has the forms")
    return SoughtRecords(tuple(records), dict(unreadable))


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a pasted text is longer than any name
        return False


def _read_file(path: Path) -> Iterable[tuple[str, object]]:
    if is_archive(path.name):
        raise ConfigError(f"{path}: an archive; extract it and name a file of records")
    if find_format(path.name) in DOCUMENTS and (digests := read_digests(path)):
        return [(f"{path}:{number}", digest) for number, digest in digests]
    return iterate_objects(InputFile.of(path), ["text"] if find_format(path.name) in DOCUMENTS else [])


def read_digests(path: Path) -> list[tuple[int, str]]:
    """Return (line, digest) of a file with one digest per line, `#` before comments; empty if it has anything else."""
    if path.stat().st_size > _MAX_DIGEST_FILE:
        return []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    found = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, start=1)]
    stated = [(number, words) for number, words in found if words]
    return stated if all(_DIGEST.fullmatch(words) for _, words in stated) else []


def _digest_forms(value: object, layouts: Sequence[RecordLayout]) -> tuple[tuple[bytes, ...], str]:
    """Return the distinct digests of an object in each layout that reads it, and else why none does."""
    if isinstance(value, UnreadableError):
        return (), str(value)
    if isinstance(value, str):
        if _DIGEST.fullmatch(value):
            return (_read_digest(value),), ""
        value = {"text": value}
    if isinstance(value, list):
        value = {"messages": value}
    found: dict[bytes, None] = {}
    reason = ""
    for layout in layouts:
        try:
            digest = record_digest(to_record(value, layout.rows, dict(layout.columns), layout.ignored))
        except UnreadableError as error:
            reason = reason or str(error)
            continue
        if digest != _NO_TEXT:
            found[digest] = None
    return tuple(found), "no text" if not reason else f"no layout reads it, e.g. {reason}"


def _read_digest(text: str) -> bytes:
    return bytes.fromhex(text[: len(text) & ~1])


def full_digests(sought: SoughtRecords) -> list[str]:
    """Return every digest of the records in hex, for `forget` of params.yaml.

    Raises:
        ConfigError: A digest is shortened.
    """
    found = list(dict.fromkeys(digest.hex() for one in sought.records for digest in one.digests))
    if short := [digest for digest in found if not re.match(RECORD_DIGEST, digest)]:
        raise ConfigError(
            f"{short[0]}: a shortened digest, expected {2 * DIGEST_BYTES} hex digits; `ropeway contains RECORD --json` "
            "prints them"
        )
    return found
