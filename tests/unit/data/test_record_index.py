"""records.index: its bytes, and that every digest is found in them, and no other."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.data import record_index
from ropeway.data.record_identity import exact_key, exact_keys
from ropeway.data.record_index import ENTRY_BYTES, RecordGroup, RecordIndex, RecordOutcome, build_record_index
from ropeway.runtime.errors import DataError

TRAINED = RecordOutcome("talk", "trained")
VALIDATION = RecordOutcome("talk", "validation")
NEAR = RecordOutcome("talk", "dropped", "near duplicate")


def keys_of(*digests):
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def opened(data):
    reads = []

    def read(start, count):
        reads.append(count)
        return data[start : start + count]

    return RecordIndex.open(read, len(data), "an index"), reads


def index_of(*groups):
    return opened(build_record_index([RecordGroup(outcome, keys_of(*digests)) for outcome, digests in groups]))[0]


def test_the_digest_of_a_record_is_that_of_its_text_without_layout():
    # b2sum -l 128 of "Is it late?", U+001E, "No."
    assert exact_key(["Is it late?", "No."]).hex() == "5ca8019f5d2470db78b2be23f6fbdf32"
    assert exact_key([" Is  it\nlate? ", "No."]).hex() == "5ca8019f5d2470db78b2be23f6fbdf32"
    assert exact_key(["  "]) == bytes(16)


def test_the_bytes_are_those_of_the_format():
    digests = [bytes([9] * 16), bytes([1] * 16)]
    data = build_record_index([RecordGroup(TRAINED, keys_of(digests[0])), RecordGroup(NEAR, keys_of(digests[1]))])
    assert data[:8] == b"RWRECIDX"
    assert [int.from_bytes(data[at:end]) for at, end in ((8, 10), (10, 12), (16, 24))] == [1, 9, 2]
    begin = 24 + int.from_bytes(data[12:16])
    assert data[begin:] == bytes([1] * 9) + b"\0\1" + bytes([9] * 9) + b"\0\0"


def test_the_first_outcome_of_equal_digests_counts_and_no_text_has_no_entry():
    same, empty = bytes(range(16)), bytes(16)
    for groups in (((NEAR, [same]), (VALIDATION, [same]), (TRAINED, [same, empty])), ((TRAINED, [same]),)):
        index = index_of(*groups)
        assert index.count == 1
        assert index.find([same, empty]) == [TRAINED, None]


def test_equal_records_in_another_order_give_equal_bytes():
    digests = [random.Random(n).randbytes(16) for n in range(50)]
    one, other = (
        build_record_index([RecordGroup(TRAINED, keys_of(*part)), RecordGroup(NEAR, keys_of(bytes([3] * 16)))])
        for part in (digests, digests[::-1])
    )
    assert one == other


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=400), st.randoms())
@settings(max_examples=40, deadline=None)
def test_every_digest_is_found_and_no_other(digests, generator):
    index = index_of((TRAINED, digests))
    known = {digest[:9] for digest in digests} - {bytes(9)}
    asked = [*digests, *(generator.randbytes(16) for _ in range(20))]
    expected = [TRAINED if one[:9] in known else None for one in asked]
    assert [index.find([one])[0] for one in asked] == expected, "one by one"
    assert index.find(asked * 5) == expected * 5, "in one pass"


def test_digests_that_begin_alike_are_found(monkeypatch):
    """Only a forger makes these: the search then takes more reads, and ends."""
    digests = [bytes([7] * 7) + number.to_bytes(2) + bytes(7) for number in range(3000)]
    index, reads = opened(build_record_index([RecordGroup(TRAINED, keys_of(*digests))]))
    assert all(index.find([one]) == [TRAINED] for one in digests[::97])
    assert index.find([bytes([7] * 6) + bytes(10), bytes([7] * 6) + bytes([8] * 10)]) == [None, None]
    monkeypatch.setattr(record_index, "_BLOCK_ENTRIES", 64)
    assert index.find(digests) == [TRAINED] * 3000
    assert max(reads) <= 3000 * ENTRY_BYTES


def test_one_lookup_among_many_reads_one_small_part():
    generator = np.random.default_rng(5)
    keys = generator.integers(0, 2**64, (200_000, 2), np.uint64)
    data = build_record_index([RecordGroup(TRAINED, keys)])
    index, reads = opened(data)
    before = len(reads)
    assert len(data) / len(keys) < 12
    for key in keys[:20]:
        assert index.find([key.astype("<u8").tobytes()]) == [TRAINED]
    assert len(reads) - before == 20
    assert max(reads[before:]) < len(data) / 50
    assert index.false_match_probability == pytest.approx(200_000 / 2**72)


def test_outcomes_beyond_two_bytes_leave_out_the_sources(monkeypatch):
    monkeypatch.setattr(record_index, "_MAX_OUTCOMES", 2)
    groups = [(RecordOutcome(f"source {n}", "trained"), [bytes([n] * 16)]) for n in range(1, 5)]
    assert index_of(*groups).find([bytes([3] * 16)]) == [RecordOutcome("", "trained")]


@pytest.mark.parametrize(
    ("at", "new", "why"),
    [(0, b"X", "expected an index of records"), (9, b"\2", "format 2"), (23, b"\7", "bytes, expected")],
)
def test_a_damaged_or_newer_index_is_refused(at, new, why):
    data = build_record_index([RecordGroup(TRAINED, exact_keys([("a",), ("b",)]))])
    with pytest.raises(DataError, match=why):
        opened(data[:at] + new + data[at + 1 :])
    with pytest.raises(DataError, match="bytes, expected"):
        opened(data[:-1])


def test_an_entry_with_an_outcome_that_the_index_does_not_name_is_refused():
    key = exact_key(["a"])
    data = build_record_index([RecordGroup(TRAINED, exact_keys([("a",)]))])
    with pytest.raises(DataError, match="outcome 65535"):
        opened(data[:-2] + b"\xff\xff")[0].find([key])
