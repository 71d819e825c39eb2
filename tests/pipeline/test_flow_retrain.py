"""The flow with the real DVC and the real Prefect around stages that take a moment."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import networkx as nx
import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.orchestration import sequence
from ropeway.orchestration.sequence import STEPS, run_retrain
from ropeway.registry import Registry
from ropeway.runtime.errors import ConfigError, DataError, RegistryError, TemporaryError
from ropeway.runtime.lock import workspace_lock

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)
ROOT = Path(__file__).parents[2]
STAGES = ["fetch", "train", "evaluate", "package"]


def plain(workspace, profile=None):
    return run_retrain(workspace.root, profile, use_prefect=False)


def registry_of(workspace):
    return Registry.open((workspace.root / "registry").as_uri())


def ask(api, path, **query):
    import httpx

    with httpx.Client(trust_env=False) as client:
        return client.post(f"{api}/{path}/filter", json={"limit": 200, **query}).raise_for_status().json()


def test_flow_runs_each_stage_once_and_then_none_and_prefect_shows_both(flow_workspace, on_prefect, capsys):
    record = '{"step": 4, "total_steps": 4}\n'
    flow_workspace.trouble("train", f"Path('.work/train.progress.jsonl').write_text({record!r})")
    first = run_retrain(flow_workspace.root)
    assert flow_workspace.calls() == STAGES
    assert first.stages == {"identity": "Unchanged", **dict.fromkeys(STAGES, "Completed")}
    assert (first.publication.state, first.publication.version) == ("Published", "laptop@v1")
    assert b"laptop@v1" in (flow_workspace.root / "runs" / "laptop" / "history.html").read_bytes()
    words = capsys.readouterr().out
    assert re.search(r"  history\s+/\S*/runs/laptop/history\.html\n", words)
    assert "validation loss  docs  8.000 -> 5.002 nats/token" in words
    assert re.search(r"steps +66, 64 of them applied", words)
    assert re.search(r"details +ropeway registry show laptop@v1\n", words)
    assert re.search(rf"next +ropeway review {first.publication.digest[:12]}\n", words)
    assert first.publication.comparison == "not compared: there is no earlier version of laptop"
    assert "loss 3.0\n  loss 1.0\n" in words  # a progress bar, folded

    second = run_retrain(flow_workspace.root)
    assert flow_workspace.calls() == []
    assert second.stages == dict.fromkeys(["identity", *STAGES], "Unchanged")
    assert (second.publication.state, second.publication.version) == ("Unchanged", "laptop@v1")
    assert second.publication.digest == first.publication.digest

    page = re.search(r"/runs/flow-run/([0-9a-f-]{36})\n", words)[1]
    check_what_prefect_shows(on_prefect, page, flow_workspace.dvc("dag", "--dot"))


def check_what_prefect_shows(api, flow_run_id, dag):
    chosen = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
    (run,) = ask(api, "flow_runs", **chosen)
    assert re.fullmatch(r"laptop-[0-9a-f]{7}-[0-9a-f]{7}", run["name"])
    assert run["state_name"] == "Published"
    assert {"profile:laptop"} < set(run["tags"])
    tasks = {task["name"]: task for task in ask(api, "task_runs", **chosen)}
    assert {name: task["state_name"] for name, task in tasks.items()} == {
        "identity": "Unchanged",
        **dict.fromkeys(STAGES, "Completed"),
        "publish": "Published",
    }
    names = {task["id"]: name for name, task in tasks.items()}
    above = {
        name: sorted(names[found["id"]] for found in task["task_inputs"].get("wait_for", []))
        for name, task in tasks.items()
    }
    assert above == {
        "identity": [],
        "fetch": ["identity"],
        "train": ["fetch"],
        "evaluate": ["train"],
        "package": ["evaluate"],
        "publish": ["package"],
    }
    drawn = {(one, name) for name, ones in above.items() for one in ones if name != "publish"}
    edges = nx.DiGraph(re.findall(r'"(\w+)" -> "(\w+)"', dag))
    assert drawn == set(nx.transitive_reduction(edges).edges)
    log = ask(api, "logs", logs={"task_run_id": {"any_": [tasks["train"]["id"]]}}, sort="TIMESTAMP_ASC")
    lines = [entry["message"] for entry in log]
    assert "learning rate 0.002" in lines
    assert "loss 1.0" in lines
    assert "loss 2.0" not in lines
    artifacts = {found["key"]: found for found in ask(api, "artifacts", **chosen)}
    assert json.loads(artifacts["laptop-plan"]["data"])[2] == {
        "stage": "train",
        "will run": "yes",
        "why": "it has not run before",
    }
    assert "| docs | 8.000 → 5.002 |" in artifacts["laptop-result"]["data"]
    assert "| laptop@v1 |" in artifacts["laptop-history"]["data"]
    assert (artifacts["laptop-train-progress"]["type"], artifacts["laptop-train-progress"]["data"]) == ("progress", 100)
    steps = json.loads(artifacts["laptop-ledger"]["data"])
    assert steps[0] == {"source": "docs", "step": "read", "sign": "=", "count": "8 records", "tokens": ""}
    assert steps[-1] == {"source": "docs", "step": "epoch 0: supervised", "sign": "=", "count": "", "tokens": "30"}
    assert {"source": "docs", "step": "train", "sign": "=", "count": "5 sequences", "tokens": "50"} in steps


def test_flow_runs_only_stages_a_changed_parameter_reaches_and_restores_the_rest(made_workspace, capsys):
    first = registry_of(made_workspace).version("laptop@v1").digest
    made_workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    second = plain(made_workspace)
    assert "train     yes       learning_rate: 0.002 -> 0.003\n" in capsys.readouterr().out
    assert made_workspace.calls() == ["train", "evaluate", "package"]
    assert second.stages["fetch"] == "Unchanged"
    assert (second.publication.state, second.publication.version) == ("Published", "laptop@v2")

    made_workspace.edit("params.yaml", "learning_rate: 3e-3", "learning_rate: 2e-3")
    third = plain(made_workspace)
    assert made_workspace.calls() == []
    assert {name: third.stages[name] for name in ("train", "package")} == {"train": "Restored", "package": "Restored"}
    assert (third.publication.state, third.publication.version) == ("Unchanged", "laptop@v1")
    assert third.publication.digest == first
    assert registry_of(made_workspace).version("laptop@candidate").digest == second.publication.digest


def test_flow_skips_stages_whose_inputs_are_unchanged(made_workspace):
    made_workspace.edit("params.yaml", "log_dir: laptop_log", "log_dir: elsewhere")  # cadence and places: no stage
    assert set(plain(made_workspace).stages.values()) == {"Unchanged"}
    made_workspace.edit("params.yaml", "warmup_steps: 10", "warmup_steps: 11")
    result = plain(made_workspace)
    assert made_workspace.calls() == ["train"]  # and left the same bytes
    assert result.stages == {
        **dict.fromkeys(["identity", *STAGES], "Unchanged"),
        "train": "Completed",
    }
    assert result.publication.state == "Unchanged"


def test_flow_runs_a_stage_added_to_dvc_yaml_with_no_python_touched(made_workspace, on_prefect):
    added = """
  probe:
    cmd: python -c "import shutil; shutil.copy('runs/${profile}/eval.json', 'runs/${profile}/probe.json')"
    deps:
      - runs/${profile}/eval.json
    outs:
      - runs/${profile}/probe.json
