"""What the loss alone adds to a process's peak memory, forward and backward: `-m benchmarks.loss_memory plain|chunked`.

Resident memory as Linux accounts it (VmHWM after, less VmRSS before): tracemalloc does not see torch's tensors. fp32,
the published vocabulary of 32,016; the head's weights and their gradient are in both ways.
"""

import json
import re
import sys
from pathlib import Path

import torch

from ropeway.models.supervised_loss import CHUNK_POSITIONS, chunked_losses

POSITIONS, HIDDEN, VOCABULARY = 4096, 192, 32_016  # 4,096 x 32,016 logits in fp32 are 500 MiB


def resident_bytes(name: str) -> int:
    """Return a figure of /proc/self/status, which counts in KiB: proc(5)."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit(f"/proc/self/status has no {name}; this measurement needs Linux")
    return int(found[1]) * 1024


def main(way: str) -> None:
    """Print the peak and the sizes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden = torch.randn(POSITIONS, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCABULARY, (POSITIONS,))
    chunked_losses(hidden[:1], head, targets[:1]).sum().backward()  # the first use of a kernel loads it
    before = resident_bytes("VmRSS")
    if way == "chunked":
        losses = chunked_losses(hidden, head, targets)
    else:
        losses = torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    losses.mean().backward()
    facts = {"positions": POSITIONS, "vocabulary": VOCABULARY, "chunk_positions": CHUNK_POSITIONS}
    print(json.dumps({**facts, "peak_bytes": max(0, resident_bytes("VmHWM") - before)}))


if __name__ == "__main__":
    main(sys.argv[1])
