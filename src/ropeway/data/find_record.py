"""The conversation that a sequence was made of.

tokenize keeps the number of each sequence's record among those that it did not refuse, and a hash of the sequence's
rendered text. A raw record is the sequence's only if it renders to a text with this hash.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, islice
from pathlib import Path

import numpy as np

from ropeway.data.raw_records import RowGroup, iterate_groups, list_groups
from ropeway.data.tokenized import TokenizedSource, text_key
from ropeway.models.chat_template import ChatTemplate, OpenAssistantTemplate
from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import Rendered, UnusableConversationError

_MOST_RENDERED = 5_000  # records; a template may need a millisecond for each


@dataclass(frozen=True, slots=True)
class SequenceRecord:
    """The conversation of a sequence.

    Attributes:
        number: Of the record in raw/, from 0.
        part: Which of the conversation's sequences it is, from 0.
        parts: Number of the conversation's sequences; more than one if each answer is a sequence.
        text: What was tokenized.
    """

    conversation: Conversation
    number: int
    part: int
    parts: int
    text: str


@dataclass(frozen=True)
class RecordFinder:
    """Finds the conversations of one source's sequences.

    Attributes:
        raw: The source's folder in raw/.
        source: The source in tokens/.
        template: The run's.
        end: The text that ends a turn in the published template.
    """

    raw: Path
    source: TokenizedSource
    template: ChatTemplate
    end: str

    def find(self, sequence: int) -> SequenceRecord | None:
        """Return the conversation of a sequence; None if it is not among the records that are searched."""
        wanted = int(self._keys[sequence])
        for number in islice(self._candidates(int(self._records[sequence])), _MOST_RENDERED):
            record = self._read(number)
            if not isinstance(record, Conversation):
                return None
            texts = [one.text for one in self._render(record)]
            for part, text in enumerate(texts):
                if text_key(text) == wanted:
                    return SequenceRecord(record, number, part, len(texts), text)
        return None

    def _candidates(self, kept: int) -> Iterator[int]:
        """Yield the raw numbers that the record after `kept` kept ones may have, the most probable first."""
        refused = sum(self.source.facts["records"]["refused"].values())
        share = refused / max(refused + self.source.records_kept, 1)
        likely = min(round(kept / max(1 - share, 1e-9)), kept + refused)
        yield likely
        for step in range(1, refused + 1):
            yield from (at for at in (likely - step, likely + step) if kept <= at <= kept + refused)

    def _render(self, record: Conversation) -> list[Rendered]:
        try:
            if isinstance(self.template, OpenAssistantTemplate):
                return self.template.sequences(record, end=self.end)
            return self.template.sequences(record, per_turn=True)
        except UnusableConversationError:
            return []

    def _read(self, number: int) -> Conversation | str | None:
        at = int(np.searchsorted(self._ends, number, side="right"))
        if at == len(self._groups):
            return None
        begin = self._ends[at] - self._groups[at].records
        return _read_group(self.raw, self._groups[at])[number - begin]

    @cached_property
    def _groups(self) -> list[RowGroup]:
        return list_groups(self.raw)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(group.records for group in self._groups))

    @cached_property
    def _records(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self.source.column("records")

    @cached_property
    def _keys(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        return self.source.column("keys")


@lru_cache(maxsize=4)
def _read_group(raw: Path, group: RowGroup) -> list[Conversation | str]:
    """Return the records of a row group, about 1 MB of text."""
    return list(iterate_groups(raw, [group]))
