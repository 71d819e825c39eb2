"""Texts to hashed words and hashed runs of words (n-grams), in numpy: what duplicates and contamination compare.

A word is a run of letters, marks and numbers, in lower case; punctuation and blanks only separate. Where a script
writes no blanks between words (Han, kana, Thai and its neighbours) every sign is a word of its own. Source: Brown et
al. 2020, arXiv:2005.14165, appendix C ("lowercase, whitespace delimited words with no punctuation").

Hashes have 64 bits and are the same in every process and on every machine: Python's own `hash` is not.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ropeway.data.text_batches import iterate_batches

_PIECE = 1 << 17  # code points hashed at once: 6 MB of arrays, which fit a cache (twice as fast as 1 << 20)
_FACTOR = 0x9E3779B97F4A7C15  # odd; 2**64 / golden ratio, as splitmix64's step
_SHORT = np.uint64(1)
_LONGEST = 4096  # positions in a word with a power of their own; a longer "word" starts over
# Thai and Lao, Myanmar, Khmer, kana, Han. Source: Unicode 15, Blocks.txt.
_ALONE = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


@dataclass(frozen=True, slots=True)
class Hashes:
    """Hashes of several texts, one text's after another's.

    Attributes:
        values: `(H,)`.
        offsets: `(texts + 1,)`; text i has `values[offsets[i] : offsets[i + 1]]`.
    """

    values: NDArray[np.uint64]
    offsets: NDArray[np.int64]


def hash_grams(texts: Sequence[str], n: int, *, marks_short: bool = False) -> Hashes:
    """Return the hashes of every run of `n` words of each text, none across two texts.

    Args:
        texts: In any normal form. One of fewer words, but not of none, is one gram.
        n: Words of a gram.
        marks_short: The lowest bit says whether a gram is such a short text, so it costs the hash one bit.
    """
    words = hash_words(texts)
    begins, counts = words.offsets[:-1], np.diff(words.offsets)
    runs = np.maximum(counts - n + 1, 0)
    weights = powers(n)
    grams = np.zeros(len(words.values), np.uint64)
    padded = np.concatenate([words.values, np.zeros(n, np.uint64)])
    for at in range(n):
        grams += padded[at : at + len(grams)] * weights[at]
    brief = np.flatnonzero((counts > 0) & (counts < n))
    for text in brief.tolist():
        own = words.values[begins[text] : begins[text] + counts[text]]
        grams[begins[text]] = (own * weights[: len(own)]).sum(dtype=np.uint64)
    runs[brief] = 1
    offsets = np.concatenate([[0], np.cumsum(runs)])
    first = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], runs)
    values = mix(grams[first])
    if marks_short:
        values &= ~_SHORT
        values[offsets[brief]] |= _SHORT
    return Hashes(values, offsets)


def is_short(grams: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return `(G,)`, True for marked grams that are a whole text of fewer words than the others."""
    return np.asarray((grams & _SHORT) != 0)


def hash_words(texts: Sequence[str]) -> Hashes:
    """Return the hash of every word of each text.

    >>> a, b, c = hash_words(["Well, well!", "no"]).values.tolist()
    >>> a == b, a == c
    (True, False)
    """
    found, counts = [np.empty(0, np.uint64)], np.zeros(len(texts) + 1, np.int64)
    for numbers, pieces in _batches(texts):
        values, each = _hash_pieces(pieces)
        found.append(values)
        np.add.at(counts, np.asarray(numbers) + 1, each)
    return Hashes(np.concatenate(found), np.cumsum(counts))


def _batches(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Yield (text numbers, pieces) of some `_PIECE` code points, normalised and in lower case."""
    pieces = chain.from_iterable(_cut(number, text) for number, text in enumerate(texts))
    for batch in iterate_batches(pieces, lambda pair: len(pair[1]), _PIECE):
        yield [number for number, _ in batch], [piece for _, piece in batch]


def _cut(number: int, text: str) -> Iterator[tuple[int, str]]:
    """Yield a text in pieces, cut at a blank where there is one."""
    text = unicodedata.normalize("NFC", text).lower()
    begin = 0
    while len(text) - begin > _PIECE:
        end = text.rfind(" ", begin + 1, begin + _PIECE)
        end = end if end > 0 else begin + _PIECE
        yield number, text[begin:end]
        begin = end
    yield number, text[begin:]


def _hash_pieces(pieces: list[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hashes of all words, and how many each piece has."""
    joined = "\n".join(pieces) + "\n"
    symbols, alone = _tables(0x80 if joined.isascii() else 0x110000)
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    values = symbols[points]
    inside = values != 0
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    if not joined.isascii():
        lonely = alone[points]
        begins |= inside & lonely
        begins[1:] |= inside[1:] & lonely[:-1]
    starts = np.flatnonzero(begins)
    borders = np.cumsum([len(piece) + 1 for piece in pieces])
    each = np.diff(np.searchsorted(starts, borders), prepend=0)
    if not len(starts):
        return np.empty(0, np.uint64), each
    here = np.arange(len(points))
    position = here - np.maximum.accumulate(np.where(begins, here, 0))
    values *= powers(_LONGEST)[position & (_LONGEST - 1)]
    return mix(np.add.reduceat(values, starts)), each


@cache
def powers(count: int) -> NDArray[np.uint64]:
    """Return the first `count` powers of an odd number, modulo 2**64: weights that tell places apart."""
    return np.multiply.accumulate(np.full(count, _FACTOR, np.uint64))


@cache
def _tables(count: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return for each code point below `count` its number, 0 where it separates words, and if it is a word alone.

    All of Unicode takes a quarter of a second, once a process; ASCII nothing.
    """
    numbers = mix(np.arange(1, count + 1, dtype=np.uint64))
    for point in range(count):
        if unicodedata.category(chr(point))[0] not in "LMN":
            numbers[point] = 0
    alone = np.zeros(count, np.bool_)
    for begin, end in _ALONE:
        alone[begin : end + 1] = True
    return numbers, alone


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return every bit of a value spread over all 64. Source: splitmix64's finaliser (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
