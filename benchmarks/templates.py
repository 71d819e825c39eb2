"""How fast conversations are encoded in a base model's own chat template, against the bare tokenizer: one JSON line.

    python -m benchmarks.templates FOLDER [--megabytes N] [--rounds N] [--turn-characters N]

FOLDER has a tokenizer and a chat template, e.g. runs/smollm2/base. `ours` renders, tokenizes and marks the answers;
`raw` and `raw_fast` are the tokenizers library's `encode_batch` (with offsets) and `encode_batch_fast` on the same
rendered texts, ids read. CPU seconds of one thread, the lowest of the rounds, which alternate. `--turn-characters`
cuts the same text into turns of that length; docstrings have turns of 80 on average.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

from benchmarks.texts import conversations, digest
from ropeway.models.chat_template import open_template
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import open_tokenizer, read_special
from ropeway.stages.tokenize.encode import Encoder

_BATCH = 100  # conversations of a call of the bare tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.templates", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn-characters", type=int, default=None)
    options = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, template = open_tokenizer(options.folder), open_template(options.folder)
    chats = conversations(options.megabytes)
    if options.turn_characters:
        chats = [_cut(one, options.turn_characters) for one in chats]
    special = read_special(options.folder, tokenizer, template)
    encoder = Encoder(tokenizer, special, template, None, "parse", "per_turn")
    texts = [template.render(one, end="") for one in chats]
    batches = [texts[at : at + _BATCH] for at in range(0, len(texts), _BATCH)]
    ways: dict[str, Callable[[], object]] = {
        "raw_fast": lambda: [[found.ids for found in tokenizer.encode_batch_fast(one)] for one in batches],
        "raw": lambda: [[found.ids for found in tokenizer.encode_batch(one)] for one in batches],
        "ours": lambda: list(encoder.copy_without_counts().encode_batches(chats)),
    }
    rounds = [{name: _clocked(way) for name, way in ways.items()} for _ in range(options.rounds)]
    seconds = {name: min(one[name] for one in rounds) for name in ways}
    facts = {
        "benchmark": "templates",
        "text": digest(chats),
        "conversations": len(chats),
        "turns": sum(len(one.turns) for one in chats),
        "characters_per_turn": round(mean(len(turn) for one in chats for turn in one.turns)),
        "cpu_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "speed_over_raw": round(seconds["raw"] / seconds["ours"], 3),
        "speed_over_raw_fast": round(seconds["raw_fast"] / seconds["ours"], 3),
    }
    print(json.dumps(facts))


def _cut(chat: Conversation, characters: int) -> Conversation:
    """Return the conversation's text in turns of this length; the last answer has what is left."""
    text = "\n".join(chat.turns)
    count = max(2, len(text) // characters // 2 * 2)
    begins = [at * min(characters, len(text) // 2) for at in range(count)]
    return Conversation(tuple(text[slice(*ends)] for ends in pairwise([*begins, len(text)])), chat.system)


def _clocked(way: Callable[[], object]) -> float:
    began = time.process_time()
    way()
    return time.process_time() - began


if __name__ == "__main__":
    main(sys.argv[1:])
