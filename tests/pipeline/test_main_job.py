"""The main job with nothing faked: real text, real DVC, DeepSpeed on two ranks; killed, resumed, edited, packaged."""

import csv
import json
import os
import re
import shutil
import signal

import psutil
import pytest

from ropeway.data.raw_records import iterate_records
from ropeway.data.record_identity import record_digest
from ropeway.runtime.manifest import file_sha256, load_manifest
from tests.support.main_job import ROOT, STEPS
from tests.support.processes import command_of, kill_all, read_until


@pytest.fixture
def finished(main_jobs, tmp_path):
    """Return a copy of a workspace in which `dvc repro` has run."""
    return main_jobs.finished.copy(tmp_path / "workspace")


@pytest.fixture
def untrained(main_jobs, tmp_path):
    """Return a copy in which the stages before training have run, and nothing remembers the others."""
    job = main_jobs.prepared.copy(tmp_path / "untrained")
    shutil.rmtree(job.root / ".dvc" / "cache" / "runs")
    return job


def test_dvc_repro_alone_writes_every_file_and_a_second_run_does_nothing(finished):
    left = {path.name for path in finished.run.iterdir() if not path.name.startswith(".")}
    assert left >= {"raw", "base", "data", "ledger.json", "report.html", "data_profile.json", "records.index"}
    profile = (finished.run / "data_profile.json").read_bytes()
    assert (finished.run / "pages" / "data_profile.json").read_bytes() == profile
    assert json.loads(profile)["record_index"]["sha256"] == file_sha256(finished.run / "records.index")
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
    from ropeway.orchestration.forecast import forecast_run

    def will_run():
        expected = {stage.name: stage.reasons for stage in forecast_run(finished.root, "tiny").stages if stage.will_run}
        finished.do("ropeway", "stage", "identity")
        plans = {plan.name: plan.reasons for plan in graph.plan(finished.root) if plan.will_run}
        assert expected == plans  # computed before anything was refreshed
        return list(plans)

    assert will_run() == []
    finished.edit("params.yaml", "save_steps: 4", "save_steps: 5")
    finished.edit("params.yaml", "  eval_steps: 8", "  eval_steps: 9\n  log_dir: elsewhere")
    assert will_run() == []
    finished.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    assert will_run() == ["train", "evaluate", "report_eval", "package", "report_package"]


def test_an_edited_template_reruns_only_reports(finished):
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


def test_an_edited_shard_is_found_before_the_first_step(finished):
    shard = finished.run / "data" / "topics" / "tokens-00000.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    said = finished.stage("train", code=65)
    assert f"{shard}: sha256 is" in said
    assert "dvc repro prepare" in said


def edit_what_is_being_run(job):
    """Edit and commit what a person may change for the next run while this one trains."""
    job.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 5e-2")
    job.edit("params.yaml", "max_new_tokens: 4", "max_new_tokens: 9")
    for name in ("zero2_cpu.json", "sampling.json"):
        job.edit(f"configs/{name}", "{", '{ "unknown": 1, ')
    (job.root / "configs" / "prompts.jsonl").write_text('"Another question?"\n')


def check_it_is_the_same_run(job, finished):
    """Every byte that is recorded or published is that of the values of the start: the same run without the edits."""
    assert job.weights() == finished.weights()
    packages = [load_manifest(one.run / "package", remedy="-") for one in (job, finished)]
    assert packages[0] == packages[1]
    run = json.loads((job.run / "package" / "run.json").read_text())
    assert run["params"]["learning_rate"] == 2e-3
    assert "learning_rate: 2e-3" in (job.run / "package" / "run.yaml").read_text().partition("\ntiny:")[2]


def check_its_records_are_known(job):
    """The registry alone answers for every record: the index has the roles that the ledger counts."""
    raw = {name: list(iterate_records(job.run / "raw" / name)) for name in ("docstrings", "topics")}
    digests = {record_digest(record).hex(): name for name, records in raw.items() for record in records}
    (job.root / "records.txt").write_text("\n".join(digests))
    version = json.loads(job.do("ropeway", "contains", "records.txt", "--json"))["versions"][0]
    assert version["indexed"] == len(digests)
    assert version["absent"] == 0
    assert min(version["trained"], version["validation"], *version["dropped"].values()) > 0
    (job.root / "records.txt").unlink()


