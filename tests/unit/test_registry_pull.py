import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from ropeway.errors import ConfigError, DataError, RegistryError, RopewayError, TemporaryError
from ropeway.manifest import canonical_json, load_manifest, write_manifest
from ropeway.registry import core as core_module
from ropeway.registry import load_core, publish, pull, rules, verify, verify_folder
from ropeway.registry.core import Core
from ropeway.registry.layout import blob_key, manifest_key, tombstone_key, versions_log
from ropeway.registry.rules import PackageFile
from ropeway.storage import Store, open_store
from tests.registry_world import flip, make_package, move, put, safetensors


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store((tmp_path / "registry").as_uri())


@pytest.fixture
def package(tmp_path) -> Path:
    return make_package(tmp_path / "package")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, str]:
    """A registry folder with one version, to copy: publishing waits for the disk."""
    place = tmp_path_factory.mktemp("published")
    store = open_store((place / "registry").as_uri())
    return store.root, put(store, make_package(place / "package")).digest


@pytest.fixture
def digest(store, published) -> str:
    """The digest of the one version of `store`."""
    shutil.copytree(published[0], store.root)
    return published[1]


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "place" / "model"


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def nothing_left(target: Path) -> bool:
    return not target.parent.exists() or list(target.parent.iterdir()) == []


def test_a_pulled_folder_is_the_package_byte_for_byte_and_verifies(store, package, digest, target):
    done = pull(store, "tiny@v1", target)
    assert (done.digest, done.folder, done.created) == (digest, target, True)
    assert files_of(target) == files_of(package)
    load_manifest(target, remedy="")
    assert verify_folder(store, "tiny@v1", target).files == 4
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_version_already_there_is_left_alone_and_something_else_is_not_touched(store, digest, target):
    pull(store, "tiny@v1", target)
    assert not pull(store, f"tiny@{digest[:8]}", target).created
    (target / "config.json").write_text("[]")
    with pytest.raises(RegistryError, match="something other than tiny"):
        pull(store, "tiny@v1", target)
    assert (target / "config.json").read_text() == "[]"


@pytest.mark.usefixtures("digest")
def test_a_target_that_is_a_file_or_a_link_is_refused_and_an_empty_folder_is_filled(store, target, tmp_path):
    target.mkdir(parents=True)
    assert pull(store, "tiny@v1", target).created
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").touch()
    for place in ("link", "file"):
        with pytest.raises(RegistryError, match="a link or a file"):
            pull(store, "tiny@v1", tmp_path / place)


def test_a_withdrawn_version_is_neither_pulled_nor_verified(store, digest, target):
    move(store, digest)
    store.put_if_absent(tombstone_key("tiny", digest), b"{}")
    for act in (lambda: pull(store, "tiny@candidate", target), lambda: verify(store, "tiny@candidate")):
        with pytest.raises(RegistryError, match="withdrawn"):
            act()
    assert nothing_left(target)


def test_every_flipped_byte_of_a_blob_is_found_by_verify_and_pull_and_nothing_is_left(store, digest, target):
    for file in load_core(store, "tiny", digest).files:
        flip(store, blob_key(file.sha256))
        with pytest.raises(DataError, match=f"blob of {file.path} hashes to"):
            verify(store, "tiny@v1")
        with pytest.raises(DataError, match=f"blob of {file.path} is not what its version says"):
            pull(store, "tiny@v1", target)
        assert nothing_left(target)
        flip(store, blob_key(file.sha256))
    assert verify(store, "tiny@v1").files == 4


def test_a_truncated_a_longer_and_a_missing_blob_are_found(store, digest, target):
    key = blob_key(next(f.sha256 for f in load_core(store, "tiny", digest).files if f.path == "model.safetensors"))
    whole = store.get(key)
    for damage in (whole[:-1], whole[1:], b"", None):
        store.delete(key)
        if damage is not None:
            store.put_if_absent(key, damage)
        with pytest.raises(DataError, match=r"blob of model.safetensors"):
            verify(store, "tiny@v1")
        with pytest.raises(DataError, match=r"blob of model.safetensors"):
            pull(store, "tiny@v1", target)
        assert nothing_left(target)
    store.delete(key)
    store.put_if_absent(key, whole + b"more")
    with pytest.raises(DataError, match="expected"):
        verify(store, "tiny@v1")


