"""Measures another model on this run's validation rows, so that the gate compares like with like.

`python -m ropeway.evaluate.champion ROOT PROFILE FOLDER OUT`, started by the flow when the validation set has changed.
"""

import sys
from pathlib import Path

from ropeway.errors import RopewayError
from ropeway.evaluate.report import MEASURED_ON_ONE, check_template, open_model, report_scores, threads_for
from ropeway.evaluate.scores import measure
from ropeway.manifest import write_json
from ropeway.params import READS, Profile, load_profile
from ropeway.shards import open_shards
from ropeway.workspace import Workspace


def measure_champion(workspace: Workspace, profile: Profile, folder: Path, out: Path) -> None:
    """Write what eval.json would say of `folder` as the tuned model of this run.

    Args:
        workspace: Whose validation rows.
        profile: As evaluate reads it.
        folder: A package, as pulled.
        out: The JSON to write.

    Raises:
        DataError: Another tokenizer or template made those rows: a loss per token would not be comparable.
    """
    shards = open_shards(workspace.data)
    check_template(folder, shards)
    model, _ = open_model(folder, like=folder)
    with threads_for(model, one_below=MEASURED_ON_ONE):
        scores = measure(model, shards, profile, name="champion")
    write_json(out, report_scores(shards, profile, {"tuned": scores}))


def main(root: Path, name: str, folder: Path, out: Path) -> None:
    """Measure it for a workspace."""
    profile = load_profile(root / "params.yaml", name)[1].reading(READS["evaluate"])
    measure_champion(Workspace(root, name), profile, folder, out)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    except RopewayError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
