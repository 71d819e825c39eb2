"""Encode conversations in a Jinja template: one tokenization of the rendered text, supervised tokens from its offsets.

A sequence is accepted only if its tokens before an answer are those of the generation prompt, token for token.
"""

import json
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ropeway.data.shards import Kind
from ropeway.models.jinja_template import Rendered, Span, UnusableConversationError

_CACHED = 4096  # headers of answers, e.g. "<|im_start|>assistant\n"; there are few different ones


class JinjaChats:
    """Tokenizes rendered conversations as `apply_chat_template` does, and marks what is supervised."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Copy the tokenizer without its post-processor, which adds tokens and trims offsets."""
        state = json.loads(tokenizer.to_str())
        state["post_processor"] = None
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        special = sorted((token["content"] for token in state["added_tokens"] if token["special"]), key=len)
        self._special = re.compile("|".join(map(re.escape, reversed(special))) or r"(?!)")
        self._headers: dict[str, list[int]] = {}

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[list[int], NDArray[np.uint8]] | str]:
        """Return (token ids, `(T,)` kinds) of each sequence, or why it cannot be used."""
        found = self._tokenizer.encode_batch([one.text for one in rendered])
        return [self._mark(encoding, one) for encoding, one in zip(found, rendered, strict=True)]

    def _mark(self, encoding: Encoding, rendered: Rendered) -> tuple[list[int], NDArray[np.uint8]] | str:
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

    @staticmethod
    def _locate(encoding: Encoding, span: Span) -> tuple[int, int]:
        """Return the first token of a span of characters and the one after its last."""
        first = next((at for at in map(encoding.char_to_token, range(*span)) if at is not None), None)
        last = encoding.char_to_token(span[1] - 1)
        if first is None or last is None:
            raise UnusableConversationError("an answer without tokens")
        chars = (*(encoding.token_to_chars(first) or ()), *(encoding.token_to_chars(last) or ()))
        if chars[0] < span[0] or chars[-1] > span[1]:
            raise UnusableConversationError("a token crosses the beginning or end of an answer")
        return first, last + 1

    def _check_prompt(self, ids: list[int], first: int, text: str, begin: int) -> None:
        """Raise UnusableConversationError unless the tokens before an answer are those of the generation prompt alone.

        Special tokens split a text before it is tokenized, so only what follows the last one can differ.
        """
        header = text[max((hit.start() for hit in self._special.finditer(text, 0, begin)), default=0) : begin]
        expected = self._headers.get(header)
        if expected is None:
            expected = self._tokenizer.encode(header).ids
            if len(self._headers) < _CACHED:
                self._headers[header] = expected
        if ids[first - len(expected) : first] != expected:
            raise UnusableConversationError("the tokens before an answer are not those of the generation prompt")
