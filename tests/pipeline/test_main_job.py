"""The main job with nothing faked: real text, real DVC, DeepSpeed on two ranks; killed, resumed, edited, packaged."""

import csv
import json
import os
import re
import shutil
import signal

import psutil
import pytest
from ruamel.yaml import YAML

from ropeway.runtime.manifest import load_manifest
from tests.support.main_job import ROOT, STEPS, MainJob, make_main_job
from tests.support.processes import command_of, kill_all


@pytest.fixture(scope="module")
def _finished(tmp_path_factory):
    job = make_main_job(tmp_path_factory.mktemp("main_job") / "workspace")
    job.first = job.repro()
    return job


@pytest.fixture
def finished(_finished, tmp_path):
    """Return a copy of a workspace whose six stages have run."""
    shutil.copytree(_finished.root, tmp_path / "workspace", symlinks=True)
    job = MainJob(tmp_path / "workspace")
    job.first = _finished.first
    return job


@pytest.fixture
def untrained(finished, tmp_path):
    """Return a copy in which the stages before training have run, and nothing remembers the others."""
    shutil.copytree(finished.root, tmp_path / "untrained", symlinks=True)
    job = MainJob(tmp_path / "untrained")
    yaml = YAML()
    lock = yaml.load(job.root / "dvc.lock")
    for stage in ("train", "evaluate", "package"):
        del lock["stages"][stage]
    yaml.dump(lock, job.root / "dvc.lock")
    shutil.rmtree(job.root / ".dvc" / "cache" / "runs")
    shutil.rmtree(job.root / ".checkpoints")
    for name in ("model", "package"):
        shutil.rmtree(job.run / name)
    return job


