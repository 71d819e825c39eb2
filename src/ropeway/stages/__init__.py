"""One package per stage of dvc.yaml, by the same names; each has `stage.run(workspace, profile)`."""
