"""Folder tables/: what evaluate measured as CSV, for `dvc plots` and for the pictures of the report."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ropeway.runtime.manifest import whole_folder, write_manifest
from ropeway.stages.evaluate import passkey
from ropeway.stages.evaluate.passkey import Answered

Table = Sequence[Mapping[str, Any]]


def plan_tables(
    sources: Mapping[str, Mapping[str, Mapping[str, float]]], curves: Table, keys: Mapping[str, Sequence[Answered]]
) -> dict[str, Table]:
    """Return name -> lines of what tables/ holds as CSV.

    Args:
        sources: eval.json's metrics per source and model.
        curves: Loss by position, one line per bucket.
        keys: Each model's answers to the passkey questions.
    """
    scores = [
        {"source": source, "model": model, **metrics}
        for source, models in sources.items()
        for model, metrics in models.items()
    ]
    return {
        "scores": scores,
        "positions": curves,
        "passkey": passkey.table_lengths(keys),
        "passkey_answers": list(passkey.table_answers(keys)),
    }


def write_tables(target: Path, tables: Mapping[str, Table]) -> None:
    """Write the folder, whole or not at all."""
    with whole_folder(target) as folder:
        for name, lines in tables.items():
            with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)
        write_manifest(folder, {})
