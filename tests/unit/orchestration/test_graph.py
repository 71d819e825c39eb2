"""What DVC says of a workspace, in its own process and without running a stage."""

import re
import shutil
import subprocess
import sys

import pytest

from ropeway.orchestration import dvc_exchange as exchange
from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration import sequence
from ropeway.orchestration.forecast import forecast_run
from ropeway.orchestration.guarded_dvc import COMMAND as DVC
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)
DVC_YAML = """
stages:
  late:
    cmd: cp early.txt late.txt
    deps:
      - early.txt
      - side.txt
    outs:
      - late.txt
  look:
    cmd: echo world > look.txt
    always_changed: true
    outs:
      - look.txt: {cache: false}
  early:
    cmd: cp look.txt early.txt
    deps:
      - look.txt
    params:
      - ${profile}.rate
      - ${profile}.nested
    outs:
      - early.txt
  side:
    cmd: echo side > side.txt
    outs:
      - side.txt
"""
PARAMS = "profile: tiny\ntiny:\n  rate: 1e-5\n  nested: {scale: 2, names: [a, b]}\n"


@pytest.fixture(scope="module")
def _templates(tmp_path_factory):
    """Two workspaces, made once: nothing has run, everything has."""
    fresh = tmp_path_factory.mktemp("graph") / "fresh"
    (fresh / ".dvc").mkdir(parents=True)
    (fresh / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (fresh / "dvc.yaml").write_text(DVC_YAML)
    (fresh / "params.yaml").write_text(PARAMS)
    ran = shutil.copytree(fresh, fresh.with_name("ran"))
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=ran, check=True)
    return {"fresh": fresh, "ran": ran}


@pytest.fixture
def fresh(_templates, tmp_path):
    return shutil.copytree(_templates["fresh"], tmp_path / "workspace")


@pytest.fixture
def ran(_templates, tmp_path):
    return shutil.copytree(_templates["ran"], tmp_path / "workspace")


def reasons(root):
    return {plan.name: plan.reasons for plan in graph.plan(root) if plan.will_run}


def commit(root):
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", root, *words], check=True)


def edit(root, name, old, new):
    path = root / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_stages_come_after_what_they_read_and_otherwise_as_dvc_yaml_has_them(fresh):
    stages = graph.load_graph(fresh)
    assert [stage.name for stage in stages] == ["look", "early", "side", "late"]
    assert {stage.name: stage.deps for stage in stages} == {
        "look": (),
        "early": ("look",),
        "side": (),
        "late": ("early", "side"),
    }
    assert [stage.name for stage in stages if stage.refreshes] == ["look"]


def test_parents_leave_out_what_another_dependency_depends_on(fresh):
    edit(fresh, "dvc.yaml", "      - side.txt\n    outs", "      - side.txt\n      - look.txt\n    outs")
    late = next(stage for stage in graph.load_graph(fresh) if stage.name == "late")
    assert (late.deps, late.parents) == (("look", "early", "side"), ("early", "side"))


def test_a_missing_output_is_a_reason_only_if_no_input_changed(ran):
    (ran / "early.txt").unlink()
    assert reasons(ran)["early"] == ("its output early.txt is missing",)
    edit(ran, "params.yaml", "rate: 1e-5", "rate: 2e-5")
    assert reasons(ran)["early"] == ("tiny.rate: 1e-05 -> 2e-05",)


def test_dvcs_report_of_a_dead_rwlock_holder_is_not_shown():
    # printed by dvc 3.67.1, rwlock.py
    killed = "WARNING: Process 'dvc repro' with (Pid 7), in RWLock-file '.dvc/tmp/rwlock' had been killed. "
    assert graph.is_hint(killed + "Auto removed it from the lock file.")
    assert not graph.is_hint("WARNING: loss is not finite at step 3")


@pytest.mark.parametrize(
    ("ended", "expected"),
    [("Completed", ["early ran"]), ("Restored", ["early was restored"]), ("Unchanged", [])],
)
def test_a_reason_names_what_the_stage_before_did(ran, ended, expected):
    edit(ran, "params.yaml", "rate: 1e-5", "rate: 2e-5")
    late = next(plan for plan in graph.plan(ran) if plan.name == "late")
    assert sequence._past_reasons(late, {"early": ended}) == expected


def test_a_fresh_clone_without_lock_or_files_runs_everything(fresh):
    assert reasons(fresh) == dict.fromkeys(["early", "side", "late"], ("it has not run before",))


