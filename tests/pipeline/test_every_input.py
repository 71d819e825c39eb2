"""Every kind of source and of base goes through a whole run: from what it is to a published version and its review."""

import json
import shutil

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropeway.orchestration.stage_process import execute_stage, write_identity
from ropeway.registry import Registry
from ropeway.reporting.evidence import open_case
from ropeway.reporting.review_report import render_review
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.storage.s3_client import make_client, split_url
from tests.support import tiny_gguf
from tests.support.archives import gz
from tests.support.hub_world import COMMIT, REPO, Hub, point_at, serve_hub
from tests.support.tiny_run import PARITY
from tests.support.web import serve_files
from tests.support.whole_run import (
    CHAT,
    CHATS,
    SHAPE,
    TEXT,
    TEXTS,
    jsonl,
    make_workspace,
    rewrite,
    run_all,
)

SECRET = "hunter2hunter2"  # noqa: S105 - of a fake server


def scratch(_folder, _monkeypatch):
    return {"base": {"kind": "scratch"}, "expected_model": {**SHAPE, "vocab_size": 400}}, "random weights"


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def original(folder, rope=None):
    """Save a Llama as another program writes it."""
    torch.manual_seed(0)
    shape = {name: value for name, value in SHAPE.items() if name != "rope_theta"}
    rope = rope or {"rope_type": "default", "rope_theta": 10000.0}
    config = LlamaConfig(**shape, rope_parameters=rope)
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in (PARITY / "tokenizer_base").iterdir():
        shutil.copyfile(path, folder / path.name)


def folder(root, _monkeypatch):
    """Return a base with a scaling of its own, which stays."""
    original(root / "own", SCALED)
    changes = {"base": {"kind": "folder"}, "model_name": str(root / "own"), "expected_model": SHAPE, "superhot": False}
    return changes, "a local folder"


def hub(root, _monkeypatch):
    original(root / "hub-model")
    files = {path.name: path.read_bytes() for path in (root / "hub-model").iterdir()}
    changes = {"base": {"kind": "hub", "revision": "main"}, "model_name": REPO, "expected_model": SHAPE}
    return {**changes, "files": files}, f"{REPO} (commit {COMMIT[:12]})"


def in_package(root, monkeypatch):
    tiny_gguf.write_package(root / "site")
    monkeypatch.syspath_prepend(str(root / "site"))
    base = {"kind": "gguf", "package": tiny_gguf.PACKAGE, "file": tiny_gguf.FILE}
    told = f"{tiny_gguf.FILE} in the Python package {tiny_gguf.PACKAGE} (version {tiny_gguf.VERSION})"
    return {"base": base, "model_name": "tiny", "expected_model": tiny_gguf.SHAPE}, told


@pytest.mark.parametrize(
    ("base", "kinds"),
    [(scratch, ("http", "s3")), (folder, ("python_docs",)), (hub, ("huggingface", "files")), (in_package, ("files",))],
    ids=["scratch, http and s3", "folder, python_docs", "hub, huggingface and files", "gguf, files"],
)
def test_every_source_and_base_reaches_a_version_with_card_and_review(tmp_path, monkeypatch, request, base, kinds):
    changes, base_told = base(tmp_path / "elsewhere", monkeypatch)
    models = changes.pop("files", {})
    sources, told = {}, []
    served = {"talk.jsonl": jsonl(CHATS)}
    with serve_files(served) as site, serve_hub(Hub({"talks.jsonl": jsonl(CHATS)}, models)) as there:
        point_at(monkeypatch, tmp_path / "cache", url=there.url)
        if "http" in kinds:
            sources["talk"] = {"kind": "files", "paths": [f"{site}/talk.jsonl?X-Amz-Signature={SECRET}"], **CHAT}
            told.append(f"{site}/talk.jsonl (ETag")
        if "s3" in kinds:
            url = request.getfixturevalue("s3_url")
            bucket, prefix = split_url(url)
            make_client().put_object(Bucket=bucket, Key=f"{prefix}/texts.jsonl.gz", Body=gz(jsonl(TEXTS)))
            sources["texts"] = {"kind": "files", "paths": [f"{url}/*.jsonl.gz"], **TEXT}
            told.append(f"{url}/texts.jsonl.gz (ETag")
        if "huggingface" in kinds:
            sources["hub"] = {"kind": "huggingface", "repo": REPO, "revision": "main", "files": ["*.jsonl"], **CHAT}
            told.append(f"{REPO} (commit {COMMIT[:12]}, files *.jsonl)")
        if "files" in kinds:
            sources["own"] = {"kind": "files", "paths": ["own.jsonl"], **TEXT}
            told.append("own.jsonl (sha256")
        if "python_docs" in kinds:
            sources["topics"] = {"kind": "python_docs", "part": "topics", "expected_rows": None}
            told.append("the topics of the documentation of Python")
        workspace = make_workspace(tmp_path / "workspace", sources, changes)
        (workspace.root / "own.jsonl").write_bytes(jsonl(TEXTS))
        publication = run_all(workspace, monkeypatch)

    assert where_is(SECRET, workspace.root) <= {"params.yaml", ".identity/addresses.json"}
    card = (workspace.pages / "README.md").read_text()
    report = render_review(open_case(Registry.open(workspace.registry_url), publication.version), with_pictures=False)
    run = json.loads((workspace.package / "run.json").read_text())
    assert run["sources"].keys() == sources.keys()
    for words in (*told, base_told):
        assert plain(words) in plain(report)
        assert plain(words).partition(" (")[0] in plain(card)
    assert AutoTokenizer.from_pretrained(workspace.package)("the sea")["input_ids"]
    if base is folder:
        check_kept_scaling(tmp_path / "elsewhere" / "own", workspace.package, card)
    facts = Registry.open(workspace.registry_url).version(publication.version).describe()
    assert facts["files"].keys() >= {"run.json", "README.md"}


