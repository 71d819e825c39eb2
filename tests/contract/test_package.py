"""A package is what was trained, for every loader, and the check finds where it is not."""

import hashlib
import json
import re
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ropeway.config.edit import without_comments
from ropeway.config.stages import READS
from ropeway.registry import Registry
from ropeway.registry.layout import blob_key
from ropeway.registry.version_manifest import build_package_manifest, build_version_manifest, package_digest
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import load_manifest, write_json, write_manifest
from ropeway.stages.package import stage as package
from ropeway.stages.package.check import check_package, main
from ropeway.stages.package.probe import expected_logits, probe_row
from ropeway.stages.package.stage import check_roundtrip
from tests.support.tiny_run import BLOCK, make_package, make_run


def check_here(folder, model, probe):
    """Check a written package in this process: a fresh interpreter takes 5 s."""
    with tempfile.TemporaryDirectory() as scratch:
        logits = Path(scratch) / "logits.npy"
        np.save(logits, expected_logits(model, probe))
        check_package(folder, logits)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    workspace, profile = make_run(tmp_path_factory.mktemp("run"), "package")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(package, "check_roundtrip", check_here)
        make_package(workspace, profile)
    probe = json.loads((workspace.package / "probe.json").read_bytes())
    logits = tmp_path_factory.mktemp("logits") / "logits.npy"
    np.save(logits, expected_logits(workspace.model, probe))
    return workspace, profile, logits


@pytest.fixture
def copy(made, tmp_path):
    """A package to damage; its manifest is gone, so only what it does when loaded can give the damage away."""
    folder = tmp_path / "package"
    shutil.copytree(made[0].package, folder)
    (folder / "manifest.json").unlink()
    return folder


def edit(path, change):
    value = json.loads(path.read_bytes())
    change(value)
    write_json(path, value)


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_every_picture_and_file_the_card_links_to_is_there(made):
    workspace, *_ = made
    card = (workspace.pages / "README.md").read_text()
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", card) if "://" not in link}
    assert {"plots/positions.png", "samples.html", "plots/passkey_answers.csv"} <= links
    version, _ = build_version_manifest(workspace.package, workspace.pages, "tiny")
    assert links <= {file.path for file in version.files}


