"""What a real run would fail with is found, with its stage and class, before a stage that takes long."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ropeway.config.load_params import load_profile
from ropeway.planning import plan as planning
from ropeway.rehearse import preflight
from ropeway.rehearse.preflight import list_checks, plan_ranks
from ropeway.runtime.devices import Gpu
from ropeway.runtime.errors import ConfigError
from tests.support.rehearsing import make_chats, rehearse_forked
from tests.support.tiny_run import ROOT
from tests.support.whole_run import CHATS

TOOLS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number}?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"x": number}}}],
            },
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "One."},
        ]
    }
    for number in range(40)
]


def failure(workspace, tmp_path, **options):
    code, state = rehearse_forked(workspace, tmp_path / "rehearsal", **options)
    assert (state.error or {}).get("code") == code
    return state.stage, code, (state.error or {}).get("kind"), (state.error or {}).get("message", "")


def test_a_missing_column_fails_in_fetch(tmp_path):
    rows = [{"message": row["messages"]} for row in CHATS]
    stage, code, kind, message = failure(make_chats(tmp_path, rows), tmp_path)
    assert (stage, code, kind) == ("fetch", 65, "DataError")
    assert "missing column 'messages'" in message


def test_records_that_the_template_refuses_fail_in_prepare(tmp_path):
    workspace = make_chats(tmp_path, TOOLS, changes={"template": "open_assistant"})
    assert failure(workspace, tmp_path)[:3] == ("prepare", 65, "DataError")


def test_a_base_without_a_chat_template_fails_in_base(tmp_path):
    workspace = make_chats(tmp_path, changes={"template": "base", "what_counts": "answers"})
    assert failure(workspace, tmp_path)[:3] == ("base", 64, "ConfigError")


@pytest.mark.parametrize("key", ["prompts", "sampling"])
def test_a_missing_file_fails_in_identity(tmp_path, key):
    workspace = make_chats(tmp_path)
    (workspace.root / "configs" / f"{key}.{'jsonl' if key == 'prompts' else 'json'}").unlink()
    stage, code, kind, message = failure(workspace, tmp_path)
    assert (stage, code, kind) == ("identity", 64, "ConfigError")
    assert f"evaluation.{key}" in message


def test_a_deepspeed_json_that_deepspeed_refuses_fails_in_train(tmp_path):
    workspace = make_chats(tmp_path)
    path = workspace.root / "configs" / "zero2_cpu.json"
    path.write_text(path.read_text().replace('"stage": 2', '"stage": 7'))
    stage, code, _, _ = failure(workspace, tmp_path)
    assert (stage, code) == ("train", 1)


def test_an_offload_that_deepspeed_refuses_is_found_although_a_cpu_has_none(tmp_path):
    workspace = make_chats(tmp_path)
    path = workspace.root / "configs" / "zero2_cpu.json"
    path.write_text(path.read_text().replace('"stage": 2', '"stage": 2, "offload_optimizer": {"device": "moon"}'))
    stage, code, kind, message = failure(workspace, tmp_path)
    assert (stage, code, kind) == ("train", 64, "ConfigError")
    assert "moon" in message


def test_tasks_without_the_harness_fail_in_evaluate(tmp_path):
    workspace = make_chats(tmp_path)
    text = (workspace.root / "params.yaml").read_text()
    (workspace.root / "params.yaml").write_text(text.replace("tasks: []", "tasks: [no_such_task]"))
    assert failure(workspace, tmp_path)[:3] == ("evaluate", 64, "ConfigError")


def test_a_registry_that_does_not_answer_fails_in_publish(tmp_path, monkeypatch):
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # nothing listens on the port of `discard`
    workspace = make_chats(tmp_path)
    stage, code, kind, _ = failure(workspace, tmp_path, registry="s3://bucket/registry")
    assert (stage, code, kind) == ("publish", 75, "TemporaryError")


def test_a_registry_that_cannot_be_written_fails_in_publish(tmp_path):
    (tmp_path / "file").write_text("")
    workspace = make_chats(tmp_path)
    registry = (tmp_path / "file" / "registry").as_uri()
    assert failure(workspace, tmp_path, registry=registry)[:3] == ("publish", 64, "ConfigError")


def check_plan(name, monkeypatch, *, free, gpus=()):
    """Return the plan's words and warnings for a profile of params.yaml."""
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(planning, "shutil", SimpleNamespace(disk_usage=lambda _: usage))
    for module in (planning, preflight):
        monkeypatch.setattr(module, "detect_gpus", lambda: list(gpus))
    monkeypatch.setattr(preflight, "list_gpus", lambda: list(gpus))
    monkeypatch.setattr(preflight, "count_ranks", lambda: len(gpus) or 2)
    profile = load_profile(ROOT / "params.yaml", name)[1]
    checks = list_checks(ROOT, name, profile, "file:///registry", ranks=None)
    (check,) = (one for one in checks if one.name == "plan")
    assert check.stage == "train"
    return check.run()


def test_a_disk_that_is_too_small_for_the_real_run_is_an_error(monkeypatch):
    with pytest.raises(ConfigError, match="disk"):
        check_plan("laptop", monkeypatch, free=2**20)
    assert check_plan("laptop", monkeypatch, free=2**40)[1] == ()


def test_the_published_run_is_planned_for_its_8_ranks_and_its_disk_is_that_of_another_machine(monkeypatch):
    profile = load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")[1]
    monkeypatch.setattr(preflight, "list_gpus", list)
    assert plan_ranks(profile) == 8
    words, warnings = check_plan("llama2_13b_orca_8k", monkeypatch, free=2**30)
    assert "8 ranks" in words
    assert [line.split(":")[0] for line in warnings] == ["disk"]


def test_memory_that_does_not_fit_the_cards_is_a_warning(monkeypatch):
    gpus = [Gpu("A100", 40 * 2**30)] * 8
    _, warnings = check_plan("llama2_13b_orca_8k", monkeypatch, free=2**50, gpus=gpus)
    assert [line.split(":")[0] for line in warnings] == ["memory"]


def test_nothing_is_written_in_the_real_workspace(tmp_path):
    workspace = make_chats(tmp_path, [{"bad": 1}])
    shutil.rmtree(workspace.root / ".work", ignore_errors=True)
    before = {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")}
    assert failure(workspace, tmp_path)[0] == "fetch"
    assert {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")} == before


def test_what_starts_a_rehearsal_does_not_load_torch():
    code = "import sys, ropeway.cli.rehearse_output, ropeway.rehearse.rehearsal; "
    code += "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
