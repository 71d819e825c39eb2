"""A 32k Llama-type tokenizer without a download: the SentencePiece model in the PyPI package mistral-common, converted.

Its vocabulary and pipeline are of Llama 2's kind (byte-pair encoding with byte fallback, "▁" in front, identity
normalisation); its weights' owner is Mistral AI, licence Apache 2.0.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.tokenizer import LLAMA_SPECIAL, llama_tokenizer, prepare_tokenizer, write_tokenizer

_MODEL = "data/tokenizer.model.v1"  # 32,000 pieces; the later ones have 32,768, hundreds of them control tokens


def find_model() -> Path:
    """Return the path of the SentencePiece model; the package is not imported."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.origin is None:
        raise SystemExit("mistral-common is not installed: run `make bench-prepare`, or pip install -e '.[bench]'")
    return Path(found.origin).parent / _MODEL


def convert(model: Path) -> Tokenizer:
    """Return the fast tokenizer of a SentencePiece BPE model with Llama's pipeline.

    SentencePiece merges the pair that gives the piece of the highest score; tokenizers merges the pair that stands
    first in a list. So each way to cut a piece in two pieces is a merge, in the order of the pieces' scores.
    """
    spoken = SentencePieceProcessor(model_file=str(model))
    pieces = [spoken.id_to_piece(number) for number in range(spoken.vocab_size())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    apart = {n for n in range(len(pieces)) if spoken.is_control(n) or spoken.is_unknown(n) or spoken.is_byte(n)}
    merges = []
    for number in sorted(set(range(len(pieces))) - apart, key=lambda n: (-spoken.get_score(n), n)):
        piece = pieces[number]
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [cut for cut in cuts if all(vocabulary.get(part, -1) not in {-1} | apart for part in cut)]
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    return llama_tokenizer(vocabulary, merges)


def count_differing(tokenizer: Tokenizer, model: Path, lines: Sequence[str]) -> int:
    """Return for how many lines the tokenizer gives other ids than SentencePiece itself."""
    spoken = SentencePieceProcessor(model_file=str(model))
    fast = tokenizer.encode_batch_fast(list(lines), add_special_tokens=False)
    return sum(encoding.ids != ids for encoding, ids in zip(fast, spoken.encode(list(lines)), strict=True))


def write_base(folder: Path, tokenizer: Tokenizer, *, max_length: int) -> None:
    """Leave the tokenizer as the base stage does: role tokens added, template and special tokens named."""
    folder.mkdir(parents=True)
    prepare_tokenizer(tokenizer, dict(LLAMA_SPECIAL), OPEN_ASSISTANT)
    write_tokenizer(folder, tokenizer, dict(LLAMA_SPECIAL), OPEN_ASSISTANT, max_length=max_length)
