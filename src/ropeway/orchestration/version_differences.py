"""What is different between a published version and the same run made again: pure, over what both left in writing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
# Of an attempt at training: what can change its rounding, hence its weights. Clock and host cannot.
_ENVIRONMENT = (
    "python", "torch", "deepspeed", "transformers", "device", "kernels", "ranks", "threads_per_rank", "attention",
)  # fmt: skip
_CLOCK = "/provenance.json"  # seconds and hosts: another one every time


@dataclass(frozen=True, slots=True)
class Record:
    """A run in writing.

    Attributes:
        files: Path in the package -> sha256.
        facts: What the package's manifest says beside its files.
        block: The profile's block of params.yaml.
        lock: dvc.lock.
        timings: train's provenance.json.
    """

    files: Mapping[str, str]
    facts: Json
    block: Json
    lock: Json
    timings: Json


def other_weights(then: Record, now: Record) -> list[str]:
    """Return the weight files whose bytes differ, or that only one of both has."""
    return [name for name in _other_files(then, now) if name.endswith(".safetensors")]


def describe_differences(then: Record, now: Record) -> list[str]:
    """Return every difference in words, causes before consequences; none for equal runs."""
    return [
        *(f"params: {line}" for line in _compare(_leaves(then.block), _leaves(now.block))),
        *_environment(then.timings, now.timings),
        *_stages(then.lock, now.lock),
        *(f"{line}" for line in _compare(_leaves(then.facts), _leaves(now.facts))),
        *(f"{name}: other bytes" for name in _other_files(then, now)),
    ]


def _other_files(then: Record, now: Record) -> list[str]:
    names = sorted({*then.files, *now.files})
    return [name for name in names if then.files.get(name) != now.files.get(name)]


def _environment(then: Json, now: Json) -> Iterator[str]:
    old, new = (list(timings.get("attempts", [])) for timings in (then, now))
    if not old:
        yield "environment: nothing is recorded of the one then"
        return
    if not new:
        yield "environment: nothing is recorded of this one"
        return
    for key in _ENVIRONMENT:
        seen = [list(dict.fromkeys(str(attempt.get(key)) for attempt in attempts)) for attempts in (old, new)]
        if seen[0] != seen[1] and any(key in attempt for attempt in old):
            yield f"{key.replace('_', ' ')}: {', then '.join(seen[0])} then, {', then '.join(seen[1])} now"


def _stages(then: Json, now: Json) -> Iterator[str]:
    """Yield which stage read something else from outside, and which read the same and yet left something else."""
    new = now.get("stages", {})
    for name, old in then.get("stages", {}).items():
        if name not in new:
            continue
        read = [path for path in _other_entries(old, new[name], "deps") if path.startswith(".identity/")]
        for path in read:
            kind = path.removeprefix(".identity/").removesuffix(".json").split("-")[0]
            yield f"stage {name}: {_WORDS.get(kind, path)}"
        left = [path for path in _other_entries(old, new[name], "outs") if not path.endswith(_CLOCK)]
        if left and not _other_entries(old, new[name], "deps"):
            yield f"stage {name}: read the same and left another {', '.join(left)}"


_WORDS = {
    "code": "its code means something else",
    "sources": "the sources are others now (its data was restored by digest all the same)",
    "base": "the base is another one",
    "deepspeed": "the DeepSpeed JSON is another one",
    "prompts": "the prompts are others",
    "contamination": "the evaluation prompts are others",
}


def _other_entries(then: Json, now: Json, kind: str) -> list[str]:
    old, new = ({one["path"]: one.get("md5") for one in stage.get(kind, [])} for stage in (then, now))
    return [path for path in old if path in new and old[path] != new[path]]


def _compare(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for key in dict.fromkeys([*then, *now]):
        if then.get(key) != now.get(key):
            yield f"{key}: {then.get(key, 'nothing')} then, {now.get(key, 'nothing')} now"


def _leaves(value: object, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        return {name: text for inner, one in value.items() for name, text in _leaves(one, f"{key}.{inner}").items()}
    return {key.removeprefix("."): str(value)}
