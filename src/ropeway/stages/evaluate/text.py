"""Validation rows decoded to text: their size for nats/byte, and the same rows under another tokenizer.

Nats/token cannot be compared across tokenizers, nats/byte can. A source's bytes are the UTF-8 bytes of its supervised
text. Special tokens (BOS, roles, ends of turns) have no bytes, but their losses are in the sum under every tokenizer.

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

_CUT_CHARACTER = "\ufffd"  # decoded from a character that the end of the row truncates
_NO_CHARACTER = "\u200b"  # zero-width space: keeps a tokenizer from parsing a special token's text as the token


@dataclass(frozen=True, slots=True)
class Segment:
    """A special token, or a part of the text between two of them that is supervised as a whole or not at all."""

    text: str  # decoded
    kind: int  # a `Kind`: whose turn it is
    is_supervised: bool
    name: str | None  # of a special token: `bos`, `eos` or a role token's text; None for text


def read_segments(
    ids: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    profile: RowParams,
    tokenizer: Tokenizer,
    special: dict[int, str],
) -> Iterator[Segment]:
    """Yield the segments of a sequence or of its start: `(T,)` token ids and their kinds; `special`: id -> name.

    Segments are decoded separately, which strips the space that some tokenizers prepend.
    """
    is_supervised = np.append(loss_mask(kinds, profile)[:-1], False)
    is_special = np.isin(ids, list(special))
    is_target = np.append(is_supervised[:1], is_supervised[:-1])
    changes = np.append(False, is_target[1:] != is_target[:-1])  # a Jinja template's header before an answer
    borders = np.flatnonzero(is_special | np.append(True, is_special[:-1]) | changes)
    for begin, end in zip(borders, [*borders[1:], len(ids)], strict=True):
        number = int(ids[begin])
        text = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        name = special.get(number)
        yield Segment(text, int(kinds[begin]), bool(is_supervised[max(begin - 1, 0)]), name)


def count_bytes(shards: Shards, profile: RowParams, folder: Path) -> list[int]:
    """Return the size in UTF-8 bytes of each source's supervised validation text.

    `folder` has the tokenizer of the shards.
    """
    totals = [0] * len(shards.sources)
    for source, row in _read_rows(shards, profile, folder):
        totals[source] += sum(len(one.text.encode()) for one in row if one.is_supervised and one.name is None)
    return totals


def retokenize(
    shards: Shards, profile: EvaluateParams, folder: Path, other: Path, out: Path
) -> tuple[Shards, EvaluateParams]:
    """Return shards with the same validation texts in another tokenizer's tokens, and the profile to read them with.

    Rows keep their whole text and may have more tokens than `max_length`; the returned profile truncates none.
    `folder` has the tokenizer of the shards, `other` the other tokenizer; `out` is an empty folder for the new shards.

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


def _read_rows(shards: Shards, profile: RowParams, folder: Path) -> Iterator[tuple[int, list[Segment]]]:
    """Yield (source, segments) of every validation row, without a character that the end of the row truncates."""
    tokenizer = open_tokenizer(folder)
    names = {number: name for name, number in shards.special.items() if name != "pad"}
    for number, (_, rows) in enumerate(validation_rows(shards, profile)):
        for (piece,) in rows:
            tokens, kinds = shards.sources[number].read(piece.sequence)
            found = list(read_segments(tokens[: piece.end], kinds[: piece.end], profile, tokenizer, names))
            if piece.end < len(tokens) and found[-1].name is None:
                found[-1] = replace(found[-1], text=found[-1].text.rstrip(_CUT_CHARACTER))
            elif kinds[-1] == Kind.DOCUMENT_END:
                found[-1] = replace(found[-1], kind=int(Kind.DOCUMENT_END))
            yield number, found


def _encoder(
    tokenizer: Tokenizer, special: dict[str, int]
) -> Callable[[Sequence[Segment]], tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Return a function from segments to (token ids, kinds)."""
    texts = {name: token_text(tokenizer, number) for name, number in special.items()}
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    special_text = re.compile("|".join(re.escape(text) for text in sorted(added, key=len, reverse=True)))
    numbers = list(special.values())

    def separate(hit: re.Match[str]) -> str:
        return f"{hit[0][:1]}{_NO_CHARACTER}{hit[0][1:]}"

    def encode(row: Sequence[Segment]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        has_bos = row[0].name == "bos"
        body = [one for one in row[has_bos:] if one.name or one.text]
        text = "".join(texts[one.name] if one.name else special_text.sub(separate, one.text) for one in body)
        ids = np.asarray(tokenizer.encode(text).ids, dtype=np.int64)
        if ids[0] == special.get("bos"):  # added by the tokenizer's post-processor
            body.insert(0, replace(row[0], name="bos"))
        elif has_bos and "bos" in special:
            ids = np.insert(ids, 0, special["bos"])
            body.insert(0, row[0])
        # Every special token is a segment by itself; all tokens get the kind of their segment.
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
