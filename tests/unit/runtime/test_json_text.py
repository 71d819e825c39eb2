"""JSON that somebody else wrote: whatever is nested too deeply, or a number of a million digits, is a named error."""

import json

import pytest

from ropeway.cli.chat import load_tools
from ropeway.models.jinja_template import find_own_templates
from ropeway.models.open_model import read_config
from ropeway.models.tokenizer import open_tokenizer, read_special_names, read_special_texts
from ropeway.orchestration.remote.request import StageRequest
from ropeway.registry.layout import versions_log
from ropeway.registry.log import read_event
from ropeway.registry.version_manifest import load_version_manifest
from ropeway.runtime.json_text import MAX_DEPTH, is_too_deep, parse_json, read_json
from ropeway.runtime.manifest import json_mapping, load_manifest
from ropeway.stages.base.base_files import check_folder
from ropeway.stages.package.check import read_probe
from ropeway.stages.package.weights import locate_tensors, read_dtypes
from tests.support.bounded import run_bounded
from tests.support.fuzz_targets import OneObject

DEEP = 1_000_000
BOMBS = {
    "lists": b"[" * DEEP,
    "closed lists": b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "objects": b'{"a":' * DEEP,
    "below Python's limit": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "digits": b'{"a":' + b"1" * 1_000_000 + b"}",
}
LLAMA = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
TENSORS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(4)


def framed(header):
    return len(header).to_bytes(8, "little") + header


# What is written beside other files, how it is read.
READERS = {
    "config.json": (lambda data: {"config.json": data, "model.safetensors": TENSORS}, check_folder),
    "config.json by transformers": (lambda data: {"config.json": data}, lambda folder: read_config(folder, {})),
    "the index of weights": (
        lambda data: {"config.json": LLAMA, "model.safetensors": TENSORS, "model.safetensors.index.json": data},
        check_folder,
    ),
    "the index of a package": (lambda data: {"model.safetensors.index.json": data}, locate_tensors),
    "a safetensors header": (lambda data: {"config.json": LLAMA, "model.safetensors": framed(data)}, check_folder),
    "a safetensors header by its library": (
        lambda data: {"model.safetensors": framed(data)},
        lambda folder: list(read_dtypes(folder / "model.safetensors")),
    ),
    "manifest.json": (lambda data: {"manifest.json": data}, lambda folder: load_manifest(folder, remedy="")),
    "tokenizer.json": (lambda data: {"tokenizer.json": data, "tokenizer_config.json": b"{}"}, open_tokenizer),
    "special tokens": (lambda data: {"tokenizer.json": data}, read_special_texts),
    "tokenizer_config.json": (lambda data: {"tokenizer_config.json": data}, read_special_names),
    "chat_template.json": (
        lambda data: {"chat_template.json": data, "tokenizer_config.json": b"{}"},
        find_own_templates,
    ),
    "probe.json": (lambda data: {"probe.json": data}, read_probe),
    "a file of tools": (lambda data: {"tools.json": data}, lambda folder: load_tools(folder / "tools.json")),
    "an event": (lambda data: {"a": data}, lambda folder: read_event(OneObject(_only(folder)), versions_log("m"), 1)),
    "a version's manifest": (lambda data: {"a": data}, lambda folder: _load_version(_only(folder))),
    "a stage's request": (lambda data: {"a": data}, lambda folder: StageRequest.from_json(_only(folder).decode())),
}
NAMED = {"ConfigError", "DataError"}


def _only(folder):
    return (folder / "a").read_bytes()


def _load_version(data):
    import hashlib

    load_version_manifest(OneObject(data), "m", hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_a_bomb_by_name_in_little_memory(tmp_path, reader, bomb):
    files, read = READERS[reader]
    for name, data in files(BOMBS[bomb]).items():
        (tmp_path / name).write_bytes(data)
    found = run_bounded(lambda: read(tmp_path))
    assert found.error in NAMED, found
    assert found.megabytes < 100


@pytest.mark.parametrize("size", [1 << 60, (1 << 64) - 1])
def test_a_header_that_states_more_bytes_than_any_file_is_not_read(tmp_path, size):
    (tmp_path / "config.json").write_bytes(LLAMA)
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + HEADER)
    for read in (check_folder, lambda folder: list(read_dtypes(folder / "model.safetensors"))):
        found = run_bounded(lambda read=read: read(tmp_path))
        assert found.error in NAMED, found
        assert found.megabytes < 50


def test_depth_is_counted_in_lists_and_objects_and_not_in_texts(tmp_path):
    def nested(depth):
        return b'{"a":[' * (depth // 2) + b"1" + b"]}" * (depth // 2)

    assert parse_json(nested(MAX_DEPTH))
    with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} nested"):
        parse_json(nested(MAX_DEPTH + 2))
    assert parse_json(json.dumps(["[" * 1000, "{" * 1000]))
    assert parse_json(json.dumps([[number] for number in range(1000)]))[999] == [999]
    assert not is_too_deep(json.loads(nested(MAX_DEPTH)))
    assert json_mapping(BOMBS["objects"]) == {}
    (tmp_path / "a.json").write_bytes(nested(4))
    assert read_json(tmp_path / "a.json", remedy="") == {"a": [{"a": [1]}]}
