"""A tokenizer's JSON files that are damaged, or not what their names say, are refused by name."""

import json

import pytest

from ropeway.models.jinja_template import find_own_templates
from ropeway.models.tokenizer import (
    read_additional,
    read_other_names,
    read_response_template,
    read_special_names,
    read_special_texts,
)
from ropeway.runtime.errors import ConfigError

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
DAMAGED = [b"", b"7", b"[]", b"null", b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize(
    ("name", "read"),
    [
        (CONFIG, read_special_names), (CONFIG, read_additional), (CONFIG, read_other_names),
        (CONFIG, read_response_template), (CONFIG, find_own_templates), (TOKENIZER, read_special_texts),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path, name, read, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=name if read is not find_own_templates else str(tmp_path)):
        read(tmp_path)


@pytest.mark.parametrize("token", [7, ["x"], {"text": "x"}, {"content": None, "id": 3}])
@pytest.mark.parametrize(
    ("key", "read"), [("eos_token", read_special_names), ("additional_special_tokens", read_additional)]
)
def test_a_token_without_text_is_refused_by_its_key(tmp_path, key, read, token):
    value = [token] if key == "additional_special_tokens" else token
    (tmp_path / CONFIG).write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError, match=key):
        read(tmp_path)
