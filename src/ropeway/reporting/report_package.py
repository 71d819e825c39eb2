"""Stage report_package: README.md and the pages of a version, and the manifest that covers them and the package.

The package itself holds no page: an edit of a sentence or a color changes none of its bytes.
"""

import json
import shutil

from ropeway.config.params import Profile
from ropeway.reporting.model_card import render_card
from ropeway.runtime.manifest import (
    NAME,
    Json,
    file_sha256,
    load_manifest,
    whole_folder,
    write_atomic,
    write_json,
    write_manifest,
)
from ropeway.runtime.workspace import Workspace


def run(workspace: Workspace, profile: Profile) -> None:  # noqa: ARG001 - card.json has every value
    """Write `pages/`: README.md, samples.html, data_profile.json, plots/, and manifest.json of the whole version."""
    package = workspace.package

    def read(name: str) -> Json:
        found: Json = json.loads((package / name).read_bytes())
        return found

    card = render_card(*(read(f"{name}.json") for name in ("card", "ledger", "eval", "samples")))
    with whole_folder(workspace.pages) as folder:
        write_atomic(folder / "README.md", card.encode())
        for path in (workspace.samples_page, workspace.data_profile):
            shutil.copyfile(path, folder / path.name)
        (folder / workspace.plots.name).mkdir()
        for source, stage in ((workspace.tables, "evaluate"), (workspace.plots, "report_eval")):
            for name in load_manifest(source, remedy=f"Run `dvc repro {stage}`")["files"]:
                shutil.copyfile(source / name, folder / workspace.plots.name / name)
        whole = read(NAME)
        pages = write_manifest(folder, {})["files"]
        write_json(
            folder / NAME,
            {**whole, "package": file_sha256(package / NAME), "files": {**whole["files"], **pages}},
        )
    print(f"model card and pages in {workspace.pages}")
