"""One process of `make bench-opening`: writes the model, or opens it as a rank of a training does and waits.

-m benchmarks.opening_rank write FOLDER SHAPE
-m benchmarks.opening_rank open FOLDER DTYPE DEVICE      prints imported, waits, prints opened, waits
"""

import json
import sys
from pathlib import Path

import torch
import transformers

from ropeway.models.open_model import DTYPES, create_model, open_folder


def write(folder: Path, shape: str) -> None:
    """Write a random model in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    create_model(json.loads(shape)).save_pretrained(folder)


def open_it(folder: Path, dtype: str, device: str) -> None:
    """Open the model when told to."""
    if device == "cuda":
        torch.zeros(1, device=device)  # CUDA's own memory is not the model's
    print("imported", flush=True)
    sys.stdin.readline()
    model = open_folder(folder, DTYPES[dtype], device=device)
    if device == "cpu":
        for part in model.parameters():
            part.sum()  # reads it
    print("opened", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), sys.argv[3])
    else:
        open_it(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