def test_verify_lists_every_fault_and_looks_at_attachments(store, package, tmp_path):
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\n")
    publish(store, package, "tiny", provenance={}, attachments={"dvc.lock": tmp_path / "dvc.lock"})
    flip(store, blob_key(hashlib.sha256(b"schema: '2.0'\n").hexdigest()))
    flip(store, blob_key(hashlib.sha256(b"{}").hexdigest()))
    with pytest.raises(DataError, match=r"(?s)config\.json hashes to.*dvc\.lock hashes to"):
        verify(store, "tiny@v1")


@pytest.mark.parametrize("at", [0, 10, 100, -1])
def test_a_flipped_byte_of_a_manifest_is_found_wherever_it_is(store, digest, target, at):
    path = store.root / manifest_key("tiny", digest)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    for act in (lambda: pull(store, "tiny@v1", target), lambda: verify(store, "tiny@v1")):
        with pytest.raises(DataError, match="changed after it was published"):
            act()
    assert nothing_left(target)


@pytest.mark.usefixtures("digest")
def test_a_changed_added_missing_or_linked_file_in_a_pulled_folder_is_found(store, target, tmp_path):
    pull(store, "tiny@v1", target)
    for spoil in (
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "extra.txt").touch(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to(target / "config.json")),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(target, copy)
        spoil(copy)
        with pytest.raises(DataError):
            verify_folder(store, "tiny@v1", copy)
        shutil.rmtree(copy)
    with pytest.raises(DataError, match="registry pull"):
        verify_folder(store, "tiny@v1", copy)


# Pull continues where a killed one stopped


def partial_of(target: Path, digest: str) -> Path:
    return target.with_name(f".{target.name}.{digest[:16]}.partial")


def test_what_a_killed_pull_left_is_used_and_only_the_rest_is_read(store, package, digest, target, monkeypatch):
    partial = partial_of(target, digest)
    (partial / "plots").mkdir(parents=True)
    shutil.copy(package / "plots" / "loss.svg", partial / "plots")
    (partial / "model.safetensors").write_bytes((package / "model.safetensors").read_bytes()[:20])
    opened = []
    open_stream = store.open_stream
    monkeypatch.setattr(
        store,
        "open_stream",
        lambda key, *, start_byte=0: opened.append(start_byte) or open_stream(key, start_byte=start_byte),
    )
    pull(store, f"tiny@{digest}", target)
    monkeypatch.undo()
    assert files_of(target) == files_of(package)
    # the version's record and its manifest, then config.json, manifest.json and the rest of the weights
    assert max(opened) == 20
    assert len([start for start in opened if start == 0]) == len(opened) - 1
    assert not partial.exists()


@pytest.mark.parametrize("rubbish", [b"rubbish", b"r" * 1000])
def test_a_part_that_is_not_one_of_this_file_is_thrown_away(store, package, digest, target, rubbish):
    partial = partial_of(target, digest)
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(rubbish)
    pull(store, "tiny@v1", target)
    assert files_of(target) == files_of(package)


