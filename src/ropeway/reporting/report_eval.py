"""Stage report_eval: samples.html and plots/, made of what train and evaluate wrote. Nothing is computed again."""

import json

from ropeway.config.params import Profile
from ropeway.reporting.evaluation_plots import write_plots
from ropeway.reporting.samples_page import draw_page
from ropeway.runtime.manifest import load_manifest, write_atomic
from ropeway.runtime.workspace import Workspace


def run(workspace: Workspace, profile: Profile) -> None:
    """Write the pages of an evaluation.

    Raises:
        DataError: The evaluation's tables are missing or were changed.
    """
    load_manifest(workspace.tables, remedy="Run `dvc checkout`, or `dvc repro evaluate`")
    write_plots(workspace.plots, workspace.tables, workspace.steps, max_length=profile.max_length)
    write_atomic(workspace.samples_page, draw_page(json.loads(workspace.samples.read_bytes())).encode())
    print(f"sample answers in {workspace.samples_page}; plots in {workspace.plots}")
