"""The package loaded by transformers 4.31.0 and 4.46.3, each in its own interpreter (`make test-loaders`).

Nothing of this project is imported there. Results are compared with the current transformers on the export.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from ropeway.config.load_params import load_profile
from ropeway.config.stages import READS
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.runtime.manifest import file_sha256, write_json
from ropeway.stages.package.facts import load_facts
from ropeway.stages.package.model_config import TORCH_NAMES
from ropeway.stages.package.probe import expected_logits, plan_probe, probe_row
from ropeway.stages.package.stage import write_model
from tests.support import tiny_run

pytestmark = pytest.mark.loaders

HERE = Path(__file__).parent
VERSIONS = sorted(path.stem for path in HERE.glob("*.txt"))
# kind -> (dtype of the package, RoPE scaling); the probe row has 96 tokens, twice the base's context length
KINDS = {
    "fp32": ("fp32", "type: linear"),
    "fp16": ("fp16", "type: linear"),
    "bf16": ("bf16", "type: linear"),
    "dynamic": ("fp32", "type: dynamic"),
    "longrope": ("fp32", "type: longrope, long_factor: [1.0, 1.5, 2.0, 4.0], attention_factor: null"),
}
SINCE = {"longrope": "4.43.0"}  # other kinds: since 4.31.0
# Relative to the largest logit. 4.31 has no SDPA, so sums round differently.
TOLERANCE = {"fp32": 2e-5, "fp16": 4e-3, "bf16": 3e-2}


copy = tiny_run.copy_tokenizer


def saved_today(folder):
    """Write the tokenizer as the base stage does: with the current tokenizers, which writes merges as pairs."""
    copy(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.save(str(folder / "tokenizer.json"))
    assert isinstance(json.loads((folder / "tokenizer.json").read_bytes())["model"]["merges"][0], list)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Return {kind: (folder, probe, logits of the trained model)}; `unscaled`: only new loaders see its scaling."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "copy_tokenizer", saved_today)
        for kind, (dtype, scaling) in KINDS.items():
            block = tiny_run.BLOCK.replace("package: {dtype: bf16", f"package: {{dtype: {dtype}")
            block += f"  superhot_config: {{{scaling}, scale: 2}}\n"
            workspace, profile = tiny_run.make_run(tmp_path_factory.mktemp(kind), block=block)
            for path in (workspace.ledger, workspace.train_metrics, workspace.evaluation, workspace.samples):
                write_json(path, {})
            stage = load_profile(workspace.root / "params.yaml")[1].reading(READS["package"])
            facts = load_facts(workspace, stage)
            folder = workspace.run / "folder"
            folder.mkdir()
            write_model(facts, workspace, folder)
            probe = plan_probe(
                workspace.model,
                rope=facts.rope,
                special=facts.special,
                stops=facts.base["stops"],
                dtype=dtype,
                max_length=profile.max_length,
            )
            made[kind] = folder, probe, expected_logits(workspace.model, probe)
    folder, probe, logits = made["fp32"]
    unscaled = folder.with_name("unscaled")
    shutil.copytree(folder, unscaled)
    config = json.loads((unscaled / "config.json").read_bytes())
    write_json(unscaled / "config.json", {key: value for key, value in config.items() if key != "rope_scaling"})
    return {**made, "unscaled": (unscaled, probe, logits)}


@pytest.fixture(scope="module", params=VERSIONS)
def seen(request, packages):
    """Return the results of one old version for all packages, from one process, since it takes seconds to start."""
    python = tiny_run.ROOT / ".venv-loaders" / request.param / "bin" / "python"
    assert python.is_file(), f"{python} is not there: `make test-loaders` makes it"
    cases = {
        str(folder): {
            "row": probe_row(probe),
            "texts": [case["text"] for case in probe["texts"]],
            "conversations": [case["messages"] for case in probe["conversations"]],
            "roles": list(OPEN_ASSISTANT.added_tokens),
            "prompt": probe["conversations"][0]["ids"],
            "forced": [probe["special"][OPEN_ASSISTANT.added_tokens[-1]], probe["special"]["eos"]],
        }
        for kind, (folder, probe, _) in packages.items()
        if request.param >= SINCE.get(kind, "4.31.0")
    }
    done = subprocess.run(
        [python, HERE / "old_loader.py"],
        input=json.dumps(cases),
        env={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = json.loads(done.stdout)
    assert output["transformers"] == request.param
    found = {kind: output["found"].get(str(folder)) for kind, (folder, *_) in packages.items()}
    return {**found, "templated": request.param != "4.31.0"}  # chat templates exist since 4.34


def difference(packages, kind):
    folder, _, expected = packages[kind]
    found = np.load(f"{folder}.npy")
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def skip_unless(found):
    if found is None:
        pytest.skip("this version does not have the scaling")


@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_are_those_of_the_trained_model(seen, packages, kind):
    skip_unless(seen[kind])
    assert len(probe_row(packages[kind][1])) == 96
    assert seen[kind]["dtype"] == f"torch.{TORCH_NAMES[KINDS[kind][0]]}"
    assert difference(packages, kind) <= TOLERANCE[KINDS[kind][0]]


def test_old_loaders_read_the_scaling_from_rope_scaling(seen, packages):
    assert {key: seen["fp32"]["rope_scaling"][key] for key in ("type", "factor")} == {"type": "linear", "factor": 2.0}
    # Without it they silently compute other logits, which the comparison above would find.
    assert seen["unscaled"]["rope_scaling"] is None
    assert difference(packages, "unscaled") > 100 * TOLERANCE["fp32"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_special_ids_and_lengths_are_those_of_the_data(seen, packages, kind):
    probe, found = packages[kind][1], seen[kind]
    skip_unless(found)
    assert found["texts"] == [case["ids"] for case in probe["texts"]]
    assert found["special"] == {name: probe["special"][name] for name in ("bos", "eos", "pad")}
    assert found["roles"] == [probe["special"][role] for role in OPEN_ASSISTANT.added_tokens]
    assert (found["max_length"], found["padding_side"], found["use_cache"]) == (96, "right", True)


def test_the_template_renders_as_in_training_if_the_version_has_templates(seen, packages):
    wanted = [case["text"] for case in packages["fp32"][1]["conversations"]]
    assert seen["fp32"]["rendered"] == (wanted if seen["templated"] else None)


@pytest.mark.parametrize("kind", KINDS)
def test_it_generates_and_stops_at_the_end_token(seen, packages, kind):
    skip_unless(seen[kind])
    special = packages[kind][1]["special"]
    assert seen[kind]["generated"] == [special[OPEN_ASSISTANT.added_tokens[-1]], special["eos"]]


def test_the_package_s_tokenizer_has_the_models_merges_as_strings(packages):
    folder, _, _ = packages["fp32"]
    tree = json.loads((folder / "tokenizer.json").read_bytes())
    assert all(isinstance(merge, str) for merge in tree["model"]["merges"])
    assert file_sha256(folder / "tokenizer.json") != file_sha256(folder.parent / "model" / "tokenizer.json")
