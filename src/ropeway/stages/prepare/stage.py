"""Room: prepare. Raw records to token shards, once and whole; the split; the ledger."""

import glob
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import Profile
from ropeway.data.ledger import Ledger, Records, check_ledger
from ropeway.data.raw_records import list_groups
from ropeway.data.shards import FORMAT, open_shards
from ropeway.models.chat_template import template_digest
from ropeway.models.tokenizer import count_tokens, open_tokenizer, read_special
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import file_sha256, load_manifest, whole_folder, write_json, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.prepare.account import account_for
from ropeway.stages.prepare.contamination import parse_prompts
from ropeway.stages.prepare.divide import Part, divide_sources
from ropeway.stages.prepare.encode_workers import staying_workers
from ropeway.stages.prepare.findings import describe_findings
from ropeway.stages.prepare.units import (
    UNIT_BYTES,
    Recipe,
    Unit,
    choose_unit_bytes,
    fingerprint,
    plan_recipes,
    plan_units,
)
from ropeway.stages.prepare.write import Units, check_readback, disk_may_be_full, make_units, write_split

_WHAT_HAPPENS = {
    "parse": "it is parsed as the token",
    "escape": "it is encoded as ordinary text",
    "reject": "these records are refused",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """One source on disk: its units, its entry in the manifest, its records' account, its split and repeats."""

    units: Units
    facts: dict[str, Any]
    records: Records
    part: Part


def run(workspace: Workspace, profile: Profile) -> None:
    """Write `data/` (shards, manifest) and `ledger.json`.

    Raises:
        ConfigError: Params ask for what this tokenizer cannot do, or name prompts that are not there or not readable.
        DataError: Raw files are not what their manifest says, too many records are refused, a source teaches nothing,
            or the ledger does not come out even.
        TemporaryError: A worker died or the disk is full: the same command makes only what is missing.
    """
    raw = load_manifest(workspace.raw, remedy="Run `dvc repro fetch`")
    facts = _facts(workspace)
    prompts = _read_prompts(workspace, profile)
    recipes = plan_recipes(profile)
    prefix = f"prepare-{workspace.profile}"
    work = workspace.work / f"{prefix}-{fingerprint(raw['files'], workspace.base, recipes)}"
    with disk_may_be_full(work):
        planned = _plan(workspace, recipes, work)
        with staying_workers():
            made = make_units(planned, work=work)
            records = {name: _records(name, raw["sources"][name], units, profile) for name, units in made.items()}
            parts = divide_sources(planned, made, profile, prompts=prompts, work=work)
        prepared = {
            name: Prepared(units, _entry(name, raw["sources"][name]["kind"], units), records[name], parts[name])
            for name, units in made.items()
        }
        with whole_folder(workspace.data) as folder:
            ledger = _write(folder, prepared, facts, profile)
    write_json(workspace.ledger, ledger.to_json())
    for line in describe(ledger, profile):
        print(line)
    for done in workspace.work.glob(f"{glob.escape(prefix)}-{'[0-9a-f]' * 16}"):  # of this and of earlier params
        shutil.rmtree(done)


def _read_prompts(workspace: Workspace, profile: Profile) -> list[str]:
    """Return the evaluation prompts that training text is compared with, as they were when the digests were taken."""
    names = profile.contamination.prompts
    frozen = FrozenInputs.load(workspace.root) if names else None
    return [text for name in names if frozen for text in parse_prompts(frozen.text("contamination", name), name)]


def _facts(workspace: Workspace) -> dict[str, Any]:
    """Return what data's manifest says beside its sources."""
    tokenizer = open_tokenizer(workspace.base)
    return {
        "format": FORMAT,
        "special": read_special(workspace.base, tokenizer),
        "tokenizer": file_sha256(workspace.base / "tokenizer.json"),
        "template": template_digest(),
        "vocab_size": count_tokens(tokenizer),
    }


def _plan(workspace: Workspace, recipes: Mapping[str, Recipe], work: Path) -> dict[str, Sequence[Unit]]:
    """Return each source's units."""
    planned: dict[str, Sequence[Unit]] = {}
    for name, recipe in recipes.items():
        raw = workspace.raw / name
        found = list_groups(raw)
        parts = plan_units(found, unit_bytes=choose_unit_bytes(found, at_most=UNIT_BYTES))
        folders = (work / name / f"{number:05d}" for number in range(len(parts)))
        planned[name] = [
            Unit(groups, raw, workspace.base, recipe, folder) for groups, folder in zip(parts, folders, strict=True)
        ]
    return planned


def _write(folder: Path, prepared: Mapping[str, Prepared], facts: Mapping[str, Any], profile: Profile) -> Ledger:
    """Fill data's folder from the units; return the checked ledger."""
    for name, source in prepared.items():
        source.units.place(folder / name)
        write_split(folder / name, source.part.split)
    manifest = write_manifest(folder, {**facts, "sources": [source.facts for source in prepared.values()]})
    for name, source in prepared.items():
        source.units.check_placed(name, manifest["files"])
    return _account(folder, prepared, profile)


def _entry(name: str, kind: str, units: Units) -> dict[str, Any]:
    """Return a source's entry in data/manifest.json, in the shape `ropeway.data.shards` reads."""
    return {
        "name": name,
        "kind": kind,
        "sequences": sum(units.shard_sequences),
        "tokens": units.tokens,
        "shard_sequences": units.shard_sequences,
    }


def _records(name: str, raw: Mapping[str, Any], units: Units, profile: Profile) -> Records:
    """Return the account of a source's records.

    Raises:
        DataError: Fetch and prepare together refused more than `max_refused_fraction`.
    """
    by_prepare = units.count_by("refused")
    refused = Counter(raw["refused"]) + by_prepare
    if sum(refused.values()) > profile.max_refused_fraction * raw["read"]:
        raise DataError(
            f"source {name}: {sum(refused.values()):,} of {raw['read']:,} records refused ({dict(refused)}), more than "
            f"max_refused_fraction {profile.max_refused_fraction:g} allows"
        )
    return Records(
        read=raw["read"],
        refused_by_fetch=raw["refused"],
        refused_by_prepare=dict(by_prepare),
        kept=units.count("kept"),
        with_special_tokens=units.count("with_special_tokens"),
        special_token_hits=dict(sorted(units.count_by("special_token_hits").items())),
        without_tokens=units.count("without_tokens"),
        files=raw.get("files", {}),
        ignored_keys=raw.get("ignored_keys", {}),
    )


def _account(folder: Path, prepared: Mapping[str, Prepared], profile: Profile) -> Ledger:
    shards = open_shards(folder, verify=False)  # hashed a moment ago
    check_readback(shards, {name: [facts["ends"] for facts in s.units.facts] for name, s in prepared.items()})
    ledger = account_for(
        shards,
        {name: source.records for name, source in prepared.items()},
        {name: source.part.split for name, source in prepared.items()},
        {name: source.part.findings for name, source in prepared.items()},
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
        if account.records.ignored_keys:
            listed = ", ".join(f"{key} in {count:,} records" for key, count in account.records.ignored_keys.items())
            lines.append(f"{account.name}: ignored keys: {listed}")
        lines += describe_findings(account.name, account.findings, profile)
        expected = profile.sources[account.name].expected_rows
        if expected is not None and expected != account.sequences.all:
            lines.append(f"{account.name}: expected_rows says {expected:,}, found {account.sequences.all:,} sequences")
    lines += [
        f"epoch {epoch.epoch}: {epoch.rows:,} rows = {epoch.steps:,} steps x {epoch.global_batch_size} + "
        f"{epoch.left_over} left over"
        for epoch in ledger.epochs
    ]
    return lines
