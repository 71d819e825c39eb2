"""What measuring costs beyond the model's own forward pass, and whether its memory grows with the rows.

One JSON line, 1 when a promise fails. A random Llama, documents of random tokens, all of them supervised (which asks
most of the head). The forward pass it is compared with has all logits of the same batches, made before, and drops
them; both take turns, and processor time is counted, so that a busy machine troubles neither. Peak memory is a fresh
process's, over 50 rows and over 500.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.config.params import Profile
from ropeway.config.sections import DatasetOptions
from ropeway.data.batches import collate
from ropeway.data.shards import Kind, Shards, SourceShards, write_shard
from ropeway.stages.evaluate.evaluation_workers import Share
from ropeway.stages.evaluate.token_scores import all_rows, plan_batches, score_sources, sum_batches

PROMISED_THROUGHPUT = 0.9  # of the forward pass alone
PROMISED_GROWTH = 1.05  # of peak memory, from 50 rows to 500
ROW_TOKENS, VOCABULARY, BATCH_ROWS, ROUNDS = 128, 8192, 8, 7
# Stored, the logits of 500 rows would be 500 x 128 x 8,192 x 4 bytes = 2.1 GB.
FEW, MANY, TIMED = 50, 500, 32


def make(folder: Path, rows: int) -> tuple[LlamaForCausalLM, Shards, Profile]:
    """Return a model, rows in shards and what measure reads of a profile."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY)).eval()
    generator = np.random.default_rng(0)
    kinds = np.full(ROW_TOKENS, Kind.DOCUMENT, dtype=np.uint8)
    sequences = [(generator.integers(3, VOCABULARY, ROW_TOKENS), kinds) for _ in range(rows)]
    lengths = np.asarray(write_shard(folder, 0, sequences, vocab_size=VOCABULARY), dtype=np.int32)
    numbers = np.arange(rows)
    source = SourceShards("text", "document", folder, (rows,), lengths, numbers[:0], numbers)
    profile = Profile.model_construct(
        datasets=[{"text": DatasetOptions()}],
        document_end="masked",
        label_masking=True,
        max_length=ROW_TOKENS,
        per_device_eval_batch_size=BATCH_ROWS,
        what_counts="published",
    )
    return model, Shards((source,), {"special": {"bos": 1, "eos": 2, "pad": 2}}), profile


def measure(model: LlamaForCausalLM, shards: Shards, profile: Profile) -> None:
    """Score all rows."""
    score_sources(sum_batches(model, shards, profile, share=Share(0, 1)), shards, name="tuned")


def throughput(folder: Path) -> float:
    """Return measuring's rows per second as a share of the forward pass's: the median of interleaved rounds."""
    model, shards, profile = make(folder, TIMED)
    rows = all_rows(shards, profile)
    batches = [
        torch.from_numpy(collate([rows[row] for row in batch], shards, profile, pad_to_multiple_of=None).input_ids)
        for batch in plan_batches([ROW_TOKENS] * len(rows), BATCH_ROWS)
    ]

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(input_ids=batch, use_cache=False)

    shares = []
    for number in range(ROUNDS + 1):
        alone, whole = _seconds(forward), _seconds(lambda: measure(model, shards, profile))
        if number:  # the first warms up
            shares.append(alone / whole)
    return statistics.median(shares)


def _seconds(work) -> float:  # noqa: ANN001 - any callable
    began = time.process_time()
    work()
    return time.process_time() - began


def peak_bytes(rows: int) -> int:
    """Return the peak memory of a fresh process that evaluates `rows` rows."""
    done = subprocess.run([sys.executable, __file__, str(rows)], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def main() -> int:
    """Print the figures; return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        share = throughput(Path(folder))
    few, many = peak_bytes(FEW), peak_bytes(MANY)
    kept = share >= PROMISED_THROUGHPUT and many <= PROMISED_GROWTH * few
    facts = {"bench": "evaluate", "share_of_forward": round(share, 3), "peak_bytes_50_rows": few}
    print(json.dumps({**facts, "peak_bytes_500_rows": many, "growth": round(many / few, 4), "promise_kept": kept}))
    return 0 if kept else 1


def measure_rows(rows: int) -> None:
    """Evaluate `rows` rows and print this process's peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        measure(*make(Path(folder), rows))
    # Not getrusage: a child's peak there starts from its parent's (both came out equal, to the byte).
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    print(int(peak.split()[1]) * 1024)  # in KiB there


if __name__ == "__main__":
    torch.set_num_threads(1)  # its own figure does not depend on how many cores are free
    sys.exit(main() if len(sys.argv) == 1 else measure_rows(int(sys.argv[1])))
