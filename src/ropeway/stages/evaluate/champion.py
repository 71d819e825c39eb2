"""Measures another model on this run's validation rows, so that the gate compares like with like.

`python -m ropeway.stages.evaluate.champion ROOT PROFILE FOLDER OUT`, started when validation data has changed.
"""

import sys
import tempfile
from pathlib import Path

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import EvaluateParams
from ropeway.data.shards import open_shards
from ropeway.runtime.errors import RopewayError
from ropeway.runtime.manifest import file_sha256, write_json
from ropeway.runtime.workspace import Workspace
from ropeway.stages.evaluate.evaluation_workers import plan_workers
from ropeway.stages.evaluate.measuring import EvalRequest, measure_folder
from ropeway.stages.evaluate.opening import check_template
from ropeway.stages.evaluate.stage import report_scores
from ropeway.stages.evaluate.text import translate

_REMEDY = "It cannot be compared on this run's data; choose another champion: `ropeway registry promote` or `rollback`"


def measure_champion(workspace: Workspace, profile: EvaluateParams, folder: Path, out: Path) -> None:
    """Write to `out` what eval.json would say of `folder`, a pulled package, as the tuned model of this run.

    Under another tokenizer than the run's it reads the same texts in its own tokens; the report then has that
    tokenizer's digest, and only its nats per byte can be compared.

    Raises:
        DataError: It was trained with another template than made those rows.
        ConfigError: Its tokenizer lacks a special token of the template.
        TemporaryError: As in `measure_folder`.
    """
    shards = open_shards(workspace.data)
    check_template(folder, shards, remedy=_REMEDY)
    tokenizer = file_sha256(folder / "tokenizer.json")
    with tempfile.TemporaryDirectory() as scratch:
        asked = EvalRequest(shards, profile)
        if tokenizer != shards.manifest["tokenizer"]:
            asked = EvalRequest(*translate(shards, profile, workspace.base, folder, Path(scratch)))
        found = measure_folder(folder, folder, asked, cards=plan_workers(), name="champion")
    report = report_scores(shards, profile, {"tuned": found.scores}, tokenizer_folder=workspace.base)
    write_json(out, {**report, "tokenizer": tokenizer})


if __name__ == "__main__":
    try:
        at, name, package, report = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
        measure_champion(Workspace(at, name), FrozenInputs.load(at).profile("evaluate"), package, report)
    except RopewayError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
