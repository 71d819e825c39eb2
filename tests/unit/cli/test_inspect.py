import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ropeway.cli.inspect_output import draw_inspection
from ropeway.cli.main import app
from ropeway.data.batches import collate, plan_epoch
from ropeway.data.shards import open_shards
from ropeway.models.conversation import Conversation
from ropeway.reporting.inspection import inspect_sequence, open_prepared
from ropeway.runtime.errors import ConfigError, DataError
from tests.support.prepared_run import TALKS, make_prepared, reckon_supervised

TALK = Conversation(("Say \x1b[31m😀\u202e", "Yes\nno"), "Be kind.")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    counted = {"ignored_keys": {"meta": 21, "[red]tag": 3}}
    return make_prepared(tmp_path_factory.mktemp("inspect"), talks=[TALK, *TALKS], layout="packed", counted=counted)


@pytest.fixture
def ask(made, monkeypatch):
    """Run `ropeway inspect …` in the workspace, without colours; return what it prints."""
    monkeypatch.chdir(made[0].root)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        result = CliRunner().invoke(app, ["inspect", *map(str, words)])
        if result.exception:
            raise result.exception
        return result.stdout

    return run


def test_without_a_source_it_lists_what_there_is(ask):
    words = ask()
    assert re.search(r"talk +conversation +21 ", words)
    assert re.search(r"text +document +16 ", words)
    assert [one["sequences"] for one in json.loads(ask("--json"))] == [21, 16]
    assert "talk: ignored keys: [red]tag in 3 records, meta in 21 records\n" in words
    assert "text: ignored" not in words
    assert [one["ignored_keys"] for one in json.loads(ask("--json"))] == [{"meta": 21, "[red]tag": 3}, {}]


def test_marks_stand_where_colours_do_not_and_enclose_what_is_supervised(ask):
    words = ask("talk", 0)
    assert "talk, sequence 0 of 21 (conversation, " in words
    body = words.partition("special tokens\n\n")[2]
    supervised = re.findall("⟦([^⟧]*)⟧", body)
    assert "│" in supervised[-1]
    assert supervised[-1].replace("│", "") == "·Yes⏎\nno</s>"
    assert supervised[0].startswith("<|system|>")
    assert body.startswith("<s>⟦")


def test_nothing_of_a_record_commands_the_terminal(ask):
    words = ask("talk", 0)
    assert "\x1b" not in words
    assert "\u202e" not in words
    assert "<U+001B>" in words
    assert "<F0>│<9F>│<98>│<80>=😀" in words


def test_json_says_of_each_token_what_a_reckoning_from_roles_says(ask):
    for source, number in (("talk", 0), ("talk", 7), ("text", 2)):
        (piece,) = json.loads(ask(source, number, "--json"))["pieces"]
        ids = [token["id"] for token in piece["tokens"]]
        expected = reckon_supervised(ids, document=source == "text")
        assert [token["supervised"] for token in piece["tokens"]] == expected
        assert piece["supervised"] == sum(expected)
        assert all(token["special"] == (token["id"] in {1, 2, *range(2000, 2005)}) for token in piece["tokens"])


def test_a_row_holds_what_training_reads_there(ask, made):
    workspace, profile = made
    shards = open_shards(workspace.data)
    plan = plan_epoch(shards, profile, epoch=0)
    index = max(range(plan.rows), key=lambda at: len(plan.row(at)))
    found = json.loads(ask("--row", index, "--json"))
    batch = collate([plan.row(index)], shards, profile)
    ids = [token["id"] for piece in found["pieces"] for token in piece["tokens"]]
    assert ids == batch.input_ids[0, : len(ids)].tolist()
    assert sum(piece["supervised"] for piece in found["pieces"]) == batch.loss_mask.sum()
    words = ask("--row", index)
    assert f"row {index} of epoch 0, step {index // 4 + 1} of {plan.steps}" in words
    assert words.count("\n── ") == len(found["pieces"]) > 1


def test_an_end_that_is_taught_but_not_stored_is_named_and_so_is_a_row_that_is_left_over(tmp_path, monkeypatch, ask):
    make_prepared(tmp_path, document_end="eos")  # 22 rows = 5 steps x 4 + 2
    monkeypatch.chdir(tmp_path)
    assert "row 19 of epoch 0, step 5 of 5" in ask("--row", 19)
    assert "row 20 of epoch 0, left over, not trained" in ask("--row", 20)
    assert ask("text", 0).rstrip().endswith("⟧ + </s> (supervised)")


def test_colours_say_the_same_as_marks(made):
    prepared = open_prepared(*made)
    lines = draw_inspection(inspect_sequence(prepared, "talk", 0), prepared, is_colourful=True)
    line = next(line for line in lines if "│" in line.plain and "between" not in line.plain)
    filled = [line.plain[span.start : span.end] for span in line.spans if "on green" in str(span.style)]
    assert "⟦" not in line.plain
    assert "".join(filled).endswith("·Yes⏎\nno</s>")
    assert not any("Say" in part for part in filled)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nope"], "source 'nope' .*: talk, text"),
        (["talk", 21], "source talk has no sequence 21; .*0 to 20"),
        (["--row", 9999], "epoch 0 has no row 9,999; .*0 to "),
        (["--row", -1], "epoch 0 has no row -1"),
        (["--row", 0, "--epoch", 1], "epoch 1 .*0 to 0 .*num_train_epochs: 1"),
        (["talk", "--row", 0], "SOURCE and --row"),
        (["talk", "--epoch", 0], "--epoch needs --row"),
    ],
)
def test_what_does_not_exist_is_refused(ask, words, says):
    with pytest.raises(ConfigError, match=says):
        ask(*words)


def test_data_that_is_not_there_yet_says_what_makes_it(ask, made, tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_bytes((made[0].root / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"profile 'tiny' has no prepared data; .*`ropeway run`"):
        ask("talk")


def test_another_tokenizer_than_the_datas_is_found(tmp_path, monkeypatch, ask):
    workspace, _ = make_prepared(tmp_path)
    path = workspace.base / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="the data was prepared with"):
        ask("talk")


def test_looking_does_not_load_torch(made):
    code = "import sys; from ropeway.cli.main import app; app(['inspect', 'talk'], standalone_mode=False); "
    code += "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=made[0].root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