def test_nothing_runs_where_nothing_changed_and_what_always_runs_is_no_change(ran):
    assert reasons(ran) == {}
    assert [(plan.name, plan.reasons) for plan in graph.plan(ran)] == [
        ("look", ("refreshes fingerprints at every start",)),
        *((name, ("nothing changed",)) for name in ("early", "side", "late")),
    ]


def test_a_changed_parameter_is_told_by_its_leaf_old_and_new_and_carried_down(ran):
    edit(ran, "params.yaml", "rate: 1e-5", "rate: 2e-5")
    edit(ran, "params.yaml", "[a, b]", "[a, c]")
    edit(ran, "params.yaml", "scale: 2", "scale: 2.0")  # the same number is no change
    assert reasons(ran) == {
        "early": ("tiny.rate: 1e-05 -> 2e-05", "tiny.nested.names[1]: b -> c"),
        "late": ("early will run",),
    }


def test_changed_and_missing_files_are_named_as_seen_from_the_root_wherever_this_process_is(ran, monkeypatch):
    (ran / "early.txt").write_text("edited by hand")
    (ran / "side.txt").unlink()
    expected = {
        "early": ("its output early.txt changed",),
        "side": ("its output side.txt is missing",),
        "late": ("early.txt changed", "side.txt is missing"),
    }
    for place in (ran.parent, ran, ran / ".dvc"):
        monkeypatch.chdir(place)
        assert reasons(ran) == expected


def test_a_changed_command_and_a_frozen_stage_are_told_apart(ran):
    edit(ran, "dvc.yaml", "echo side >", "echo other side >")
    edit(ran, "dvc.yaml", "cmd: cp early.txt", "frozen: true\n    cmd: cp early.txt")
    assert reasons(ran) == {"side": ("its command changed",)}
    assert {plan.name: plan.reasons for plan in graph.plan(ran)}["late"] == ("frozen in dvc.yaml",)


def test_a_parameter_that_a_stage_newly_reads_is_told(ran):
    edit(ran, "dvc.yaml", "      - ${profile}.nested\n", "      - ${profile}.nested\n      - profile\n")
    assert reasons(ran) == {"early": ("profile: none -> tiny",), "late": ("early will run",)}


def test_a_broken_dvc_yaml_and_a_folder_that_is_no_workspace_are_config_errors(fresh, tmp_path):
    edit(fresh, "dvc.yaml", "stages:", "stages: [")
    with pytest.raises(ConfigError, match=r"DVC cannot read this workspace: .*dvc\.yaml"):
        graph.load_graph(fresh)
    with pytest.raises(ConfigError, match="DVC cannot read this workspace"):
        graph.load_graph(tmp_path)


def test_a_remote_is_seen(fresh):
    assert not graph.has_remote(fresh)
    with (fresh / ".dvc" / "config").open("a") as config:
        config.write("    remote = store\n['remote \"store\"']\n    url = /nowhere\n")
    with pytest.raises(ConfigError, match="dvc remote modify store verify true"):
        graph.has_remote(fresh)
    with (fresh / ".dvc" / "config").open("a") as config:
        config.write("    verify = true\n")
    assert graph.has_remote(fresh)


REMOTES = {
    "http": [("a", {"url": "http://data.example/dvc"})],
    "webdav": [("a", {"url": "webdav://data.example/dvc"})],
    "S3 without TLS": [("a", {"url": "s3://bucket/dvc", "use_ssl": "false"})],
    "an S3 server": [("a", {"url": "s3://bucket/dvc", "endpointurl": "http://data.example:9000"})],
    "below another remote": [("a", {"url": "remote://b/dvc"}), ("b", {"url": "http://data.example"})],
}


@pytest.mark.parametrize("remotes", REMOTES.values(), ids=REMOTES)
def test_a_remote_on_another_machine_without_encryption_is_refused(fresh, remotes, monkeypatch):
    monkeypatch.delenv("ROPEWAY_ALLOW_HTTP", raising=False)
    with (fresh / ".dvc" / "config").open("a") as config:
        config.write("    remote = a\n")
        for name, facts in remotes:
            lines = "".join(f"    {key} = {value}\n" for key, value in (facts | {"verify": "true"}).items())
            config.write(f"['remote \"{name}\"']\n{lines}")
    with pytest.raises(ConfigError, match="ROPEWAY_ALLOW_HTTP=1"):
        graph.has_remote(fresh)
    monkeypatch.setenv("ROPEWAY_ALLOW_HTTP", "1")
    assert graph.has_remote(fresh)


