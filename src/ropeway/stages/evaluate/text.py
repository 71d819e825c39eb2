"""Validation rows as text again: how many bytes a loss was paid for, and the same rows under another tokenizer.

Nats per token cannot be compared across tokenizers, nats per byte can. A source's bytes are the UTF-8 bytes of the
text whose tokens are supervised; special tokens (BOS, roles, ends of turns) have no bytes of their own, though their
losses are in the sum, under every tokenizer alike.

Source: bits per byte as in Gao et al. 2020, "The Pile", arXiv:2101.00027, section 3.1, in nats.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ropeway.config.params import EvaluateParams, RowParams
from ropeway.data.batches import validation_rows
from ropeway.data.loss_mask import loss_mask
from ropeway.data.shards import Kind, Shards, SourceShards, write_shard
from ropeway.models.chat_template import open_template
from ropeway.models.tokenizer import count_tokens, open_tokenizer, read_special, token_text

_CUT_CHARACTER = "\ufffd"  # what is decoded of a character whose last bytes lie behind the row's end
_NO_CHARACTER = "\u200b"  # parts a special token's spelling in text, so that no tokenizer takes it for the token


@dataclass(frozen=True, slots=True)
class Stretch:
    """A special token, or the text between two of them."""

    text: str  # decoded; of a special token, its name
    kind: int  # who said it
    counts: bool  # whether its tokens are supervised
    name: str | None  # `bos`, `eos` or a role token's text, if it is special; None if it is text


def read_stretches(
    ids: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    profile: RowParams,
    tokenizer: Tokenizer,
    special: dict[int, str],
) -> Iterator[Stretch]:
    """Yield the stretches of one sequence from its beginning, perhaps cut: `(T,)` tokens, and who said each.

    Each is decoded by itself, so that the blank which some tokenizers put in front is taken off; `special`: id -> name.
    """
    counts = np.append(loss_mask(kinds, profile)[:-1], False)
    is_special = np.isin(ids, list(special))
    borders = np.flatnonzero(is_special | np.append(True, is_special[:-1]))
    for begin, end in zip(borders, [*borders[1:], len(ids)], strict=True):
        number = int(ids[begin])
        text = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        name = special.get(number)
        yield Stretch(text, int(kinds[begin]), bool(counts[max(begin - 1, 0)]), name)


def count_bytes(shards: Shards, profile: RowParams, folder: Path) -> list[int]:
    """Return each source's bytes: UTF-8, of the text that is supervised in its validation rows.

    `folder` holds the tokenizer that made the shards.
    """
    totals = [0] * len(shards.sources)
    for source, row in _read_rows(shards, profile, folder):
        totals[source] += sum(len(one.text.encode()) for one in row if one.counts and one.name is None)
    return totals


def translate(
    shards: Shards, profile: EvaluateParams, folder: Path, other: Path, out: Path
) -> tuple[Shards, EvaluateParams]:
    """Return validation rows of the same texts in the tokens of another folder's tokenizer, and a profile to read them.

    Rows keep their text, so they may have more tokens than `max_length`; the returned profile cuts none.

    `folder` holds the tokenizer that made the shards, `other` the other one; `out` is an empty folder for new shards.

    Raises:
        ConfigError: The other tokenizer lacks a special token of the template.
    """
    tokenizer = open_tokenizer(other)
    special = read_special(other, tokenizer, open_template(other))
    rows: list[list[tuple[NDArray[np.int64], NDArray[np.uint8]]]] = [[] for _ in shards.sources]
    encode = _encoder(tokenizer, special)
    for source, row in _read_rows(shards, profile, folder):
        rows[source].append(encode(row))
    sources = [
        _write_source(source, found, out / source.name, count_tokens(tokenizer))
        for source, found in zip(shards.sources, rows, strict=True)
    ]
    longest = max((len(ids) for found in rows for ids, _ in found), default=profile.max_length)
    seen = {name: getattr(profile, name) for name in profile.model_fields_set} | {"max_length": longest}
    new = replace(shards, sources=tuple(sources), manifest={**shards.manifest, "special": special})
    return new, profile.model_construct(**seen)


def _read_rows(shards: Shards, profile: RowParams, folder: Path) -> Iterator[tuple[int, list[Stretch]]]:
    """Yield (source, stretches) of every validation row; a half character at a cut is left out."""
    tokenizer = open_tokenizer(folder)
    names = {number: name for name, number in shards.special.items() if name != "pad"}
    for number, (_, rows) in enumerate(validation_rows(shards, profile)):
        for (piece,) in rows:
            tokens, kinds = shards.sources[number].read(piece.sequence)
            found = list(read_stretches(tokens[: piece.end], kinds[: piece.end], profile, tokenizer, names))
            if piece.end < len(tokens) and found[-1].name is None:
                found[-1] = replace(found[-1], text=found[-1].text.rstrip(_CUT_CHARACTER))
            elif kinds[-1] == Kind.DOCUMENT_END:
                found[-1] = replace(found[-1], kind=int(Kind.DOCUMENT_END))
            yield number, found


def _encoder(
    tokenizer: Tokenizer, special: dict[str, int]
) -> Callable[[Sequence[Stretch]], tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Return what turns stretches into (tokens, kinds)."""
    texts = {name: token_text(tokenizer, number) for name, number in special.items()}
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    spelt = re.compile("|".join(re.escape(text) for text in sorted(added, key=len, reverse=True)))
    numbers = list(special.values())

    def part(hit: re.Match[str]) -> str:
        return f"{hit[0][:1]}{_NO_CHARACTER}{hit[0][1:]}"

    def encode(row: Sequence[Stretch]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        body = [one for one in row[row[0].name == "bos" :] if one.name or one.text]
        text = "".join(texts[one.name] if one.name else spelt.sub(part, one.text) for one in body)
        ids = np.asarray(tokenizer.encode(text).ids, dtype=np.int64)
        if ids[0] == special["bos"]:  # the post-processor put it there
            body.insert(0, replace(row[0], name="bos"))
        # Where a special token stands a stretch ends and another begins: each token has the kind of its own.
        is_special = np.isin(ids, numbers)
        turn = np.cumsum(is_special | np.append(True, is_special[:-1])) - 1
        kinds = np.array([one.kind for one in body], dtype=np.uint8)[turn]
        inner = kinds == Kind.DOCUMENT_END
        kinds[:-1][inner[:-1]] = Kind.DOCUMENT
        return ids, kinds

    return encode


def _write_source(
    source: SourceShards, rows: list[tuple[NDArray[np.int64], NDArray[np.uint8]]], folder: Path, vocab_size: int
) -> SourceShards:
    folder.mkdir(parents=True)
    lengths = np.asarray(write_shard(folder, 0, rows, vocab_size=vocab_size), dtype=np.int32)
    everything = np.arange(len(rows))
    return SourceShards(source.name, source.kind, folder, (len(rows),), lengths, everything[:0], everything)
