"""Planned against rehearsed GPU memory in seven configurations of the published run: one JSON line, 1 if one is off.

`python -m benchmarks.engine_rehearsal [--layers N] [--only NAME]`. With the published 40 layers about two minutes
of one core per configuration and rank; both ranks run at the same time.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ropeway.config.load_params import load_profile
from ropeway.config.params import Profile
from ropeway.config.sections import Lora
from ropeway.config.zero import read_zero
from ropeway.engine_rehearsal.compare import planned_peaks, run_rank
from ropeway.planning.memory import Load

ROOT = Path(__file__).parents[1]
NAME, RANKS, LAYERS = "llama2_13b_orca_8k", 8, 40
PROMISED = 0.05  # planned over rehearsed peak
Configuration = tuple[Profile, str]  # profile, text of its DeepSpeed JSON


def all_configurations(layers: int = LAYERS) -> dict[str, Configuration]:
    """Return the published run with another number of layers: ZeRO 1 to 3, offloaded, packed, LoRA, shared rows."""
    _, profile = load_profile(ROOT / "params.yaml", NAME)
    profile = profile.model_copy(
        update={"expected_model": profile.expected_model.model_copy(update={"num_hidden_layers": layers})}
    )
    named = json.loads((ROOT / profile.deepspeed_config).read_text())

    def stage(number: int, **more: object) -> str:
        return json.dumps(named | {"zero_optimization": named["zero_optimization"] | {"stage": number, **more}})

    offload = {"offload_optimizer": {"device": "cpu"}}
    packed = profile.model_copy(update={"layout": "packed"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = Lora(rank=16, alpha=32, dropout=0.0, target_modules=targets, train_embeddings=False)
    stretched = profile.superhot_config.model_copy(update={"scale": 32})
    long = {
        "max_length": 131072,
        "per_device_train_batch_size": 1,
        "sequence_parallel": 4,
        "superhot_config": stretched,
    }
    adapted = profile.model_copy(update={"peft_model": True, "lora": lora})
    return {
        "ZeRO-2 (published)": (profile, stage(2)),
        "ZeRO-3": (profile, stage(3)),
        "ZeRO-2, packed, optimizer offloaded": (packed, stage(2, **offload)),
        "ZeRO-1": (profile, stage(1)),
        "ZeRO-2, LoRA": (adapted, stage(2)),
        "ZeRO-2, rows of 131,072 shared by 4 ranks": (packed.model_copy(update=long), stage(2)),
        "ZeRO-3, optimizer offloaded": (profile, stage(3, **offload)),
    }


def load_of(configuration: Configuration) -> Load:
    """Return the load of a rank."""
    profile, text = configuration
    return Load.of(profile, read_zero(text, profile.deepspeed_config), ranks=RANKS)


def planned(configuration: Configuration, *, rank: int) -> dict[str, int]:
    """Return the planned peak in bytes by phase."""
    return planned_peaks(load_of(configuration), rank=rank)


def compare(configurations: dict[str, Configuration], rank: int) -> dict[str, dict[str, object]]:
    """Return planned and rehearsed peaks of one rank by configuration, and the planned over the rehearsed one."""
    found = {}
    for name, configuration in configurations.items():
        began = time.perf_counter()
        peaks = run_rank([configuration], rank=rank, ranks=RANKS)[0]
        expected = planned(configuration, rank=rank)
        off = max(expected.values()) / max(peaks["card"].values()) - 1
        facts = {"planned": expected, "rehearsed": peaks["card"], "host": peaks["host"], "difference": round(off, 4)}
        found[name] = {**facts, "seconds": round(time.perf_counter() - began)}
        print(f"rank {rank}, {name}: {off:+.1%}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Print the figures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--only", help="name of one configuration")
    options = parser.parse_args()
    chosen = all_configurations(options.layers)
    if options.only:
        chosen = {options.only: chosen[options.only]}
    ranks = (0, RANKS - 1)
    with ThreadPoolExecutor(len(ranks)) as pool:
        results = dict(zip(ranks, pool.map(lambda rank: compare(chosen, rank), ranks), strict=True))
    kept = all(abs(float(str(one["difference"]))) <= PROMISED for found in results.values() for one in found.values())
    facts = {"bench": "engine_rehearsal", "profile": NAME, "layers": options.layers, "ranks": RANKS}
    print(json.dumps({**facts, "bytes": results, "promise_kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