def test_links_and_strays_in_the_unfinished_folder_are_not_followed_nor_kept(store, digest, target, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text("precious")
    partial = partial_of(target, digest)
    partial.mkdir(parents=True)
    (partial / "config.json").symlink_to(outside)
    with pytest.raises(DataError, match="is a link"):
        pull(store, "tiny@v1", target)
    assert outside.read_text() == "precious"
    assert nothing_left(target)
    partial.mkdir(parents=True)
    (partial / "stray.json").touch()
    with pytest.raises(DataError, match="none of the version's files"):
        pull(store, "tiny@v1", target)
    assert nothing_left(target)
    partial.symlink_to(tmp_path)
    with pytest.raises(ConfigError):
        pull(store, "tiny@v1", target)


def test_two_pulls_to_one_place_do_not_mix(store, digest, target):
    partial = partial_of(target, digest)
    partial.mkdir(parents=True)
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(TemporaryError, match="another process"):
        pull(store, "tiny@v1", target)
    os.close(handle)
    assert pull(store, "tiny@v1", target).created


@pytest.mark.usefixtures("digest")
def test_a_disk_that_cannot_hold_the_version_is_named_before_anything_is_fetched(store, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ConfigError, match="bytes more, 10 are free"):
        pull(store, "tiny@v1", target)
    assert nothing_left(target)


# What may enter and leave

HOSTILE_PATHS = [
    "../x.json", "/etc/x.json", "a/../../x.json", "a/./x.json", "a//x.json", "./x.json", "a\\..\\x.json", "x\0.json",
    "C:/x.json", "x.json:stream.json", "~/x.json", ".hidden.json", "a/.git/x.json", "x.json/", "", "x.json ", "x.json.",
    "model.bin", "model.pkl", "model.pt", "model.safetensors.index", "setup.py", "run.sh", "x", "x.JSON", "con.json",
    "a/NUL.txt", "x\u202e.json", "caf\u00e9.json", "x\n.json", "a/" * 8 + "x.json", "x" * 196 + ".json", "-rf.json",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE_PATHS)
@pytest.mark.usefixtures("digest")
def test_a_hostile_path_in_a_manifest_is_refused_on_pull_and_nothing_is_left(store, target, path):
    reference = plant(store, [PackageFile(path, hashlib.sha256(b"{}").hexdigest(), 2)])
    before = sorted(target.parents[1].rglob("*"))
    for act in (lambda: pull(store, reference, target), lambda: verify(store, reference)):
        with pytest.raises(DataError, match="package path"):
            act()
    assert sorted(target.parents[1].rglob("*")) == before


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["a.json", "A.json"], "but for case"),
        (["Plots/a.svg", "plots/b.svg"], "but for case"),
        (["a.json", "a.json"], "named twice"),
        (["a.json", "a.json/b.json"], "a file where a folder"),
        ([], "0 files"),
        ([f"{n}.json" for n in range(rules.MAX_FILES + 1)], "4,097 files"),
    ],
)
@pytest.mark.usefixtures("digest")
def test_paths_that_get_in_each_others_way_and_too_many_are_refused_on_pull(store, target, paths, words):
    sha256 = hashlib.sha256(b"{}").hexdigest()
    reference = plant(store, sorted((PackageFile(path, sha256, 2) for path in paths), key=lambda file: file.path))
    with pytest.raises(DataError, match=words):
        pull(store, reference, target)
    assert nothing_left(target)


@pytest.mark.parametrize(("path", "size"), [("a.json", 1 << 40), ("a.safetensors", 1 << 50), ("a.json", -1)])
@pytest.mark.usefixtures("digest")
def test_a_size_beyond_the_cap_is_refused_on_pull(store, target, path, size):
    reference = plant(store, [PackageFile(path, hashlib.sha256(b"{}").hexdigest(), size)])
    with pytest.raises(DataError, match="at most"):
        pull(store, reference, target)
    assert nothing_left(target)


@pytest.mark.usefixtures("digest")
def test_sizes_are_capped_in_sum_too(store, target):
    shards = [PackageFile(f"{n:03}.safetensors", "0" * 64, rules.MAX_WEIGHTS_BYTES) for n in range(65)]
    with pytest.raises(DataError, match="in all"):
        pull(store, plant(store, shards), target)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda core: core | {"format": "ropeway-version/2"},
        lambda core: core | {"more": 1},
        lambda core: {key: core[key] for key in core if key != "facts"},
        lambda core: core | {"facts": []},
        lambda core: core | {"name": 1},
        lambda core: core | {"files": {}},
        lambda core: core | {"files": [{"path": "a.json", "sha256": "0" * 64, "bytes": 2, "mode": 493}]},
        lambda core: core | {"files": [{"path": "a.json", "sha256": "0" * 64, "bytes": True}]},
        lambda core: core | {"files": [{"path": "a.json", "sha256": "../../../x", "bytes": 2}]},
        lambda core: core | {"files": [{"path": ["a.json"], "sha256": "0" * 64, "bytes": 2}]},
        lambda core: core | {"files": core["files"][::-1]},
        lambda core: [core],
        lambda _: b"not JSON",
        lambda _: b"[" * 100_000,
        lambda core: json.dumps(core).encode(),
        lambda core: canonical_json(core)[:-1] + b',"name":"tiny"}',
        lambda core: canonical_json(core) + b"\n",
        lambda _: b'"\\ud800"',
    ],
)
def test_a_manifest_of_another_form_is_refused_though_its_hash_is_right(store, digest, target, spoil):
    spoilt = spoil(json.loads(store.get(manifest_key("tiny", digest))))
    reference = plant_document(store, spoilt if isinstance(spoilt, bytes) else canonical_json(spoilt))
    with pytest.raises(DataError, match="not a version this Ropeway can read"):
        pull(store, reference, target)
    assert nothing_left(target)


