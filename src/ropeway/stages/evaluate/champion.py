"""Evaluates another model on this run's rows and questions, so that the gate compares both models on the same.

`python -m ropeway.stages.evaluate.champion ROOT PROFILE FOLDER OUT SECTION...`, started where the recorded evaluation
of the champion is of other rows or questions, or lacks a section that the gate compares.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import EvaluateParams
from ropeway.models.chat_template import OPEN_ASSISTANT, open_template
from ropeway.models.tokenizer import open_tokenizer
from ropeway.runtime.errors import DataError, RopewayError
from ropeway.runtime.manifest import file_sha256, write_json
from ropeway.runtime.workspace import Workspace
from ropeway.stages.evaluate.evaluation_workers import plan_workers
from ropeway.stages.evaluate.load_model import check_template
from ropeway.stages.evaluate.measuring import measure_folder
from ropeway.stages.evaluate.stage import identify_sections, plan_measurements, report_scores, report_skills
from ropeway.stages.evaluate.text import retokenize

_REMEDY = "It cannot be compared on this run's data. Choose another champion: `ropeway registry promote` or `rollback`"


def measure_champion(
    workspace: Workspace, profile: EvaluateParams, folder: Path, out: Path, sections: Sequence[str]
) -> None:
    """Write to `out` what eval.json would have in `sections` with `folder`, a pulled package, as the tuned model.

    A model with another tokenizer than the run's is scored on the same texts in its own tokens. The report then has
    that tokenizer's digest; of its losses only nats/byte can be compared, and losses by position are left out.

    Raises:
        DataError: Its chat template is not the one of the validation rows.
        ConfigError: Its tokenizer lacks a special token of the template, or the harness is not installed.
        TemporaryError: As in `measure_folder`.
    """
    request = plan_measurements(workspace, profile, sections)
    shards, identities = request.shards, identify_sections(workspace, request)
    check_template(folder, shards, remedy=_REMEDY)
    tokenizer = _identify_tokenizer(folder, workspace.base, str(shards.manifest["tokenizer"]))
    with tempfile.TemporaryDirectory() as scratch:
        if tokenizer != shards.manifest["tokenizer"]:
            if open_template(folder) is not OPEN_ASSISTANT:
                raise DataError(
                    f"{folder}: its tokenizer is not the run's, and rows are converted between tokenizers only "
                    f"under template open_assistant. {_REMEDY}"
                )
            rows, reading = retokenize(shards, profile, workspace.base, folder, Path(scratch))
            request = replace(request, shards=rows, profile=reading, long_rows=())
        result = measure_folder(folder, folder, request, gpus=plan_workers(), name="champion")
    report = report_skills(request, {"tuned": result}, identities)
    if request.losses:
        report |= report_scores(shards, profile, {"tuned": result.scores}, tokenizer_folder=workspace.base)
    write_json(out, {**report, "tokenizer": tokenizer})


def _identify_tokenizer(folder: Path, base: Path, digest: str) -> str:
    """Return `digest`, that of the run's tokenizer in `base`, if the folder has the same one; else its file's digest.

    A package has merges in the form that older versions of tokenizers read, so the bytes of the same tokenizer differ.
    """
    same = open_tokenizer(folder).to_str() == open_tokenizer(base).to_str()
    return digest if same else file_sha256(folder / "tokenizer.json")


if __name__ == "__main__":
    try:
        at, name, package, report, *wanted = sys.argv[1:]
        inputs = FrozenInputs.load(Path(at)).profile("evaluate")
        measure_champion(Workspace(Path(at), name), inputs, Path(package), Path(report), wanted)
    except RopewayError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
