"""Scores another model on this run's validation rows, so that the gate compares both models on the same data.

`python -m ropeway.stages.evaluate.champion ROOT PROFILE FOLDER OUT`, started where the validation data has changed.
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
from ropeway.stages.evaluate.load_model import check_template
from ropeway.stages.evaluate.measuring import EvalRequest, measure_folder
from ropeway.stages.evaluate.stage import report_scores
from ropeway.stages.evaluate.text import retokenize

_REMEDY = "It cannot be compared on this run's data. Choose another champion: `ropeway registry promote` or `rollback`"


def measure_champion(workspace: Workspace, profile: EvaluateParams, folder: Path, out: Path) -> None:
    """Write to `out` the scores that eval.json would have with `folder`, a pulled package, as the tuned model.

    A model with another tokenizer than the run's is scored on the same texts in its own tokens. The report then has
    that tokenizer's digest, and only its nats/byte can be compared.

    Raises:
        DataError: Its chat template is not the one of the validation rows.
        ConfigError: Its tokenizer lacks a special token of the template.
        TemporaryError: As in `measure_folder`.
    """
    shards = open_shards(workspace.data)
    check_template(folder, shards, remedy=_REMEDY)
    tokenizer = file_sha256(folder / "tokenizer.json")
    with tempfile.TemporaryDirectory() as scratch:
        request = EvalRequest(shards, profile)
        if tokenizer != shards.manifest["tokenizer"]:
            request = EvalRequest(*retokenize(shards, profile, workspace.base, folder, Path(scratch)))
        result = measure_folder(folder, folder, request, gpus=plan_workers(), name="champion")
    report = report_scores(shards, profile, {"tuned": result.scores}, tokenizer_folder=workspace.base)
    write_json(out, {**report, "tokenizer": tokenizer})


if __name__ == "__main__":
    try:
        at, name, package, report = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
        measure_champion(Workspace(at, name), FrozenInputs.load(at).profile("evaluate"), package, report)
    except RopewayError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
