"""Folder plots/: pictures (PNG and SVG) of the tables that evaluate wrote, and of the training losses."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ropeway.reporting import evaluation_pictures as pictures
from ropeway.runtime.manifest import whole_folder, write_manifest

Table = Sequence[Mapping[str, Any]]


def write_plots(target: Path, tables: Path, steps: Path, *, max_length: int) -> None:
    """Write the folder, whole or not at all.

    Args:
        target: The folder.
        tables: Folder of the CSV files.
        steps: steps.csv.
        max_length: Tokens of the longest row in training.
    """
    with whole_folder(target) as folder:
        pictures.draw_losses(folder, read_table(steps))
        pictures.draw_sources(folder, read_table(tables / "scores.csv"))
        pictures.draw_positions(folder, read_table(tables / "positions.csv"), max_length=max_length)
        pictures.draw_passkey(folder, passkey_grids(read_table(tables / "passkey_answers.csv")))
        write_manifest(folder, {})


def passkey_grids(answers: Table) -> dict[str, pictures.Grid]:
    """Return model -> (lengths, depths, share of keys found by depth and length); lines of passkey_answers.csv."""
    grids: dict[str, pictures.Grid] = {}
    for model in dict.fromkeys(line["model"] for line in answers):
        right: dict[tuple[int, float], list[int]] = {}
        for line in answers:
            if line["model"] == model:
                right.setdefault((int(line["length"]), float(line["depth"])), []).append(int(line["right"]))
        lengths, depths = (sorted({place[axis] for place in right}) for axis in (0, 1))
        shares = [[sum(found := right[int(length), depth]) / len(found) for length in lengths] for depth in depths]
        grids[model] = ([int(length) for length in lengths], depths, shares)
    return grids


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