def test_the_s3_server_of_the_environment_counts_where_the_remote_names_none(monkeypatch):
    remotes = {"a": {"url": "s3://bucket/dvc"}}
    monkeypatch.delenv("ROPEWAY_ALLOW_HTTP", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://data.example:9000")
    with pytest.raises(ConfigError, match="ROPEWAY_ALLOW_HTTP=1"):
        graph.check_remote_is_encrypted("a", remotes)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://data.example:9000")
    graph.check_remote_is_encrypted("a", remotes)


def test_the_s3_server_of_the_remotes_own_aws_profile_counts(tmp_path, monkeypatch):
    for name in ("ROPEWAY_ALLOW_HTTP", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "aws").write_text(
        "[default]\n[profile plain]\nendpoint_url = http://data.example:9000\n[profile safe]\nregion = eu-west-1\n"
    )
    own = {"url": "s3://bucket/dvc", "configpath": str(tmp_path / "aws")}
    graph.check_remote_is_encrypted("a", {"a": {**own, "profile": "safe"}})
    graph.check_remote_is_encrypted("a", {"a": own})
    with pytest.raises(ConfigError, match="ROPEWAY_ALLOW_HTTP=1"):
        graph.check_remote_is_encrypted("a", {"a": {**own, "profile": "plain"}})
    with pytest.raises(ConfigError, match="ProfileNotFound"):
        graph.check_remote_is_encrypted("a", {"a": {**own, "profile": "nobody"}})


STAGES_OF_OTHERS = "stages:\n  readme:\n    cmd: id\n    always_changed: true\n"


@pytest.mark.parametrize("folder", ["model", "*", "data/deep"])
def test_commands_that_came_with_a_package_or_with_data_are_refused_until_git_has_them(fresh, folder):
    (fresh / "x").mkdir()
    (fresh / "x" / "dvc.yaml").write_text("stages: {}\n")
    commit(fresh)
    graph.load_graph(fresh)
    (fresh / folder).mkdir(parents=True)
    (fresh / folder / "dvc.yaml").write_text(STAGES_OF_OTHERS)
    with pytest.raises(ConfigError, match=rf"{re.escape(folder)}/dvc\.yaml: has commands"):
        graph.load_graph(fresh)
    commit(fresh)
    assert f"{folder}/dvc.yaml:readme" in {stage.name for stage in graph.load_graph(fresh)}


def test_an_import_that_came_with_data_is_refused_before_its_repository_is_asked(fresh):
    (fresh / "data").mkdir()
    (fresh / "data" / "x.dvc").write_text(
        "frozen: true\ndeps:\n- path: x\n  repo:\n    url: ext::false\n    rev_lock: "
        + "a" * 40
        + "\nouts:\n- path: x\n"
    )
    with pytest.raises(ConfigError, match=r"data/x\.dvc: has commands, imports"):
        graph.load_graph(fresh)


@pytest.mark.parametrize("entry", [
    {"outs": [{"path": "early.txt", "md5": "a" * 32}, {"path": "--cprofile-dump=x", "md5": "a" * 32}]},
    {"outs": [{"path": "src/code.py", "md5": "a" * 32}]},
    {"outs": [{"path": "early.txt", "md5": 7}]},
    {"outs": []}, {"outs": 7}, {}, [], None,
])  # fmt: skip
def test_a_workers_entry_with_other_outputs_than_its_stage_is_refused(fresh, entry):
    exchange.check_entry(fresh, "early", {"outs": [{"path": "early.txt", "md5": "a" * 32}]})
    with pytest.raises(DataError, match="other outputs"):
        exchange.check_entry(fresh, "early", entry)


def test_an_output_beside_its_dvc_file_is_data_and_another_one_is_refused(fresh):
    (fresh / "data").mkdir()
    add = "outs:\n- md5: d41d8cd98f00b204e9800998ecf8427e\n  path: "
    (fresh / "data" / "x.dvc").write_text(f"{add}x\n")
    graph.load_graph(fresh)
    for path in ("../src/sitecustomize.py", "../dvc.py", "deep/x"):
        (fresh / "data" / "x.dvc").write_text(f"{add}{path}\n")
        with pytest.raises(ConfigError, match=r"data/x\.dvc: has .* outputs elsewhere"):
            graph.load_graph(fresh)
    (fresh / "data" / "x.dvc").write_text(f"wdir: ..\n{add}x\n")
    with pytest.raises(ConfigError, match=r"data/x\.dvc: has .* outputs elsewhere"):
        graph.load_graph(fresh)


def test_a_stage_is_rebuilt_past_every_cache_and_pulled_only_where_asked():
    assert graph.reproduce_command("train", force=True, pull=True)[len(DVC) + 2 :] == [
        "--force", "--no-commit", "--single-item", "train",
    ]  # fmt: skip
    assert graph.reproduce_command("train", pull=True)[len(DVC) + 2 :] == ["--pull", "--single-item", "train"]


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("Running stage 'train':", ("ran", None)),
        ("Stage 'train' is cached - skipping run, checking out outputs", ("restored", None)),
        ("Stage 'train' didn't change, skipping", ("unchanged", None)),
        ("ERROR: 'runs/laptop/model' is busy, it is being blocked by:", ("busy", None)),
        ("ERROR: failed to reproduce 'train': failed to run: ropeway stage train, exited with 65", ("failed", 65)),
        ("ERROR: failed to reproduce 'train': failed to run: ropeway stage train, exited with -9", ("failed", -9)),
        ("step 7 loss 3.2", None),
    ],
)
def test_what_dvc_says_of_a_stage_is_understood(line, event):
    assert graph.read_event(line) == event


