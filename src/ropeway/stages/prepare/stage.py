"""Stage prepare: dedup, split and decontaminate the tokens, and write the ledger and the digests of the records.

It does not tokenize.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import PrepareParams
from ropeway.config.tokenize_params import values_shared_with_prepare
from ropeway.data.batches import EpochPlan
from ropeway.data.ledger import Findings, ForgetTotals, Ledger, PersonalTotals, RecordTotals, check_ledger
from ropeway.data.raw_records import RawSource, check_sources, load_raw_manifest
from ropeway.data.record_index import build_record_index
from ropeway.data.shards import Shards, SourceShards, open_shards, sequence_digest
from ropeway.data.tokenized import REMEDY, TokenizedSource, TokensManifest, open_tokenized, shard_path
from ropeway.runtime.errors import DataError, full_disk_explained
from ropeway.runtime.manifest import NAME, link_file, whole_folder, write_atomic, write_json, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.prepare.contamination import parse_prompts
from ropeway.stages.prepare.ledger_builder import build_ledger, plan_epochs
from ropeway.stages.prepare.record_outcomes import find_trained, group_records
from ropeway.stages.prepare.split import Split
from ropeway.stages.prepare.split_sources import SplitSource, split_sources

_SHOWN_DIGESTS = 5
_PERSONAL = {"count": "kept", "mask": "replaced by placeholders", "refuse": "these records are refused"}
_HANDLING = {
    "parse": "it is parsed as the token",
    "escape": "it is encoded as ordinary text",
    "reject": "these records are refused",
}


def run(workspace: Workspace, profile: PrepareParams) -> None:
    """Write `data/` (shards, manifest), `ledger.json` and `records.index`.

    Raises:
        ConfigError: A file in `contamination.prompts` cannot be parsed.
        DataError: The tokens changed or were made with other params, a manifest is incomplete, too many records were
            refused, a source has no supervised tokens, or the sums of the ledger differ.
        TemporaryError: The disk is full.
    """
    names = [name for name, _ in profile.mixture]
    raw = load_raw_manifest(workspace.raw, verify=False)  # only its counts are read
    check_sources(workspace.raw, raw, names)
    found, tokens = open_tokenized(workspace.tokens)
    _check_params(workspace, profile, tokens["params"])
    if missing := [name for name in names if name not in found]:
        raise DataError(f"{workspace.tokens / NAME}: no source {', '.join(missing)}. {REMEDY}")
    sources = {name: found[name] for name in names}
    prompts = _read_prompts(workspace, profile)
    personal = (tokens["params"].get("personal_data") or {}).get("action", "off")
    records = {
        name: _records(name, raw["sources"][name], source, profile, personal) for name, source in sources.items()
    }
    work = workspace.work / f"prepare-{workspace.profile}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with full_disk_explained(workspace.data):
            parts = split_sources(sources, profile, prompts=prompts, work=work)
            with whole_folder(workspace.data) as folder:
                for name, source in sources.items():
                    write_source(folder / name, source, parts[name].split)
                write_manifest(folder, _describe_data(tokens, sources.values()))
                shards = open_shards(folder, verify=False)  # write_manifest has just hashed it
                check_readback(shards, {name: source.facts["ends"] for name, source in sources.items()})
                plans = plan_epochs(shards, profile)
                ledger = build_ledger(
                    plans,
                    records,
                    {name: part.split for name, part in parts.items()},
                    {name: part.findings for name, part in parts.items()},
                    profile,
                    forget=_count_forgotten(raw["sources"], profile),
                )
                check_ledger(ledger)
            forgotten = {name: list(raw["sources"][name].get("forgotten", {})) for name in names}
            write_record_index(workspace.record_index, sources, parts, plans, profile, forgotten)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_json(workspace.ledger, ledger.to_json())
    for line in describe(ledger, profile, tokens["params"]["special_tokens_in_text"]):
        print(line)


def write_record_index(
    path: Path,
    sources: Mapping[str, TokenizedSource],
    parts: Mapping[str, SplitSource],
    plans: Sequence[EpochPlan],
    profile: PrepareParams,
    forgotten: Mapping[str, Sequence[str]],
) -> None:
    """Write the digest of every record and what became of it; see `ropeway.data.record_index`.

    `forgotten` has the digests of the records that fetch dropped, by source.
    """
    trained = find_trained(plans)
    groups = [
        group
        for name, source in sources.items()
        for group in group_records(source, parts[name], trained[name], profile, forgotten[name])
    ]
    write_atomic(path, build_record_index(groups))


def _check_params(workspace: Workspace, profile: PrepareParams, made: Mapping[str, object]) -> None:
    """Raise DataError if the tokens were made with other values of the params that tokenize and prepare share."""
    wanted = values_shared_with_prepare(profile)
    if differ := [key for key, value in wanted.items() if made.get(key) != value]:
        raise DataError(
            f"{workspace.tokens}: made with other values of {', '.join(differ)} than params.yaml has. Run `dvc repro "
            "prepare`, which runs tokenize first"
        )


def _read_prompts(workspace: Workspace, profile: PrepareParams) -> list[str]:
    """Return the evaluation prompts that training text is compared with, from the frozen inputs."""
    names = profile.contamination.prompts
    frozen = FrozenInputs.load(workspace.root) if names else None
    return [text for name in names if frozen for text in parse_prompts(frozen.text("contamination", name), name)]


def _describe_data(tokens: TokensManifest, sources: Iterable[TokenizedSource]) -> dict[str, object]:
    """Return what data/manifest.json says besides its files."""
    return {
        "format": tokens["format"],
        "special": tokens["special"],
        "tokenizer": tokens["tokenizer"],
        "template": tokens["template"],
        "vocab_size": tokens["vocab_size"],
        "sources": [_entry(source) for source in sources],
    }


def _entry(source: TokenizedSource) -> dict[str, object]:
    """Return a source's entry in data/manifest.json, in the shape `ropeway.data.shards` reads."""
    return {
        "name": source.facts["name"],
        "kind": source.facts["kind"],
        "sequences": sum(source.shard_sequences),
        "tokens": source.facts["tokens"],
        "shard_sequences": source.shard_sequences,
    }


