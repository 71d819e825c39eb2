"""Encode records as complete token sequences, with the kind of every token: who speaks, or what is supervised."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ropeway.config.sections import PersonalKind
from ropeway.data.mixture import plan_chunks
from ropeway.data.personal_data import find_personal_data
from ropeway.data.raw_records import Record, iterate_texts
from ropeway.data.shards import Kind
from ropeway.data.text_batches import BATCH_CHARACTERS, count_characters, iterate_batches
from ropeway.data.tokenized import text_key
from ropeway.models.chat_template import ChatTemplate, OpenAssistantTemplate
from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import JinjaTemplate, Rendered, UnusableConversationError
from ropeway.models.tokenizer import token_text
from ropeway.stages.tokenize.escape import ESCAPE_MARKER, Escape
from ropeway.stages.tokenize.jinja_chats import JinjaChats

_MAX_REASONS = 30  # counted by name; a template's own message may quote the record
Tokens = tuple[list[int], NDArray[np.uint8] | None]  # token ids and kinds; no kinds: made for the whole batch


@dataclass(frozen=True, slots=True)
class Encoded:
    """N concatenated sequences (conversations, documents or chunks of documents) with T tokens in total.

    Attributes:
        tokens: `(T,)`; each sequence begins with BOS where tokenizer or template writes one.
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


@dataclass(frozen=True, slots=True)
class _Plan:
    """A record that can be tokenized.

    Attributes:
        at: Position in the input.
        record: The record.
        texts: Of each sequence: a rendered conversation, or a document's chunks.
        is_escaped: Whether special tokens in the texts must be encoded as ordinary tokens.
    """

    at: int
    record: Record
    texts: list[Rendered]
    is_escaped: bool


