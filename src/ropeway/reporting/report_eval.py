"""Stage report_eval: samples.html and plots/ from the files of train and evaluate. Nothing is computed again."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from ropeway.config.params import Profile
from ropeway.reporting import pictures
from ropeway.reporting.render import render
from ropeway.reporting.shown_parts import ShownPart, show_answers
from ropeway.runtime.manifest import Json, load_manifest, whole_folder, write_atomic, write_manifest
from ropeway.runtime.workspace import Workspace

Table = Sequence[Json]


def run(workspace: Workspace, profile: Profile) -> None:
    """Write samples.html and plots/; raise DataError when a table of the evaluation is missing or changed."""
    load_manifest(workspace.tables, remedy="Run `dvc repro evaluate`")
    write_plots(workspace.plots, workspace.tables, workspace.steps, max_length=profile.max_length)
    write_atomic(workspace.samples_page, render_samples(json.loads(workspace.samples.read_bytes())).encode())
    print(f"sample answers: {workspace.samples_page}; plots: {workspace.plots}")


def render_samples(report: Json) -> str:
    """Return the HTML page of a samples.json: a card per prompt, a row per sampling config, a column per model."""
    first = report["prompts"][0]["results"]
    pairs = [result["sampling_config"].split("/", 1) for result in first]
    sampling = {config: result["sampling_params"] for (_, config), result in zip(pairs, first, strict=True)}
    models = list(dict.fromkeys(model for model, _ in pairs))

    def answers_of(prompt: Json, config: str) -> list[list[list[ShownPart]]]:
        found = {result["sampling_config"]: result for result in prompt["results"]}
        return [show_answers(found[f"{model}/{config}"]) for model in models]

    return render(
        "samples.html.jinja",
        title=f"{report['model_name']}: sample answers",
        report=report,
        models=models,
        configs=list(sampling),
        sampling=sampling,
        settings=sorted({name for values in sampling.values() for name in values}),
        answers_of=answers_of,
    )


def write_plots(target: Path, tables: Path, steps: Path, *, max_length: int) -> None:
    """Write the folder of plots atomically."""
    with whole_folder(target) as folder:
        pictures.draw_losses(folder, read_table(steps))
        pictures.draw_sources(folder, read_table(tables / "scores.csv"))
        pictures.draw_positions(folder, read_table(tables / "positions.csv"), max_length=max_length)
        pictures.draw_passkey(folder, passkey_grids(read_table(tables / "passkey_answers.csv")))
        if (scores := tables / "long_context.csv").is_file():
            pictures.draw_long_context(folder, long_context_grids(read_table(scores)))
        write_manifest(folder, {})


def long_context_grids(table: Table) -> dict[str, pictures.KindGrid]:
    """Return model -> (lengths, kinds, score by kind and length) from rows of long_context.csv."""
    lengths = sorted({int(line["length"]) for line in table})
    kinds = list(dict.fromkeys(line["kind"].replace("_", " ") for line in table))
    places = {(line["kind"].replace("_", " "), int(line["length"])): line for line in table}
    return {
        model: (lengths, kinds, [[float(places[kind, length][model]) for length in lengths] for kind in kinds])
        for model in table[0]
        if model not in ("kind", "length")
    }


def passkey_grids(answers: Table) -> dict[str, pictures.Grid]:
    """Return model -> (lengths, depths, share of keys found by depth and length) from rows of passkey_answers.csv."""
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
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
