"""The data profile of a version: counts, histograms and sketches of its records, compared between versions as drift.

Stage tokenize counts each unit of work while its texts are in memory; sums of units are tokens/profile.json. Stage
report_data adds what prepare decided and writes data_profile.json, which is part of a version. Both depend on data and
params alone. A profile has no text: words are only in hashes.

Records are counted as they are stored, before duplicates, split and `fraction`; `trained_tokens` is what the first
epoch reads of each source.
"""

import string
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from ropeway.data.words import mix_bits
from ropeway.runtime.manifest import FileFacts

FORMAT = 1
FILE = "data_profile.json"  # in a version
TOKEN_BUCKETS, SYSTEM_BUCKETS = 256, 64
LENGTH_BINS = 48  # two per doubling: up to 2**24 tokens
MAX_HASHES = 1024  # smallest text hashes that are kept; the share of texts seen before has a standard error of 0.016
_UNIT_TOP_TOKENS, TOP_TOKENS = 1024, 64
_MAX_ROLES = 12  # counted by name
_OTHER = "other"
# Blocks of letters by script; all else (digits, punctuation, white space, symbols) is `common`. First and last code
# point. Source: Unicode 15, Blocks.txt.
_SCRIPTS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "latin": (
        (0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F),
        (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A),
    ),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "armenian": ((0x530, 0x58F),),
    "hebrew": ((0x590, 0x5FF), (0xFB1D, 0xFB4F)),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "devanagari": ((0x900, 0x97F), (0xA8E0, 0xA8FF)),
    "bengali": ((0x980, 0x9FF),),
    "gurmukhi": ((0xA00, 0xA7F),),
    "gujarati": ((0xA80, 0xAFF),),
    "tamil": ((0xB80, 0xBFF),),
    "telugu": ((0xC00, 0xC7F),),
    "kannada": ((0xC80, 0xCFF),),
    "malayalam": ((0xD00, 0xD7F),),
    "sinhala": ((0xD80, 0xDFF),),
    "thai": ((0xE00, 0xE7F),),
    "lao": ((0xE80, 0xEFF),),
    "tibetan": ((0xF00, 0xFFF),),
    "myanmar": ((0x1000, 0x109F),),
    "georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2F)),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "ethiopic": ((0x1200, 0x139F), (0x2D80, 0x2DDF)),
    "khmer": ((0x1780, 0x17FF),),
    "mongolian": ((0x1800, 0x18AF),),
    "kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D)),
    "han": ((0x2E80, 0x2FDF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
}  # fmt: skip
_SCRIPT_NAMES = ("common", *_SCRIPTS)
_ASCII_OTHERS = bytes(byte for byte in range(256) if chr(byte) not in string.ascii_letters)
_LAST_ASCII = 0x7F
Json = Mapping[str, Any]


@dataclass
class DataProfile:
    """Counts of the records of a unit, a source, or all sources; profiles can be added.

    Attributes:
        characters: Code points of documents, or of system messages and turns.
        lengths: Sequences by tokens: bin b has 2**(b/2) to below 2**((b+1)/2) tokens, the last bin also longer ones.
        turns: Conversations by number of turns, in the same bins.
        scripts: Script -> code points.
        roles: Role -> messages, system messages included.
        with_system, with_tools: Conversations with a system message, with tools offered.
        with_calls, with_reasoning: Answers with tool calls, with reasoning in a field of its own or in `<think>`.
        systems: System messages by bucket of their hash.
        tokens_by_bucket: Tokens by bucket of their id's hash.
        top_tokens: Token id -> occurrences, of the most frequent ones. Counts can be too low where a token is not among
            the most frequent ones of each unit.
        hashes: The smallest hashes of distinct record texts, ascending.
    """

    records: int = 0
    conversations: int = 0
    sequences: int = 0
    tokens: int = 0
    characters: int = 0
    with_system: int = 0
    with_tools: int = 0
    with_calls: int = 0
    with_reasoning: int = 0
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(LENGTH_BINS, np.int64))
    turns: NDArray[np.int64] = field(default_factory=lambda: np.zeros(LENGTH_BINS, np.int64))
    systems: NDArray[np.int64] = field(default_factory=lambda: np.zeros(SYSTEM_BUCKETS, np.int64))
    tokens_by_bucket: NDArray[np.int64] = field(default_factory=lambda: np.zeros(TOKEN_BUCKETS, np.int64))
    scripts: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    top_tokens: Counter[int] = field(default_factory=Counter)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def add(self, other: "DataProfile") -> None:
        """Add the counts of other records."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if one.name == "hashes":
                self.hashes = smallest(np.concatenate([mine, theirs]))
            elif isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, one.name, mine + theirs)

    def count_tokens(self, tokens: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Count concatenated sequences: `(T,)` ids, `(N,)` tokens of each sequence."""
        if not len(tokens):
            return
        counts = np.bincount(tokens)
        ids = np.flatnonzero(counts)
        self.tokens += len(tokens)
        self.sequences += len(lengths)
        self.lengths += histogram(lengths)
        np.add.at(self.tokens_by_bucket, bucket(ids, TOKEN_BUCKETS), counts[ids])
        self.top_tokens.update(dict(zip(ids.tolist(), counts[ids].tolist(), strict=True)))

    def to_json(self) -> dict[str, object]:
        """Return JSON values; only the most frequent tokens of a unit, and the most frequent roles, are kept."""
        values = asdict(self)
        for name in ("lengths", "turns", "systems", "tokens_by_bucket"):
            values[name] = cast("NDArray[np.int64]", values[name]).tolist()
        values["hashes"] = [f"{one:016x}" for one in self.hashes.tolist()]
        values["top_tokens"] = {str(key): count for key, count in most_common(self.top_tokens, _UNIT_TOP_TOKENS)}
        values["roles"] = _limited(self.roles)
        values["scripts"] = dict(sorted(self.scripts.items()))
        return values

    @classmethod
    def from_json(cls, values: Json) -> Self:
        """Return the profile that `to_json` described; raise KeyError, TypeError or ValueError if it did not."""
        arrays = {
            name: np.asarray(values[name], np.int64) for name in ("lengths", "turns", "systems", "tokens_by_bucket")
        }
        counts = {one.name: int(values[one.name]) for one in fields(cls) if one.type == "int" or one.type is int}
        parts: dict[str, Any] = {**counts, **arrays}
        return cls(
            **parts,
            scripts=Counter(values["scripts"]),
            roles=Counter(values["roles"]),
            top_tokens=Counter({int(key): count for key, count in values["top_tokens"].items()}),
            hashes=np.asarray([int(one, 16) for one in values["hashes"]], np.uint64),
        )


