"""Encode conversations in a Jinja template: one tokenization of the rendered text, supervised tokens from its offsets.

A sequence is accepted only if its tokens before an answer are those of the generation prompt, token for token.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ropeway.data.shards import Kind
from ropeway.models.jinja_template import Rendered, Span, UnusableConversationError
from ropeway.models.tokenizer import count_tokens

_CACHED = 4096  # headers of answers, e.g. "<|im_start|>assistant\n"; there are few different ones


_OTHER_PROMPT = "the tokens before an answer are not those of the generation prompt"
_ANSWER = bytes([Kind.ANSWER])
Marked = tuple[list[int], NDArray[np.uint8]]


class JinjaChats:
    """Tokenizes rendered conversations as `apply_chat_template` does, and marks what is supervised."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Copy the tokenizer without its post-processor, which adds tokens and trims offsets."""
        state = json.loads(tokenizer.to_str())
        state["post_processor"] = None
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        special = sorted((token["content"] for token in state["added_tokens"] if token["special"]), key=len)
        self._is_special = np.zeros(count_tokens(tokenizer), np.bool_)
        self._is_special[[token["id"] for token in state["added_tokens"] if token["special"]]] = True
        self._special = re.compile("|".join(map(re.escape, reversed(special))) or r"(?!)")
        self._headers: dict[str, list[int]] = {}
        self._orders: dict[tuple[str, ...], list[int | None]] = {}

    def encode(self, rendered: Sequence[Rendered]) -> list[Marked | str]:
        """Return (token ids, `(T,)` kinds) of each sequence, or why it cannot be used.

        Offsets cost a fifth of the tokenization. Where a template only inserts texts without special tokens, the
        special tokens among the ids are those of the template, in order, and say the same.
        """
        if any(one.frame is None or not one.frame.marks for one in rendered):
            found = self._tokenizer.encode_batch([one.text for one in rendered])
            return [self._mark(encoding, one) for encoding, one in zip(found, rendered, strict=True)]
        fast = [encoding.ids for encoding in self._tokenizer.encode_batch_fast([one.text for one in rendered])]
        lengths = np.fromiter(map(len, fast), np.int64, len(fast))
        special = np.flatnonzero(self._is_special[np.fromiter(chain.from_iterable(fast), np.int64, int(lengths.sum()))])
        ends = np.cumsum(lengths)
        borders = [0, *np.searchsorted(special, ends).tolist()]
        places = (special - np.repeat(ends - lengths, np.diff(borders))).tolist()
        return [
            self._mark_by_frame(ids, one, places[begin:end])
            for ids, one, (begin, end) in zip(fast, rendered, pairwise(borders), strict=True)
        ]

    def _mark_by_frame(self, ids: list[int], rendered: Rendered, special: list[int]) -> Marked | str:
        """Mark the answers between the template's special tokens, which are at these places."""
        frame = rendered.frame
        if frame is None or [ids[at] for at in special] != self._ids_of(frame.special_tokens):  # e.g. in a text
            return self._mark(self._tokenizer.encode(rendered.text), rendered)
        kinds = bytearray([Kind.CONTEXT]) * len(ids)
        for before, header, end in frame.marks:
            first, last = special[before], special[end]
            expected = self._header(header)
            begin = first + len(expected)
            if ids[first:begin] != expected:
                return _OTHER_PROMPT
            kinds[begin : last + 1] = _ANSWER * (last + 1 - begin)
        return ids, np.frombuffer(kinds, np.uint8)

    def _mark(self, encoding: Encoding, rendered: Rendered) -> Marked | str:
        ids: list[int] = encoding.ids
        kinds = np.full(len(ids), Kind.CONTEXT, np.uint8)
        try:
            for span in rendered.answers:
                first, end = self._locate(encoding, span)
                self._check_prompt(ids, first, rendered.text, span[0])
                kinds[first:end] = Kind.ANSWER
        except UnusableConversationError as error:
            return str(error)
        if kinds[0] == Kind.ANSWER:
            return "an answer without a token before it"
        return ids, kinds

    def _locate(self, encoding: Encoding, span: Span) -> tuple[int, int]:
        """Return the first token of a span of characters and the one after its last."""
        first = next((at for at in map(encoding.char_to_token, range(*span)) if at is not None), None)
        last = encoding.char_to_token(span[1] - 1)
        if first is None or last is None:
            raise UnusableConversationError("an answer without tokens")
        chars = (*(encoding.token_to_chars(first) or ()), *(encoding.token_to_chars(last) or ()))
        is_end = self._is_special[encoding.ids[last]]  # it may swallow white space after it (`rstrip`)
        if chars[0] < span[0] or (chars[-1] > span[1] and not is_end):
            raise UnusableConversationError("a token crosses the beginning or end of an answer")
        if not is_end:
            raise UnusableConversationError("the tokenizer does not read the end token of an answer as one token")
        return first, last + 1

    def _check_prompt(self, ids: list[int], first: int, text: str, begin: int) -> None:
        """Raise UnusableConversationError unless the tokens before an answer are those of the generation prompt alone.

        Special tokens split a text before it is tokenized, so only what follows the last one can differ.
        """
        header = text[max((hit.start() for hit in self._special.finditer(text, 0, begin)), default=0) : begin]
        expected = self._header(header)
        if ids[first - len(expected) : first] != expected:
            raise UnusableConversationError(_OTHER_PROMPT)

    def _ids_of(self, tokens: tuple[str, ...]) -> list[int | None]:
        """Return the ids of these special tokens."""
        if tokens not in self._orders:
            self._orders[tokens] = [self._tokenizer.token_to_id(text) for text in tokens]
        return self._orders[tokens]

    def _header(self, text: str) -> list[int]:
        """Return the token ids of a text from a special token to an answer."""
        expected = self._headers.get(text)
        if expected is None:
            expected = self._tokenizer.encode(text).ids
            if len(self._headers) < _CACHED:
                self._headers[text] = expected
        return expected