"""
    with (made_workspace.root / "dvc.yaml").open("a") as file:
        file.write(added)
    result = run_retrain(made_workspace.root)
    assert result.stages == {**dict.fromkeys(["identity", *STAGES], "Unchanged"), "probe": "Completed"}
    assert (made_workspace.root / "runs/laptop/probe.json").is_file()
    (task,) = ask(on_prefect, "task_runs", task_runs={"name": {"any_": ["probe"]}})
    assert [found["input_type"] for found in task["task_inputs"]["wait_for"]] == ["task_run"]


def test_flow_publishes_when_new_data_arrives_and_not_before(made_workspace):
    assert plain(made_workspace).publication.state == "Unchanged"
    (made_workspace.root / "sources").mkdir()
    (made_workspace.root / "sources" / "new.txt").write_text("a new conversation")
    result = plain(made_workspace)
    assert made_workspace.calls() == ["fetch", "train", "evaluate", "package"]
    assert result.publication.version == "laptop@v2"


@pytest.mark.parametrize(("code", "error", "tries"), [(65, DataError, 1), (75, TemporaryError, 3)])
def test_flow_quotes_a_failed_stage_and_retries_only_temporary_errors(made_workspace, code, error, tries):
    made_workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    made_workspace.trouble("train", f"print('shard 7: sha256 is 9f2c'); sys.exit({code})")
    with pytest.raises(error) as failure:
        plain(made_workspace)
    assert type(failure.value) is error
    assert f"stage train failed with exit code {code}; last lines:\n    shard 7: sha256 is 9f2c\n" in str(failure.value)
    assert made_workspace.calls() == ["train"] * tries
    assert (made_workspace.root / ".work/logs/train.log").read_text().count("shard 7") == tries


def test_flow_on_prefect_retries_a_temporary_failure_and_shows_a_lasting_one(made_workspace, on_prefect):
    made_workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    made_workspace.trouble("train", "Path('break-train').unlink(); sys.exit(75)")
    made_workspace.trouble("evaluate", "print('no room on the disk'); sys.exit(65)")
    with pytest.raises(DataError, match="no room on the disk"):
        run_retrain(made_workspace.root)
    assert made_workspace.calls() == ["train", "train", "evaluate"]
    failed = ask(on_prefect, "task_runs", task_runs={"state": {"type": {"any_": ["FAILED"]}}})
    assert [task["name"] for task in failed] == ["evaluate"]


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("signing key", ConfigError, "ROPEWAY_SIGNING_KEY: .* cannot be read"),
        ("another format", RegistryError, "registry.json contains .*, expected format"),
        ("a name in another case", RegistryError, "Laptop exists and differs only in case"),
    ],
)
def test_flow_checks_the_registry_before_the_first_stage(made_workspace, monkeypatch, fault, error, said):
    made_workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    if fault == "signing key":
        monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(made_workspace.root / "nowhere.pem"))
    elif fault == "another format":
        (made_workspace.root / "registry" / "registry.json").write_text('{"format":"ropeway-registry/9"}')
    else:
        models = made_workspace.root / "registry" / "models"
        (models / "laptop").rename(models / "Laptop")
    with pytest.raises(error, match=said):
        plain(made_workspace)
    assert made_workspace.calls() == []


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (
            "params.yaml",
            "profile: laptop",
            "profile: smollm2",
            "profile, laptop -> smollm2: was edited during this run",
        ),
        (
            "dvc.yaml",
            "python fake_stage.py evaluate",
            "python  fake_stage.py evaluate",
            "dvc.yaml: was edited during this run",
        ),
    ],
)
def test_flow_runs_no_stage_of_another_graph_or_profile_than_it_planned(made_workspace, name, old, new, said):
    made_workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    program = f"p = Path({name!r}); p.write_text(p.read_text().replace({old!r}, {new!r}))"
    made_workspace.trouble("train", program)
    with pytest.raises(ConfigError, match=said):
        plain(made_workspace)
    assert made_workspace.calls() == ["train"]
    assert not (made_workspace.root / "runs" / "smollm2").exists()
    made_workspace.edit(name, new, old)
    again = plain(made_workspace)
    assert made_workspace.calls() == ["evaluate", "package"]  # train is recorded with what it used
    assert (again.publication.state, again.publication.version) == ("Published", "laptop@v2")


def test_flow_reads_a_failure_of_a_stage_without_a_record_from_dvc(made_workspace):
    made_workspace.edit("dvc.yaml", "cmd: python fake_stage.py evaluate", "cmd: python  fake_stage.py evaluate")
    made_workspace.trouble("evaluate", "sys.exit(65)")  # this fake stage has no supervisor of its own
    with pytest.raises(DataError, match="stage evaluate failed with exit code 65"):
        plain(made_workspace)


def test_the_flow_calls_the_steps_of_the_sequence_in_their_order():
    tree = ast.parse((ROOT / "flows" / "retrain.py").read_text(encoding="utf-8"))
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    steps = [node for node in called if ast.unparse(node.func.value) == "run"]
    assert [node.func.attr for node in sorted(steps, key=lambda node: node.lineno)] == list(STEPS)


def test_a_task_that_a_user_adds_to_the_flow_appears_in_the_run(made_workspace, on_prefect, capsys):
    made_workspace.edit("flows/retrain.py", "from prefect import flow\n", "from prefect import flow, task\n")
    made_workspace.edit(
        "flows/retrain.py",
        "\n\n@flow(",
        "\n\n@task(name='tell', task_run_name='tell the team')\ndef tell(name):\n    return name\n\n\n@flow(",
    )
    made_workspace.edit(
        "flows/retrain.py", "        run.publish()\n", "        tell(run.name)\n        run.publish()\n"
    )
    run_retrain(made_workspace.root)
    page = re.search(r"/runs/flow-run/([0-9a-f-]{36})\n", capsys.readouterr().out)[1]
    names = {one["name"] for one in ask(on_prefect, "task_runs", flow_runs={"id": {"any_": [page]}})}
    assert names >= {"tell the team", "publish", *STAGES}


@pytest.mark.usefixtures("on_prefect")
def test_a_workspace_without_a_flow_that_loads_is_refused_by_name(made_workspace):
    path = made_workspace.root / "flows" / "retrain.py"
    path.write_text("retrain = ")
    with pytest.raises(ConfigError, match=r"flows/retrain\.py"):
        run_retrain(made_workspace.root)
    path.unlink()
    with pytest.raises(ConfigError, match=r"flows/retrain\.py"):
        run_retrain(made_workspace.root)
    assert run_retrain(made_workspace.root, use_prefect=False).publication.version == "laptop@v1"


def test_flow_refuses_a_locked_workspace(flow_workspace):
    said = rf"held by pid {os.getpid()}, `ropeway run` of profile laptop, since"
    with (
        workspace_lock(flow_workspace.root, command="ropeway run", profile="laptop"),
        pytest.raises(TemporaryError, match=said),
    ):
        plain(flow_workspace)
    assert flow_workspace.calls() == []


def test_flow_fails_in_the_first_second_on_a_wrong_params_file(flow_workspace):
    flow_workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 2e-3x")
    with pytest.raises(ConfigError, match="learning_rate: expected a number"):
        run_retrain(flow_workspace.root)
    assert not (flow_workspace.root / ".prefect").exists()


def test_flow_publishes_what_the_gate_rejects_and_leaves_candidate_where_it_is(made_workspace):
    first = registry_of(made_workspace).version("laptop@candidate").digest
    made_workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 0.5")
    second = plain(made_workspace)
    assert (second.publication.state, second.publication.version) == ("Rejected", "laptop@v2")
    registry = registry_of(made_workspace)
    assert registry.version("laptop@candidate").digest == first
    kept = registry.version("laptop@v2").describe()["provenance"]
    assert kept["verdict"]["passed"] is False
    assert kept["verdict"]["lines"][1] == "docs: 5.500, laptop@v1 5.002: +0.498 nats/token, allowed +0.010"
    again = plain(made_workspace)
    assert again.publication.state == "Unchanged"
    assert "the gate did not pass then" in again.publication.words


def test_flow_changes_one_line_for_another_profile_and_the_tree_counts_as_clean(flow_workspace):
    before = (flow_workspace.root / "params.yaml").read_text().splitlines()
    result = plain(flow_workspace, "smollm2")
    after = (flow_workspace.root / "params.yaml").read_text().splitlines()
    assert [(old, new) for old, new in zip(before, after, strict=True) if old != new] == [
        ("profile: laptop", "profile: smollm2")
    ]
    assert result.publication.version == "smollm2@v1"
    kept = registry_of(flow_workspace).version("smollm2@v1").describe()
    assert kept["provenance"]["git"] == flow_workspace.git("rev-parse", "HEAD").strip()
    assert kept["provenance"]["dirty"] is False
    assert "dvc.lock" in kept["attachments"]


def test_the_result_of_a_run_is_one_json_object_on_stdout(made_workspace, monkeypatch):
    monkeypatch.chdir(made_workspace.root)
    done = CliRunner().invoke(app, ["run", "--no-prefect", "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["state"], result["version"]) == ("Unchanged", "laptop@v1")
    assert set(result["stages"].values()) == {"Unchanged"}
    assert "publish: Unchanged" in done.stderr


def test_a_rehearsal_that_fails_ends_the_run_before_a_stage_starts_and_none_runs_if_nothing_changed(
    made_workspace, monkeypatch
):
    asked, package = [], made_workspace.root / "runs" / "laptop" / "package"
    shutil.rmtree(package)  # DVC's cache has it

    def fail(_site, name, command, _write_line):
        asked.append((name, command[-3:]))
        return 65, ["stage fetch would fail"]

    monkeypatch.setattr(sequence, "run_command", fail)
    with pytest.raises(DataError, match="stage fetch would fail"):
        run_retrain(made_workspace.root, use_prefect=False, rehearse=True)
    assert asked == [("rehearse", ["rehearse", "--profile", "laptop"])]
    assert not package.exists()
    monkeypatch.setattr(sequence, "run_command", lambda *_: (0, []))
    done = run_retrain(made_workspace.root, use_prefect=False, rehearse=True)
    assert done.stages["package"] == "Restored"
    monkeypatch.setattr(sequence, "run_command", fail)
    run_retrain(made_workspace.root, use_prefect=False, rehearse=True)
    assert len(asked) == 1