def build_data_profile(tokenized: Json, ledger: Json, *, record_index: FileFacts | None = None) -> dict[str, object]:
    """Return the content of data_profile.json from that of tokens/profile.json and ledger.json.

    `record_index` describes records.index, which is attached to a version: so the version's digest covers it.

    Sketches (token buckets, text hashes, system messages) are of all sources together, so that the size is bounded: 25
    kB and 1 kB per source.
    """
    whole = DataProfile()
    for values in tokenized["sources"].values():
        whole.add(DataProfile.from_json(values))
    accounts = {account["name"]: account for account in ledger["sources"]}
    sources = {name: _describe_source(values, accounts[name]) for name, values in tokenized["sources"].items()}
    top = {str(key): count for key, count in most_common(whole.top_tokens, TOP_TOKENS)}
    totals = ("read", "refused", "exact_duplicates", "near_duplicates", "trained_tokens")
    return {
        "format": FORMAT,
        **({"record_index": record_index} if record_index else {}),
        "tokenizer": tokenized["tokenizer"],
        "sources": sources,
        "all": {
            **whole.to_json(),
            "top_tokens": top,
            **{key: sum(source[key] for source in sources.values()) for key in totals},
        },
    }


def _describe_source(values: Json, account: Json) -> dict[str, Any]:
    records, findings, epochs = account["records"], account["findings"], account["epochs"]
    kept = {key: value for key, value in values.items() if key not in _OF_ALL}
    refused = sum(sum(records[f"refused_by_{stage}"].values()) for stage in ("fetch", "tokenize"))
    return {
        **kept,
        "kind": account["kind"],
        "read": records["read"],
        "refused": refused,
        "exact_duplicates": findings["exact"]["records"],
        "near_duplicates": findings["near"]["records"],
        "trained_tokens": epochs[0]["row_tokens"] if epochs else 0,
    }


def check_lists(profile: Json) -> None:
    """Raise ValueError unless every list of a data_profile.json of this format has the length that it must have."""
    parts = [("all", profile.get("all"), _LISTS)]
    sources = profile.get("sources")
    if isinstance(sources, Mapping):
        kept = {key: length for key, length in _LISTS.items() if key not in _OF_ALL}
        parts += [(f"sources.{name}", source, kept) for name, source in sources.items()]
    for place, part, lists in parts:
        for key, length in lists.items():
            found = part.get(key) if isinstance(part, Mapping) else None
            if not isinstance(found, list) or len(found) != length:
                count = f"{len(found)} values" if isinstance(found, list) else "no list"
                raise ValueError(f"{place}.{key}: expected {length} values, found {count}")


