"""Rules for packages: hostile packages, manifests and names."""

import dataclasses
import hashlib
import json
import os
from contextlib import suppress

import pytest

from ropeway.registry import Registry, rules, version_manifest
from ropeway.registry.layout import blob_key, manifest_key, versions_log
from ropeway.registry.rules import PackageFile
from ropeway.registry.version_manifest import VersionManifest, load_version_manifest
from ropeway.runtime.errors import DataError, RopewayError
from ropeway.runtime.manifest import canonical_json, write_manifest
from ropeway.storage import Store, open_store
from tests.support.registry_world import is_untouched, nothing_left, own_fields, put, safetensors, tiny


@pytest.fixture
def store(tmp_path) -> Store:
    """Return a folder store: the rules are independent of the store and checked before it is used."""
    return open_store((tmp_path / "registry").as_uri())


HOSTILE_PATHS = [
    "../x.json", "/etc/x.json", "a/../../x.json", "a/./x.json", "a//x.json", "./x.json", "a\\..\\x.json", "x\0.json",
    "C:/x.json", "x.json:stream.json", "~/x.json", ".hidden.json", "a/.git/x.json", "x.json/", "", "x.json ", "x.json.",
    "model.bin", "model.pkl", "model.pt", "model.safetensors.index", "setup.py", "run.sh", "x", "x.JSON", "con.json",
    "a/NUL.txt", "x\u202e.json", "caf\u00e9.json", "x\n.json", "a/" * 8 + "x.json", "x" * 196 + ".json", "-rf.json",
    "adapter_config.json", "a/Adapter_Config.json", "dvc.yaml", "a/DVC.yaml", "x.dvc",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE_PATHS)
@pytest.mark.usefixtures("digest")
def test_a_pull_rejects_hostile_paths_and_writes_nothing(store, target, path):
    reference = plant(store, [PackageFile(path, hashlib.sha256(b"{}").hexdigest(), 2)])
    before = sorted(target.parents[1].rglob("*"))
    for act in (
        lambda: Registry(store).version(reference).pull(target),
        lambda: Registry(store).version(reference).verify(),
    ):
        with pytest.raises(DataError, match="package path"):
            act()
    assert sorted(target.parents[1].rglob("*")) == before


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["a.json", "A.json"], "'A.json' and 'a.json' conflict"),
        (["Plots/a.svg", "plots/b.svg"], "'Plots' and 'plots' conflict"),
        (["a.json", "a.json"], "'a.json' and 'a.json' conflict"),
        (["a.json", "a.json/b.json"], "'a.json' and 'a.json' conflict"),
        ([], "0 files"),
        ([f"{n}.json" for n in range(rules.MAX_FILES + 1)], "4,097 files"),
    ],
)
@pytest.mark.usefixtures("digest")
def test_a_pull_rejects_conflicting_paths_and_too_many_files(store, target, paths, words):
    sha256 = hashlib.sha256(b"{}").hexdigest()
    reference = plant(store, sorted((PackageFile(path, sha256, 2) for path in paths), key=lambda file: file.path))
    with pytest.raises(DataError, match=words):
        Registry(store).version(reference).pull(target)
    assert nothing_left(target)


@pytest.mark.parametrize(("path", "size"), [("a.json", 1 << 40), ("a.safetensors", 1 << 50), ("a.json", -1)])
@pytest.mark.usefixtures("digest")
def test_a_pull_rejects_a_file_above_the_size_limit(store, target, path, size):
    reference = plant(store, [PackageFile(path, hashlib.sha256(b"{}").hexdigest(), size)])
    with pytest.raises(DataError, match="at most"):
        Registry(store).version(reference).pull(target)
    assert nothing_left(target)