def _records(name: str, raw: RawSource, source: TokenizedSource, profile: PrepareParams, personal: str) -> RecordTotals:
    """Return the record counts of a source for the ledger; `personal` is the action of `personal_data`.

    Raises:
        DataError: Fetch and tokenize together refused more than `max_refused_fraction` of its records.
    """
    counts = source.facts["records"]
    refused = Counter(raw["refused"]) + Counter(counts["refused"])
    if sum(refused.values()) > profile.max_refused_fraction * raw["read"]:
        raise DataError(
            f"source {name}: {sum(refused.values()):,} of {raw['read']:,} records refused ({dict(refused)}), more than "
            f"max_refused_fraction {profile.max_refused_fraction:g} allows; correct the records or raise it"
        )
    return RecordTotals(
        read=raw["read"],
        refused_by_fetch=raw["refused"],
        refused_by_tokenize=counts["refused"],
        kept=source.records_kept,
        with_special_tokens=counts["with_special_tokens"],
        special_token_hits=counts["special_token_hits"],
        without_tokens=counts["without_tokens"],
        files=raw.get("files", {}),
        ignored_keys=raw.get("ignored_keys", {}),
        skipped_members=raw.get("skipped_members", {}),
        further_answers=_count_further_answers(source),
        forgotten=sum(raw.get("forgotten", {}).values()),
        personal_data=None
        if personal == "off"
        else PersonalTotals(personal, counts["with_personal_data"], counts["personal_data"]),
    )


def _count_forgotten(raw: Mapping[str, RawSource], profile: PrepareParams) -> ForgetTotals | None:
    """Return how many digests of `forget` a record of the run's sources has; None if params list none."""
    listed = set(profile.forget)
    if not listed:
        return None
    matched = listed & {digest for source in raw.values() for digest in source.get("forgotten", {})}
    return ForgetTotals(len(listed), len(matched), tuple(sorted(listed - matched)))


def _count_further_answers(source: TokenizedSource) -> int:
    """Return the sequences of conversations beyond the first of each."""
    if source.facts["kind"] == "document":
        return 0
    records = source.column("records")
    return len(records) - len(np.unique(records))


def write_source(folder: Path, source: TokenizedSource, split: Split) -> None:
    """Write a source's shards, lengths and split to its folder; shards and lengths are hard links to tokens/."""
    folder.mkdir(parents=True)
    for number in range(len(source.shard_sequences)):
        for part in ("tokens", "kinds"):
            link_file(shard_path(source.folder, part, number), shard_path(folder, part, number))
    link_file(source.folder / "lengths.npy", folder / "lengths.npy")
    np.save(folder / "train.npy", split.train.astype(np.int64), allow_pickle=False)
    np.save(folder / "validation.npy", split.validation.astype(np.int64), allow_pickle=False)


def check_readback(shards: Shards, ends: dict[str, list[list[str]]]) -> None:
    """Raise DataError unless each shard has the expected number of tokens, and its first and last sequence read back.

    Reads two sequences per shard. `ends` are their digests as tokenize encoded them, by source and shard.
    """
    for source in shards.sources:
        _check_sizes(source)
        first = 0
        for count, written in zip(source.shard_sequences, ends[source.name], strict=True):
            for number, digest in zip((first, first + count - 1), written, strict=bool(written)):
                tokens, kinds = source.read(number)
                if sequence_digest(tokens, kinds) != digest:
                    raise DataError(
                        f"{source.folder}: sequence {number} reads back as {len(tokens)} tokens "
                        f"{tokens[:8].tolist()}…, which differ from what tokenize wrote. Check the disk and run `dvc "
                        "repro --force tokenize`"
                    )
            first += count


