"""Stage tokenize: write token shards of the raw records, and their fingerprints for dedup and decontamination.

Stage prepare decides the split, mixture, layout, epochs and which duplicates are removed; it does not tokenize.
"""

import glob
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ropeway.config.tokenize_params import TokenizeParams
from ropeway.data.raw_records import check_sources, list_groups, load_raw_manifest
from ropeway.data.shards import FORMAT
from ropeway.data.tokenized import PROFILE
from ropeway.models.chat_template import open_template
from ropeway.models.tokenizer import count_tokens, open_tokenizer, read_special
from ropeway.runtime.errors import full_disk_explained
from ropeway.runtime.manifest import canonical_json, file_sha256, whole_folder, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.tokenize.store import make_units
from ropeway.stages.tokenize.units import (
    UNIT_BYTES,
    Recipe,
    Unit,
    choose_unit_bytes,
    fingerprint,
    plan_recipes,
    plan_units,
)


def run(workspace: Workspace, params: TokenizeParams) -> None:
    """Write `tokens/`.

    Raises:
        ConfigError: The tokenizer does not support `special_tokens_in_text`, or the workers cannot be used.
        DataError: A raw file has changed, or the raw manifest is incomplete.
        TemporaryError: A worker died or the disk is full; the same command makes only the missing units.
    """
    raw = load_raw_manifest(workspace.raw)
    recipes = plan_recipes(params)
    check_sources(workspace.raw, raw, recipes)
    prefix = f"tokenize-{workspace.profile}"
    work = workspace.work / f"{prefix}-{fingerprint(raw['files'], workspace.base, recipes)}"
    with full_disk_explained(work, kept="completed units are kept there"):
        made = make_units(_plan(workspace, recipes, work), work=work)
        with whole_folder(workspace.tokens) as folder:
            for name, units in made.items():
                units.write_source(folder / name)
            tokenizer = _describe_tokenizer(workspace)
            profiles = {name: units.sum_profiles().to_json() for name, units in made.items()}
            profile = {"tokenizer": tokenizer["tokenizer"], "sources": profiles}
            (folder / PROFILE).write_bytes(canonical_json(profile))
            sources = [units.describe(name, raw["sources"][name]["kind"]) for name, units in made.items()]
            facts = {"params": params.model_dump(mode="json"), "sources": sources}
            manifest = write_manifest(folder, {**tokenizer, **facts})
            for name, units in made.items():
                units.verify_source(name, manifest["files"])
    for source in sources:
        sequences = sum(source["shard_sequences"])
        records = sum(source["shard_records"])
        print(f"{source['name']}: {records:,} records, {sequences:,} sequences, {source['tokens']:,} tokens")
    for done in workspace.work.glob(f"{glob.escape(prefix)}-{'[0-9a-f]' * 16}"):  # units of these and of earlier params
        shutil.rmtree(done)


def _describe_tokenizer(workspace: Workspace) -> dict[str, object]:
    """Return the tokenizer's entries of the manifests of tokens/ and data/."""
    tokenizer, template = open_tokenizer(workspace.base), open_template(workspace.base)
    return {
        "format": FORMAT,
        "special": read_special(workspace.base, tokenizer, template),
        "tokenizer": file_sha256(workspace.base / "tokenizer.json"),
        "template": template.digest,
        "vocab_size": count_tokens(tokenizer),
    }


def _plan(workspace: Workspace, recipes: Mapping[str, Recipe], work: Path) -> dict[str, Sequence[Unit]]:
    """Return the units of each source."""
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