@pytest.mark.usefixtures("digest")
def test_a_pull_rejects_a_package_above_the_total_size_limit(store, target):
    shards = [PackageFile(f"{n:03}.safetensors", "0" * 64, rules.MAX_WEIGHTS_BYTES) for n in range(65)]
    with pytest.raises(DataError, match=r"package: .* bytes in total"):
        Registry(store).version(plant(store, shards)).pull(target)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: manifest | {"format": "ropeway-version/2"},
        lambda manifest: manifest | {"more": 1},
        lambda manifest: {key: manifest[key] for key in manifest if key != "facts"},
        lambda manifest: manifest | {"facts": []},
        lambda manifest: manifest | {"name": 1},
        lambda manifest: manifest | {"files": {}},
        lambda manifest: manifest | {"files": [{"path": "a.json", "sha256": "0" * 64, "bytes": 2, "mode": 493}]},
        lambda manifest: manifest | {"files": [{"path": "a.json", "sha256": "0" * 64, "bytes": True}]},
        lambda manifest: manifest | {"files": [{"path": "a.json", "sha256": "../../../x", "bytes": 2}]},
        lambda manifest: manifest | {"files": [{"path": ["a.json"], "sha256": "0" * 64, "bytes": 2}]},
        lambda manifest: manifest | {"files": manifest["files"][::-1]},
        lambda manifest: [manifest],
        lambda _: b"not JSON",
        lambda _: b"[" * 100_000,
        lambda manifest: json.dumps(manifest).encode(),
        lambda manifest: canonical_json(manifest)[:-1] + b',"name":"tiny"}',
        lambda manifest: canonical_json(manifest) + b"\n",
        lambda _: b'"\\ud800"',
    ],
)
def test_a_malformed_manifest_with_a_matching_hash_is_rejected(store, digest, target, spoil):
    spoilt = spoil(json.loads(store.get(manifest_key("tiny", digest))))
    reference = plant_document(store, spoilt if isinstance(spoilt, bytes) else canonical_json(spoilt))
    with pytest.raises(DataError, match="expected canonical JSON of format ropeway-version/1"):
        Registry(store).version(reference).pull(target)
    assert nothing_left(target)


def test_a_manifest_of_another_model_is_rejected(store, digest, target):
    manifest = dataclasses.replace(load_version_manifest(store, "tiny", digest), name="other")
    with pytest.raises(DataError, match="model 'other', expected tiny"):
        Registry(store).version(plant_document(store, manifest.document)).pull(target)


@pytest.mark.parametrize(
    "attachments", [{"a.json": 1}, {"a.json": {"sha256": "x", "bytes": 1}}, {"a.json": {"sha256": "0" * 64}}]
)
@pytest.mark.usefixtures("digest")
def test_malformed_attachments_in_a_version_event_are_rejected(store, attachments):
    event = own_fields(store, versions_log("tiny").key(1))
    store.delete(versions_log("tiny").key(1))
    store.put_if_absent(versions_log("tiny").key(1), canonical_json(event | {"attachments": attachments}))
    with pytest.raises(DataError, match=r"attachment 'a\.json'"):
        Registry(store).version("tiny@v1").verify()


@pytest.mark.usefixtures("digest")
def test_a_pull_rejects_a_pickle_with_an_allowed_suffix(store, target):
    pickle = b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x94."
    store.put_if_absent(blob_key(hashlib.sha256(pickle).hexdigest()), pickle)
    for path in ("model.safetensors", "a.json", "a.png", "tokenizer.model"):
        reference = plant(store, [PackageFile(path, hashlib.sha256(pickle).hexdigest(), len(pickle))])
        with pytest.raises(DataError, match="the first bytes"):
            Registry(store).version(reference).pull(target)
        assert nothing_left(target)


def spoil_link(folder):
    (folder / "link.json").symlink_to(folder / "config.json")


def spoil_folder_link(folder):
    (folder / "plots2").symlink_to(folder / "plots")


def spoil_fifo(folder):
    os.mkfifo(folder / "pipe.json")


