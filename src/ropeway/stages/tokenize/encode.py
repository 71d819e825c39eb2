"""Encode records as complete token sequences, with the speaker of every token."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, groupby
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ropeway.data.mixture import SPLIT_SEED, plan_chunks
from ropeway.data.raw_records import Record, iterate_texts
from ropeway.data.shards import Kind
from ropeway.data.text_batches import BATCH_CHARACTERS, count_characters, iterate_batches
from ropeway.models.chat_template import ChatTemplate
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import token_text
from ropeway.stages.tokenize.escape import ESCAPE_MARKER, Escape


@dataclass(frozen=True, slots=True)
class Encoded:
    """N concatenated sequences (conversations, documents or chunks of documents) with T tokens in total.

    Attributes:
        tokens: `(T,)`, each sequence begins with BOS.
        kinds: `(T,)`, see `ropeway.data.shards.Kind`.
        lengths: `(N,)` tokens of each sequence.
        records: `(N,)` number of the kept record that each sequence comes from.
        keys: `(N,)` hash of each sequence's text, for a split that new records do not change.
        record_keys: `(N,)` hash of its complete record's text.
    """

    tokens: NDArray[np.uint32]
    kinds: NDArray[np.uint8]
    lengths: NDArray[np.int32]
    records: NDArray[np.int64]
    keys: NDArray[np.uint64]
    record_keys: NDArray[np.uint64]


@dataclass
class Encoder:
    """Tokenizes one source's records and counts them.

    Attributes:
        special_tokens_in_text: What happens to a special token's string in a text: it is encoded as the token
            (`parse`, as published), as ordinary tokens (`escape`), or the record is refused (`reject`).
        kept: Records that were not refused.
        refused: Reason -> records.
        refused_at: Positions of the refused records in the input, from 0.
        with_special_tokens: Records with a special token's string in their text, kept or refused.
        special_token_hits: Special token's string -> occurrences in texts.
    """

    tokenizer: Tokenizer
    special: dict[str, int]
    template: ChatTemplate
    max_chunk_size: int | None
    special_tokens_in_text: Literal["parse", "escape", "reject"]
    kept: int = 0
    with_special_tokens: int = 0
    without_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    refused_at: list[int] = field(default_factory=list)
    special_token_hits: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Compile the pattern of the strings that the tokenizer parses as special tokens."""
        added = sorted(self.tokenizer.get_added_tokens_decoder().values(), key=lambda token: -len(token.content))
        self.end = token_text(self.tokenizer, self.special["eos"])
        self._special_pattern = re.compile("|".join(re.escape(token.content) for token in added if token.special))
        self._escape = Escape(self.tokenizer, self.template) if self.special_tokens_in_text == "escape" else None

    def copy_without_counts(self) -> Self:
        """Return a copy with all counts at 0; the tokenizers, which are slow to build, are shared."""
        other = copy(self)
        other.kept = other.with_special_tokens = other.without_tokens = 0
        other.refused, other.refused_at, other.special_token_hits = Counter(), [], Counter()
        return other

    def encode_batches(self, records: Iterable[Record]) -> Iterator[Encoded]:
        """Yield the sequences of these records in order, in batches of `BATCH_CHARACTERS` characters."""
        for batch in _iterate_record_batches(self._filter_records(records)):
            texts = [self._texts(record) for record in batch]
            ids, lengths = array("I"), array("i")
            for encoding in self._tokenize(batch, texts):
                ids.fromlist(found := encoding.ids)
                lengths.append(len(found))
            tokens, counts = np.array(ids, dtype=np.uint32), np.array(lengths, dtype=np.int32)
            per_record = np.array([len(parts) for parts in texts], dtype=np.int64)
            keys = [[text_key(text) for text in parts] for parts in texts]
            # A record with one sequence is hashed once.
            whole = [
                own[0] if len(own) == 1 else text_key("".join(parts)) for own, parts in zip(keys, texts, strict=True)
            ]
            yield Encoded(
                tokens=tokens,
                kinds=self._kinds(tokens, counts, per_record, is_conversation=isinstance(batch[0], Conversation)),
                lengths=counts,
                records=np.repeat(np.arange(self.kept, self.kept + len(batch)), per_record),
                keys=np.array([key for own in keys for key in own], dtype=np.uint64),
                record_keys=np.repeat(np.array(whole, dtype=np.uint64), per_record),
            )
            self.without_tokens += int((per_record == 0).sum())
            self.kept += len(batch)

    def _filter_records(self, records: Iterable[Record]) -> Iterator[Record]:
        for at, record in enumerate(records):
            if isinstance(record, Conversation) and not record.turns:
                self._refuse("conversation without turns", at)
                continue
            hits = [hit for text in iterate_texts(record) for hit in self._special_pattern.findall(text)]
            if hits:
                self.with_special_tokens += 1
                self.special_token_hits.update(hits)
            if hits and self.special_tokens_in_text == "reject":
                self._refuse("special token in text", at)
            elif self._escape and any(map(ESCAPE_MARKER.search, iterate_texts(record))):
                self._refuse("text contains the escape marker (U+FDD0, digits, U+FDD1)", at)
            else:
                yield record

    def _refuse(self, reason: str, at: int) -> None:
        self.refused[reason] += 1
        self.refused_at.append(at)

    def _texts(self, record: Record) -> list[str]:
        """Return the texts to tokenize, before escaping: the rendered conversation, or a document's chunks."""
        if isinstance(record, Conversation):
            return [self.template.render(record, end=self.end)]
        return [record[begin:end] for begin, end in plan_chunks(len(record), self.max_chunk_size)]

    def _tokenize(self, batch: list[Record], texts: list[list[str]]) -> list[Encoding]:
        """Return the encoding of each text of each record."""
        if self._escape is None:
            return self.tokenizer.encode_batch_fast(list(chain.from_iterable(texts)))
        escaped: list[str] = []
        for record, parts in zip(batch, texts, strict=True):
            escaped += [self._escape.render(record, end=self.end)] if isinstance(record, Conversation) else parts
        return self._escape.tokenizer.encode_batch_fast(escaped)

    def _kinds(
        self,
        tokens: NDArray[np.uint32],
        lengths: NDArray[np.int32],
        per_record: NDArray[np.int64],
        *,
        is_conversation: bool,
    ) -> NDArray[np.uint8]:
        if is_conversation:
            return self.template.speakers(tokens, lengths, ids=self.special)
        is_last = np.zeros(len(lengths), dtype=np.bool_)
        is_last[np.cumsum(per_record)[per_record > 0] - 1] = True
        return document_kinds(lengths, is_last=is_last)


def _iterate_record_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield batches of records of one kind with `BATCH_CHARACTERS` characters."""
    for _, alike in groupby(records, key=type):
        yield from iterate_batches(alike, lambda record: count_characters(iterate_texts(record)), BATCH_CHARACTERS)


def document_kinds(length: int | NDArray[np.integer], *, is_last: bool | NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return `(T,)` kinds of a chunk, or of concatenated chunks; a document's last token is its DOCUMENT_END.

    Args:
        length: Tokens of the chunk, or `(N,)` of each.
        is_last: Whether it is the last chunk of its document, or `(N,)` of each.
    """
    lengths, last = np.atleast_1d(length), np.atleast_1d(is_last)
    kinds = np.full(int(lengths.sum()), Kind.DOCUMENT, dtype=np.uint8)
    kinds[np.cumsum(lengths)[last & (lengths > 0)] - 1] = Kind.DOCUMENT_END
    return kinds


def text_key(text: str) -> int:
    """Return a 64-bit hash of a text, keyed with the split's fixed seed; equal on every machine."""
    seed = SPLIT_SEED.to_bytes(8)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=seed).digest())
