"""A GGUF file whose header states more than it has is refused before a library reads it."""

import struct

import pytest

from ropeway.runtime.errors import ConfigError
from ropeway.stages.base.gguf_header import MAX_ITEMS, check_gguf_header
from ropeway.stages.base.stage import check_gguf_rope
from tests.support.bounded import run_bounded
from tests.support.tiny_gguf import write_model

KEY = struct.pack("<Q", 23) + b"llama.rope.scaling.type"
HUGE = 1 << 60


def head(tensors, keys, *, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


BOMBS = {
    "2^60 tensors": head(HUGE, 0),
    "2^60 keys": head(0, HUGE),
    "a key of 2^60 bytes": head(0, 1) + struct.pack("<Q", HUGE) + KEY,
    "a text of 2^60 bytes": head(0, 1) + KEY + struct.pack("<IQ", 8, HUGE),
    "a list of 2^60 numbers": head(0, 1) + KEY + struct.pack("<IIQ", 9, 4, HUGE),
    "a list of many empty texts": head(0, 1) + KEY + struct.pack("<IIQ", 9, 8, MAX_ITEMS + 1) + bytes(800_000),
    "a list of texts that ends early": head(0, 1) + KEY + struct.pack("<IIQ", 9, 8, 1000) + bytes(800),
    "lists of lists": head(0, 1) + KEY + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 100_000,
    "an unknown type": head(0, 1) + KEY + struct.pack("<I", 77) + bytes(8),
    "a tensor of 2^31 dimensions": head(1, 0) + KEY + struct.pack("<I", 1 << 31),
    "a tensor of 2^120 values": head(1, 0) + KEY + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0) + bytes(64),
    "version 9": head(0, 0, version=9) + KEY,
    "no magic": b"none" + KEY,
    "empty": b"",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_header_beyond_its_file_is_refused_by_name_in_little_memory(tmp_path, data):
    (tmp_path / "a.gguf").write_bytes(data)
    found = run_bounded(lambda: check_gguf_rope(tmp_path / "a.gguf"))
    assert found.error == "ConfigError", found
    assert str(tmp_path / "a.gguf") in found.message
    assert found.megabytes < 50


def test_a_model_that_the_library_wrote_is_accepted_whole_and_refused_cut(tmp_path):
    write_model(tmp_path / "a.gguf")
    check_gguf_header(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:3000])
    with pytest.raises(ConfigError, match="not a valid GGUF file"):
        check_gguf_header(tmp_path / "b.gguf")