def where_is(secret, root):
    """Return the files below a folder that hold a text, but for git's own."""
    files = (path for path in root.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {path.relative_to(root).as_posix() for path in files if secret.encode() in path.read_bytes()}


def check_kept_scaling(original, package, card):
    """The authority: transformers' own function on the base's untouched config."""
    untouched = AutoConfig.from_pretrained(original)
    frequencies, factor = ROPE_INIT_FUNCTIONS["llama3"](untouched)
    model = AutoModelForCausalLM.from_pretrained(package)
    assert model.config.rope_parameters == untouched.rope_parameters == SCALED
    assert model.config.max_position_embeddings == untouched.max_position_embeddings
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequencies, rtol=0, atol=0)
    assert model.model.rotary_emb.attention_scaling == factor
    stated = json.loads((package / "config.json").read_text())["rope_scaling"]
    assert stated == {name: value for name, value in SCALED.items() if name != "rope_theta"}
    assert "the RoPE scaling of its base, llama3" in card


def plain(text):
    """Return a text without Markdown's marks."""
    for mark in "\\`*":
        text = text.replace(mark, "")
    return text


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """A workspace whose data is prepared: training is next."""
    sources = {"own": {"kind": "files", "paths": ["own.jsonl"], **TEXT}}
    changes = {"base": {"kind": "scratch"}, "expected_model": {**SHAPE, "vocab_size": 320}}
    workspace = make_workspace(tmp_path / "workspace", sources, changes)
    (workspace.root / "own.jsonl").write_bytes(jsonl(TEXTS))
    monkeypatch.setenv("ROPEWAY_RANKS", "1")
    write_identity(workspace.root)
    for stage in ("fetch", "base", "tokenize", "prepare"):
        execute_stage(workspace.root, stage)
    monkeypatch.setattr("ropeway.stages.train.stage.run", lambda *_: pytest.fail("training began"))
    return workspace


EVALUATION = {
    "prompts": "configs/prompts.jsonl",
    "sampling": "configs/sampling.json",
    "max_new_tokens": 4,
    "tasks": [],
    "long_context": None,
}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            {"positions": {"rows": 1, "row_tokens": 10**6, "bucket_tokens": 32}},
            DataError,
            r"positions\.row_tokens: 1,000,000 tokens",
        ),
        ({"passkey": {"lengths": [64], "depths": [0.5], "repeats": 1}}, ConfigError, r"passkey\.lengths: 64 tokens"),
        (
            {"long_context": {"kinds": ["multi_key"], "lengths": [64], "repeats": 1}},
            ConfigError,
            r"long_context\.lengths, kind multi_key: 64 tokens",
        ),
        ({"prompts": "configs/sampling.json"}, ConfigError, r"sampling\.json:1: expected a JSON string"),
        ({"sampling": "configs/zero2_cpu.json"}, ConfigError, "expected {default"),
    ],
    ids=["long rows", "passkeys", "long context", "prompts", "sampling"],
)
def test_what_would_fail_evaluate_fails_before_training(ready, change, error, said):
    block = YAML(typ="safe", pure=True).load((ready.root / "params.yaml").read_text())["tiny"]
    rewrite(ready, {"evaluation": {**block["evaluation"], **change}})
    write_identity(ready.root)
    with pytest.raises(error, match=said):
        execute_stage(ready.root, "train")


def test_what_would_fail_package_fails_before_training(ready):
    ready.ledger.unlink()
    with pytest.raises(DataError, match=r"ledger.json: expected the JSON"):
        execute_stage(ready.root, "train")
