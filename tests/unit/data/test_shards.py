from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.data.shards import FORMAT, Kind, open_shards, write_shard
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import write_manifest

sequence = st.lists(st.tuples(st.integers(0, 65535), st.sampled_from(list(Kind))), max_size=9)


def write(folder: Path, shards, *, vocab_size=65536):
    """One source `s` with these shards, as prepare leaves them."""
    here = folder / "s"
    here.mkdir(parents=True)
    lengths = []
    for number, part in enumerate(shards):
        pairs = [
            (np.array([token for token, _ in pairs], np.int64), np.array([kind for _, kind in pairs], np.uint8))
            for pairs in part
        ]
        lengths += write_shard(here, number, pairs, vocab_size=vocab_size)
    np.save(here / "lengths.npy", np.array(lengths, np.int32))
    np.save(here / "train.npy", np.arange(len(lengths), dtype=np.int64))
    np.save(here / "validation.npy", np.empty(0, np.int64))
    source = {"name": "s", "kind": "document", "shard_sequences": [len(part) for part in shards]}
    write_manifest(folder, {"format": FORMAT, "special": {"bos": 1, "eos": 2, "pad": 2}, "sources": [source]})
    return folder


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(sequence, max_size=4), min_size=1, max_size=3))
def test_every_sequence_reads_back_from_whatever_shard_it_is_in(tmp_path_factory, shards):
    folder = write(tmp_path_factory.mktemp("data") / "data", shards)
    (source,) = open_shards(folder).sources
    everything = [pairs for part in shards for pairs in part]
    assert source.lengths.tolist() == [len(pairs) for pairs in everything]
    for number, pairs in enumerate(everything):
        tokens, kinds = source.read(number)
        assert tokens.tolist() == [token for token, _ in pairs]
        assert kinds.tolist() == [kind for _, kind in pairs]


@pytest.mark.parametrize(("vocab_size", "width"), [(65536, 2), (65537, 4)])
def test_tokens_take_two_bytes_as_long_as_the_vocabulary_fits(tmp_path, vocab_size, width):
    folder = write(tmp_path / "data", [[[(vocab_size - 1, Kind.DOCUMENT)]]], vocab_size=vocab_size)
    assert np.load(folder / "s" / "tokens-00000.npy").itemsize == width
    assert open_shards(folder).sources[0].read(0)[0].tolist() == [vocab_size - 1]


def test_a_flipped_byte_is_found_before_anything_is_read(tmp_path):
    folder = write(tmp_path / "data", [[[(7, Kind.DOCUMENT)] * 9]])
    path = folder / "s" / "tokens-00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"tokens-00000.npy: sha256 is .*the file changed after it was written"):
        open_shards(folder)


def test_a_folder_without_a_manifest_is_unfinished_work(tmp_path):
    folder = write(tmp_path / "data", [[[(7, Kind.DOCUMENT)]]])
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="unfinished"):
        open_shards(folder)


def test_the_digest_changes_with_a_token_and_with_nothing_else(tmp_path):
    digests = [
        open_shards(write(tmp_path / name, [[[(token, Kind.DOCUMENT)]]])).digest
        for name, token in (("a", 7), ("b", 7), ("c", 8))
    ]
    assert digests[0] == digests[1] != digests[2]
