"""The records of a version: digests, never texts, and what became of each record. `ropeway contains` reads it.

records.index, written by prepare and attached to a version in the registry; all numbers are big-endian:

    8 bytes   `RWRECIDX`
    2 bytes   version of the format, 1
    2 bytes   bytes of a digest, 9
    4 bytes   length of the header
    8 bytes   number of entries
    header    canonical JSON: `identity`, what the digest is of; `outcomes`, a list of {source, role, reason}
    entries   11 bytes each, ascending: the first 9 bytes of the record's digest (`ropeway.data.record_identity`), and
              2 bytes, the position of its outcome in `outcomes`

`role` is `trained` (a step of the plan reads it), `validation` or `dropped`; `reason` says why it was dropped. Records
with one digest are one entry, with the first of their outcomes: training before validation before dropping, then the
sources in the order of params. A record without text has no entry.

The order depends on the digests alone, so equal records give equal bytes. A digest that is in no record equals one of
n entries with probability n / 2**72: 2e-15 for 10 million.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from ropeway.config.faults import check_json
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import canonical_json, json_mapping

MAGIC = b"RWRECIDX"
VERSION = 1
KEY_BYTES = 9
ENTRY_BYTES = 11
IDENTITY = "blake2b-128 of NFC texts with single spaces, joined by U+001E"
_HEAD = struct.Struct(">8sHHIQ")
_ENTRY = np.dtype([("high", ">u8"), ("low", "u1"), ("outcome", ">u2")])
_MAX_OUTCOMES = 1 << 16
_MAX_HEADER_BYTES = 64 << 20
_FEW = 64  # digests that are looked up one by one; for more, the whole index is read once
_BLOCK_ENTRIES = 1 << 20
_REMEDY = "Publish the version again from its run, or restore the registry from a backup"
Role = Literal["trained", "validation", "dropped"]
ROLES: tuple[Role, ...] = ("trained", "validation", "dropped")
ReadBytes = Callable[[int, int], bytes]
"""Returns `count` bytes from `start`, fewer at the end."""


@dataclass(frozen=True, slots=True)
class RecordOutcome:
    """What became of a record in a run.

    Attributes:
        source: Its source in params; empty if there are too many sources to name.
        role: See `ROLES`.
        reason: Why it was dropped, else empty.
    """

    source: str
    role: Role
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RecordGroup:
    """Records of one outcome: `(n, 2)` digests as `ropeway.data.record_identity.exact_keys` returns them."""

    outcome: RecordOutcome
    keys: NDArray[np.uint64]


class _Outcome(TypedDict):
    source: str
    role: Role
    reason: str


class _Header(TypedDict):
    identity: str
    outcomes: list[_Outcome]


def build_record_index(groups: Iterable[RecordGroup]) -> bytes:
    """Return the content of records.index; groups are in the order of params, and of roles in each source."""
    found = [group for group in groups if len(group.keys)]
    if len({group.outcome for group in found}) > _MAX_OUTCOMES:
        found = [
            RecordGroup(RecordOutcome("", group.outcome.role, group.outcome.reason), group.keys) for group in found
        ]
    order = {role: number for number, role in enumerate(ROLES)}
    outcomes = sorted(dict.fromkeys(group.outcome for group in found), key=lambda one: order[one.role])
    numbers = {outcome: number for number, outcome in enumerate(outcomes)}
    entries = np.empty(sum(len(group.keys) for group in found), _ENTRY)
    at = 0
    for group in found:
        part = entries[at : at + len(group.keys)]
        at += len(part)
        bytes_of = np.ascontiguousarray(group.keys, "<u8").view(np.uint8).reshape(-1, 16)
        part["high"] = np.ascontiguousarray(bytes_of[:, :8]).view(">u8")[:, 0]
        part["low"], part["outcome"] = bytes_of[:, 8], numbers[group.outcome]
    entries = _sorted_entries(entries)
    header = canonical_json({"identity": IDENTITY, "outcomes": [asdict(one) for one in outcomes]})
    return _HEAD.pack(MAGIC, VERSION, KEY_BYTES, len(header), len(entries)) + header + entries.tobytes()


def _sorted_entries(entries: NDArray[np.void]) -> NDArray[np.void]:
    """Return the entries by digest, one for each: the one with the lowest outcome. No text has no entry."""
    high = entries["high"].astype(np.uint64)
    rest = entries["low"].astype(np.uint32) << np.uint32(16) | entries["outcome"].astype(np.uint32)
    order = np.lexsort((rest, high))
    high, low = high[order], entries["low"][order]
    first = np.ones(len(order), np.bool_)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    first &= (high != 0) | (low != 0)
    return np.asarray(entries[order[first]])


@dataclass(frozen=True)
class RecordIndex:
    """An index that is read in parts: from a file, or by ranges from a store.

    Attributes:
        outcomes: By their number in an entry.
        count: Number of entries.
    """

    where: str
    read: ReadBytes
    begin: int
    count: int
    outcomes: tuple[RecordOutcome, ...]

    @classmethod
    def open(cls, read: ReadBytes, size: int, where: str) -> "RecordIndex":
        """Read the header of an index of `size` bytes.

        Raises:
            DataError: It is not an index, is of a newer format, or its size does not fit its number of entries.
        """
        head = read(0, _HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(MAGIC):
            raise DataError(f"{where}: expected an index of records, found {head[:8]!r}. {_REMEDY}")
        _, version, key_bytes, header_bytes, count = _HEAD.unpack(head)
        if (version, key_bytes) != (VERSION, KEY_BYTES):
            raise DataError(
                f"{where}: an index of format {version} with digests of {key_bytes} bytes, expected {VERSION} and "
                f"{KEY_BYTES}. Upgrade Ropeway"
            )
        begin = _HEAD.size + header_bytes
        if header_bytes > _MAX_HEADER_BYTES or size != begin + count * ENTRY_BYTES:
            raise DataError(f"{where}: {size:,} bytes, expected {begin + count * ENTRY_BYTES:,}. {_REMEDY}")
        header = check_json(json_mapping(read(_HEAD.size, header_bytes)), _Header, where=where, remedy=_REMEDY)
        if header["identity"] != IDENTITY:
            raise DataError(f"{where}: digests are {header['identity']}, expected {IDENTITY}. Upgrade Ropeway")
        return cls(where, read, begin, count, tuple(RecordOutcome(**one) for one in header["outcomes"]))

    @property
    def false_match_probability(self) -> float:
        """The probability that the digest of a record that is not in the index equals one of its entries."""
        return float(self.count / 2 ** (8 * KEY_BYTES))

    def find(self, digests: Sequence[bytes]) -> list[RecordOutcome | None]:
        """Return the outcome of each digest, of which the first `KEY_BYTES` bytes count; None: it is not there."""
        keys = [(int.from_bytes(one[:8]), one[8]) for one in digests]
        if len(keys) > _FEW:
            return self._scan(keys)
        return [self._find_one(high, low) for high, low in keys]

    def _find_one(self, high: int, low: int) -> RecordOutcome | None:
        """Search by interpolation: digests are evenly distributed, so one read of a few windows finds the entry.

        The place of a digest among n has a standard deviation of at most sqrt(n) / 2.
        """
        begin, end, width = 0, self.count, 3 * isqrt(self.count) + 64
        guess = high * self.count >> 64
        while begin < end:
            first = max(begin, min(guess, end - 1) - width)
            last = min(end, first + 2 * width)
            entries = self._entries(first, last)
            if (high, low) < _key(entries[0]):
                end, guess = first, first
            elif (high, low) > _key(entries[-1]):
                begin, guess = last, last
            else:
                return self._pick(entries, [(high, low)])[0]
            width *= 2
        return None

    def _scan(self, keys: Sequence[tuple[int, int]]) -> list[RecordOutcome | None]:
        order = sorted(range(len(keys)), key=keys.__getitem__)
        found: list[RecordOutcome | None] = [None] * len(keys)
        at = 0
        for first in range(0, self.count, _BLOCK_ENTRIES):
            entries = self._entries(first, min(first + _BLOCK_ENTRIES, self.count))
            until = at
            last = _key(entries[-1])
            while until < len(order) and keys[order[until]] <= last:
                until += 1
            here = order[at:until]
            for number, outcome in zip(here, self._pick(entries, [keys[one] for one in here]), strict=True):
                found[number] = outcome
            at = until
        return found

    def _pick(self, entries: NDArray[np.void], keys: Sequence[tuple[int, int]]) -> list[RecordOutcome | None]:
        """Return the outcomes of keys that are not above the last of these entries."""
        if not keys:
            return []
        high = entries["high"].astype(np.uint64)
        found: list[RecordOutcome | None] = []
        places = np.searchsorted(high, np.asarray([one for one, _ in keys], np.uint64)).tolist()
        for place, (wanted, low) in zip(places, keys, strict=True):
            at = place
            while at < len(entries) and int(high[at]) == wanted and int(entries["low"][at]) < low:
                at += 1
            same = at < len(entries) and (int(high[at]), int(entries["low"][at])) == (wanted, low)
            found.append(self._outcome(int(entries["outcome"][at])) if same else None)
        return found

    def _outcome(self, number: int) -> RecordOutcome:
        if number >= len(self.outcomes):
            raise DataError(
                f"{self.where}: an entry has outcome {number}, expected {len(self.outcomes)} at most. {_REMEDY}"
            )
        return self.outcomes[number]

    def _entries(self, first: int, last: int) -> NDArray[np.void]:
        data = self.read(self.begin + first * ENTRY_BYTES, (last - first) * ENTRY_BYTES)
        if len(data) != (last - first) * ENTRY_BYTES:
            raise DataError(f"{self.where}: ends after {len(data):,} bytes of entry {first:,}. {_REMEDY}")
        return np.frombuffer(data, _ENTRY)


def _key(entry: np.void) -> tuple[int, int]:
    return int(entry["high"]), int(entry["low"])
