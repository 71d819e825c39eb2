"""One measurement of one way to prepare one source, in a process of its own: prints a JSON line.

    python benchmarks/prepare_once.py WAY WORKSPACE WORKERS

Ways: `ours` (tokenize and prepare, as the stages run them, near duplicates and contamination not looked for),
`ours_counting` (they are, as the published profile says), `raw` and `raw_fast` (the tokenizers library's
`encode_batch` and `encode_batch_fast` on the stage's own texts, nothing kept), `trl` (what SFTTrainer does to a data
set before it trains, as it comes), `trl_processes` (the same, told to use as many processes as there are cores).
Imports, reading of the texts for `raw` and making of a model for `trl` are not timed; all that the stage does is.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ropeway.config.load_params import load_profile
from ropeway.config.params import Profile
from ropeway.config.stages import READS
from ropeway.config.tokenize_params import TokenizeParams
from ropeway.data.mixture import plan_chunks
from ropeway.data.raw_records import iterate_records
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import LLAMA_SPECIAL, open_tokenizer
from ropeway.runtime.workspace import Workspace

OTHER_LAYOUT = "prepare_again_with_another_layout"
SOURCE = "text"  # the one source of these workspaces
_BATCH_CHARACTERS = 1 << 22  # of a call of the bare tokenizer; the stage hands it a quarter of that at once
Facts = dict[str, Any]


@contextmanager
def timed(facts: Facts) -> Iterator[None]:
    """Add the block's wall and CPU seconds, those of ended child processes included, to `facts`."""
    began, used = time.perf_counter(), _cpu_seconds()
    yield
    facts |= {"seconds": time.perf_counter() - began, "cpu_seconds": _cpu_seconds() - used}


def _cpu_seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def texts_of(workspace: Workspace, profile: Profile) -> list[str]:
    """Return what the stage hands to the tokenizer: rendered conversations, or documents' chunks."""
    size = dict(profile.mixture)[SOURCE].max_chunk_size
    texts = []
    for record in iterate_records(workspace.raw / SOURCE):
        if isinstance(record, Conversation):
            texts.append(OPEN_ASSISTANT.render(record, end=LLAMA_SPECIAL["eos"]))
        else:
            texts += [record[begin:end] for begin, end in plan_chunks(len(record), size)]
    return texts


def ours(workspace: Workspace, profile: Profile, _: int, *, counting: bool = False) -> Facts:
    """Run tokenize and prepare on a workspace without earlier results, then prepare again with another layout."""
    from ropeway.stages.prepare import stage as prepare
    from ropeway.stages.tokenize import stage as tokenize

    if not counting:
        near, runs = profile.duplicates, profile.contamination
        changed = {"duplicates": near.model_copy(update={"near": "off"})}
        profile = profile.model_copy(update=changed | {"contamination": runs.model_copy(update={"action": "off"})})

    for left in (workspace.tokens, workspace.data, workspace.work):
        shutil.rmtree(left, ignore_errors=True)
    facts: Facts = {"parts": {}}
    run_tokenize = _clocked(tokenize.run, "tokenize", facts["parts"])
    # What repeats and the split; hashing of shards; ledger.
    for part in ("open_tokenized", "split_sources", "write_manifest", "build_ledger"):
        setattr(prepare, part, _clocked(getattr(prepare, part), part, facts["parts"]))
    reads = profile.reading(READS["prepare"])
    with timed(facts):
        run_tokenize(workspace, TokenizeParams.of(profile))
        prepare.run(workspace, reads)
    other = "packed" if profile.layout == "padded" else "padded"
    again = _clocked(prepare.run, OTHER_LAYOUT, facts["parts"])
    again(workspace, reads.model_copy(update={"layout": other}))
    manifest = json.loads((workspace.data / "manifest.json").read_text())
    return facts | {"tokens": sum(source["tokens"] for source in manifest["sources"])}


def ours_counting(workspace: Workspace, profile: Profile, workers: int) -> Facts:
    """The same, and count near duplicates and what training shares with validation."""
    return ours(workspace, profile, workers, counting=True)


def _clocked(function: Callable[..., Any], name: str, parts: dict[str, float]) -> Callable[..., Any]:
    def run(*arguments: object, **named: object) -> object:
        began = time.perf_counter()
        result = function(*arguments, **named)
        parts[name] = parts.get(name, 0.0) + time.perf_counter() - began
        return result

    return run


def raw(workspace: Workspace, profile: Profile, _: int, *, fast: bool = False) -> Facts:
    """Encode the stage's texts, a few MB a call, and forget them."""
    from ropeway.data.text_batches import iterate_batches

    tokenizer = open_tokenizer(workspace.base)
    encode = tokenizer.encode_batch_fast if fast else tokenizer.encode_batch
    batches = list(iterate_batches(texts_of(workspace, profile), len, _BATCH_CHARACTERS))
    facts: Facts = {"tokens": 0}
    with timed(facts):
        for batch in batches:
            facts["tokens"] += sum(map(len, encode(batch)))
    return facts


def raw_fast(workspace: Workspace, profile: Profile, workers: int) -> Facts:
    """The same without offsets, as the stage does."""
    return raw(workspace, profile, workers, fast=True)


def trl(workspace: Workspace, profile: Profile, _: int) -> Facts:
    """Time TRL as it comes: one process, however many cores there are."""
    return _trl(workspace, profile, processes=None)


def trl_processes(workspace: Workspace, profile: Profile, workers: int) -> Facts:
    """Time TRL told to use as many processes as there are cores (`dataset_num_proc`)."""
    return _trl(workspace, profile, processes=workers)


def _trl(workspace: Workspace, profile: Profile, *, processes: int | None) -> Facts:
    """Time `SFTTrainer._prepare_dataset`, as its constructor calls it, on the records that `write_for_trl` left."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    facts: Facts = {}

    class Clocked(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - passed through
            with timed(facts):
                return super()._prepare_dataset(*arguments, **named)

    records = datasets.load_from_disk(workspace.root / "trl")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(workspace.base)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    options = SFTConfig(
        output_dir=str(workspace.root / "trl-out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=profile.max_length,
        packing=False,
        dataset_num_proc=processes,
        assistant_only_loss="messages" in records.column_names,
    )
    trainer = Clocked(LlamaForCausalLM(shape), options, train_dataset=records, processing_class=tokenizer)
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    return facts | {"tokens": tokens, "columns": sorted(trainer.train_dataset.column_names)}


def write_for_trl(workspace: Workspace, profile: Profile) -> None:
    """Leave the records as a data set in the form that TRL reads: `messages`, or `text` a chunk."""
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    for record in iterate_records(workspace.raw / SOURCE):
        if not isinstance(record, Conversation):
            rows = [{"text": text} for text in texts_of(workspace, profile)]
            break
        said = [(("user", "assistant")[at % 2], text) for at, text in enumerate(record.turns)]
        said = [("system", record.system), *said] if record.system else said
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    Dataset.from_list(rows).save_to_disk(workspace.root / "trl")


WAYS: dict[str, Callable[[Workspace, Profile, int], Facts]] = {
    "ours": ours,
    "ours_counting": ours_counting,
    "raw": raw,
    "raw_fast": raw_fast,
    "trl": trl,
    "trl_processes": trl_processes,
}


def main(way: str, root: str, workers: str) -> None:
    """Measure and print."""
    name, profile = load_profile(Path(root) / "params.yaml")
    facts = WAYS[way](Workspace(Path(root), name), profile, int(workers))
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
