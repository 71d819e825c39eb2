"""A version goes to the Hub as it is; what the Hub is asked is held by a fake of its client."""

import json
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.cli.registry_commands import upload_version
from ropeway.registry import Registry
from ropeway.registry.layout import blob_key
from ropeway.runtime.errors import ConfigError, DataError, RegistryError, TemporaryError
from ropeway.runtime.manifest import load_manifest, write_manifest
from ropeway.storage import open_store
from tests.support.registry_world import flip, make_package, put, tiny

REPO = "team/tiny"


@pytest.fixture
def published(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ROPEWAY_REGISTRY", (tmp_path / "registry").as_uri())
    store = open_store((tmp_path / "registry").as_uri())
    return store, put(store, make_package(tmp_path / "package")), tmp_path / "package"


@pytest.fixture
def asked(monkeypatch):
    """Fake the client: calls are kept, and the folder's bytes as they were when it was uploaded."""
    calls = []

    class Api:
        def create_repo(self, repo, **options):
            calls.append(("create", repo, options))

        def upload_folder(self, *, folder_path, **options):
            sent = {path.name: path.read_bytes() for path in folder_path.rglob("*") if path.is_file()}
            calls.append(("upload", sent, options))
            return SimpleNamespace(oid="c0ffee")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return calls


def test_a_dry_run_verifies_lists_and_asks_the_hub_nothing(published, asked):
    _, done, package = published
    result = CliRunner().invoke(app, ["push-hub", "tiny@v1", REPO, "--dry-run"])
    assert result.exit_code == 0, result.output
    size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    assert f"4 files, {size} bytes of tiny@v1 ({done.digest[:12]}…) would go to {REPO}" in result.stdout
    assert "model.safetensors" in result.stdout
    as_json = CliRunner().invoke(app, ["push-hub", "tiny@v1", REPO, "--dry-run", "--json"])
    assert json.loads(as_json.stdout)["commit"] is None
    assert asked == []


def test_exactly_the_published_bytes_go_in_one_commit_and_old_weights_leave(published, asked):
    store, done, package = published
    shared = upload_version(Registry(store).version("tiny@v1"), REPO, private=True, dry_run=False)
    assert shared.commit == "c0ffee"
    (create, repo, created), (upload, sent, options) = asked
    assert (create, repo, created) == ("create", REPO, {"private": True, "exist_ok": True})
    assert upload == "upload"
    assert sent == {path.name: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    assert options["commit_message"] == f"tiny@v1 ({done.digest})"
    assert {"*.safetensors", "*.bin"} <= set(options["delete_patterns"])


def test_digests_of_forgotten_records_stay_in_the_registry(published, asked, tmp_path):
    store, _, package = published
    digest, other = "9da556d119ccb056be8f05da22d9c00b", "5f3c" * 8
    (package / "run.json").write_text(json.dumps({"params": {"forget": [digest]}, "fingerprint": other}))
    (package / "run.yaml").write_text(f'tiny:\n  forget:\n  - "{digest}"\n')
    (package / "manifest.json").unlink()
    write_manifest(package, {"kind": "package"})
    put(store, package)
    shared = upload_version(Registry(store).version("tiny@v2"), REPO, private=True, dry_run=False)
    sent = asked[-1][1]
    assert (shared.forgotten, digest.encode() in b"".join(sent.values())) == (1, False)
    assert json.loads(sent["run.json"]) == {"params": {"forget": ["0" * 32]}, "fingerprint": other}
    assert sent["model.safetensors"] == (package / "model.safetensors").read_bytes()
    for name, data in sent.items():
        (tmp_path / "there").mkdir(exist_ok=True)
        place = tmp_path / "there" / ("plots/loss.svg" if name == "loss.svg" else name)
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
    load_manifest(tmp_path / "there", remedy="")
    assert [path.name for path in (tmp_path / "cache").rglob(".share-*")] == []


def test_withdrawn_damaged_and_misnamed_versions_are_refused_before_the_hub_is_asked(published, asked):
    store, done, _ = published
    with pytest.raises(ConfigError, match="expected owner/name"):
        upload_version(Registry(store).version("tiny@v1"), "tiny", private=True, dry_run=True)
    weights = next(file for file in json.loads(store.get(f"models/tiny/manifests/{done.digest}.json"))["files"])
    flip(store, blob_key(weights["sha256"]))
    with pytest.raises(DataError, match=r"blob of config\.json"):
        upload_version(Registry(store).version("tiny@v1"), REPO, private=True, dry_run=False)
    tiny(store).version(done.digest).withdraw(by="a test", reason="damaged")
    with pytest.raises(RegistryError, match="is withdrawn"):
        upload_version(Registry(store).version("tiny@v1"), REPO, private=True, dry_run=True)
    assert asked == []


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(403, ConfigError, "HF_TOKEN .*403"), (503, TemporaryError, "503")],
)
def test_a_hub_that_refuses_is_explained_without_the_token(published, asked, monkeypatch, status, error, words):
    def refuse(*_arguments, **_options):
        response = httpx.Response(status, request=httpx.Request("POST", "https://hf.co/?t=hf_secret"))
        raise HfHubHTTPError("with hf_secret in it", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(error, match=words) as caught:
        upload_version(Registry(published[0]).version("tiny@v1"), REPO, private=True, dry_run=False)
    assert "hf_secret" not in str(caught.value)
    assert asked == []


def test_without_a_token_or_a_network_nothing_is_tried(published, asked, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        upload_version(Registry(published[0]).version("tiny@v1"), REPO, private=True, dry_run=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        upload_version(Registry(published[0]).version("tiny@v1"), REPO, private=True, dry_run=False)
    assert asked == []
