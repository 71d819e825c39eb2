"""The parity vectors, and the few lines that bring them into the product's own objects."""

import hashlib
import json
import os
import random
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from ropeway.config.load_params import load_profile
from ropeway.data.batches import Piece, plan_window
from ropeway.data.shards import FORMAT, Kind, Shards, SourceShards, write_shard
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import count_tokens, open_tokenizer, read_special
from ropeway.stages.tokenize.encode import Encoder

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("ROPEWAY_PARITY_DIR", ROOT / "tests" / "contract" / "parity"))
TOKENIZER = FOLDER / "tokenizer"
compared: Counter[str] = Counter()  # file -> values compared with a vector, shown when the session ends


@cache
def vectors(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def cases(name, key="cases"):
    return [(f"{number}-{case.get('id', '')}", case) for number, case in enumerate(vectors(name)[key])]


def same(file, found, expected, what=""):
    """Hold one value against its vector."""
    if isinstance(found, np.ndarray):
        found = found.tolist()
    assert found == expected, f"{file}: {what}"
    compared[file] += 1


def bits(mask):
    return "".join(map(str, np.asarray(mask).astype(int).tolist()))


def sha256(numbers):
    return hashlib.sha256(",".join(map(str, np.asarray(numbers, dtype=np.int64).ravel().tolist())).encode()).hexdigest()


@cache
def _card():
    return load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")[1]


def published(**changes):
    """The run of the card with the switches where the original has them, and what one case says."""
    return _card().model_copy(update={"document_end": "published", **changes})


def conversation(record):
    turns = [turn[side] for turn in record["conversation"] for side in ("input", "output")]
    return Conversation(tuple(turns), record["instruction"])


class Bench:
    """Sequences encoded with the vectors' tokenizer and opened as shards, so that the product collates them."""

    def __init__(self, folder):
        self.folder = folder
        self.tokenizer = open_tokenizer(TOKENIZER)
        self.special = read_special(TOKENIZER, self.tokenizer, OPEN_ASSISTANT)
        self.encoder = Encoder(self.tokenizer, self.special, OPEN_ASSISTANT, None, "parse")
        self.records = {case["id"]: conversation(case["record"]) for _, case in cases("formatting")}

    def talk(self, name):
        """(tokens, kinds, False) of a conversation of formatting.json, as prepare encodes it."""
        if not self.records[name].turns:  # prepare refuses it and counts it; the original reads a lone BOS
            tokens = np.asarray(self.tokenizer.encode("").ids)
            return tokens, np.full(len(tokens), Kind.SYSTEM, np.uint8), False
        (encoded,) = self.encoder.copy_without_counts().encode_batches([self.records[name]])
        return encoded.tokens, encoded.kinds, False

    def text(self, text):
        """(tokens, kinds, True) of a document's chunk."""
        (encoded,) = self.encoder.copy_without_counts().encode_batches([text])
        return encoded.tokens, encoded.kinds, True

    def shards(self, sequences):
        """Shards with two sources: conversations, documents; and the pieces' places in them."""
        parts = [[s for s in sequences if not s[2]], [s for s in sequences if s[2]]]
        sources = []
        for name, part in zip(("conversation", "document"), parts, strict=True):
            folder = self.folder / f"{len(list(self.folder.iterdir()))}"
            folder.mkdir()
            pairs = [(tokens, kinds) for tokens, kinds, _ in part]
            lengths = write_shard(folder, 0, pairs, vocab_size=count_tokens(self.tokenizer))
            everything = np.arange(len(part))
            sources.append(SourceShards(name, name, folder, (len(part),), np.asarray(lengths), everything, everything))
        seen: Counter[bool] = Counter()
        places = []
        for sequence in sequences:
            places.append((int(sequence[2]), seen[sequence[2]]))
            seen[sequence[2]] += 1
        return Shards(tuple(sources), {"format": FORMAT, "special": self.special}), places

    def rows(self, sequences, *, max_length, probability, generator):
        """(shards, one row per sequence), windows drawn one after the other."""
        shards, places = self.shards(sequences)
        rows = []
        for (tokens, _, is_document), (source, number) in zip(sequences, places, strict=True):
            begin, end = plan_window(
                len(tokens),
                max_length=max_length,
                probability=probability,
                generator=generator,
                is_document=is_document,
            )
            rows.append((Piece(source, number, begin, end),))
        return shards, rows


def seeded(case):
    return random.Random(case["seed"])
