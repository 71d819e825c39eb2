"""Hash the words and word n-grams of texts with numpy, for dedup and decontamination.

A word is a sequence of letters, marks and numbers in lower case; punctuation and white space separate words. In scripts
without spaces between words (Han, kana, Thai and related scripts), every character is a word. Source: Brown et al.
2020, arXiv:2005.14165, appendix C ("lowercase, whitespace delimited words with no punctuation").

Hashes have 64 bits and are equal in every process and on every machine, unlike Python's `hash`.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ropeway.data.text_batches import iterate_batches

_CHUNK = 1 << 17  # code points per call: 6 MB of arrays, which fit the cache (twice as fast as 1 << 20)
_FACTOR = 0x9E3779B97F4A7C15  # odd; 2**64 / golden ratio, as splitmix64's step
_SHORT_BIT = np.uint64(1)
_MAX_WORD = 4096  # positions in a word with distinct weights; they repeat in a longer "word"
# Thai and Lao, Myanmar, Khmer, kana, Han. Source: Unicode 15, Blocks.txt.
_UNSPACED_SCRIPTS = (
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
    """Concatenated hashes of several texts.

    Attributes:
        values: `(H,)`.
        offsets: `(texts + 1,)`; text i has `values[offsets[i] : offsets[i + 1]]`.
    """

    values: NDArray[np.uint64]
    offsets: NDArray[np.int64]


def hash_grams(texts: Sequence[str], n: int, *, mark_short: bool = False) -> Hashes:
    """Return the hashes of every `n`-gram of words of each text; n-grams do not span texts.

    Args:
        texts: In any Unicode normal form. A text of 1 to n - 1 words is one n-gram.
        n: Words per n-gram.
        mark_short: Use the lowest bit to mark such short texts; the hash then has 63 bits.
    """
    words = hash_words(texts)
    begins, counts = words.offsets[:-1], np.diff(words.offsets)
    runs = np.maximum(counts - n + 1, 0)
    weights = position_weights(n)
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
    values = mix_bits(grams[first])
    if mark_short:
        values &= ~_SHORT_BIT
        values[offsets[brief]] |= _SHORT_BIT
    return Hashes(values, offsets)


def is_short(grams: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return `(G,)`, True for marked n-grams: complete texts of fewer than n words."""
    return np.asarray((grams & _SHORT_BIT) != 0)


def hash_words(texts: Sequence[str]) -> Hashes:
    """Return the hash of every word of each text.

    >>> a, b, c = hash_words(["Well, well!", "no"]).values.tolist()
    >>> a == b, a == c
    (True, False)
    """
    found, counts = [np.empty(0, np.uint64)], np.zeros(len(texts) + 1, np.int64)
    for numbers, chunks in _iterate_chunk_batches(texts):
        values, each = _hash_chunks(chunks)
        found.append(values)
        np.add.at(counts, np.asarray(numbers) + 1, each)
    return Hashes(np.concatenate(found), np.cumsum(counts))


def _iterate_chunk_batches(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Yield (text numbers, chunks) with about `_CHUNK` code points, normalized and in lower case."""
    chunks = chain.from_iterable(_split_text(number, text) for number, text in enumerate(texts))
    for batch in iterate_batches(chunks, lambda pair: len(pair[1]), _CHUNK):
        yield [number for number, _ in batch], [chunk for _, chunk in batch]


def _split_text(number: int, text: str) -> Iterator[tuple[int, str]]:
    """Yield a text in chunks, split at a space if there is one."""
    text = unicodedata.normalize("NFC", text).lower()
    begin = 0
    while len(text) - begin > _CHUNK:
        end = text.rfind(" ", begin + 1, begin + _CHUNK)
        end = end if end > 0 else begin + _CHUNK
        yield number, text[begin:end]
        begin = end
    yield number, text[begin:]


def _hash_chunks(chunks: list[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hashes of all words, and the number of words of each chunk."""
    joined = "\n".join(chunks) + "\n"
    symbols, alone = _code_point_tables(0x80 if joined.isascii() else 0x110000)
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
    borders = np.cumsum([len(chunk) + 1 for chunk in chunks])
    each = np.diff(np.searchsorted(starts, borders), prepend=0)
    if not len(starts):
        return np.empty(0, np.uint64), each
    here = np.arange(len(points))
    position = here - np.maximum.accumulate(np.where(begins, here, 0))
    values *= position_weights(_MAX_WORD)[position & (_MAX_WORD - 1)]
    return mix_bits(np.add.reduceat(values, starts)), each


@cache
def position_weights(count: int) -> NDArray[np.uint64]:
    """Return the first `count` powers of an odd number, modulo 2**64: weights that make a hash depend on positions."""
    return np.multiply.accumulate(np.full(count, _FACTOR, np.uint64))


@cache
def _code_point_tables(count: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return for each code point below `count` its hash (0 if it separates words), and whether it is a word by itself.

    All of Unicode takes 0.25 s, once per process; ASCII takes no measurable time.
    """
    numbers = mix_bits(np.arange(1, count + 1, dtype=np.uint64))
    for point in range(count):
        if unicodedata.category(chr(point))[0] not in "LMN":
            numbers[point] = 0
    alone = np.zeros(count, np.bool_)
    for begin, end in _UNSPACED_SCRIPTS:
        alone[begin : end + 1] = True
    return numbers, alone


def mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return values with their bits mixed over all 64. Source: splitmix64's finalizer (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
