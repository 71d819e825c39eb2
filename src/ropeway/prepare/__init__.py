"""Room: prepare. Raw records to token shards, once and whole; the split; the ledger."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ropeway.chat import template_digest
from ropeway.errors import DataError
from ropeway.ledger import Ledger, Records, check_ledger
from ropeway.manifest import file_sha256, load_manifest, whole_folder, write_json, write_manifest
from ropeway.params import DatasetOptions, Profile
from ropeway.prepare.account import account_for
from ropeway.prepare.encode import Encoder, Sequence
from ropeway.prepare.split import Split, plan_split
from ropeway.prepare.write import ShardWriter, check_readback
from ropeway.raw import iterate_records
from ropeway.shards import FORMAT, open_shards
from ropeway.tokenizer import count_tokens, open_tokenizer, read_special
from ropeway.workspace import Workspace

_WHAT_HAPPENS = {
    "parse": "it is parsed as the token",
    "escape": "it is encoded as ordinary text",
    "reject": "these records are refused",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """One source on disk: its entry in the manifest, its records' account, its split, and samples to look up."""

    facts: dict[str, Any]
    records: Records
    split: Split
    samples: dict[int, Sequence]


def run(workspace: Workspace, profile: Profile) -> None:
    """Leave `data/` (shards, manifest) and `ledger.json`.

    Raises:
        ConfigError: Params ask for what this tokenizer cannot do.
        DataError: Raw files are not what their manifest says, too many records are refused, a source teaches nothing,
            or the ledger does not come out even.
    """
    raw = load_manifest(workspace.raw, remedy="Run `dvc repro fetch`")
    tokenizer = open_tokenizer(workspace.base)
    special = read_special(workspace.base, tokenizer)
    generator = np.random.RandomState(profile.rng_seed)  # one for all sources in their order, as in the original
    prepared: dict[str, Prepared] = {}
    with whole_folder(workspace.data) as folder:
        for name, options in profile.mixture:
            encoder = Encoder(tokenizer, special, options.max_chunk_size, profile.special_tokens_in_text)
            writer = ShardWriter(folder / name, vocab_size=count_tokens(tokenizer))
            for sequence in encoder.encode(iterate_records(workspace.raw / name)):
                writer.add(sequence)
            split = _split(writer, options, profile, generator)
            facts = raw["sources"][name]
            prepared[name] = Prepared(
                _entry(name, facts["kind"], writer), _records(name, facts, encoder, profile), split, writer.samples
            )
        manifest = {
            "format": FORMAT,
            "special": special,
            "tokenizer": file_sha256(workspace.base / "tokenizer.json"),
            "template": template_digest(),
            "vocab_size": count_tokens(tokenizer),
            "sources": [source.facts for source in prepared.values()],
        }
        write_manifest(folder, manifest)
        ledger = _account(folder, prepared, profile)
    write_json(workspace.ledger, ledger.to_json())
    for line in describe(ledger, profile):
        print(line)


def _split(writer: ShardWriter, options: DatasetOptions, profile: Profile, generator: np.random.RandomState) -> Split:
    records, keys = writer.finish(by_document=profile.split_by == "document")
    split = plan_split(records, keys, profile, max_val_set=options.max_val_set, generator=generator)
    writer.write_split(split)
    return split


def _entry(name: str, kind: str, writer: ShardWriter) -> dict[str, Any]:
    """Return a source's entry in data/manifest.json, in the shape `ropeway.shards` reads."""
    return {
        "name": name,
        "kind": kind,
        "sequences": sum(writer.shard_sequences),
        "tokens": writer.tokens,
        "shard_sequences": writer.shard_sequences,
    }


def _records(name: str, raw: Mapping[str, Any], encoder: Encoder, profile: Profile) -> Records:
    """Return the account of a source's records.

    Raises:
        DataError: Fetch and prepare together refused more than `max_refused_fraction`.
    """
    refused = Counter(raw["refused"]) + encoder.refused
    if sum(refused.values()) > profile.max_refused_fraction * raw["read"]:
        raise DataError(
            f"source {name}: {sum(refused.values()):,} of {raw['read']:,} records refused ({dict(refused)}), more than "
            f"max_refused_fraction {profile.max_refused_fraction:g} allows"
        )
    return Records(
        read=raw["read"],
        refused_by_fetch=raw["refused"],
        refused_by_prepare=dict(encoder.refused),
        kept=encoder.kept,
        with_special_tokens=encoder.with_special_tokens,
        special_token_hits=dict(sorted(encoder.special_token_hits.items())),
        without_tokens=encoder.without_tokens,
    )


def _account(folder: Path, prepared: Mapping[str, Prepared], profile: Profile) -> Ledger:
    shards = open_shards(folder, verify=False)  # hashed a moment ago
    check_readback(shards, {name: source.samples for name, source in prepared.items()})
    ledger = account_for(
        shards,
        {name: source.records for name, source in prepared.items()},
        {name: source.split for name, source in prepared.items()},
        profile,
    )
    check_ledger(ledger)
    return ledger


def describe(ledger: Ledger, profile: Profile) -> list[str]:
    """Return the ledger in a few lines for the log."""
    lines = []
    for account in ledger.sources:
        first = account.epochs[0]
        share = first.supervised / max(first.row_tokens, 1)
        lines.append(
            f"{account.name}: {account.records.kept:,} of {account.records.read:,} records, {account.sequences.all:,} "
            f"sequences, {account.tokens.all:,} tokens; train {account.sequences.train:,}, validation "
            f"{account.sequences.validation:,}, unused {account.sequences.unused:,}; epoch 0 reads {first.drawn:,} "
            f"rows, {first.row_tokens:,} tokens, {share:.1%} supervised, loses "
            f"{first.windowed_tokens + first.cut_tokens:,}"
        )
        if account.records.with_special_tokens:
            lines.append(
                f"{account.name}: {account.records.with_special_tokens:,} records hold a special token's string in "
                f"their text ({account.records.special_token_hits}); {_WHAT_HAPPENS[profile.special_tokens_in_text]} "
                f"(special_tokens_in_text: {profile.special_tokens_in_text})"
            )
        expected = profile.sources[account.name].expected_rows
        if expected is not None and expected != account.sequences.all:
            lines.append(f"{account.name}: expected_rows says {expected:,}, found {account.sequences.all:,} sequences")
    lines += [
        f"epoch {epoch.epoch}: {epoch.rows:,} rows = {epoch.steps:,} steps x {epoch.global_batch_size} + "
        f"{epoch.left_over} left over"
        for epoch in ledger.epochs
    ]
    return lines
