"""Stage package: writes the model in a form that other loaders read, with facts and lineage; checks it by reloading.

package/*.safetensors, model.safetensors.index.json   weights in `package.dtype`, shards of `max_shard_bytes` at most
package/config.json, generation_config.json           readable by transformers 4.31 to 5
package/tokenizer.json, tokenizer_config.json,
        special_tokens_map.json, chat_template.jinja  tokenizer with role tokens; template as file and as key
package/card.json                                     facts of the model card (NOTICE.txt: required by Llama 2)
package/run.json, run.yaml                            what determines the model; its block of params.yaml
package/eval.json, samples.json, steps.csv,
        ledger.json                                   as the earlier stages wrote them
package/probe.json                                    expected values for `python -m ropeway.stages.package.check`
package/manifest.json                                 written last
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ropeway.config.edit import write_blocks
from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import PackageParams
from ropeway.models.jinja_template import FILE as TEMPLATE_FILE
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import digest_of, file_sha256, whole_folder, write_json, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.package.card_facts import plan_card
from ropeway.stages.package.facts import Facts, load_early_facts, load_facts
from ropeway.stages.package.model_config import (
    plan_config,
    plan_generation_config,
    plan_special_tokens_map,
    plan_tokenizer_config,
)
from ropeway.stages.package.probe import Probe, expected_logits, plan_probe
from ropeway.stages.package.weights import WrittenWeights, write_weights

FORMAT = 1
_SHOWN_CHARACTERS = 2000
# Without network: a package that needs a download is incomplete.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def check_request(workspace: Workspace, profile: PackageParams) -> None:
    """Build all of the package that needs no trained model, to report errors before training.

    Raises:
        ConfigError: The profile's block of params.yaml has other values when it is cut out of the file.
        DataError: Manifests of raw, base and data are not of one run, or the ledger is missing.
    """
    facts = load_early_facts(workspace, profile)
    with tempfile.TemporaryDirectory() as scratch:
        write_blocks(FrozenInputs.load(workspace.root).params_file, workspace.profile, Path(scratch) / "run.yaml")
    plan_card(facts, _params_text(workspace), parameters=0, weights={})
    tokenizer = json.loads((workspace.base / "tokenizer_config.json").read_bytes())
    plan_special_tokens_map(plan_tokenizer_config(tokenizer, facts.template, max_length=profile.max_length))
    _plan_probe(facts, workspace.base)


def run(workspace: Workspace, profile: PackageParams) -> None:
    """Write `package/`, only if a fresh interpreter loads it and finds the expected values.

    Raises:
        DataError: The stages' files are not of one run, a weight does not fit into the dtype, or the reloaded package
            differs from the model in logits, frequencies, tokens, template or end token.
    """
    facts = load_facts(workspace, profile)
    with whole_folder(workspace.package) as folder:
        written = write_model(facts, workspace, folder)
        probe = _plan_probe(facts, workspace.model)
        write_json(folder / "probe.json", probe)
        check_roundtrip(folder, workspace.model, probe)
        write_lineage(facts, workspace, folder)
        write_card(facts, workspace, folder, written)
        write_manifest(folder, {"format": FORMAT, **identity_of(facts)})
    files = sum(path.is_file() for path in workspace.package.rglob("*"))
    print(
        f"{facts.title}: {files} files, {written.parameters:,} parameters in {profile.package.dtype}; "
        "the reloaded package equals the exported model"
    )


def _plan_probe(facts: Facts, tokenizer_folder: Path) -> Probe:
    profile = facts.profile
    return plan_probe(
        tokenizer_folder,
        rope=facts.rope,
        special=facts.special,
        stops=facts.base["stops"],
        dtype=profile.package.dtype,
        max_length=profile.max_length,
    )


def write_model(facts: Facts, workspace: Workspace, folder: Path) -> WrittenWeights:
    """Write weights, configs and tokenizer."""
    profile, source = facts.profile, workspace.model
    trained = json.loads((source / "config.json").read_bytes())
    written = write_weights(
        source,
        folder,
        dtype=profile.package.dtype,
        max_shard_bytes=profile.package.max_shard_bytes,
        tied=bool(trained.get("tie_word_embeddings")),
    )
    config = plan_config(trained, rope=facts.rope, dtype=profile.package.dtype, stops=facts.base["stops"])
    generation = json.loads((source / "generation_config.json").read_bytes())
    tokenizer = json.loads((source / "tokenizer_config.json").read_bytes())
    tokenizer = plan_tokenizer_config(tokenizer, facts.template, max_length=profile.max_length)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json", plan_generation_config(generation, facts.template, facts.base["stops"])
    )
    write_json(folder / "tokenizer_config.json", tokenizer)
    write_json(folder / "special_tokens_map.json", plan_special_tokens_map(tokenizer))
    # Not write_json, which sorts keys: a vocabulary is expected in the order of its ids.
    text = json.dumps(facts.tokenizer, ensure_ascii=False, indent=2)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    (folder / TEMPLATE_FILE).write_text(facts.template.jinja, encoding="utf-8")
    return written


def write_lineage(facts: Facts, workspace: Workspace, folder: Path) -> None:
    """Write what determines the model and the metrics of earlier stages, without time, host, path or library versions.

    Those do not determine the model; they are in provenance.json of the version in the registry.
    """
    write_json(
        folder / "run.json",
        {
            "format": FORMAT,
            **identity_of(facts),
            "base": {key: facts.base["model"].get(key) for key in ("kind", "name", "origin")},
            "sources": {name: read["identity"] for name, read in facts.raw["sources"].items()},
            "params": facts.profile.model_dump(mode="json", include=set(facts.profile.model_fields_set)),
            "ledger": facts.ledger,
            "metrics": {"train": facts.train, "eval": facts.evaluation},
        },
    )
    write_blocks(FrozenInputs.load(workspace.root).params_file, workspace.profile, folder / "run.yaml")
    for path in (workspace.evaluation, workspace.samples, workspace.steps, workspace.ledger):
        shutil.copyfile(path, folder / path.name)


def write_card(facts: Facts, workspace: Workspace, folder: Path, written: WrittenWeights) -> None:
    """Write card.json, from which report_package renders the model card, and the notice that Llama 2 requires."""
    weights = {path.name: file_sha256(path) for path in folder.glob("*.safetensors")}
    card = plan_card(facts, _params_text(workspace), parameters=written.parameters, weights=weights)
    write_json(folder / "card.json", card)
    if card["notice"]:
        (folder / "NOTICE.txt").write_text(f"{card['notice']}\n", encoding="utf-8")


def _params_text(workspace: Workspace) -> str:
    return FrozenInputs.load(workspace.root).params_file.read_text(encoding="utf-8")


def identity_of(facts: Facts) -> dict[str, object]:
    """Return the facts that identify the model, for manifest.json and run.json."""
    return {
        "name": facts.name,
        "steps": facts.steps,
        "applied_steps": facts.applied_steps,
        "fingerprint": facts.model["fingerprint"],
        "dtype": facts.profile.package.dtype,
        "digests": {
            "raw": digest_of(facts.raw),
            "base": digest_of(facts.base),
            "data": digest_of(facts.data),
            "tokenizer": facts.data["tokenizer"],
            "template": facts.data["template"],
        },
    }


def check_roundtrip(folder: Path, model: Path, probe: Probe) -> None:
    """Raise DataError unless a fresh interpreter loads the folder and finds the trained model."""
    with tempfile.TemporaryDirectory() as scratch:
        logits = Path(scratch) / "logits.npy"
        np.save(logits, expected_logits(model, probe))
        child = subprocess.run(
            [sys.executable, "-m", "ropeway.stages.package.check", str(folder), "--logits", str(logits)],
            env={**os.environ, **_OFFLINE},
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode == DataError.exit_code:
        raise DataError(child.stderr.strip())
    if child.returncode:
        raise DataError(
            f"{folder}: the package does not load in a fresh interpreter (exit code {child.returncode}): "
            f"{child.stderr.strip()[-_SHOWN_CHARACTERS:]}"
        )
