"""The real dvc.yaml with a run of seconds: every stage, two DeepSpeed ranks, a tiny Llama."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.support import forked
from tests.support.shared import build_once
from tests.support.shipped_params import read_shipped_params

ROOT = Path(__file__).parents[2]
BLOCK = """
tiny:
  <<: *published
  dtype: fp32
  learning_rate: 2e-3
  resume_from: null
  model_name: scratch
  deepspeed_config: configs/zero2_cpu.json
  max_length: 64
  warmup_steps: 2
  use_flash_attention: false
  gradient_accumulation_steps: 1
  per_device_train_batch_size: 2
  per_device_eval_batch_size: 8
  eval_steps: 8
  save_steps: 4
  save_total_limit: 2
  async_save: false
  num_train_epochs: 1
  global_batch_size: 4
  superhot_config: {type: linear, scale: 2}
  datasets:
    - docstrings: {max_val_set: 8, size: 60}
    - topics: {max_chunk_size: 200, max_val_set: 8, size: 37}
  sources:
    docstrings: {kind: python_docs, part: docstrings, expected_rows: null}
    topics: {kind: python_docs, part: topics, expected_rows: null}
  base: {kind: scratch}
  expected_model:
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 2
    vocab_size: 600
    max_position_embeddings: 32
    rope_theta: 10000.0
    rms_norm_eps: 1e-5
    tie_word_embeddings: false
  stop:
    {max_skipped_in_row: 5, spike_window_steps: 8, spike_ratio: 2.0, max_spikes_in_row: 3, rewinds: 0,
    hang_seconds: null}
  duplicates: {exact: count, near: count, threshold: 0.8, permutations: 128, ngram: 5}
  contamination: {ngram: 13, action: count, prompts: [configs/prompts.jsonl]}
  evaluation:
    prompts: configs/prompts.jsonl
    sampling: configs/sampling.json
    max_new_tokens: 4
    positions: {rows: 2, row_tokens: 96, bucket_tokens: 32}
    passkey: {lengths: [384], depths: [0.5], repeats: 1}
    long_context: null
    tasks: []
  gate: {max_loss_increase_nats: 0.01, min_gain_over_base_nats: 0.1,
    max_accuracy_decrease: null, max_position_loss_increase_nats: null, max_passkey_decrease: null,
    min_passkey_accuracy: null, max_long_context_decrease: null, max_task_decrease_errors: null, drift: null}
  package: {dtype: fp32, max_shard_bytes: 5000000000}
  card:
    license: apache-2.0
    license_name: Apache License 2.0
    license_link: https://www.apache.org/licenses/LICENSE-2.0
    base_model: null
    upstream_datasets: []
    developers: []
    sponsored_by: null
    thanks: null
"""
STEPS = 24  # (60 + 37) // 4


class MainJob:
    """A workspace as a user has it, and the commands a user gives."""

    def __init__(self, root):
        self.root, self._edited = root, False
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("ROPEWAY_", "DVC_"))}
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment["ROPEWAY_RANKS"] = "2"
        self.environment["ROPEWAY_GRACE_SECONDS"] = "30"
        self.environment["WANDB_MODE"] = "disabled"

    def start(self, *command):
        """Start a command; its output, standard error included, comes line by line.

        A stage that is started by itself after an edit gets new digests first, as DVC gives it.
        """
        if command[:2] == ("ropeway", "stage") and self._edited:
            self._edited = False
            self.do("ropeway", "stage", "identity")
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def do(self, *command, code=0):
        """Run a command to its end and return what it printed."""
        with self.start(*command) as process:
            text = process.stdout.read()
        assert process.returncode == code, text
        return text

    def stage(self, name, *, code=0):
        """Run a stage to its end in a forked process, without a supervisor; return what it printed.

        A model that is there is removed first, as DVC does.
        """
        if self._edited:
            self._edited = False
            self.stage("identity")
        if name == "train":
            shutil.rmtree(self.run / "model", ignore_errors=True)
        words = ("stage", name) if name == "identity" else ("execute-stage", name)
        command = [sys.executable, "-m", "ropeway.cli.main", *words]
        done = forked.run(command, cwd=self.root, env={**self.environment, "DS_ACCELERATOR": "cpu"})
        assert done.returncode == code, done.stdout
        return done.stdout

    def repro(self):
        return self.do("dvc", "repro")

    def copy(self, root):
        """Return a copy of the workspace elsewhere."""
        return MainJob(shutil.copytree(self.root, root, symlinks=True))

    def edit(self, name, old, new):
        path = self.root / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        head, _, tail = text.rpartition(old)  # the last one: the tiny block
        path.write_text(head + new + tail, encoding="utf-8")
        self._edited = True

    def commit(self, message):
        identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        self.do("git", *identity, "add", "--all")
        self.do("git", *identity, "commit", "-q", "-m", message)

    def revision(self):
        return self.do("git", "rev-parse", "HEAD").strip()

    @property
    def run(self):
        return self.root / "runs" / "tiny"

    def weights(self):
        return (self.run / "model" / "model.safetensors").read_bytes()


def make_main_job(root):
    """Return a fresh workspace: the project's own files, the tiny run chosen, one commit."""
    root.mkdir(parents=True)
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, root)
    for folder in ("configs", "flows"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", root / ".dvc")
    (root / "params.yaml").write_text(read_shipped_params("tiny") + BLOCK, encoding="utf-8")
    job = MainJob(root)
    job.do("git", "init", "-q")
    job.commit("a workspace")
    return job


class MainJobs(NamedTuple):
    """Workspaces of one job, the same for the whole session: to be read and copied, never changed.

    Attributes:
        prepared: The stages before training have run, under DVC.
        finished: `dvc repro` has run to its end.
        said: What it printed.
    """

    prepared: MainJob
    finished: MainJob
    said: str


def share_main_jobs(tmp_path_factory):
    """Return the session's MainJobs; the first call takes a minute."""

    def build(folder):
        job = make_main_job(folder / "finished")
        said = job.do("dvc", "repro", "prepare", "report_data")
        job.copy(folder / "prepared")
        (folder / "said").write_text(said + job.repro())

    folder = build_once(tmp_path_factory, "main-job", build)
    return MainJobs(MainJob(folder / "prepared"), MainJob(folder / "finished"), (folder / "said").read_text())