def nothing(_root):
    pass


def edit_params(root):
    edit(root, "params.yaml", "rate: 1e-5", "rate: 2e-5")


def edit_nested_params(root):
    edit(root, "params.yaml", "names: [a, b]", "names: [a, c]")


def edit_command(root):
    edit(root, "dvc.yaml", "echo side", "echo other")


def add_dependency(root):
    edit(
        root,
        "dvc.yaml",
        "    cmd: cp look.txt early.txt\n    deps:",
        "    cmd: cp look.txt early.txt\n    deps:\n      - more",
    )
    (root / "more").mkdir()
    (root / "more" / "file.txt").write_text("more")


def remove_output(root):
    (root / "side.txt").unlink()


def change_output(root):
    (root / "early.txt").unlink()
    (root / "early.txt").write_text("World\n")  # of equal size


def freeze_stage(root):
    edit(root, "dvc.yaml", "  side:\n", "  side:\n    frozen: true\n")
    remove_output(root)


CHANGES = [nothing, edit_params, edit_nested_params, edit_command, add_dependency, remove_output, change_output]


@pytest.mark.parametrize("change", [*CHANGES, freeze_stage])
def test_the_forecast_without_dvc_is_dvcs_own_plan(ran, change):
    change(ran)
    expected = {plan.name: (plan.will_run, plan.reasons) for plan in graph.plan(ran) if not plan.refreshes}
    found = {stage.name: (stage.will_run, stage.reasons) for stage in forecast_run(ran, "tiny").stages}
    assert found == expected
    assert list(found) == list(expected)


def test_the_forecast_of_a_workspace_where_nothing_ran_is_dvcs_own_plan(fresh):
    expected = {plan.name: (plan.will_run, plan.reasons) for plan in graph.plan(fresh) if not plan.refreshes}
    assert {stage.name: (stage.will_run, stage.reasons) for stage in forecast_run(fresh, "tiny").stages} == expected


def test_the_forecast_of_a_folder_compares_the_files_in_it(ran):
    edit(
        ran,
        "dvc.yaml",
        "cmd: echo side > side.txt\n    outs:\n      - side.txt",
        "cmd: mkdir -p side/b && echo a > side/a && echo b > side/b/c\n    outs:\n      - side",
    )
    edit(ran, "dvc.yaml", "      - early.txt\n      - side.txt", "      - early.txt\n      - side")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=ran, check=True)
    assert [stage.will_run for stage in forecast_run(ran, "tiny").stages] == [False] * 3
    (ran / "side" / "a").chmod(0o644)
    (ran / "side" / "a").write_text("z\n")
    reasons_of = {stage.name: stage.reasons for stage in forecast_run(ran, "tiny").stages}
    assert reasons_of["side"] == ("its output side changed",)


