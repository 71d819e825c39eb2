import errno
import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ropeway.registry import Registry, pulling
from ropeway.registry.layout import blob_key, manifest_key, tombstone_key
from ropeway.registry.version_manifest import load_version_manifest
from ropeway.runtime.errors import ConfigError, DataError, RegistryError, TemporaryError
from ropeway.runtime.manifest import load_manifest
from tests.support.registry_world import flip, move, nothing_left, replace, tiny


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_pulled_folder_is_the_package_byte_for_byte_and_verifies(store, package, digest, target):
    done = Registry(store).version("tiny@v1").pull(target)
    assert (done.digest, done.folder, done.created) == (digest, target, True)
    assert files_of(target) == files_of(package)
    load_manifest(target, remedy="")
    assert Registry(store).version("tiny@v1").verify_folder(target).files == 4
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_pull_to_an_existing_folder_changes_nothing(store, digest, target):
    Registry(store).version("tiny@v1").pull(target)
    assert not Registry(store).version(f"tiny@{digest[:8]}").pull(target).created
    (target / "config.json").write_text("[]")
    with pytest.raises(RegistryError, match="exactly tiny"):
        Registry(store).version("tiny@v1").pull(target)
    assert (target / "config.json").read_text() == "[]"


@pytest.mark.usefixtures("digest")
def test_a_target_can_be_an_empty_folder_but_no_file_or_link(store, target, tmp_path):
    target.mkdir(parents=True)
    assert Registry(store).version("tiny@v1").pull(target).created
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").touch()
    for place in ("link", "file"):
        with pytest.raises(RegistryError, match="a link or a file"):
            Registry(store).version("tiny@v1").pull(tmp_path / place)


def test_a_withdrawn_version_is_neither_pulled_nor_verified(store, digest, target):
    move(store, digest)
    store.put_if_absent(tombstone_key("tiny", digest), b"{}")
    for act in (
        lambda: Registry(store).version("tiny@candidate").pull(target),
        lambda: Registry(store).version("tiny@candidate").verify(),
    ):
        with pytest.raises(RegistryError, match="withdrawn"):
            act()
    assert nothing_left(target)


def test_verify_and_pull_detect_a_flipped_bit_in_any_blob(store, digest, target):
    for file in load_version_manifest(store, "tiny", digest).files:
        flip(store, blob_key(file.sha256))
        with pytest.raises(DataError, match=rf"{file.path}: blobs/\S+{file.sha256} hashes to"):
            Registry(store).version("tiny@v1").verify()
        with pytest.raises(DataError, match=f"blob of {file.path} does not match"):
            Registry(store).version("tiny@v1").pull(target)
        assert nothing_left(target)
        flip(store, blob_key(file.sha256))
    assert Registry(store).version("tiny@v1").verify().files == 4


def test_truncated_longer_and_missing_blobs_are_detected(store, digest, target):
    key = blob_key(
        next(f.sha256 for f in load_version_manifest(store, "tiny", digest).files if f.path == "model.safetensors")
    )
    whole = store.get(key)
    for damage in (whole[:-1], whole[1:], b"", None):
        store.delete(key)
        if damage is not None:
            store.put_if_absent(key, damage)
        with pytest.raises(DataError, match=r"model.safetensors: blobs/"):
            Registry(store).version("tiny@v1").verify()
        with pytest.raises(DataError, match=r"blob of model.safetensors"):
            Registry(store).version("tiny@v1").pull(target)
        assert nothing_left(target)
    store.delete(key)
    store.put_if_absent(key, whole + b"more")
    with pytest.raises(DataError, match="expected"):
        Registry(store).version("tiny@v1").verify()


def test_verify_lists_every_fault_including_attachments(store, package, tmp_path):
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\n")
    tiny(store).publish(package, provenance={}, attachments={"dvc.lock": tmp_path / "dvc.lock"})
    flip(store, blob_key(hashlib.sha256(b"schema: '2.0'\n").hexdigest()))
    flip(store, blob_key(hashlib.sha256(b"{}").hexdigest()))
    with pytest.raises(DataError, match=r"(?s)config\.json: \S+ hashes to.*dvc\.lock: \S+ hashes to"):
        Registry(store).version("tiny@v1").verify()


@pytest.mark.parametrize("at", [0, 10, 100, -1])
def test_a_flipped_bit_anywhere_in_a_manifest_is_detected(store, digest, target, at):
    key = manifest_key("tiny", digest)
    data = bytearray(store.get(key))
    data[at] ^= 1
    replace(store, key, bytes(data))
    for act in (
        lambda: Registry(store).version("tiny@v1").pull(target),
        lambda: Registry(store).version("tiny@v1").verify(),
    ):
        with pytest.raises(DataError, match="changed after it was published"):
            act()
    assert nothing_left(target)


