"""A manifest that someone edited, or that lacks keys, is a DataError that names the file, the key and the remedy."""

import json
import shutil

import pytest

from ropeway.config.stages import READS
from ropeway.data.raw_records import load_raw_manifest
from ropeway.data.shards import open_shards
from ropeway.data.tokenized import open_tokenized
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import write_json
from ropeway.runtime.workspace import Workspace
from ropeway.stages.prepare import stage as prepare
from tests.support.raw_records import profile, write_raw
from tests.support.tokenizing import run_tokenize, tokenize_and_prepare

READERS = {"raw": load_raw_manifest, "tokens": open_tokenized, "data": open_shards}
REMEDIES = {"raw": "dvc repro fetch", "tokens": "dvc repro tokenize", "data": "dvc repro prepare"}
# Folder, keys that lead to the value, what replaces it (None: the key is removed), what the message names.
EDITS = [
    ("raw", ("files",), None, "files"),
    ("raw", ("files",), [], "files"),
    ("raw", ("files", "talk/part-00000.parquet", "bytes"), None, "files.talk/part-00000.parquet"),
    ("raw", ("files", "talk/part-00000.parquet", "sha256"), 7, "files.talk/part-00000.parquet"),
    ("raw", ("sources",), None, "sources"),
    ("raw", ("sources", "talk", "kind"), None, "sources.talk.kind"),
    ("raw", ("sources", "talk", "kind"), "table", "sources.talk.kind"),
    ("raw", ("sources", "talk", "read"), "40", "sources.talk.read"),
    ("raw", ("sources", "talk", "refused"), 3, "sources.talk.refused"),
    ("tokens", ("params",), None, "params"),
    ("tokens", ("special",), None, "special"),
    ("tokens", ("sources",), {}, "sources"),
    ("tokens", ("sources", 1, "name"), None, "sources.1.name"),
    ("tokens", ("sources", 1, "ends"), None, "sources.1.ends"),
    ("tokens", ("sources", 1, "ends"), [], "ends"),
    ("tokens", ("sources", 1, "records", "refused"), None, "sources.1.records.refused"),
    ("tokens", ("sources", 1, "shard_sequences"), [1, 2], "shard_sequences"),
    ("data", ("special", "pad"), None, "special.pad"),
    ("data", ("sources", 0, "kind"), None, "sources.0.kind"),
    ("data", ("sources", 0, "shard_sequences"), [41], "shard_sequences"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    workspace = write_raw(tmp_path_factory.mktemp("prepared"))
    tokenize_and_prepare(workspace, profile())
    return workspace


@pytest.fixture
def workspace(prepared, tmp_path):
    shutil.copytree(prepared.root, tmp_path / "copy")
    return Workspace(tmp_path / "copy", prepared.profile)


def edit(path, keys, value):
    """Replace one value of a JSON file, or remove its key."""
    manifest = json.loads(path.read_bytes())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    write_json(path, manifest)


@pytest.mark.parametrize(("folder", "keys", "value", "named"), EDITS)
def test_an_edited_manifest_names_file_key_and_remedy(workspace, folder, keys, value, named):
    path = getattr(workspace, folder) / "manifest.json"
    edit(path, keys, value)
    with pytest.raises(DataError) as caught:
        READERS[folder](path.parent)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)
    assert REMEDIES[folder] in str(caught.value)


@pytest.mark.parametrize("folder", READERS)
def test_a_file_that_neither_manifest_nor_folder_has_is_named(workspace, folder):
    path = getattr(workspace, folder) / "manifest.json"
    name = "talk/part-00000.parquet" if folder == "raw" else "talk/tokens-00000.npy"
    edit(path, ("files", name), None)
    with pytest.raises(DataError, match=REMEDIES[folder]):  # the file is there, unlisted
        READERS[folder](path.parent)
    (path.parent / name).unlink()
    if folder != "raw":  # the number of parts of raw follows from the files
        with pytest.raises(DataError, match=f"{name}.*{REMEDIES[folder]}"):
            READERS[folder](path.parent)


@pytest.mark.parametrize("folder", ["raw", "tokens"])
def test_a_source_that_the_manifest_lacks_is_named(workspace, folder):
    path = getattr(workspace, folder) / "manifest.json"
    edit(path, ("sources", "text" if folder == "raw" else 1), None)
    if folder == "tokens":  # its files are listed still
        for part in (workspace.tokens / "text").iterdir():
            edit(path, ("files", f"text/{part.name}"), None)
        shutil.rmtree(workspace.tokens / "text")
    with pytest.raises(DataError, match=rf"{folder}/manifest\.json: no source text.*{REMEDIES[folder]}"):
        prepare.run(workspace, profile().reading(READS["prepare"]))
    if folder == "raw":
        with pytest.raises(DataError, match="no source text"):
            run_tokenize(workspace, profile())
