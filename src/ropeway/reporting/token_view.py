"""Tokens as a person looks at them: what each one says, whether it is learned, whether it is special.

A loss mask belongs to positions: True where predicting the *next* token counts. A person asks it of tokens: is this one
learned? So token t is `learned` when the mask is True at t - 1 of the same piece. The first token of a piece never is,
since nothing stands before it; a mask that is True at the last position teaches a token behind the piece
(`document_end`), which `Reading.teaches_next` says.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ropeway.config.params import RowParams
from ropeway.data.batches import Piece
from ropeway.data.loss_mask import loss_mask
from ropeway.data.shards import Shards, SourceShards
from ropeway.models.tokenizer import BLANK, token_text

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # Source: SentencePiece's byte fallback
_MOST_PENDING_BYTES = 64  # of a character that never comes whole


@dataclass(frozen=True, slots=True)
class Shown:
    """One token in characters.

    Attributes:
        text: What it says; of bytes that are no whole character, their hex digits.
        is_special: A special token of the tokenizer, e.g. `</s>`; where its string comes from cannot be told.
        completes: The characters of which these bytes are the last ones.
    """

    number: int
    text: str
    is_special: bool = False
    is_bytes: bool = False
    completes: str = ""


class Decoder(TypedDict):
    """A decoder in tokenizer.json, as far as it is looked at; one of type Sequence has others inside."""

    type: str
    decoders: NotRequired[list["Decoder"]]


class Vocabulary:
    """A tokenizer's tokens in characters, for Llama's type (byte fallback) and GPT-2's (byte level)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find out how this tokenizer spells blanks and bytes."""
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._added = frozenset(added)
        self._special = frozenset(number for number, token in added.items() if token.special)
        decoder = json.loads(tokenizer.to_str())["decoder"]
        kinds = set(_list_kinds(decoder))
        self._alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        self._falls_back = "ByteFallback" in kinds
        self._has_blanks = "Metaspace" in kinds or BLANK in json.dumps(decoder, ensure_ascii=False)

    def show(self, numbers: Iterable[int]) -> Iterator[Shown]:
        """Yield these tokens in characters, in order."""
        pending = b""
        for number in numbers:
            spelt = self._spell(int(number))
            if isinstance(spelt, bytes):
                pending = (pending + spelt)[-_MOST_PENDING_BYTES:]
                completes = _decode(pending) or ""
                pending = b"" if completes else pending
                yield Shown(int(number), spelt.hex(" ").upper(), is_bytes=True, completes=completes)
            else:
                pending = b""
                yield Shown(int(number), spelt, is_special=int(number) in self._special)

    def _spell(self, number: int) -> str | bytes:
        """Return a token's characters, or its bytes where they are no whole characters."""
        text = token_text(self._tokenizer, number)
        if number in self._added:
            return text
        if self._alphabet is not None and all(character in self._alphabet for character in text):
            spelt = bytes(self._alphabet[character] for character in text)
            return spelt if (decoded := _decode(spelt)) is None else decoded
        if self._falls_back and (match := _BYTE_TOKEN.fullmatch(text)):
            spelt = bytes.fromhex(match[1])
            return spelt if (decoded := _decode(spelt)) is None else decoded
        return text.replace(BLANK, " ") if self._has_blanks else text


@dataclass(frozen=True, slots=True)
class Reading:
    """One piece as it is read.

    Attributes:
        length: Tokens of the whole sequence.
        tokens: `(T,)` ids of the piece.
        learned: `(T,)` True where predicting *this* token counts.
        teaches_next: Predicting what stands behind the piece counts as well.
    """

    piece: Piece
    source: str
    length: int
    tokens: NDArray[np.int64]
    learned: NDArray[np.bool_]
    teaches_next: bool

    @property
    def supervised(self) -> int:
        """Positions that count in the loss."""
        return int(self.learned.sum()) + self.teaches_next


def read_piece(piece: Piece, shards: Shards, profile: RowParams) -> Reading:
    """Return a piece with what is learned of it, through the mask that training uses."""
    source = shards.sources[piece.source]
    tokens, kinds = source.read(piece.sequence)
    cut = slice(piece.begin, piece.end)
    mask = loss_mask(kinds[cut], profile)
    learned = np.concatenate(([False], mask[:-1])) if len(mask) else mask
    length = int(source.lengths[piece.sequence])
    return Reading(piece, source.name, length, tokens[cut], learned, bool(mask[-1:].any()))


def read_whole(source: int, sequence: int, shards: Shards, profile: RowParams) -> Reading:
    """Return a whole sequence, as if a row could hold it."""
    length = int(shards.sources[source].lengths[sequence])
    return read_piece(Piece(source, sequence, 0, length), shards, profile)


def find_part(sequence: int, source: SourceShards) -> str | None:
    """Return whether a sequence is in `train` or in `validation`; None in neither."""
    return next((part for part in ("train", "validation") if (getattr(source, part) == sequence).any()), None)


def next_token(reading: Reading, shards: Shards, profile: RowParams, vocabulary: Vocabulary) -> str | None:
    """Return the token that the last position is taught though it stands behind the piece, None if none is."""
    if not reading.teaches_next:
        return None
    if profile.document_end == "eos":
        return next(vocabulary.show([shards.special["eos"]])).text
    return "whatever stands next in the batch"  # document_end: published


class Sort(StrEnum):
    """What a stretch of a token's text is to the eye."""

    PLAIN = "plain"
    SPACE = "space"
    BREAK = "break"
    TAB = "tab"
    CODE = "code"  # a character that shows nothing, or turns the text around: its code point


_SIGNS = {" ": (Sort.SPACE, "·"), "\n": (Sort.BREAK, "⏎"), "\t": (Sort.TAB, "⇥")}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"}


def split_visible(text: str) -> list[tuple[Sort, str]]:
    r"""Return a text in stretches in which nothing is invisible and nothing commands a terminal.

    >>> [part for _, part in split_visible("a b\x1b")]
    ['a', '·', 'b', 'U+001B']
    """
    parts: list[tuple[Sort, str]] = []
    for character in text:
        if character in _SIGNS:
            parts.append(_SIGNS[character])
        elif unicodedata.category(character) in _UNSEEN:
            parts.append((Sort.CODE, f"U+{ord(character):04X}"))
        elif parts and parts[-1][0] is Sort.PLAIN:
            parts[-1] = (Sort.PLAIN, parts[-1][1] + character)
        else:
            parts.append((Sort.PLAIN, character))
    return parts


def name_visibly(text: str) -> str:
    """Return a name, e.g. a file's, with blanks as they are and nothing else invisible."""
    return "".join(" " if sort is Sort.SPACE else part for sort, part in split_visible(text))


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _list_kinds(tree: Decoder | None) -> Iterator[str]:
    """Yield the types of a decoder and of those inside it."""
    if tree:
        yield tree["type"]
        for part in tree.get("decoders", ()):
            yield from _list_kinds(part)


def _byte_alphabet() -> dict[str, int]:
    """Return character -> byte of a byte-level vocabulary. Source: bytes_to_unicode in GPT-2's encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
