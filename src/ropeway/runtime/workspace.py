"""Paths of a workspace, each defined once for all stages."""

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


class _WorkspacePath:
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
    run = _WorkspacePath("runs/{profile}")
    raw = _WorkspacePath("runs/{profile}/raw")  # one folder of parquet files per source, and a manifest
    base = _WorkspacePath("runs/{profile}/base")  # base model and tokenizer with the role tokens, vocabulary padded
    tokens = _WorkspacePath("runs/{profile}/tokens")  # every sequence as tokens, and the keys that find duplicates
    data = _WorkspacePath("runs/{profile}/data")  # token shards and their manifest
    ledger = _WorkspacePath("runs/{profile}/ledger.json")  # counts of every record and token by outcome in prepare
    record_index = _WorkspacePath("runs/{profile}/records.index")  # digest of every record, and what became of it
    report = _WorkspacePath("runs/{profile}/report.html")  # data report: samples, lengths, ledger, refused records
    data_profile = _WorkspacePath("runs/{profile}/data_profile.json")  # counts and sketches of the data, for drift
    model = _WorkspacePath(
        "runs/{profile}/model"
    )  # train's export: weights, config and tokenizer in Hugging Face format
    steps = _WorkspacePath(
        "runs/{profile}/steps.csv"
    )  # one row per optimizer step, without values that depend on the clock
    train_metrics = _WorkspacePath("runs/{profile}/train.json")  # training metrics that do not depend on the clock
    timings = _WorkspacePath(
        "runs/{profile}/provenance.json"
    )  # seconds, tokens/s, host, versions: not part of the model
    evaluation = _WorkspacePath("runs/{profile}/eval.json")  # metrics of base and tuned, per source
    samples = _WorkspacePath("runs/{profile}/samples.json")  # sample answers in the published family's JSON format
    samples_page = _WorkspacePath("runs/{profile}/samples.html")  # the same as a page, base and tuned side by side
    tables = _WorkspacePath("runs/{profile}/tables")  # evaluate's tables as CSV
    plots = _WorkspacePath("runs/{profile}/plots")  # plots of the evaluation (PNG, SVG)
    package = _WorkspacePath(
        "runs/{profile}/package"
    )  # the model in Hugging Face format, its metadata and its manifest
    history = _WorkspacePath("runs/{profile}/history.html")  # all versions over time, written at the end of a run
    pages = _WorkspacePath("runs/{profile}/pages")  # README.md and pages, with a manifest for them and the package

    tasks = _WorkspacePath("configs/tasks")  # tasks of this workspace for lm-evaluation-harness (YAML and data)
    identity = _WorkspacePath(".identity")  # frozen inputs: params, files they name, digests of code, sources, base
    checkpoints = _WorkspacePath(".checkpoints")  # resumable training state, one folder per fingerprint; no DVC output
    work = _WorkspacePath(".work")  # unfinished work, exit records, logs and the workspace lock

    def progress(self, stage: str) -> Path:
        """Return the progress file of a stage: one JSON record per step of its latest attempt (`runtime.progress`)."""
        return self.work / f"{stage}.progress.jsonl"

    @property
    def registry_url(self) -> str:
        """The store that packages are published to: `ROPEWAY_REGISTRY`, else the workspace's folder `registry/`."""
        return os.environ.get("ROPEWAY_REGISTRY") or (self.root / "registry").as_uri()


def count_bytes(path: Path) -> int:
    """Return the total bytes of all files below a path, without following links."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for each in path.rglob("*"):
        with suppress(OSError):  # another process removed it
            total += each.lstat().st_size if each.is_file() or each.is_symlink() else 0
    return total


def format_bytes(count: float) -> str:
    """Return a number of bytes as text in GiB or MiB.

    >>> format_bytes(3 * 2**29)
    '1.5 GiB'
    """
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"


def list_by_time(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder that match, the one written last at the end; a link to nothing is no file."""
    found = []
    for path in folder.glob(pattern):
        with suppress(OSError):  # removed meanwhile
            state = path.stat()
            if stat.S_ISREG(state.st_mode):
                found.append((state.st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def find_root(start: Path | None = None) -> Path:
    """Return the nearest folder at or above `start` that contains params.yaml; `start` itself if there is none."""
    here = (start or Path.cwd()).resolve()
    return next((folder for folder in (here, *here.parents) if (folder / "params.yaml").is_file()), here)