def test_a_manifest_of_another_model_is_refused(store, digest, target):
    core = dataclasses.replace(load_core(store, "tiny", digest), name="other")
    with pytest.raises(DataError, match="a version of 'other', not of tiny"):
        pull(store, plant_document(store, core.document), target)


@pytest.mark.parametrize(
    "attachments", [{"a.json": 1}, {"a.json": {"sha256": "x", "bytes": 1}}, {"a.json": {"sha256": "0" * 64}}]
)
@pytest.mark.usefixtures("digest")
def test_a_record_that_names_its_attachments_wrongly_is_refused(store, attachments):
    event = json.loads(store.get(versions_log("tiny").key(1)))
    store.delete(versions_log("tiny").key(1))
    store.put_if_absent(versions_log("tiny").key(1), canonical_json(event | {"attachments": attachments}))
    with pytest.raises(DataError, match=r"attachment 'a\.json'"):
        verify(store, "tiny@v1")


@pytest.mark.usefixtures("digest")
def test_a_pickle_smuggled_into_the_store_under_a_good_name_does_not_leave_it(store, target):
    pickle = b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x94."
    store.put_if_absent(blob_key(hashlib.sha256(pickle).hexdigest()), pickle)
    for path in ("model.safetensors", "a.json", "a.png", "tokenizer.model"):
        reference = plant(store, [PackageFile(path, hashlib.sha256(pickle).hexdigest(), len(pickle))])
        with pytest.raises(DataError, match="does not begin as a"):
            pull(store, reference, target)
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
def test_what_no_package_may_hold_is_refused_on_publish_before_anything_is_written(store, package, spoil):
    spoil(package)
    with suppress(UnicodeEncodeError):  # of a name that is not UTF-8; the manifest without it is there already
        write_manifest(package, {})
    with pytest.raises(DataError):
        put(store, package)
    assert not store.root.exists()


def test_every_allowed_kind_of_file_passes(store, tmp_path):
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
    (folder / "long.txt").write_bytes(b"a" + "ü".encode() * 4000)  # a letter lies across the 4,096th byte
    (folder / "empty.txt").touch()
    write_manifest(folder, {})
    assert put(store, folder).number == 1


def test_an_attachment_keeps_the_rules_too(store, package, tmp_path):
    good = tmp_path / "good.json"
    good.write_text("{}")
    link = tmp_path / "link.json"
    link.symlink_to(good)
    pickle = tmp_path / "pickle"
    pickle.write_bytes(b"\x80\x04")
    cases = [("a/b.json", good), ("../x.json", good), ("x.bin", good), ("x.json", link), ("x.json", pickle)]
    for name, path in [*cases, ("x.json", tmp_path / "none")]:
        with pytest.raises(DataError):
            publish(store, package, "tiny", provenance={}, attachments={name: path})
    assert not store.root.exists()


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"files": []}', '{"files": {"config.json": 1}}', "{"])
def test_a_package_whose_manifest_is_none_is_refused(store, package, manifest):
    (package / "manifest.json").write_text(manifest)
    with pytest.raises(RopewayError):
        put(store, package)
    assert not store.root.exists()


def test_facts_too_long_to_be_read_again_are_refused(store, package, monkeypatch):
    monkeypatch.setattr(core_module, "MAX_DOCUMENT_BYTES", 100)
    with pytest.raises(DataError, match="100 fit"):
        put(store, package)


def plant(store: Store, files: list[PackageFile]) -> str:
    """Publish a core as a hostile registry would, and return a reference to it."""
    return plant_document(store, Core("tiny", tuple(files), {}).document)


def plant_document(store: Store, document: bytes) -> str:
    digest = hashlib.sha256(document).hexdigest()
    store.put_if_absent(manifest_key("tiny", digest), document)
    record = json.loads(store.get(versions_log("tiny").key(1))) | {"digest": digest}
    number = len(store.list_keys("models/tiny/versions/")) + 1
    store.put_if_absent(versions_log("tiny").key(number), canonical_json(record))
    return f"tiny@v{number}"