@pytest.mark.usefixtures("digest")
def test_verify_folder_detects_changed_added_missing_and_linked_files(store, target, tmp_path):
    Registry(store).version("tiny@v1").pull(target)
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
            Registry(store).version("tiny@v1").verify_folder(copy)
        shutil.rmtree(copy)
    with pytest.raises(DataError, match="registry pull"):
        Registry(store).version("tiny@v1").verify_folder(copy)


# Pulls that resume


def partial_of(target: Path, digest: str) -> Path:
    return target.with_name(f".{target.name}.{digest[:16]}.partial")


def test_a_pull_resumes_and_downloads_only_the_missing_bytes(store, package, digest, target, monkeypatch):
    partial = partial_of(target, digest)
    (partial / "plots").mkdir(parents=True)
    shutil.copy(package / "plots" / "loss.svg", partial / "plots")
    (partial / "model.safetensors").write_bytes((package / "model.safetensors").read_bytes()[:20])
    opened = []
    open_stream = store.open_stream
    monkeypatch.setattr(
        store,
        "open_stream",
        lambda key, *, start_byte=0: opened.append((key, start_byte)) or open_stream(key, start_byte=start_byte),
    )
    Registry(store).version(f"tiny@{digest}").pull(target)
    monkeypatch.undo()
    assert files_of(target) == files_of(package)
    # config.json and manifest.json from byte 0, the weights from byte 20
    assert sorted(start for key, start in opened if key.startswith("blobs/")) == [0, 0, 20]
    assert not partial.exists()


@pytest.mark.parametrize("rubbish", [b"rubbish", b"r" * 1000])
def test_a_partial_file_with_other_content_is_discarded(store, package, digest, target, rubbish):
    partial = partial_of(target, digest)
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(rubbish)
    Registry(store).version("tiny@v1").pull(target)
    assert files_of(target) == files_of(package)


@pytest.mark.parametrize("fault", ["another user", "mode"])
def test_a_partial_folder_that_another_user_can_change_is_refused(store, digest, target, monkeypatch, fault):
    partial = partial_of(target, digest)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{}")
    if fault == "mode":
        partial.chmod(0o777)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RegistryError, match=rf"{partial.name}: owned by user {os.getuid()}"):
        Registry(store).version("tiny@v1").pull(target)
    assert [path.name for path in partial.iterdir()] == ["config.json"]
    assert not target.exists()


@pytest.mark.usefixtures("digest")
def test_a_pulled_folder_cannot_be_written_by_others_with_any_umask(store, target):
    before = os.umask(0)
    try:
        Registry(store).version("tiny@v1").pull(target)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o775


def test_links_and_unexpected_files_in_a_partial_folder_are_rejected(store, digest, target, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text("precious")
    partial = partial_of(target, digest)
    partial.mkdir(parents=True)
    (partial / "config.json").symlink_to(outside)
    with pytest.raises(DataError, match="is a link"):
        Registry(store).version("tiny@v1").pull(target)
    assert outside.read_text() == "precious"
    assert nothing_left(target)
    partial.mkdir(parents=True)
    (partial / "stray.json").touch()
    with pytest.raises(DataError, match=r"stray\.json is not a file of the version"):
        Registry(store).version("tiny@v1").pull(target)
    assert nothing_left(target)
    partial.symlink_to(tmp_path)
    with pytest.raises(ConfigError):
        Registry(store).version("tiny@v1").pull(target)


def test_a_second_pull_to_the_same_target_fails_until_the_first_ends(store, digest, target):
    partial = partial_of(target, digest)
    partial.mkdir(parents=True)
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(TemporaryError, match="another process"):
        Registry(store).version("tiny@v1").pull(target)
    os.close(handle)
    assert Registry(store).version("tiny@v1").pull(target).created


@pytest.mark.usefixtures("digest")
def test_a_pull_checks_the_free_disk_space_first(store, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ConfigError, match="10 bytes free"):
        Registry(store).version("tiny@v1").pull(target)
    assert nothing_left(target)


@pytest.mark.usefixtures("digest")
@pytest.mark.parametrize("where", ["sync_folders", "rename"])
@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, TemporaryError), (errno.EROFS, ConfigError)])
def test_a_disk_that_fails_in_a_pull_is_named_as_what_it_is(store, target, monkeypatch, where, number, kind):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((pulling, where) if where == "sync_folders" else (Path, where)), fail)
    with pytest.raises(kind, match=os.strerror(number)) as caught:
        Registry(store).version("tiny@v1").pull(target)
    assert type(caught.value) is kind
    assert "another process" not in str(caught.value)