@dataclass
class Encoder:
    """Tokenizes one source's records and counts them.

    Attributes:
        special_tokens_in_text: What happens to a special token's string in a text: it is encoded as the token
            (`parse`, as published), as ordinary tokens (`escape`), or the record is refused (`reject`).
        history: Whether conversations whose earlier turns a Jinja template rewrites are refused, or become one sequence
            per answer.
        refused_kinds: Records with personal data of these kinds are refused.
        kept: Records that were not refused.
        refused: Reason -> records.
        refused_at: Position of each refused record in the input, from 0 -> the reason that it is counted under.
        with_special_tokens: Records with a special token's string in their text, kept or refused.
        special_token_hits: Special token's string -> occurrences in texts.
    """

    tokenizer: Tokenizer
    special: dict[str, int]
    template: ChatTemplate
    max_chunk_size: int | None
    special_tokens_in_text: Literal["parse", "escape", "reject"]
    history: Literal["refuse", "per_turn"] = "refuse"
    refused_kinds: tuple[PersonalKind, ...] = ()
    kept: int = 0
    with_special_tokens: int = 0
    without_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    refused_at: dict[int, str] = field(default_factory=dict)
    special_token_hits: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Compile the pattern of the strings that the tokenizer parses as special tokens."""
        added = sorted(self.tokenizer.get_added_tokens_decoder().values(), key=lambda token: -len(token.content))
        self.end = token_text(self.tokenizer, self.special["eos"])
        self._special_pattern = re.compile("|".join(re.escape(token.content) for token in added if token.special))
        self._escape = Escape(self.tokenizer) if self.special_tokens_in_text == "escape" else None
        self._chats = self._escaped_chats = None
        if isinstance(self.template, JinjaTemplate):
            self._chats = JinjaChats(self.tokenizer)
            self._escaped_chats = JinjaChats(self._escape.tokenizer) if self._escape else None

    def copy_without_counts(self) -> Self:
        """Return a copy with all counts at 0; the tokenizers, which are slow to build, are shared."""
        other = copy(self)
        other.kept = other.with_special_tokens = other.without_tokens = 0
        other.refused, other.refused_at, other.special_token_hits = Counter(), {}, Counter()
        return other

    def encode_batches(self, records: Iterable[Record]) -> Iterator[Encoded]:
        """Yield the sequences of these records in order, in batches of `BATCH_CHARACTERS` characters."""
        for batch in _iterate_batches(self._plan_records(records)):
            encoded = self._encode(batch)
            usable = [(plan, found) for plan, found in zip(batch, encoded, strict=True) if not isinstance(found, str)]
            for plan, found in zip(batch, encoded, strict=True):
                if isinstance(found, str):
                    self._refuse(found, plan.at)
            yield self._join([plan for plan, _ in usable], [found for _, found in usable])

    def _join(self, batch: list[_Plan], found: list[list[Tokens]]) -> Encoded:
        """Return the sequences of these records, concatenated, and count the records."""
        ids, lengths = array("I"), array("i")
        for own, _ in chain.from_iterable(found):
            ids.fromlist(own)
            lengths.append(len(own))
        tokens, counts = np.array(ids, dtype=np.uint32), np.array(lengths, dtype=np.int32)
        per_record = np.array([len(plan.texts) for plan in batch], dtype=np.int64)
        keys = [[text_key(one.text) for one in plan.texts] for plan in batch]
        # A record with one sequence is hashed once.
        whole = [
            own[0] if len(own) == 1 else text_key("".join(one.text for one in plan.texts))
            for own, plan in zip(keys, batch, strict=True)
        ]
        encoded = Encoded(
            tokens=tokens,
            kinds=self._kinds(batch, found, tokens, counts),
            lengths=counts,
            records=np.repeat(np.arange(self.kept, self.kept + len(batch)), per_record),
            keys=np.array([key for own in keys for key in own], dtype=np.uint64),
            record_keys=np.repeat(np.array(whole, dtype=np.uint64), per_record),
        )
        self.without_tokens += int((per_record == 0).sum())
        self.kept += len(batch)
        return encoded

    def _plan_records(self, records: Iterable[Record]) -> Iterator[_Plan]:
        for at, record in enumerate(records):
            hits = [hit for text in iterate_texts(record) for hit in self._special_pattern.findall(text)]
            if hits:
                self.with_special_tokens += 1
                self.special_token_hits.update(hits)
            try:
                yield self._plan(at, record, has_hits=bool(hits))
            except UnusableConversationError as error:
                self._refuse(str(error), at)

    def _plan(self, at: int, record: Record, *, has_hits: bool) -> _Plan:
        """Return the record's texts.

        Raises:
            UnusableConversationError: The message is the reason.
        """
        if isinstance(record, Conversation) and not record.turns:
            raise UnusableConversationError("conversation without turns")
        if has_hits and self.special_tokens_in_text == "reject":
            raise UnusableConversationError("special token in text")
        if self.refused_kinds:
            self._check_personal(record)
        if self._escape and any(map(ESCAPE_MARKER.search, iterate_texts(record))):
            raise UnusableConversationError("text contains the escape marker (U+FDD0, digits, U+FDD1)")
        if isinstance(record, str):
            chunks = [record[begin:end] for begin, end in plan_chunks(len(record), self.max_chunk_size)]
            return _Plan(at, record, [Rendered(chunk, ()) for chunk in chunks], is_escaped=self._escape is not None)
        if isinstance(self.template, OpenAssistantTemplate):
            return _Plan(at, record, self.template.sequences(record, end=self.end), self._escape is not None)
        texts = self.template.sequences(record, per_turn=self.history == "per_turn")
        is_escaped = has_hits and self._escape is not None
        if is_escaped and any(one.slots is None for one in texts):
            raise UnusableConversationError("special token in a text that the template does not only insert")
        return _Plan(at, record, texts, is_escaped)

    def _check_personal(self, record: Record) -> None:
        """Raise UnusableConversationError if a text of the record has personal data that is refused."""
        for text in iterate_texts(record):
            if found := find_personal_data(text, self.refused_kinds):
                raise UnusableConversationError(f"personal data: {found[0].kind}")

    def _refuse(self, reason: str, at: int) -> None:
        known = reason in self.refused or len(self.refused) < _MAX_REASONS
        counted_as = reason if known else "another reason"
        self.refused[counted_as] += 1
        self.refused_at[at] = counted_as

    def _encode(self, batch: list[_Plan]) -> list[list[Tokens] | str]:
        """Return the sequences of each record, or why it is refused."""
        if self._chats and isinstance(batch[0].record, Conversation):
            return self._encode_chats(batch)
        if self._escape is None:
            found = self.tokenizer.encode_batch_fast([one.text for plan in batch for one in plan.texts])
        else:
            found = self._escape.tokenizer.encode_batch_fast(
                [text for plan in batch for text in self._escaped_texts(plan)]
            )
        ids: Iterator[Tokens] = ((encoding.ids, None) for encoding in found)
        return [list(islice(ids, len(plan.texts))) for plan in batch]

    def _escaped_texts(self, plan: _Plan) -> list[str]:
        if self._escape and isinstance(plan.record, Conversation):
            return [self._escape.render(plan.record, end=self.end)]
        return [one.text for one in plan.texts]

    def _encode_chats(self, batch: list[_Plan]) -> list[list[Tokens] | str]:
        sequences: dict[bool, Iterator[tuple[list[int], NDArray[np.uint8]] | str]] = {}
        for is_escaped, chats in ((False, self._chats), (True, self._escaped_chats)):
            texts = [one for plan in batch if plan.is_escaped == is_escaped for one in plan.texts]
            if chats and texts:
                renamed = [self._escape.rename(one) for one in texts] if is_escaped and self._escape else texts
                sequences[is_escaped] = iter(chats.encode(renamed))
        found: list[list[Tokens] | str] = []
        for plan in batch:
            own = list(islice(sequences[plan.is_escaped], len(plan.texts)))
            faults = [one for one in own if isinstance(one, str)]
            found.append(faults[0] if faults else [one for one in own if not isinstance(one, str)])
        return found

    def _kinds(
        self,
        batch: list[_Plan],
        found: list[list[Tokens]],
        tokens: NDArray[np.uint32],
        lengths: NDArray[np.int32],
    ) -> NDArray[np.uint8]:
        if not batch:
            return np.empty(0, np.uint8)
        if isinstance(batch[0].record, str):
            per_record = np.array([len(plan.texts) for plan in batch])
            is_last = np.zeros(len(lengths), dtype=np.bool_)
            is_last[np.cumsum(per_record)[per_record > 0] - 1] = True
            return document_kinds(lengths, is_last=is_last)
        if isinstance(self.template, OpenAssistantTemplate):
            return self.template.speakers(tokens, lengths, ids=self.special)
        return np.concatenate([kinds for own in found for _, kinds in own if kinds is not None])


def _iterate_batches(plans: Iterable[_Plan]) -> Iterator[list[_Plan]]:
    """Yield batches of records of one kind with `BATCH_CHARACTERS` characters."""
    for _, alike in groupby(plans, key=lambda plan: type(plan.record)):
        yield from iterate_batches(
            alike, lambda plan: count_characters([one.text for one in plan.texts]), BATCH_CHARACTERS
        )


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