@pytest.mark.parametrize("body", ["wdir: .\n    cmd: echo side", "cmd: echo ${own}"])
def test_what_the_forecast_does_not_evaluate_is_not_known_rather_than_unchanged(ran, body):
    edit(ran, "dvc.yaml", "  side:\n    cmd: echo side", f"  side:\n    {body}")
    found = {stage.name: stage.will_run for stage in forecast_run(ran, "tiny").stages}
    assert found["side"] is None


def test_a_forecast_of_large_files_compares_sizes_and_says_so(ran, monkeypatch):
    monkeypatch.setattr("ropeway.orchestration.forecast._HASHED_BYTES", 0)
    change_output(ran)
    found = forecast_run(ran, "tiny")
    assert not any(stage.will_run for stage in found.stages)
    assert any("compared by size" in note for note in found.notes)


def test_the_forecast_does_not_take_stages_of_foreach_for_new_ones(ran):
    with (ran / "dvc.yaml").open("a") as file:
        file.write("  many:\n    foreach: [a, b]\n    do:\n      cmd: echo ${item}\n")
    found = {stage.name: stage.will_run for stage in forecast_run(ran, "tiny").stages}
    assert found["many"] is None


def test_an_output_made_elsewhere_may_be_absent_here_but_neither_edited_nor_of_another_digest(ran):
    def will_run():
        return {plan.name: plan.reasons for plan in graph.plan(ran, elsewhere={"early"}) if plan.will_run}

    (ran / "early.txt").unlink()
    assert will_run() == {}
    assert "early" in reasons(ran)
    (ran / "late.txt").unlink()  # of a stage that runs here
    assert will_run() == {"late": ("its output late.txt is missing",)}
    entry = dict(exchange.read_lock_entry(ran, "early"))
    entry["outs"] = [{**entry["outs"][0], "md5": "0" * 32}]
    exchange.write_lock_entry(ran, "early", entry)
    assert "early.txt is missing" in will_run()["late"]
    (ran / "early.txt").write_text("edited")
    assert "early" in will_run()


def test_inputs_are_what_other_stages_write_and_a_lone_manifest_stands_for_its_folder(fresh):
    edit(
        fresh,
        "dvc.yaml",
        "  side:",
        """  folder:
    cmd: mkdir made
    deps: [early.txt]
    outs: [made]
  whole:
    cmd: ls made > whole.txt
    deps: [made/manifest.json, params.yaml]
    outs: [whole.txt]
  part:
    cmd: ls made > part.txt
    deps: [made/manifest.json, made/card.json]
    outs: [part.txt]
  side:""",
    )
    assert exchange.inputs(fresh, "whole") == ("made",)
    assert exchange.inputs(fresh, "part") == ("made/manifest.json", "made/card.json")
    assert exchange.inputs(fresh, "late") == ("early.txt", "side.txt")
    assert exchange.inputs(fresh, "folder", of_others=("late", "whole")) == ("early.txt",)  # not what comes after it
    assert exchange.outputs(fresh)["folder"] == ("made",)


def test_a_lock_entry_of_a_worker_is_recorded_as_dvc_records_its_own(ran):
    text = (ran / "dvc.lock").read_text()
    entry = exchange.read_lock_entry(ran, "early")
    assert exchange.read_lock_entry(ran, "nothing") is None
    exchange.write_lock_entry(ran, "early", entry)
    assert graph.parse_lock((ran / "dvc.lock").read_bytes()) == graph.parse_lock(text.encode())
    (ran / "dvc.lock").unlink()
    exchange.write_lock_entry(ran, "early", entry)
    assert exchange.read_lock_entry(ran, "early") == entry


def test_a_document_reaches_another_clone_through_the_remote_and_a_damaged_one_does_not(ran, tmp_path):
    other = shutil.copytree(ran, tmp_path / "other")
    for root in (ran, other):
        graph.configure_remote(root, "add", "--default", "store", str(tmp_path / "remote"))
        graph.configure_remote(root, "modify", "store", "verify", "true")
    digest = exchange.push_document(ran, b"hand-over")
    assert exchange.push_document(ran, b"hand-over") == digest
    assert exchange.pull_document(other, digest) == b"hand-over"
    shutil.rmtree(other / ".dvc" / "cache")
    (place,) = (path for path in (tmp_path / "remote").rglob("*") if path.is_file())
    place.chmod(0o644)
    place.write_bytes(b"hand-0ver")
    with pytest.raises(TemporaryError):
        exchange.pull_document(other, digest)
    with pytest.raises(TemporaryError):
        exchange.pull_document(other, "0" * 32)
