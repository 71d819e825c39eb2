"""Tasks through the real lm-evaluation-harness (`make test-lm-eval`), offline: local tasks and a tiny model."""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch

from ropeway.config.load_params import load_profile
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.orchestration.gate import gate, sections_to_measure
from ropeway.orchestration.stage_process import write_identity
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.stages.evaluate import stage as evaluate
from ropeway.stages.evaluate import tasks as harness
from ropeway.stages.evaluate.champion import measure_champion
from ropeway.stages.evaluate.load_model import open_model
from ropeway.stages.evaluate.samples import encode_prompt
from tests.support.gate_limits import make_limits
from tests.support.tiny_run import BLOCK, ROOT, make_run

pytestmark = [
    pytest.mark.harness,
    pytest.mark.filterwarnings("default"),  # those of the harness's 40 dependencies
]

BOS = 1
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: configs/tasks/few.jsonl}}
output_type: {kind}
test_split: test
{rest}
metadata: {{version: 2.0}}
"""
CHOICE = 'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"'
SAY = 'doc_to_text: "{{question}}"\ndoc_to_target: "It is {{choices[answer]}}"'
GREEDY = "{max_gen_toks: 6, do_sample: false, until: [x]}"
KINDS = {
    "few_choice": ("multiple_choice", CHOICE),
    "few_shots": ("multiple_choice", f"{CHOICE}\nfewshot_split: test\nnum_fewshot: 1"),
    "few_likely": ("loglikelihood", f"{SAY}\nmetric_list: [{{metric: acc}}]"),
    "few_say": (
        "generate_until",
        f"{SAY}\ngeneration_kwargs: {GREEDY}\nmetric_list: [{{metric: exact_match}}]",
    ),
    "few_roll": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{question}}"\nmetric_list: [{metric: word_perplexity}]',
    ),
}
GROUP = "group: few\ntask: [few_choice, few_say]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
LINES = [
    {"question": "Which is a list?", "choices": ["[1]", "(1,)", "{1}"], "answer": 0},
    {"question": "Which is a tuple in Python code?", "choices": ["[1]", "(1,)", "{1}"], "answer": 1},
    {"question": "Which of all of these is a set?", "choices": ["[1]", "(1,)", "{1}"], "answer": 2},
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def write_tasks(folder):
    folder.mkdir(parents=True)
    for name, (kind, rest) in KINDS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, rest=rest))
    (folder / "few.yaml").write_text(GROUP)
    (folder / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))


def make_workspace(root, tasks):
    workspace, profile = make_run(root, block=BLOCK.replace("tasks: []", f"tasks: [{', '.join(tasks)}]"))
    write_tasks(workspace.tasks)
    for path in (ROOT / "configs" / "tasks").iterdir():
        shutil.copyfile(path, workspace.tasks / path.name)
    return workspace, profile


@pytest.fixture(scope="module")
def opened_run(tmp_path_factory):
    workspace, _ = make_workspace(tmp_path_factory.mktemp("run"), ())
    return workspace, open_model(workspace.model, like=workspace.model)


def run_tasks(opened_run, *names, model=None, max_length=96):
    workspace, (opened, tokenizer) = opened_run
    tasks = harness.open_tasks(names, workspace.root, workspace.tasks)
    return harness.run_tasks(model or opened, tokenizer, tasks, batch_size=2, max_length=max_length, seed=7)


def seen_by(model, run):
    """Return the rows of every forward pass over a prompt."""
    rows = []

    def note(_, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        rows.extend(ids.tolist() if ids.shape[1] > 1 else [])  # one token: a step of generation

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return rows


@pytest.mark.parametrize("name", KINDS)
def test_every_input_of_the_model_starts_with_exactly_one_bos(opened_run, name):
    rows = seen_by(opened_run[1][0], lambda: run_tasks(opened_run, name))
    assert rows
    for row in rows:
        said = row[row.index(BOS) :]
        assert row.count(BOS) == 1
        assert said[1] != 2
        assert set(row[: -len(said)]) <= {2}  # padding on the left


def test_a_prompt_is_that_of_the_sample_answers(opened_run):
    _, (model, tokenizer) = opened_run
    rows = [row[row.index(BOS) :] for row in seen_by(model, lambda: run_tasks(opened_run, "few_say"))]
    assert sorted(rows) == sorted(encode_prompt(tokenizer, OPEN_ASSISTANT, line["question"]) for line in LINES)


def test_accuracy_is_that_of_the_answers_with_the_highest_probability(opened_run):
    _, (model, tokenizer) = opened_run
    right = 0
    for line in LINES:
        prompt = encode_prompt(tokenizer, OPEN_ASSISTANT, line["question"])
        told = []
        for choice in line["choices"]:
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            told.append(float(logits[torch.arange(len(answer)), answer].sum()))
        right += int(np.argmax(told)) == line["answer"]
    score = run_tasks(opened_run, "few_choice")["few_choice"]
    assert score.metrics["acc"] == pytest.approx(right / 3, abs=1e-6)
    assert (score.version, score.shots, score.n) == ("2.0", 0, 3)
    assert run_tasks(opened_run, "few_shots")["few_shots"].shots == 1


def test_a_group_and_its_tasks_have_separate_scores(opened_run):
    scores = run_tasks(opened_run, "few")
    assert set(scores) == {"few", "few_choice", "few_say"}
    assert scores["few"].metrics["acc"] == scores["few_choice"].metrics["acc"]
    assert scores["few_say"].n == 3


def test_metrics_that_should_fall_are_named(opened_run):
    assert run_tasks(opened_run, "few_roll")["few_roll"].lower_is_better == ("word_perplexity",)
    assert {name: one.lower_is_better for name, one in run_tasks(opened_run, "few").items()} == {
        "few": (),
        "few_choice": (),
        "few_say": (),
    }


def test_the_gate_compares_the_harness_s_scores_with_their_errors(tmp_path):
    workspace, profile = make_workspace(tmp_path, ("python_basics", "few_roll"))
    evaluate.run(workspace, profile)
    report = json.loads(workspace.evaluation.read_bytes())
    measure_champion(workspace, profile, workspace.model, tmp_path / "champion.json", ["tasks"])
    champion = {**report, **json.loads((tmp_path / "champion.json").read_bytes())}
    assert champion["tasks"].keys() == report["tasks"].keys()
    limits = make_limits(min_gain_over_base_nats=-9.0, max_task_decrease_errors=2.0)
    assert sections_to_measure(report, champion, limits) == {}
    verdict = gate(report, champion, limits, max_length=96)
    assert verdict.passed, verdict
    assert [line.split(":")[0] for line in verdict.lines if "standard error" in line] == [
        "few_roll, word_perplexity",
        "python_basics, acc",
        "python_basics, acc_norm",
    ]
    worse = report["tasks"]["few_roll"]["tuned"]
    worse["word_perplexity"] += 0.001
    (failed,) = gate(report, champion, limits, max_length=96).failed
    assert failed.startswith("few_roll, word_perplexity: ")


def test_the_report_of_one_process_and_of_two_is_the_same(tmp_path, monkeypatch):
    workspace, profile = make_workspace(tmp_path, ("python_basics", "few_say"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))  # for both processes
    seen = []
    for processes in ("1", "2"):
        monkeypatch.setenv("ROPEWAY_EVALUATE_WORKERS", processes)
        evaluate.run(workspace, profile)
        seen.append(workspace.evaluation.read_bytes())
    assert seen[0] == seen[1]
    report = json.loads(seen[0])
    assert report["harness"] == f"lm_eval {harness.harness_version(())}"
    assert set(report["tasks"]) == {"python_basics", "few_say"}
    basics = report["tasks"]["python_basics"]
    assert {key: basics[key] for key in ("version", "shots", "n")} == {"version": "1.0", "shots": 0, "n": 24}
    for model in ("base", "tuned"):
        assert set(basics[model]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
        p = basics[model]["acc"]
        assert p * 24 == pytest.approx(round(p * 24), abs=1e-4)
        assert basics[model]["acc_stderr"] == pytest.approx((p * (1 - p) / 23) ** 0.5, abs=1e-5)


def test_shipped_tasks_have_one_correct_answer_each_and_no_trivial_pattern():
    text = (ROOT / "configs" / "tasks" / "python_basics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == len({line["question"] for line in lines}) == 24
    for line in lines:
        assert len(set(line["choices"])) == 4
        assert 0 <= line["answer"] < 4
    assert max(np.bincount([line["answer"] for line in lines])) <= len(lines) / 3


def test_a_changed_question_is_read_again_and_changes_the_digest_for_dvc(tmp_path):
    workspace, _ = make_workspace(tmp_path, ("few_choice",))
    (tmp_path / "configs" / "zero2_cpu.json").write_text("{}")
    _, profile = load_profile(tmp_path / "params.yaml")
    (tmp_path / profile.deepspeed_config).write_text("{}")
    model = open_model(workspace.model, like=workspace.model)
    seen = []
    for count in (3, 2):
        (workspace.tasks / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:count]))
        write_identity(tmp_path)
        seen.append(json.loads((workspace.identity / "tasks.json").read_bytes()))
        assert run_tasks((workspace, model), "few_choice")["few_choice"].n == count
    assert seen[0]["digest"] != seen[1]["digest"]
    assert seen[0]["of"]["lm_eval"] == harness.harness_version(())


def test_an_unknown_task_is_named_before_a_model_is_opened(tmp_path, monkeypatch):
    workspace, profile = make_workspace(tmp_path, ("few_choise",))
    monkeypatch.setattr(
        "ropeway.stages.evaluate.measuring.open_model", lambda *_, **__: pytest.fail("a model was opened")
    )
    with pytest.raises(ConfigError, match=r"few_choise does not exist in .*configs/tasks.*did you mean few_choice"):
        evaluate.run(workspace, profile)


def test_a_missing_data_file_is_named(opened_run, tmp_path):
    workspace, _ = opened_run
    shutil.copytree(workspace.tasks, tmp_path / "configs" / "tasks")
    (tmp_path / "configs" / "tasks" / "few.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"the data of task few_say cannot be loaded.*few.jsonl"):
        harness.open_tasks(["few_say"], tmp_path, tmp_path / "configs" / "tasks")


def test_a_score_that_is_not_finite_is_an_error(opened_run):
    _, (model, _) = opened_run
    broken = type(model)(model.config).eval()
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(DataError, match="task few_roll: word_perplexity is nan"):
        run_tasks(opened_run, "few_roll", model=broken)


def test_offline_a_dataset_of_the_hub_is_refused_immediately(tmp_path):
    code = (
        "from pathlib import Path; from ropeway.stages.evaluate.tasks import open_tasks; "
        "open_tasks(['arc_easy'], Path(), Path('none'))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert "ConfigError: params.yaml: evaluation.tasks: the data of task arc_easy cannot be loaded" in child.stderr
    assert "HF_HUB_OFFLINE is set" in child.stderr


def test_earlier_inputs_do_not_change_the_frequencies_of_a_trun_tasks(opened_run):
    model = deepcopy(opened_run[1][0])
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    fresh, seen = model.model.rotary_emb.inv_freq.clone(), []
    with torch.inference_mode():
        model(torch.arange(3, 400)[None], use_cache=False)
    assert not torch.equal(model.model.rotary_emb.inv_freq, fresh)
    model.register_forward_pre_hook(lambda *_: seen.append(model.model.rotary_emb.inv_freq.clone()))
    run_tasks(opened_run, "few_choice", model=model)
    assert torch.equal(seen[0], fresh)