def test_a_killed_training_resumes_to_the_same_bytes_despite_edits(finished, untrained):
    job, before = untrained, untrained.revision()
    process = job.start("ropeway", "run", "--no-prefect")
    seen = read_until(process, "step 5/")  # step 4 is saved; what is printed lags a little behind what is trained
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert any("ropeway.stages.train.rank" in " ".join(command_of(one)) for one in tree), "".join(seen)
    kill_all(tree)
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(tree, timeout=120)
    assert alive == []

    process = job.start("ropeway", "run", "--no-prefect")
    said = read_until(process, "resuming after step")
    assert int(re.search(rf"resuming after step (\d+) of {STEPS}", said[-1])[1]) in range(4, STEPS, 4)
    edit_what_is_being_run(job)
    job.commit("edited during the run")
    said += process.stdout.read()
    process.stdout.close()
    assert process.wait() == 0, "".join(said)
    # The signed package holds the same bytes: a run that was resumed, or edited during the run, is the same version.
    check_it_is_the_same_run(job, finished)
    assert "tiny@v1" in "".join(said)
    words = " ".join("".join(said).split())  # a long line is wrapped
    assert "params.yaml was edited during the run (learning_rate, evaluation)" in words
    version = json.loads(job.do("ropeway", "registry", "show", "tiny@v1", "--json"))
    assert version["provenance"]["git"] == before
    check_its_records_are_known(job)
    assert not version["provenance"]["dirty"]


@pytest.mark.slow
def test_an_edit_committed_during_dvc_repro_reaches_only_the_next_run(finished, untrained):
    from ropeway.orchestration import dvc_graph as graph

    job = untrained
    process = job.start("dvc", "repro")
    said = read_until(process, "step 3/")
    edit_what_is_being_run(job)
    job.edit("params.yaml", "profile: tiny", "profile: laptop")  # DVC reads it once; a flow asks DVC for every stage
    job.commit("edited during the run")
    said += process.stdout.read()
    process.stdout.close()
    assert process.wait() == 0, "".join(said)
    check_it_is_the_same_run(job, finished)
    lock = (job.root / "dvc.lock").read_bytes()
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


@pytest.mark.slow
def test_code_edited_during_training_records_nothing_and_resumes_once_reverted(finished, untrained):
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
    assert "stage train: ropeway.stages.train.loss changed after this run froze its inputs" in said
    assert "train:" not in (job.root / "dvc.lock").read_text().replace("train.json", "")
    assert lock != b""
    assert not (job.root / ".dvc" / "cache" / "runs").exists()
    job.edit("src/ropeway/stages/train/loss.py", "EPSILON = 1e-7", "EPSILON = 1e-8")
    assert f"resuming after step {STEPS} of {STEPS}" in job.do("dvc", "repro", "train")
    assert job.weights() == finished.weights()


def test_a_terminated_run_saves_reports_it_and_leaves_no_process(finished, untrained):
    job = untrained
    process = job.start("dvc", "repro")
    for line in process.stdout:
        if "step 5/" in line:
            break
    tree = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)  # dvc alone: nothing tells the ranks but its absence
    rest = process.stdout.read()
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(tree, timeout=120)
    assert alive == []
    record = json.loads((job.root / ".work" / "train.exit.json").read_text())
    assert record["code"] == 75, rest
    saved = sorted(path.name for path in next((job.root / ".checkpoints").iterdir()).glob("step-*"))
    assert saved[-1] >= "step-000006"
    assert f"step {STEPS}/{STEPS}" in job.stage("train")
    assert job.weights() == finished.weights()


def test_without_a_compiler_training_says_what_is_missing(finished):
    finished.environment["CXX"] = "no-such-compiler"
    said = finished.stage("train", code=64)
    assert re.search(r"no C\+\+ compiler: `no-such-compiler`", said)


def test_a_missing_base_folder_is_named_before_anything_runs(finished):
    text = (finished.root / "params.yaml").read_text()
    (finished.root / "params.yaml").write_text(text.replace("profile: tiny", "profile: llama2_13b_orca_8k"))
    said = finished.do("ropeway", "run", "--no-prefect", code=64)
    assert "/mnt/data/llama2/Llama-2-13b-hf/ is not a folder" in said
    assert "base.kind" in said