_LISTS = {"lengths": LENGTH_BINS, "turns": LENGTH_BINS, "systems": SYSTEM_BUCKETS, "tokens_by_bucket": TOKEN_BUCKETS}
_OF_ALL = ("systems", "tokens_by_bucket", "top_tokens", "hashes")


def histogram(values: NDArray[np.integer] | Iterable[int]) -> NDArray[np.int64]:
    """Return `(LENGTH_BINS,)` counts of positive numbers, two bins per doubling; zeros are in the first bin.

    >>> [int(np.flatnonzero(histogram([value]))[0]) for value in (1, 2, 3, 4, 6, 1 << 40)]
    [0, 2, 3, 4, 5, 47]
    """
    numbers = np.asarray(values if isinstance(values, np.ndarray) else list(values), np.int64)
    return np.bincount(np.searchsorted(_edges(), numbers, side="right").clip(1) - 1, minlength=LENGTH_BINS)


@cache
def _edges() -> NDArray[np.int64]:
    """Return `(LENGTH_BINS,)` the smallest whole number of each bin. Exact, with integers only: 2**(b/2)."""
    doubles = [1 << power for power in range(LENGTH_BINS // 2)]
    return np.asarray([edge for one in doubles for edge in (one, _ceil_sqrt(2 * one * one))], np.int64)


def _ceil_sqrt(value: int) -> int:
    root = int(value**0.5)
    while root * root < value:
        root += 1
    while (root - 1) * (root - 1) >= value:
        root -= 1
    return root


def bin_names(bins: int = LENGTH_BINS) -> list[str]:
    """Return the name of each bin of `histogram`: its smallest and largest number.

    >>> bin_names(6)
    ['1', '2', '2', '3', '4 to 5', '6 to 7']
    """
    edges = _edges().tolist()
    ends = [*(edge - 1 for edge in edges[1:]), None]
    return [
        f"{first:,} or more" if last is None else f"{first:,} to {last:,}" if last > first else f"{first:,}"
        for first, last in zip(edges[:bins], ends[:bins], strict=True)
    ]


def bucket(values: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    """Return the bucket of each number, by its hash; `count` is a power of two."""
    return (mix_bits(values.astype(np.uint64) + np.uint64(1)) & np.uint64(count - 1)).astype(np.int64)


def smallest(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the `MAX_HASHES` smallest distinct hashes, ascending; 0, the hash of no text, is left out."""
    if len(hashes) > 4 * MAX_HASHES:  # else sorting all of a large source takes most of the time
        known = np.unique(np.partition(hashes, 2 * MAX_HASHES)[: 2 * MAX_HASHES])
        if len(known) > MAX_HASHES:
            hashes = known
    return np.unique(hashes[hashes > 0])[:MAX_HASHES]


def count_scripts(text: str) -> Counter[str]:
    """Return the number of code points of each script.

    >>> dict(count_scripts("Tea: чай"))
    {'common': 2, 'latin': 3, 'cyrillic': 3}
    """
    ascii_text = text.encode("ascii", "ignore")
    letters = len(ascii_text.translate(None, _ASCII_OTHERS))
    found = Counter({"common": len(ascii_text) - letters, "latin": letters})
    if len(ascii_text) < len(text):
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        counts = np.bincount(_script_table()[points[points > _LAST_ASCII]], minlength=len(_SCRIPT_NAMES)).tolist()
        found.update(dict(zip(_SCRIPT_NAMES, counts, strict=True)))
    return Counter({name: count for name, count in found.items() if count})


@cache
def _script_table() -> NDArray[np.uint8]:
    """Return `(0x110000,)` the script of each code point, as a position in `_SCRIPT_NAMES`."""
    table = np.zeros(0x110000, np.uint8)
    for number, ranges in enumerate(_SCRIPTS.values(), start=1):
        for first, last in ranges:
            table[first : last + 1] = number
    return table


def most_common(counts: Mapping[int, int], most: int) -> list[tuple[int, int]]:
    """Return the most frequent entries, equal counts in the order of their keys."""
    return sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:most]


def _limited(roles: Counter[str]) -> dict[str, int]:
    """Return the most frequent roles by name and all others together: a record can name any role."""
    ordered = sorted(roles.items(), key=lambda one: (one[0] == _OTHER, -one[1], one[0]))
    kept, rest = ordered[:_MAX_ROLES], ordered[_MAX_ROLES:]
    return dict(sorted([*kept, *([(_OTHER, sum(count for _, count in rest))] if rest else [])]))
