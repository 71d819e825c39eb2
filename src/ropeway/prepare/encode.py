"""Records to token sequences: whole, never cut, and for every token who said it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ropeway.chat import ASSISTANT, PROMPTER, Conversation, render
from ropeway.mixture import SPLIT_SEED, plan_chunks
from ropeway.prepare.escape import OWN_MARK, Escape
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
        special_tokens_in_text: What a special token's string in a text becomes: the token (`parse`, as published),
            ordinary tokens (`escape`), or a refusal of the record (`reject`).
        kept: Records that were not refused.
        refused: Reason -> records.
        with_special_tokens: Records in whose text a special token's string stands, kept or refused for it.
        special_token_hits: Such a string -> how often it stands in texts.
    """

    tokenizer: Tokenizer
    special: dict[str, int]
    max_chunk_size: int | None
    special_tokens_in_text: Literal["parse", "escape", "reject"] = "parse"
    kept: int = 0
    with_special_tokens: int = 0
    without_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    special_token_hits: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Collect the strings that the tokenizer parses as special tokens."""
        added = sorted(self.tokenizer.get_added_tokens_decoder().values(), key=lambda token: -len(token.content))
        self.end = token_text(self.tokenizer, self.special["eos"])
        self._parsed = re.compile("|".join(re.escape(token.content) for token in added if token.special))
        self._escape = Escape(self.tokenizer) if self.special_tokens_in_text == "escape" else None

    def encode(self, records: Iterable[Record]) -> Iterator[Sequence]:
        """Yield the sequences of these records, in order."""
        for batch in self._batches(self._keep(records)):
            encodings = iter(self._tokenize(batch))
            for record in batch:
                parts = self._texts(record)
                record_key = text_key("".join(parts))
                for at, text in enumerate(parts):
                    encoding = next(encodings)
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
            hits = Counter(hit[0] for text in iterate_texts(record) for hit in self._parsed.finditer(text))
            self.with_special_tokens += bool(hits)
            self.special_token_hits += hits
            if hits and self.special_tokens_in_text == "reject":
                self.refused["special token in text"] += 1
            elif self._escape and any(map(OWN_MARK.search, iterate_texts(record))):
                self.refused["text holds escape's own mark (U+FDD0, digits, U+FDD1)"] += 1
            else:
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

    def _tokenize(self, batch: list[Record]) -> list[Encoding]:
        """Return one encoding for each of `_texts` of each record."""
        if self._escape is None:
            return self.tokenizer.encode_batch_fast([text for record in batch for text in self._texts(record)])
        texts = []
        for record in batch:
            if isinstance(record, Conversation):
                texts.append(self._escape.render(record, end=self.end))
            else:
                texts += self._texts(record)
        return self._escape.tokenizer.encode_batch_fast(texts)

    def _texts(self, record: Record) -> list[str]:
        """Return what is tokenized, before escaping: the rendered conversation, or a document's chunks."""
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
    """Return 64 bits of the hash of a text and the split's fixed seed, the same on every machine."""
    seed = SPLIT_SEED.to_bytes(8)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=seed).digest())
