"""Code that a model folder brings is never run: every call that could run it says so."""

import ast
import json
from pathlib import Path

import pytest

from ropeway.models.open_model import read_config
from ropeway.runtime.errors import ConfigError

SOURCE = Path(__file__).parents[2] / "src" / "ropeway"
OPENERS = ("from_pretrained", "from_config")
NO_CODE = ("GenerationConfig",)  # reads JSON only


def calls_without_refusal(text):
    """Return the lines of calls that open a model, config or tokenizer and may run code of its folder."""
    for call in ast.walk(ast.parse(text)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in OPENERS:
            given = {one.arg: one.value for one in call.keywords}.get("trust_remote_code")
            refuses = isinstance(given, ast.Constant) and given.value is False
            if not refuses and ast.unparse(call.func.value) not in NO_CODE:
                yield call.lineno


def calls_that_may_read_pickles(text):
    """Return the lines of calls that open the weights of a model without asking for safetensors."""
    for call in ast.walk(ast.parse(text)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
            given = {one.arg: one.value for one in call.keywords}.get("use_safetensors")
            asks = isinstance(given, ast.Constant) and given.value is True
            if not asks and ast.unparse(call.func.value) not in (*NO_CODE, "AutoConfig", "AutoTokenizer"):
                yield call.lineno


def test_every_call_that_opens_weights_asks_for_safetensors():
    sources = sorted(SOURCE.rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    assert [f"{path}:{line}" for path, text in texts.items() for line in calls_that_may_read_pickles(text)] == []
    assert list(calls_that_may_read_pickles("AutoModelForCausalLM.from_pretrained(folder)")) == [1]


def test_every_call_that_opens_a_model_refuses_its_code():
    sources = sorted(SOURCE.rglob("*.py"))
    found = [f"{path}:{line}" for path in sources for line in calls_without_refusal(path.read_text(encoding="utf-8"))]
    assert found == []
    assert list(calls_without_refusal("AutoConfig.from_pretrained(folder)")) == [1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose code writes a file, and a person who agrees to everything that transformers asks."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig as Own\n"
    )
    return folder


def write_config(folder, kind):
    config = {"model_type": kind, "hidden_size": 64, "auto_map": {"AutoConfig": "code.Own"}}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_type_that_only_the_folders_code_knows_is_refused(folder):
    write_config(folder, "of_its_own")
    with pytest.raises(ConfigError):
        read_config(folder, {})
    assert not (folder.parent / "ran").exists()


def test_a_type_that_transformers_knows_is_opened_without_the_folders_code(folder, capsys):
    write_config(folder, "llama")
    config = read_config(folder, {})
    assert (config.hidden_size, "auto_map" in config.to_dict()) == (64, False)
    assert "AutoConfig" in capsys.readouterr().out
    assert not (folder.parent / "ran").exists()