def _check_sizes(source: SourceShards) -> None:
    first = 0
    for shard, count in enumerate(source.shard_sequences):
        expected = int(source.lengths[first : first + count].sum())
        for part in ("tokens", "kinds"):
            found = len(np.load(source.folder / f"{part}-{shard:05d}.npy", mmap_mode="r", allow_pickle=False))
            if found != expected:
                raise DataError(
                    f"{source.folder}: {part}-{shard:05d}.npy has {found:,} entries, expected {expected:,} for its "
                    f"{count:,} sequences; run `dvc repro --force tokenize`"
                )
        first += count


def describe(ledger: Ledger, profile: PrepareParams, special: str) -> list[str]:
    """Return the log lines of the ledger; `special` is the value of `special_tokens_in_text`."""
    lines = []
    for account in ledger.sources:
        first = account.epochs[0]
        share = first.supervised / max(first.row_tokens, 1)
        repeats = f" ({first.repeated:,} repeats)" if first.repeated else ""
        lines.append(
            f"{account.name}: {account.records.kept:,} of {account.records.read:,} records, {account.sequences.all:,} "
            f"sequences, {account.tokens.all:,} tokens; train {account.sequences.train:,}, validation "
            f"{account.sequences.validation:,}, unused {account.sequences.unused:,}; epoch 0 reads {first.drawn:,} "
            f"rows{repeats}, {first.row_tokens:,} tokens, {share:.1%} supervised, loses "
            f"{first.windowed_tokens + first.cut_tokens:,}"
        )
        if account.records.with_special_tokens:
            lines.append(
                f"{account.name}: {account.records.with_special_tokens:,} records have a special token's string in "
                f"their text ({account.records.special_token_hits}); {_HANDLING[special]} "
                f"(special_tokens_in_text: {special})"
            )
        if account.records.ignored_keys:
            listed = ", ".join(f"{key} in {count:,} records" for key, count in account.records.ignored_keys.items())
            lines.append(f"{account.name}: ignored keys: {listed}")
        if (personal := account.records.personal_data) and personal.found:
            listed = ", ".join(f"{kind}: {count:,}" for kind, count in personal.found.items())
            lines.append(
                f"{account.name}: personal data in {personal.records:,} records ({listed}); "
                f"{_PERSONAL[personal.action]} (personal_data.action: {personal.action})"
            )
        lines += _describe_findings(account.name, account.findings, profile)
        expected = profile.sources[account.name].expected_rows
        if expected is not None and expected != account.sequences.all:
            lines.append(f"{account.name}: expected_rows is {expected:,}, found {account.sequences.all:,} sequences")
    if ledger.forget:
        lines.append(describe_forgotten(ledger.forget, sum(one.records.forgotten for one in ledger.sources)))
    lines += [
        f"epoch {epoch.epoch}: {epoch.rows:,} rows = {epoch.steps:,} steps x {epoch.global_batch_size} + "
        f"{epoch.left_over} left over"
        for epoch in ledger.epochs
    ]
    return lines


def describe_forgotten(forget: ForgetTotals, records: int) -> str:
    """Return the log line of `forget`.

    >>> describe_forgotten(ForgetTotals(2, 1, ("0" * 32,)), 3)
    'forget: 2 digests; 1 matched 3 records, which were dropped; 1 matched none: 00000000000000000000000000000000'
    """
    line = f"forget: {forget.listed:,} digests; {forget.matched:,} matched {records:,} records, which were dropped"
    if not forget.unmatched:
        return line
    shown = ", ".join(forget.unmatched[:_SHOWN_DIGESTS])
    more = "; ledger.json lists all" if len(forget.unmatched) > _SHOWN_DIGESTS else ""
    return f"{line}; {len(forget.unmatched):,} matched none: {shown}{more}"


def _describe_findings(name: str, findings: Findings, profile: PrepareParams) -> list[str]:
    """Return the log lines of one source's duplicates and contamination; none if there are none."""
    lines, done = [], {"count": "kept", "remove": "removed"}
    for how, found in (("exact", findings.exact), ("near", findings.near)):
        if found.records:
            lines.append(
                f"{name}: {how} duplicates of earlier records: {found.records:,} ({found.sequences:,} sequences, "
                f"{found.tokens:,} tokens), {done[found.action]} (duplicates.{how}: {found.action})"
            )
    found = findings.contaminated
    if found.sequences:
        lines.append(
            f"{name}: training sequences that share a {profile.contamination.ngram}-gram of words with validation or a "
            f"prompt: {found.sequences:,} ({found.tokens:,} tokens), {findings.with_prompts:,} of them with a prompt; "
            f"{done[found.action]} (contamination.action: {found.action})"
        )
    return lines
