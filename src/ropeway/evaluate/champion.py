"""Measures another model on this run's validation rows, so that the gate compares like with like.

`python -m ropeway.evaluate.champion ROOT PROFILE FOLDER OUT`, started by the flow when the validation set has changed.
"""

import sys
import tempfile
from pathlib import Path

from ropeway.errors import RopewayError
from ropeway.evaluate.measuring import Asked, measure_folder
from ropeway.evaluate.opening import check_template
from ropeway.evaluate.report import report_scores
from ropeway.evaluate.text import translate
from ropeway.evaluate.workers import plan_workers
from ropeway.frozen import FrozenInputs
from ropeway.manifest import file_sha256, write_json
from ropeway.params import Profile
from ropeway.shards import open_shards
from ropeway.workspace import Workspace


def measure_champion(workspace: Workspace, profile: Profile, folder: Path, out: Path) -> None:
    """Write what eval.json would say of `folder` as the tuned model of this run.

    Args:
        workspace: Whose validation rows.
        profile: As evaluate reads it.
        folder: A package, as pulled.
        out: The JSON to write.

    Under another tokenizer than the run's it reads the same texts in its own tokens; the report then has that
    tokenizer's digest, and only its nats per byte can be compared.

    Raises:
        DataError: It was trained with another template than made those rows.
        ConfigError: Its tokenizer lacks a special token of the template.
        TemporaryError: As in `measure_folder`.
    """
    shards = open_shards(workspace.data)
    check_template(folder)
    tokenizer = file_sha256(folder / "tokenizer.json")
    with tempfile.TemporaryDirectory() as scratch:
        asked = Asked(shards, profile)
        if tokenizer != shards.manifest["tokenizer"]:
            asked = Asked(*translate(shards, profile, workspace.base, folder, Path(scratch)))
        found = measure_folder(folder, folder, asked, cards=plan_workers(), name="champion")
    report = report_scores(shards, profile, {"tuned": found.scores}, tokenizer_folder=workspace.base)
    write_json(out, {**report, "tokenizer": tokenizer})


def main(root: Path, name: str, folder: Path, out: Path) -> None:
    """Measure it for a workspace."""
    profile = FrozenInputs.load(root).profile("evaluate")
    measure_champion(Workspace(root, name), profile, folder, out)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    except RopewayError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
