"""Where things lie in a workspace: one object per run, so no room spells a path twice."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder that holds params.yaml, and one profile in it."""

    root: Path
    profile: str

    @property
    def run(self) -> Path:
        """`runs/<profile>`: the tables on which the rooms leave their files."""
        return self.root / "runs" / self.profile

    @property
    def raw(self) -> Path:
        """Fetch leaves one folder of parquet files per source here, and a manifest."""
        return self.run / "raw"

    @property
    def base(self) -> Path:
        """The base model and its tokenizer with the role tokens, vocabulary padded."""
        return self.run / "base"

    @property
    def tokens(self) -> Path:
        """Every sequence as tokens, and what records are compared by."""
        return self.run / "tokens"

    @property
    def data(self) -> Path:
        """Token shards and their manifest, nothing else."""
        return self.run / "data"

    @property
    def ledger(self) -> Path:
        """Prepare's account of every record and token."""
        return self.run / "ledger.json"

    @property
    def report(self) -> Path:
        """The data's page for people: samples token by token, lengths, ledger, refused records."""
        return self.run / "report.html"

    @property
    def model(self) -> Path:
        """Train's export: weights, config and tokenizer as others load them."""
        return self.run / "model"

    @property
    def steps(self) -> Path:
        """One line per optimizer step; columns that depend on the clock stand in `timings`."""
        return self.run / "steps.csv"

    @property
    def train_metrics(self) -> Path:
        """Train's figures that do not depend on the clock."""
        return self.run / "train.json"

    @property
    def timings(self) -> Path:
        """Seconds, tokens/s, host and library versions of the training: true, but not part of the model."""
        return self.run / "provenance.json"

    @property
    def evaluation(self) -> Path:
        """Evaluate's metrics, base and tuned, per source."""
        return self.run / "eval.json"

    @property
    def samples(self) -> Path:
        """Sample answers in the published family's JSON format."""
        return self.run / "samples.json"

    @property
    def samples_page(self) -> Path:
        """The same for people: one page, base and tuned side by side."""
        return self.run / "samples.html"

    @property
    def tables(self) -> Path:
        """Evaluate's tables (CSV)."""
        return self.run / "tables"

    @property
    def plots(self) -> Path:
        """Pictures of the evaluation (PNG, SVG)."""
        return self.run / "plots"

    @property
    def package(self) -> Path:
        """The model as others load it, its facts and its manifest."""
        return self.run / "package"

    @property
    def pages(self) -> Path:
        """README.md and pages of a version, with the manifest that covers them and the package."""
        return self.run / "pages"

    @property
    def tasks(self) -> Path:
        """The workspace's own tasks for lm-evaluation-harness, YAML and their data."""
        return self.root / "configs" / "tasks"

    @property
    def identity(self) -> Path:
        """Digests of code, sources, base and DeepSpeed config, written by the always-run first stage."""
        return self.root / ".identity"

    @property
    def checkpoints(self) -> Path:
        """Resumable training state, one folder per fingerprint. Never a DVC output."""
        return self.root / ".checkpoints"

    @property
    def work(self) -> Path:
        """Unfinished work, exit records, logs and the workspace lock."""
        return self.root / ".work"

    def progress(self, stage: str) -> Path:
        """How far a stage has come: a JSON record per step (`ropeway.runtime.progress`), of its latest start alone."""
        return self.work / f"{stage}.progress.jsonl"

    @property
    def registry_url(self) -> str:
        """The store packages are published to: `ROPEWAY_REGISTRY`, else the folder `registry/` here."""
        return os.environ.get("ROPEWAY_REGISTRY") or (self.root / "registry").as_uri()


def find_root(start: Path | None = None) -> Path:
    """Return the nearest folder upward that holds params.yaml; `start` itself when none does."""
    here = (start or Path.cwd()).resolve()
    return next((folder for folder in (here, *here.parents) if (folder / "params.yaml").is_file()), here)