def test_the_package_holds_just_what_it_promises(made):
    workspace, *_ = made
    assert sorted(path.name for path in workspace.package.iterdir()) == [
        "card.json", "chat_template.jinja", "config.json", "eval.json", "generation_config.json", "ledger.json",
        "manifest.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "probe.json", "run.json", "run.yaml", "samples.json",
        "special_tokens_map.json", "steps.csv", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    pictures = {f"{name}.{kind}" for name in ("loss", "sources", "positions", "passkey") for kind in ("png", "svg")}
    tables = {f"{name}.csv" for name in ("scores", "positions", "passkey", "passkey_answers")}
    assert {path.name for path in (workspace.pages / "plots").iterdir()} == pictures | tables
    manifest = load_manifest(workspace.package, remedy="")
    assert (manifest["name"], manifest["steps"], manifest["applied_steps"]) == ("tiny", 3, 3)
    for path in files_of(workspace.package):
        assert path.stat().st_mode & 0o444 == 0o444


def test_the_registry_takes_the_package(made):
    workspace, *_ = made
    assert len(build_package_manifest(workspace.package, "tiny", verify=True).files) == 18
    manifest, paths = build_version_manifest(workspace.package, workspace.pages, "tiny")
    assert len(manifest.files) == 18 + 15
    assert paths["README.md"] == workspace.pages / "README.md"
    assert paths["config.json"] == workspace.package / "config.json"
    assert manifest.digest != package_digest(workspace.package, "tiny")


def test_an_edited_page_changes_no_byte_of_the_package_and_pages_of_another_package_are_refused(made, tmp_path):
    workspace, *_ = made
    pages, other = tmp_path / "pages", tmp_path / "package"
    shutil.copytree(workspace.pages, pages)
    (pages / "README.md").write_text("# another card\n")
    with pytest.raises(DataError, match=r"README\.md"):
        build_version_manifest(workspace.package, pages, "tiny")
    shutil.copytree(workspace.package, other)
    edit(other / "manifest.json", lambda manifest: manifest.update(steps=4))
    with pytest.raises(DataError, match="do not belong to the package"):
        build_version_manifest(other, workspace.pages, "tiny")


def test_what_is_pulled_is_package_and_pages_and_a_flipped_byte_of_the_card_is_found(made, tmp_path):
    workspace, *_ = made
    registry = Registry.open((tmp_path / "registry").as_uri())
    done = registry.artifact("tiny").publish(workspace.package, provenance={}, attachments={}, pages=workspace.pages)
    version = registry.version(f"tiny@{done.digest}")
    folder = version.pull(tmp_path / "pulled").folder
    assert (folder / "README.md").read_bytes() == (workspace.pages / "README.md").read_bytes()
    manifest = load_manifest(folder, remedy="")
    assert {"README.md", "samples.html", "plots/loss.png", "config.json"} <= manifest["files"].keys()
    blob = tmp_path / "registry" / blob_key(manifest["files"]["README.md"]["sha256"])
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[100] ^= 1
    blob.write_bytes(data)
    with pytest.raises(DataError):
        version.pull(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_plain_transformers_loads_it_and_computes_what_the_trained_model_does(made):
    workspace, *_ = made
    trained = AutoModelForCausalLM.from_pretrained(workspace.model, dtype=torch.bfloat16)
    packed = AutoModelForCausalLM.from_pretrained(workspace.package)
    assert packed.dtype == torch.bfloat16
    row = torch.arange(3, 60)[None]
    with torch.inference_mode():
        assert torch.equal(trained(row, use_cache=False).logits, packed(row, use_cache=False).logits)


def test_the_cards_own_snippet_runs_in_the_folder(made, tmp_path, monkeypatch, capsys):
    workspace, *_ = made
    code = re.search(r"```python\n(.*?)```", (workspace.pages / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "snippet.py").write_text(code)
    monkeypatch.chdir(workspace.package)
    runpy.run_path(str(tmp_path / "snippet.py"))
    assert capsys.readouterr().out.startswith("<s><|prompter|>")


@pytest.fixture
def checked_here(monkeypatch):
    """Let the check of a written package run in this process."""
    monkeypatch.setattr(package, "check_roundtrip", check_here)


@pytest.mark.usefixtures("checked_here")
def test_two_packagings_of_one_run_in_two_places_give_the_same_bytes(made, tmp_path):
    workspace, profile = make_run(tmp_path, "package")
    make_package(workspace, profile)
    first, second = (
        {p.relative_to(w.run): p.read_bytes() for folder in (w.package, w.pages) for p in files_of(folder)}
        for w in (made[0], workspace)
    )
    assert first == second


def test_nothing_in_it_tells_where_or_when_it_was_made(made):
    workspace, *_ = made
    for path in [*files_of(workspace.package), *files_of(workspace.pages)]:
        data = path.read_bytes()
        assert str(workspace.root).encode() not in data, path
        assert b"transformers_version" not in data, path


def test_the_run_says_params_digests_ledger_and_metrics(made):
    workspace, profile, _ = made
    run = json.loads((workspace.package / "run.json").read_bytes())
    assert run["params"]["rng_seed"] == 0xE1291F1A
    assert run["params"]["superhot_config"] == {"type": "linear", "scale": 2.0}
    assert "log_dir" not in run["params"]
    assert run["ledger"] == json.loads(workspace.ledger.read_bytes())
    assert run["metrics"]["eval"] == json.loads(workspace.evaluation.read_bytes())
    assert run["metrics"]["train"] == json.loads(workspace.train_metrics.read_bytes())
    tokenizer = (workspace.base / "tokenizer.json").read_bytes()
    assert run["digests"]["tokenizer"] == hashlib.sha256(tokenizer).hexdigest()
    assert (workspace.package / "run.yaml").read_text().endswith(without_comments(BLOCK))
    assert profile.package.dtype == "bf16"


@pytest.mark.usefixtures("checked_here")
@pytest.mark.parametrize(("dtype", "files"), [("fp16", 2), ("fp32", 3)])
def test_every_dtype_of_params_comes_back_as_itself(tmp_path, dtype, files):
    workspace, profile = make_run(tmp_path, "package", block=BLOCK.replace("{dtype: bf16", f"{{dtype: {dtype}"))
    package.run(workspace, profile)
    assert len(list(workspace.package.glob("*.safetensors"))) == files


def test_an_undamaged_copy_passes(copy, made, capsys):
    assert main([str(copy), "--logits", str(made[2])]) == 0
    assert "loads and equals the trained model" in capsys.readouterr().out


def test_a_dropped_factor_is_found(copy, made):
    def drop(config):
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
        config["rope_scaling"] = None

    edit(copy / "config.json", drop)
    with pytest.raises(DataError) as caught:
        check_package(copy, made[2])
    assert "config.json, rope_scaling: expected {'type': 'linear', 'factor': 2.0}, found None" in str(caught.value)
    assert "RoPE frequencies (inv_freq): expected [0.5, 0.05" in str(caught.value)
    assert re.search(r"logit of token \d+ at position \d+ of the probe: expected -?[\d.]+, found", str(caught.value))


def test_a_factor_that_only_new_loaders_read_is_found(copy):
    edit(copy / "config.json", lambda config: config.pop("rope_scaling"))
    with pytest.raises(DataError, match=r"config.json, rope_scaling: expected .*'linear'.*, found None"):
        check_package(copy)


def test_a_factor_that_is_no_float_is_found(copy):
    edit(copy / "config.json", lambda config: config["rope_scaling"].update(factor=2))
    with pytest.raises(DataError, match=r"rope_scaling: expected .*2\.0.*, found .*2\b(?!\.)"):
        check_package(copy)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config"])
def test_an_altered_template_is_found_wherever_it_stands(copy, place):
    if place == "tokenizer_config":
        edit(
            copy / "tokenizer_config.json",
            lambda config: config.update(chat_template=config["chat_template"].replace("+ eos_token", "", 1)),
        )
    else:
        template = (copy / place).read_text()
        (copy / place).write_text(template.replace("+ eos_token", "", 1))
    with pytest.raises(DataError, match=rf"{place}, conversation as text: expected <s><\|system\|>Be kind.</s>"):
        check_package(copy)


def test_a_missing_template_is_found(copy):
    edit(copy / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    with pytest.raises(DataError, match="tokenizer_config: the chat template is missing"):
        check_package(copy)


def test_a_template_that_renders_the_same_is_none_the_worse_for_a_comment(copy):
    template = "{# a comment #}" + (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(template)
    edit(copy / "tokenizer_config.json", lambda config: config.update(chat_template=template))
    check_package(copy)


def test_a_package_of_an_earlier_version_is_checked_with_what_its_probe_has(copy):
    def as_before(probe):
        del probe["stops"]
        for case in probe["conversations"]:
            del case["prompt"], case["prompt_ids"]

    edit(copy / "probe.json", as_before)
    check_package(copy)


def test_a_probe_without_the_templates_tokens_is_found(copy):
    edit(copy / "probe.json", lambda probe: probe["special"].pop("<|assistant|>"))
    with pytest.raises(DataError, match=r"probe\.json, special: expected the id of <\|assistant\|>"):
        check_package(copy)


def test_two_role_tokens_with_each_others_ids_are_found(copy):
    def swap(tokenizer):
        tokens = {token["content"]: token for token in tokenizer["added_tokens"]}
        for one, other in (("<|prompter|>", "<|assistant|>"),):
            tokens[one]["content"], tokens[other]["content"] = other, one
        for vocabulary in (tokenizer["model"]["vocab"],):
            if "<|prompter|>" in vocabulary:
                vocabulary["<|prompter|>"], vocabulary["<|assistant|>"] = 2001, 2000

    edit(copy / "tokenizer.json", swap)
    with pytest.raises(DataError, match=r"id of <\|prompter\|>: expected 2000, found 2001"):
        check_package(copy)


def test_a_tokenizer_that_splits_text_otherwise_is_found(copy):
    edit(copy / "tokenizer.json", lambda tokenizer: tokenizer.update(normalizer=None))
    with pytest.raises(DataError, match=r"ids of 'Hello': expected \[1, "):
        check_package(copy)


def test_a_bos_that_no_longer_comes_by_itself_is_found(copy):
    edit(copy / "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None))
    with pytest.raises(DataError, match=r"ids of '': expected \[1\], found \[\]"):
        check_package(copy)


def test_weights_of_another_dtype_are_found(copy, made):
    for path in copy.glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"stored dtype of lm_head.weight: expected BF16, found F32"):
        check_package(copy, made[2])
    edit(copy / "config.json", lambda config: config.update(dtype="float32", torch_dtype="float32"))
    with pytest.raises(DataError, match=r"dtype of the loaded model: expected torch.bfloat16, found torch.float32"):
        check_package(copy)


NORM, INDEX = "model.norm.weight", "model.safetensors.index.json"


def drop_from_index(copy):
    edit(copy / INDEX, lambda index: index["weight_map"].pop(NORM))


def drop_from_files(copy):
    drop_from_index(copy)
    drop_from_shard(copy)


def drop_from_shard(copy):
    path = copy / "model-00002-of-00002.safetensors"
    save_file({name: one for name, one in load_file(path).items() if name != NORM}, path, metadata={"format": "pt"})


def drop_shard(copy):
    (copy / "model-00002-of-00002.safetensors").unlink()


def cut_shard(copy):
    path = copy / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_from_index, rf"{NORM}: found in model-00002-of-00002.safetensors, where the index does not have it"),
        (drop_from_shard, rf"{NORM}: missing in model-00002-of-00002.safetensors, where the index has it"),
        (drop_from_files, rf"{NORM}: missing in the files"),
        (drop_shard, rf"{NORM}: missing in model-00002-of-00002.safetensors"),
        (cut_shard, r"model-00002-of-00002.safetensors: not a valid safetensors file"),
    ],
)
def test_a_tensor_that_index_or_files_lack_is_found_without_any_logits(copy, damage, words):
    damage(copy)
    with pytest.raises(DataError, match=words):
        check_package(copy)


def test_one_altered_weight_is_found_by_the_logits(copy, made):
    path = copy / "model-00002-of-00002.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 4
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"logit of token \d+ at position \d+"):
        check_package(copy, made[2])


def test_an_end_token_that_does_not_stop_is_found(copy):
    edit(copy / "generation_config.json", lambda settings: settings.update(eos_token_id=5))
    with pytest.raises(DataError, match=r"tokens generated when the second is end token 2: expected \[329, 2\], found"):
        check_package(copy)


def test_generation_settings_that_transformers_would_not_save_are_found(copy):
    edit(copy / "generation_config.json", lambda settings: settings.update(temperature=0.9, do_sample=False))
    with pytest.raises(DataError, match=r"generation_config.json: invalid settings"):
        check_package(copy)


def test_a_pulled_package_with_a_flipped_byte_is_found_by_its_manifest(made, tmp_path):
    folder = tmp_path / "package"
    shutil.copytree(made[0].package, folder)
    data = bytearray((folder / "tokenizer.json").read_bytes())
    data[100] ^= 1
    (folder / "tokenizer.json").write_bytes(data)
    assert main([str(folder)]) == 65


def test_the_stage_fails_and_leaves_no_package_when_the_clean_process_finds_a_fault(made, copy, monkeypatch, capsys):
    def run_here(command, **_):  # main() of the very command; the next test starts it
        assert command[1:3] == ["-m", "ropeway.stages.package.check"]
        return subprocess.CompletedProcess(command, main(command[3:]), stderr=capsys.readouterr().err)

    monkeypatch.setattr(package, "subprocess", SimpleNamespace(run=run_here))
    workspace, profile, _ = made
    edit(copy / "config.json", lambda config: config.update(rope_scaling=None))
    probe = json.loads((copy / "probe.json").read_bytes())
    with pytest.raises(DataError, match=r"differs from the trained model:\n  config.json, rope_scaling"):
        check_roundtrip(copy, workspace.model, probe)
    assert len(probe_row(probe)) == profile.max_length


def test_a_folder_that_does_not_load_at_all_is_reported_with_the_loaders_own_words(made, copy):
    (copy / "tokenizer.json").write_text("{}")
    probe = json.loads((copy / "probe.json").read_bytes())
    with pytest.raises(DataError, match=r"does not load in a fresh interpreter \(exit code 1\)"):
        check_roundtrip(copy, made[0].model, probe)


def test_a_model_trained_with_other_params_is_not_packaged_under_the_present_ones(tmp_path):
    workspace, profile = make_run(tmp_path, "package")
    values = {name: getattr(profile, name) for name in READS["package"]} | {"learning_rate": 7e-3}
    with pytest.raises(DataError, match=r"trained with other params .*learning_rate: .* -> 0.007"):
        package.run(workspace, profile.model_construct(**values))
    assert not workspace.package.exists()


def test_a_model_that_does_not_state_its_params_is_not_packaged(tmp_path):
    workspace, profile = make_run(tmp_path, "package")
    write_manifest(workspace.model, {"steps": 3, "applied_steps": 3, "fingerprint": "0", "dtype": "fp32"})
    with pytest.raises(DataError, match="its manifest has no params"):
        package.run(workspace, profile)


def test_an_export_scaled_otherwise_than_params_say_is_refused_before_anything_is_written(tmp_path):
    workspace, profile = make_run(tmp_path, "package")
    edit(workspace.model / "config.json", lambda config: config["rope_parameters"].update(factor=4.0))
    write_manifest(workspace.model, {"steps": 3, "applied_steps": 3, "fingerprint": "0", "dtype": "fp32"})
    with pytest.raises(DataError, match=r"rope_parameters: expected .*2\.0.*, found .*4\.0"):
        package.run(workspace, profile)
    assert not workspace.package.exists()


def test_special_ids_come_from_the_tokenizer_and_the_template_gives_one_bos(made):
    tokenizer = AutoTokenizer.from_pretrained(made[0].package)
    assert tokenizer.model_max_length == 96
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == tokenizer("<|system|>Be kind.</s><|prompter|>Hi</s><|assistant|>")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
