"""Where things lie in a workspace: one object per run, so no stage spells a path twice."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


class _Place:
    """A path in a workspace; `{profile}` in it stands for the workspace's profile."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __get__(self, workspace: "Workspace", _owner: type) -> Path:
        return workspace.root / self._path.format(profile=workspace.profile)


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder that holds params.yaml, and one profile in it."""

    root: Path
    profile: str

    # The outputs of the stages.
    run = _Place("runs/{profile}")
    raw = _Place("runs/{profile}/raw")  # one folder of parquet files per source, and a manifest
    base = _Place("runs/{profile}/base")  # base model and tokenizer with the role tokens, vocabulary padded
    tokens = _Place("runs/{profile}/tokens")  # every sequence as tokens, and what records are compared by
    data = _Place("runs/{profile}/data")  # token shards and their manifest, nothing else
    ledger = _Place("runs/{profile}/ledger.json")  # prepare's account of every record and token
    report = _Place("runs/{profile}/report.html")  # the data for people: samples, lengths, ledger, refused records
    model = _Place("runs/{profile}/model")  # train's export: weights, config and tokenizer as others load them
    steps = _Place("runs/{profile}/steps.csv")  # one line per optimizer step, without what depends on the clock
    train_metrics = _Place("runs/{profile}/train.json")  # train's figures that do not depend on the clock
    timings = _Place("runs/{profile}/provenance.json")  # seconds, tokens/s, host, versions: no part of the model
    evaluation = _Place("runs/{profile}/eval.json")  # metrics of base and tuned, per source
    samples = _Place("runs/{profile}/samples.json")  # sample answers in the published family's JSON format
    samples_page = _Place("runs/{profile}/samples.html")  # the same for people, base and tuned side by side
    tables = _Place("runs/{profile}/tables")  # evaluate's CSV
    plots = _Place("runs/{profile}/plots")  # pictures of the evaluation (PNG, SVG)
    package = _Place("runs/{profile}/package")  # the model as others load it, its facts and its manifest
    pages = _Place("runs/{profile}/pages")  # README.md and pages, with the manifest that covers them and the package

    tasks = _Place("configs/tasks")  # the workspace's own tasks for lm-evaluation-harness, YAML and their data
    identity = _Place(".identity")  # params, the files they name, digests of code, sources and base: frozen inputs
    checkpoints = _Place(".checkpoints")  # resumable training state, one folder per fingerprint; never a DVC output
    work = _Place(".work")  # unfinished work, exit records, logs and the workspace lock

    def progress(self, stage: str) -> Path:
        """How far a stage has come: a JSON record per step (`ropeway.runtime.progress`), of its latest start alone."""
        return self.work / f"{stage}.progress.jsonl"

    @property
    def registry_url(self) -> str:
        """The store packages are published to: `ROPEWAY_REGISTRY`, else the folder `registry/` here."""
        return os.environ.get("ROPEWAY_REGISTRY") or (self.root / "registry").as_uri()


def count_bytes(path: Path) -> int:
    """Return the bytes of all files below a path, links not followed."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for each in path.rglob("*"):
        with suppress(OSError):  # another process removed it
            total += each.lstat().st_size if each.is_file() or each.is_symlink() else 0
    return total


def find_root(start: Path | None = None) -> Path:
    """Return the nearest folder upward that holds params.yaml; `start` itself when none does."""
    here = (start or Path.cwd()).resolve()
    return next((folder for folder in (here, *here.parents) if (folder / "params.yaml").is_file()), here)