def test_dvc_repro_alone_leaves_every_file_and_does_nothing_again(finished):
    left = {path.name for path in finished.run.iterdir() if not path.name.startswith(".")}
    assert left >= {"raw", "base", "data", "ledger.json", "report.html"}
    assert left >= {"model", "steps.csv", "train.json", "eval.json", "package"}
    with (finished.run / "steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [int(line["step"]) for line in steps] == list(range(1, STEPS + 1))
    assert float(steps[0]["learning_rate"]) == float(steps[1]["learning_rate"]) == 0
    metrics = json.loads((finished.run / "train.json").read_text())
    assert metrics["applied_steps"] == STEPS
    scores = json.loads((finished.run / "eval.json").read_text())
    assert scores["mean"]["tuned"] < scores["mean"]["base"] - 0.1
    # Training's own validation and evaluate, which opens the exported folder, agree.
    for name, source in scores["sources"].items():
        assert source["tuned"]["loss"] == pytest.approx(metrics["validation"][name], abs=2e-5)
    again = finished.repro()
    assert "Running stage 'identity'" in again
    assert again.count("Running stage") == 1


def test_an_edit_reruns_what_it_changes_and_nothing_else(finished):
    from ropeway.orchestration import dvc_graph as graph

    def will_run():
        finished.do("ropeway", "stage", "identity")
        return [plan.name for plan in graph.plan(finished.root) if plan.will_run]

    assert will_run() == []
    finished.edit("params.yaml", "save_steps: 4", "save_steps: 5")
    finished.edit("params.yaml", "  eval_steps: 8", "  eval_steps: 9\n  log_dir: elsewhere")
    assert will_run() == []
    finished.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    assert will_run() == ["train", "evaluate", "report_eval", "package", "report_package"]


def test_an_edited_page_computes_nothing_again(finished):
    from ropeway.orchestration import dvc_graph as graph

    source = shutil.copytree(ROOT / "src", finished.root / "src")
    finished.environment["PYTHONPATH"] = f"{source}{os.pathsep}{ROOT}"
    finished.edit("src/ropeway/reporting/templates/style.css.jinja", "font-weight:600", "font-weight:700")
    finished.do("ropeway", "stage", "identity")
    assert [plan.name for plan in graph.plan(finished.root) if plan.will_run] == [
        "report_data",
        "report_eval",
        "report_package",
    ]


def test_plain_transformers_loads_the_package_and_generates(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = finished.run / "package"
    load_manifest(package, remedy="-")
    tokenizer = AutoTokenizer.from_pretrained(package)
    model = AutoModelForCausalLM.from_pretrained(package)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does str.split do?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert tokenizer.decode(ids["input_ids"][0]).endswith("<|assistant|>")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert ids["input_ids"].shape[1] < out.shape[1] <= ids["input_ids"].shape[1] + 4
    assert model.config.rope_parameters["factor"] == 2.0


def test_an_edited_shard_is_found_before_training_spends_anything(finished):
    shard = finished.run / "data" / "topics" / "tokens-00000.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    said = finished.do("ropeway", "stage", "train", code=65)
    assert f"{shard}: sha256 is" in said
    assert "dvc repro prepare" in said


@pytest.mark.parametrize("how", ["repro", "run"])
def test_what_is_edited_and_committed_in_the_middle_of_a_run_reaches_the_next_one_only(finished, untrained, how):
    from ropeway.orchestration import dvc_graph as graph

    job, before = untrained, untrained.revision()
    process = job.start(*(("dvc", "repro") if how == "repro" else ("ropeway", "run", "--no-prefect")))
    said = []
    for line in process.stdout:
        said.append(line)
        if "step 3/" in line:
            break
    job.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 5e-2")
    job.edit("params.yaml", "max_new_tokens: 4", "max_new_tokens: 9")
    for name in ("zero2_cpu.json", "sampling.json"):
        job.edit(f"configs/{name}", "{", '{ "unknown": 1, ')
    (job.root / "configs" / "prompts.jsonl").write_text('"Another question?"\n')
    if how == "repro":  # DVC reads it once; a flow asks DVC again for every stage
        job.edit("params.yaml", "profile: tiny", "profile: laptop")
    job.commit("edited meanwhile")
    said += process.stdout.read()
    process.stdout.close()
    assert process.wait() == 0, "".join(said)

    # Every byte that is recorded or published is that of the values of the start: the same run without the edits.
    packages = [load_manifest(one.run / "package", remedy="-") for one in (job, finished)]
    assert packages[0] == packages[1]
    run = json.loads((job.run / "package" / "run.json").read_text())
    assert run["params"]["learning_rate"] == 2e-3
    assert "learning_rate: 2e-3" in (job.run / "package" / "run.yaml").read_text().partition("\ntiny:")[2]
    lock = (job.root / "dvc.lock").read_bytes()
    if how == "run":
        assert "params.yaml was edited meanwhile (learning_rate, evaluation)" in "".join(said)
        version = json.loads(job.do("ropeway", "registry", "show", "tiny@v1", "--json"))
        assert version["provenance"]["git"] == before
        assert not version["provenance"]["dirty"]
        return
    job.edit("params.yaml", "profile: laptop", "profile: tiny")
    job.edit("configs/zero2_cpu.json", '{ "unknown": 1, ', "{")
    job.do("ropeway", "stage", "identity")
    plans = {plan.name: plan.reasons for plan in graph.plan(job.root) if plan.will_run}
    assert plans["train"] == ("learning_rate: 0.002 -> 0.05",)
    assert plans["evaluate"] == (
        "evaluation.max_new_tokens: 4 -> 9",
        "configs/prompts.jsonl changed",
        "configs/sampling.json changed",
    )
    assert plans["prepare"] == ("configs/prompts.jsonl changed",)
    assert (job.root / "dvc.lock").read_bytes() == lock


def test_code_that_is_edited_while_training_goes_on_records_nothing_and_edited_back_it_resumes(finished, untrained):
    job = untrained
    source = shutil.copytree(ROOT / "src", job.root / "src")
    job.environment["PYTHONPATH"] = f"{source}{os.pathsep}{ROOT}"
    lock = (job.root / "dvc.lock").read_bytes()
    process = job.start("dvc", "repro", "train")
    for line in process.stdout:
        if "step 3/" in line:
            break
    job.edit("src/ropeway/stages/train/loss.py", "EPSILON = 1e-8", "EPSILON = 1e-7")
    said = process.stdout.read()
    process.stdout.close()
    assert process.wait() != 0
    assert json.loads((job.root / ".work" / "train.exit.json").read_text())["code"] == 65
    assert "stage train: ropeway.stages.train.loss changed after the digests of this run were taken" in said
    assert "train:" not in (job.root / "dvc.lock").read_text().replace("train.json", "")
    assert lock != b""
    assert not (job.root / ".dvc" / "cache" / "runs").exists()
    job.edit("src/ropeway/stages/train/loss.py", "EPSILON = 1e-7", "EPSILON = 1e-8")
    assert f"resuming after step {STEPS} of {STEPS}" in job.do("dvc", "repro", "train")
    assert job.weights() == finished.weights()


def test_killed_in_training_the_run_resumes_and_ends_with_the_same_bytes(finished, untrained):
    job = untrained
    process = job.start("ropeway", "run", "--no-prefect")
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "step 5/" in line:  # step 4 is saved; what is printed lags a little behind what is trained
            break
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert any("ropeway.stages.train.rank" in " ".join(command_of(one)) for one in tree), "".join(seen)
    kill_all(tree)
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(tree, timeout=30)
    assert alive == []

    text = job.do("ropeway", "run", "--no-prefect")
    assert int(re.search(rf"resuming after step (\d+) of {STEPS}", text)[1]) in range(4, STEPS, 4)
    assert job.weights() == finished.weights()
    # All that the signed package holds is the same too: a resumed run is the same version.
    packages = [load_manifest(one.run / "package", remedy="-") for one in (job, finished)]
    assert packages[0] == packages[1]
    assert "tiny@v1" in text


def test_a_terminated_run_saves_first_says_so_and_leaves_no_process(finished, untrained):
    job = untrained
    process = job.start("dvc", "repro")
    for line in process.stdout:
        if "step 6/" in line:
            break
    tree = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)  # dvc alone: nothing tells the ranks but its absence
    rest = process.stdout.read()
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert alive == []
    record = json.loads((job.root / ".work" / "train.exit.json").read_text())
    assert record["code"] == 75, rest
    saved = sorted(path.name for path in next((job.root / ".checkpoints").iterdir()).glob("step-*"))
    assert saved[-1] >= "step-000006"
    assert f"step {STEPS}/{STEPS}" in job.do("dvc", "repro", "train")
    assert job.weights() == finished.weights()


def test_without_a_compiler_training_says_what_is_missing(finished):
    finished.environment["CXX"] = "no-such-compiler"
    said = finished.do("ropeway", "stage", "train", code=64)
    assert "no C++ compiler: looked for `no-such-compiler`" in said


def test_a_missing_base_folder_is_named_before_anything_runs(finished):
    text = (finished.root / "params.yaml").read_text()
    (finished.root / "params.yaml").write_text(text.replace("profile: tiny", "profile: llama2_13b_orca_8k"))
    said = finished.do("ropeway", "run", "--no-prefect", code=64)
    assert "/mnt/data/llama2/Llama-2-13b-hf/ is not a folder" in said
    assert "base.kind" in said
