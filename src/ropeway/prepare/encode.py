"""Records to token sequences: whole, never cut, and for every token who said it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ropeway.chat import ASSISTANT, PROMPTER, Conversation, render
from ropeway.mixture import plan_chunks
from ropeway.raw import Record, iterate_texts
from ropeway.shards import Kind
from ropeway.tokenizer import token_text

_BATCH_CHARACTERS = 1 << 22  # one call of the tokenizer: enough to keep its threads busy, little to hold


@dataclass(frozen=True, slots=True)
class Sequence:
    """One conversation, document or chunk.

    Attributes:
        tokens: `(T,)`, BOS in front.
        kinds: `(T,)`, see `ropeway.shards.Kind`.
        record: Number of the kept record it comes from.
        key: Hash of its text, for a split that new records do not move.
        record_key: Likewise of the whole record.
    """

    tokens: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    record: int
    key: int
    record_key: int


@dataclass
class Encoder:
    """Tokenizes one source's records and counts what it meets.

    Attributes:
        kept: Records that were not refused.
        refused: Reason -> records.
        with_special_tokens: Kept records in whose text a special token's string stands; it is parsed as the token.
    """

    tokenizer: Tokenizer
    special: dict[str, int]
    max_chunk_size: int | None
    kept: int = 0
    with_special_tokens: int = 0
    without_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Collect the strings that the tokenizer parses as special tokens."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.end = token_text(self.tokenizer, self.special["eos"])
        self._parsed = re.compile("|".join(re.escape(token.content) for token in added if token.special))

    def encode(self, records: Iterable[Record]) -> Iterator[Sequence]:
        """Yield the sequences of these records, in order."""
        for batch in self._batches(self._keep(records)):
            texts = [text for record in batch for text in self._texts(record)]
            encodings = iter(zip(texts, self.tokenizer.encode_batch_fast(texts), strict=True))
            for record in batch:
                parts = self._texts(record)
                record_key = text_key("".join(parts))
                for at in range(len(parts)):
                    text, encoding = next(encodings)
                    tokens = np.asarray(encoding.ids, dtype=np.int64)
                    kinds = self._kinds(record, tokens, is_last=at == len(parts) - 1)
                    yield Sequence(tokens, kinds, self.kept, text_key(text), record_key)
                self.without_tokens += not parts
                self.kept += 1

    def _keep(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            if isinstance(record, Conversation) and not record.turns:
                self.refused["conversation without turns"] += 1
                continue
            self.with_special_tokens += any(map(self._parsed.search, iterate_texts(record)))
            yield record

    def _batches(self, records: Iterable[Record]) -> Iterator[list[Record]]:
        batch: list[Record] = []
        characters = 0
        for record in records:
            batch.append(record)
            characters += sum(map(len, iterate_texts(record)))
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _texts(self, record: Record) -> list[str]:
        """Return the strings that are tokenized: the rendered conversation, or a document's chunks."""
        if isinstance(record, Conversation):
            return [render(record, end=self.end)]
        return [record[begin:end] for begin, end in plan_chunks(len(record), self.max_chunk_size)]

    def _kinds(self, record: Record, tokens: NDArray[np.int64], *, is_last: bool) -> NDArray[np.uint8]:
        if isinstance(record, Conversation):
            return conversation_kinds(tokens, prompter=self.special[PROMPTER], assistant=self.special[ASSISTANT])
        return document_kinds(len(tokens), is_last=is_last)


def conversation_kinds(tokens: NDArray[np.int64], *, prompter: int, assistant: int) -> NDArray[np.uint8]:
    """Return `(T,)` who said each token of a conversation, seen from its beginning.

    A turn begins with its role token. Turns are counted, not read: the first is the prompter's, the second the
    assistant's and so on, whichever role token opens it; what stands before the first is nobody's. Source:
    Open-Assistant's dialogue collator (July 2023), where a literal role token in a text begins a turn as well.
    """
    turn = np.cumsum((tokens == prompter) | (tokens == assistant))
    said = np.where(turn % 2 == 1, Kind.PROMPTER, Kind.ASSISTANT)
    return np.where(turn == 0, Kind.BEFORE, said).astype(np.uint8)


def document_kinds(length: int, *, is_last: bool) -> NDArray[np.uint8]:
    """Return `(T,)` kinds of a chunk; the last token of a document's last chunk is marked as its end."""
    kinds = np.full(length, Kind.DOCUMENT, dtype=np.uint8)
    if is_last:
        kinds[-1:] = Kind.DOCUMENT_END
    return kinds


def text_key(text: str) -> int:
    """Return 64 bits of a text's hash, the same on every machine."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
