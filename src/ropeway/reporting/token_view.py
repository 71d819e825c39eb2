"""Tokens for display: their text, whether they are supervised, whether they are special.

A loss mask belongs to positions: True where predicting the *next* token counts. Displays need it per token: token t is
supervised if the mask is True at t - 1 of the same piece. The first token of a piece never is: no position precedes it.
If the mask is True at the last position, the token after the piece is supervised (`document_end`,
`Reading.next_is_supervised`).
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
_MOST_PENDING_BYTES = 64  # of a character that never becomes complete


@dataclass(frozen=True, slots=True)
class DisplayToken:
    """One decoded token.

    Attributes:
        text: Its text; hex digits for bytes that are not a complete character.
        is_special: A special token of the tokenizer, e.g. `</s>`.
        completes: The character that these bytes complete.
    """

    number: int
    text: str
    is_special: bool = False
    is_bytes: bool = False
    completes: str = ""


class Decoder(TypedDict):
    """The used fields of a decoder in tokenizer.json; type Sequence has inner decoders."""

    type: str
    decoders: NotRequired[list["Decoder"]]


class Vocabulary:
    """Decodes single tokens of Llama's tokenizer type (byte fallback) and GPT-2's (byte level)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Detect how this tokenizer encodes spaces and bytes."""
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._added = frozenset(added)
        self._special = frozenset(number for number, token in added.items() if token.special)
        decoder = json.loads(tokenizer.to_str())["decoder"]
        kinds = set(_list_kinds(decoder))
        self._alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        self._falls_back = "ByteFallback" in kinds
        self._has_blanks = "Metaspace" in kinds or BLANK in json.dumps(decoder, ensure_ascii=False)

    def show(self, numbers: Iterable[int]) -> Iterator[DisplayToken]:
        """Yield these tokens decoded, in order."""
        pending = b""
        for number in numbers:
            spelt = self._spell(int(number))
            if isinstance(spelt, bytes):
                pending = (pending + spelt)[-_MOST_PENDING_BYTES:]
                completes = _decode(pending) or ""
                pending = b"" if completes else pending
                yield DisplayToken(int(number), spelt.hex(" ").upper(), is_bytes=True, completes=completes)
            else:
                pending = b""
                yield DisplayToken(int(number), spelt, is_special=int(number) in self._special)

    def _spell(self, number: int) -> str | bytes:
        """Return a token's text, or its bytes if they are not complete characters."""
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
    """One piece of a row with its loss mask.

    Attributes:
        length: Tokens of the whole sequence.
        tokens: `(T,)` ids of the piece.
        supervised_mask: `(T,)` True where predicting *this* token counts.
        next_is_supervised: The token after the piece is supervised too.
    """

    piece: Piece
    source: str
    length: int
    tokens: NDArray[np.int64]
    supervised_mask: NDArray[np.bool_]
    next_is_supervised: bool

    @property
    def supervised(self) -> int:
        """Positions that count in the loss."""
        return int(self.supervised_mask.sum()) + self.next_is_supervised


def read_piece(piece: Piece, shards: Shards, profile: RowParams) -> Reading:
    """Return a piece with the loss mask that training uses."""
    source = shards.sources[piece.source]
    tokens, kinds = source.read(piece.sequence)
    cut = slice(piece.begin, piece.end)
    mask = loss_mask(kinds[cut], profile)
    supervised_mask = np.concatenate(([False], mask[:-1])) if len(mask) else mask
    length = int(source.lengths[piece.sequence])
    return Reading(piece, source.name, length, tokens[cut], supervised_mask, bool(mask[-1:].any()))


def read_whole(source: int, sequence: int, shards: Shards, profile: RowParams) -> Reading:
    """Return a whole sequence with its loss mask, regardless of `max_length`."""
    length = int(shards.sources[source].lengths[sequence])
    return read_piece(Piece(source, sequence, 0, length), shards, profile)


def find_part(sequence: int, source: SourceShards) -> str | None:
    """Return `train` or `validation`, the split of a sequence; None if it is in neither."""
    return next((part for part in ("train", "validation") if (getattr(source, part) == sequence).any()), None)


def next_token(reading: Reading, shards: Shards, profile: RowParams, vocabulary: Vocabulary) -> str | None:
    """Return the supervised token after the piece as text; None if there is none."""
    if not reading.next_is_supervised:
        return None
    if profile.document_end == "eos":
        return next(vocabulary.show([shards.special["eos"]])).text
    return "the next token in the batch"  # document_end: published


class TextKind(StrEnum):
    """How a part of a token's text is displayed."""

    PLAIN = "plain"
    SPACE = "space"
    BREAK = "break"
    TAB = "tab"
    CODE = "code"  # an invisible or direction-changing character, shown as its code point


_SIGNS = {" ": (TextKind.SPACE, "·"), "\n": (TextKind.BREAK, "⏎"), "\t": (TextKind.TAB, "⇥")}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"}


def split_visible(text: str) -> list[tuple[TextKind, str]]:
    r"""Return a text in parts without invisible characters and terminal control codes.

    >>> [part for _, part in split_visible("a b\x1b")]
    ['a', '·', 'b', 'U+001B']
    """
    parts: list[tuple[TextKind, str]] = []
    for character in text:
        if character in _SIGNS:
            parts.append(_SIGNS[character])
        elif unicodedata.category(character) in _UNSEEN:
            parts.append((TextKind.CODE, f"U+{ord(character):04X}"))
        elif parts and parts[-1][0] is TextKind.PLAIN:
            parts[-1] = (TextKind.PLAIN, parts[-1][1] + character)
        else:
            parts.append((TextKind.PLAIN, character))
    return parts


def name_visibly(text: str) -> str:
    """Return a name, e.g. a file's, with spaces kept and other invisible characters replaced."""
    return "".join(" " if sort is TextKind.SPACE else part for sort, part in split_visible(text))


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _list_kinds(tree: Decoder | None) -> Iterator[str]:
    """Yield the types of a decoder and of its inner decoders."""
    if tree:
        yield tree["type"]
        for part in tree.get("decoders", ()):
            yield from _list_kinds(part)


def _byte_alphabet() -> dict[str, int]:
    """Return character -> byte of a byte-level vocabulary. Source: bytes_to_unicode in GPT-2's encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