def spoil_with(name: str, data: bytes = b"{}"):
    def spoil(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_link,
        spoil_folder_link,
        spoil_fifo,
        spoil_with("pytorch_model.bin"),
        spoil_with("evil.pkl"),
        spoil_with("modeling.py"),
        spoil_with("noext"),
        spoil_with(".env.json"),
        spoil_with(".git/config.json"),
        spoil_with("back\\slash.json"),
        spoil_with("x" * 220 + ".json"),
        spoil_with("Config.json"),
        spoil_with("Plots/more.svg"),
        spoil_with("space name.json"),
        spoil_with("bad\udcff.json"),
        spoil_with("renamed.safetensors", b"\x80\x04\x95pickle"),
        spoil_with("renamed.json", b"PK\x03\x04\x14\0\0\0"),
        spoil_with("renamed.txt", b"\xff\xfe\0a"),
        spoil_with("lying.safetensors", (1 << 40).to_bytes(8, "little") + b"{}"),
        spoil_with("empty.png", b""),
    ],
)
def test_publish_rejects_disallowed_files_before_any_write(store, package, spoil):
    spoil(package)
    with suppress(UnicodeEncodeError):  # for a name that is not UTF-8; the manifest without it exists
        write_manifest(package, {})
    with pytest.raises(DataError):
        put(store, package)
    assert is_untouched(store)


def test_every_allowed_suffix_is_accepted(store, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    text = "grüße".encode()
    contents = {
        ".safetensors": safetensors(b""), ".png": b"\x89PNG\r\n\x1a\n\0", ".model": b"\n\x0e\n\x05<unk>\x15\0\0",
        **dict.fromkeys((".json", ".txt", ".md", ".jinja", ".svg", ".html", ".yaml", ".csv", ".lock"), text),
    }  # fmt: skip
    assert set(contents) == set(rules.SUFFIXES)
    for suffix, data in contents.items():
        (folder / f"file{suffix}").write_bytes(data)
    (folder / "long.txt").write_bytes(b"a" + "ü".encode() * 4000)  # a character spans byte 4,096
    (folder / "empty.txt").touch()
    write_manifest(folder, {})
    assert put(store, folder).number == 1


def test_attachments_follow_the_package_rules(store, package, tmp_path):
    good = tmp_path / "good.json"
    good.write_text("{}")
    link = tmp_path / "link.json"
    link.symlink_to(good)
    pickle = tmp_path / "pickle"
    pickle.write_bytes(b"\x80\x04")
    cases = [("a/b.json", good), ("../x.json", good), ("x.bin", good), ("x.json", link), ("x.json", pickle)]
    cases += [("records.index", good), ("records.index", pickle)]
    for name, path in [*cases, ("x.json", tmp_path / "none")]:
        with pytest.raises(DataError):
            tiny(store).publish(package, provenance={}, attachments={name: path})
    assert is_untouched(store)


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"files": []}', '{"files": {"config.json": 1}}', "{"])
def test_a_package_with_a_malformed_manifest_is_rejected(store, package, manifest):
    (package / "manifest.json").write_text(manifest)
    with pytest.raises(RopewayError):
        put(store, package)
    assert is_untouched(store)


def test_a_manifest_above_the_document_size_limit_is_rejected(store, package, monkeypatch):
    monkeypatch.setattr(version_manifest, "MAX_DOCUMENT_BYTES", 100)
    with pytest.raises(DataError, match="expected 100 at most"):
        put(store, package)


def plant(store: Store, files: list[PackageFile]) -> str:
    """Write a manifest as a hostile registry would and return a reference to it."""
    return plant_document(store, VersionManifest("tiny", tuple(files), {}).document)


def plant_document(store: Store, document: bytes) -> str:
    digest = hashlib.sha256(document).hexdigest()
    store.put_if_absent(manifest_key("tiny", digest), document)
    record = own_fields(store, versions_log("tiny").key(1)) | {"digest": digest}
    number = len(store.list_keys("models/tiny/versions/")) + 1
    store.put_if_absent(versions_log("tiny").key(number), canonical_json(record))
    return f"tiny@v{number}"
