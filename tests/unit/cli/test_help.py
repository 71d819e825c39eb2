"""Every command explains itself: help with defaults for each argument and option, JSON wherever facts are printed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.storage import open_store
from tests.support.registry_world import make_package, put
from tests.support.shipped_params import read_shipped_params

WITHOUT_JSON = {
    "params schema": "prints JSON",
    "stage": "is called by dvc.yaml and prints the stage's lines; `status --json` and `logs --json` have its state",
    "server": "runs until it is stopped; `status --json` has its address",
    "serve": "runs until it is stopped; `status --json` has the deployments and schedules",
}
# Commands that need a model, a run or a terminal: the module whose tests parse their output.
PARSED_ELSEWHERE = {
    "rehearse": "tests/pipeline/test_rehearse.py",
    "run": "tests/pipeline/test_flow_retrain.py",
    "init": "tests/unit/onboarding/test_start.py",
    "plan": "tests/unit/planning/test_plan.py",
    "inspect": "tests/unit/cli/test_inspect.py",
    "chat": "tests/unit/cli/test_chat.py",
    "push-hub": "tests/unit/cli/test_sharing.py",
    "evaluate": "tests/pipeline/test_main_job.py",
    "review": "tests/unit/orchestration/test_review.py",
    "drift": "tests/unit/cli/test_version_commands.py",
    "history": "tests/unit/cli/test_version_commands.py",
    "contains": "tests/unit/cli/test_record_commands.py",
    "forget": "tests/unit/cli/test_record_commands.py",
    "reproduce": "tests/pipeline/test_reproduce.py",
    "doctor": "tests/unit/orchestration/test_doctor.py",
    "clean": "tests/pipeline/test_flow_clean.py",
    "logs": "tests/unit/orchestration/test_logs.py",
    "notify-data": "tests/unit/orchestration/test_source_watch.py",
}
# The others, in this order, over a registry with one version.
EXAMPLES = {
    "status": [],
    "registry list": [],
    "registry show": ["tiny@v1"],
    "registry verify": ["tiny@v1"],
    "registry pull": ["tiny@v1", "--to", "pulled"],
    "registry publish": ["package", "--name", "other"],
    "registry promote": ["tiny@v1", "candidate", "--reason", "first"],
    "registry history": ["tiny@candidate"],
    "registry diff": ["tiny@v1", "other@v1"],
    "registry withdraw": ["other@v1", "--reason", "a copy"],
    "registry gc": [],
    "registry retire": ["other"],
    "registry keygen": ["key"],
    "registry sign": ["tiny@v1"],
    "registry attestations": ["tiny@v1", "--to", "attestations"],
    "params show": [],
    "params explain": ["learning_rate"],
    "params diff": ["laptop", "smollm2"],
}
NEEDS_TWO_VERSIONS = {"registry rollback": "tests/unit/cli/test_registry_commands.py"}


def list_commands(command, path=()):
    for name, child in command.commands.items():
        if hasattr(child, "commands"):
            yield from list_commands(child, (*path, name))
        elif not child.hidden:
            yield " ".join((*path, name)), child


ROOT = Path(__file__).parents[3]
COMMANDS = dict(list_commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_prints_facts_has_json(name):
    options = {word for parameter in COMMANDS[name].params for word in parameter.opts}
    assert ("--json" in options) == (name not in WITHOUT_JSON)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_and_option_is_explained_with_its_default(name):
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, parameter.name
        if parameter.default is None and not parameter.required and parameter.name != "help":
            assert any(word in parameter.help for word in ("Default:", "with --", "With --", "Without")), parameter.name


def test_every_command_with_json_is_parsed_by_a_test():
    elsewhere = PARSED_ELSEWHERE | NEEDS_TWO_VERSIONS
    assert {*EXAMPLES, *elsewhere, *WITHOUT_JSON} == set(COMMANDS)
    for name, module in elsewhere.items():
        text = (ROOT / module).read_text(encoding="utf-8")
        assert '"--json"' in text or "as_json=True" in text, (name, module)


@pytest.fixture
def run_examples(tmp_path, monkeypatch):
    """Return a function that runs every example with more options and returns what each printed to stdout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROPEWAY_REGISTRY", (tmp_path / "registry").as_uri())
    for name in ("ROPEWAY_TRUSTED_KEYS", "ROPEWAY_SIGNING_KEY", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "params.yaml").write_text(read_shipped_params(), encoding="utf-8")
    put(open_store((tmp_path / "registry").as_uri()), make_package(tmp_path / "package"), name="tiny")

    def run(*options):
        printed = {}
        for name, arguments in EXAMPLES.items():
            if name == "registry sign":
                monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
            done = CliRunner().invoke(app, [*name.split(), *arguments, *options])
            assert done.exit_code == 0, (name, done.output)
            printed[name] = done.stdout
        return printed

    return run


def test_stdout_of_a_command_with_json_is_json(run_examples):
    for text in run_examples("--json").values():
        json.loads(text)


@pytest.mark.parametrize("columns", [40, 80])
def test_lines_fit_the_terminal_and_have_no_control_bytes(run_examples, monkeypatch, columns):
    """A line that is longer has a word that does not fit, e.g. a path, or is a command to copy."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "")
    for name, text in run_examples().items():
        assert all(character.isprintable() or character == "\n" for character in text), name
        for line in text.splitlines():
            words = line.split()
            longest = max(map(len, words), default=0)
            assert len(line) <= columns or longest + len(line) - len(line.lstrip()) > columns - 20, (name, line)


FIRST_LINE = """
import builtins, os, sys
from ropeway.cli import main
said = print
def say(*words, **_):
    said(*words, sorted({"dvc", "prefect", "numpy", "ropeway.orchestration.sequence"} & sys.modules.keys()), flush=True)
    os._exit(0)
builtins.print = say
sys.argv = ["ropeway", "run"]
main.main()
"""


def test_run_prints_its_first_line_before_it_imports_what_takes_long():
    done = subprocess.run([sys.executable, "-c", FIRST_LINE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("smollm2: starting.")
    assert done.stdout.endswith(" []\n")
