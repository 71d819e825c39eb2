import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ropeway.cli.chat import ChatSession, GenerationSettings, chat, check_folder, fit_messages, locate_model
from ropeway.cli.main import app
from ropeway.config.load_params import load_profile
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.runtime.errors import ConfigError, DataError, RegistryError
from ropeway.runtime.manifest import write_manifest
from ropeway.storage import open_store
from tests.support import tiny_run
from tests.support.registry_world import move, put, tiny

MANNER = GenerationSettings(system="", max_new_tokens=6, temperature=1.0, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("talk")
    text = (tiny_run.ROOT / "params.yaml").read_text()
    (root / "params.yaml").write_text(text + "\n" + tiny_run.BLOCK)
    tiny_run.make_model(root / "model", load_profile(root / "params.yaml", "tiny")[1], seed=3, steps=1)
    path = root / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "model_max_length": 96}))
    write_manifest(root / "model", {"steps": 1})
    return root / "model"


@pytest.fixture
def copied(model, tmp_path):
    """A model to damage: its files, without the manifest."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        if path.name != "manifest.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def through_pipe(folder, text, *, as_json=True, **changes):
    generation = GenerationSettings(**{name: changes.get(name, getattr(MANNER, name)) for name in MANNER.__slots__})
    out = io.StringIO()
    chat(ChatSession(folder, generation), io.StringIO(text), out, as_json=as_json)
    return [json.loads(line) for line in out.getvalue().splitlines()] if as_json else out.getvalue()


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(model):
    first = through_pipe(model, "Hi\n\nAnd then?\n")
    assert [one["prompt"] for one in first] == ["Hi", "And then?"]
    before = torch.random.get_rng_state()
    assert through_pipe(model, "Hi\n\nAnd then?\n") == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert through_pipe(model, "Hi\n\nAnd then?\n", seed=8) != first


def test_each_turn_is_asked_with_all_that_was_said_in_the_models_template(model, monkeypatch):
    talk, prompts = ChatSession(model, GenerationSettings("Be kind.", 6, 0.0, 1.0, 0)), []
    generate = talk._generate
    monkeypatch.setattr(talk, "_generate", lambda ids, write: prompts.append(ids) or generate(ids, write))
    first = talk.ask("Hi", lambda _: None)
    talk.ask("Go on", lambda _: None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    wanted = OPEN_ASSISTANT.render_prompt(["Hi", first.text, "Go on"], end="</s>", system="Be kind.")
    assert prompts[1] == tokenizer(wanted)["input_ids"]
    assert prompts[1].count(tokenizer.bos_token_id) == 1
    talk.begin("")
    talk.ask("Hi", lambda _: None)
    assert prompts[2] == tokenizer(OPEN_ASSISTANT.render_prompt(["Hi"], end="</s>"))["input_ids"]


def test_what_is_streamed_is_the_answer_and_it_comes_in_pieces(model):
    pieces = []
    answer = ChatSession(model, GenerationSettings("", 40, 1.0, 1.0, 0)).ask("What is a list?", pieces.append)
    assert "".join(pieces) == answer.text
    assert len([piece for piece in pieces if piece]) > 1
    assert (answer.tokens, answer.ended) == (40, False)


def test_an_answer_that_was_cut_is_reported_as_such(model, capsys):
    text = through_pipe(model, "Hi\n", as_json=False)
    assert text.endswith("\n")
    assert "(cut at 6 tokens; --max-new-tokens allows more)" in capsys.readouterr().err


class Terminal(io.StringIO):
    """An input that says it is a terminal."""

    def isatty(self):
        return True


def test_an_unknown_command_is_refused_with_the_list_and_not_sent_to_the_model(model, monkeypatch, capsys):
    session, typed = ChatSession(model, MANNER), iter(["/exit", "/systemX", "/new", "/system Be kind.", "/etc/hosts?"])

    def read(_prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    questions = []
    answer = session.ask
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(session, "ask", lambda question, write: questions.append(question) or answer(question, write))
    chat(session, Terminal(), io.StringIO(), as_json=False)
    refused = [line for line in capsys.readouterr().err.splitlines() if line.startswith("/")]
    assert [line.partition(":")[0] for line in refused] == ["/exit", "/systemX"]
    assert all("/new" in line and "/system TEXT" in line for line in refused)
    assert questions == ["/etc/hosts?"]
    assert session.generation.system == "Be kind."


def test_the_end_token_ends_an_answer_and_an_empty_one_is_named(copied, capsys):
    path = copied / "model.safetensors"
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}
    weights["model.embed_tokens.weight"][:] = 1
    weights["model.norm.weight"][:] = 1
    weights["lm_head.weight"][2] = 1
    save_file(weights, path, metadata={"format": "pt"})
    [answer] = through_pipe(copied, "Hi\n", temperature=0.0)
    assert (answer["answer"], answer["tokens"], answer["ended"]) == ("", 1, True)
    assert through_pipe(copied, "Hi\n", temperature=0.0, as_json=False) == "\n"
    assert "(empty answer" in capsys.readouterr().err


def test_what_no_longer_fits_is_forgotten_from_the_oldest_and_said(model, capsys):
    talk = ChatSession(model, GenerationSettings("", 40, 0.0, 1.0, 0))
    assert talk.context_tokens == 96
    chat(talk, io.StringIO("Hi there\nGo on\n"), io.StringIO(), as_json=False)
    assert "(the oldest 2 turns " in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"question has \d+ tokens .* 56 .*--max-new-tokens"):
        talk.ask("a b c " * 40, lambda _: None)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9).filter(lambda sizes: len(sizes) % 2), st.integers(9, 30))
def test_turns_go_in_pairs_and_no_more_than_needed(sizes, limit):
    turns = [{"role": ("user", "assistant")[at % 2], "content": "x" * size} for at, size in enumerate(sizes)]
    kept = fit_messages(turns, count_characters, limit)
    assert turns[len(turns) - len(kept) :] == kept
    assert len(kept) % 2 == 1
    assert count_characters(kept) <= limit
    if len(kept) < len(turns):
        assert count_characters(turns[len(turns) - len(kept) - 2 :]) > limit


def count_characters(messages):
    return sum(len(one["content"]) for one in messages)


def test_a_question_is_dropped_with_the_calls_and_results_that_follow_it():
    roles = ["user", "assistant", "tool", "assistant", "user", "assistant", "tool"]
    messages = [{"role": role, "content": "xx"} for role in roles]
    assert fit_messages(messages, count_characters, 8) == messages[4:]
    with pytest.raises(ConfigError, match="question has 6 tokens"):
        fit_messages(messages, count_characters, 5)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "data/weights.NPZ"])
def test_pickles_are_refused_also_beside_safetensors(copied, name):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="may be a pickle file"):
        locate_model(str(copied), None)


def test_code_that_comes_with_a_model_is_refused(copied):
    config = json.loads((copied / "config.json").read_bytes())
    (copied / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    with pytest.raises(DataError, match="auto_map names custom code"):
        check_folder(copied)


def test_an_adapter_which_can_name_the_weights_of_another_folder_is_refused(copied):
    (copied / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(DataError, match=r"adapter_config\.json.* adapter"):
        locate_model(str(copied), None)


@pytest.mark.parametrize("elsewhere", ["../model.safetensors", "/model.safetensors", 7])
def test_an_index_that_names_weights_outside_of_the_folder_is_refused(copied, elsewhere):
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": elsewhere}}))
    with pytest.raises(DataError, match=r"index\.json: .* outside of this folder"):
        check_folder(copied)


def test_a_changed_byte_is_found_before_anything_is_loaded(copied):
    write_manifest(copied, {})
    check_folder(copied)
    (copied / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer_config.json: \d+ bytes, its manifest says"):
        check_folder(copied)


def test_a_folder_without_weights_or_template_is_no_model(copied, tmp_path):
    with pytest.raises(DataError, match=r"no \*.safetensors file"):
        check_folder(tmp_path / "nothing")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (copied / name).unlink()
    (copied / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="its tokenizer has no chat template"):
        ChatSession(copied, MANNER)


@pytest.mark.parametrize("source", ["no/such/folder", "nothing", "a/b@c"])
def test_what_is_neither_a_folder_nor_a_version_says_so(source):
    with pytest.raises(ConfigError, match="expected an existing folder"):
        locate_model(source, None)


def test_a_published_version_is_pulled_once_and_talked_to_and_a_withdrawn_one_is_not(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ROPEWAY_REGISTRY", (tmp_path / "registry").as_uri())
    store = open_store((tmp_path / "registry").as_uri())
    done = put(store, model)
    move(store, done.digest)
    options = ["--max-new-tokens", "3", "--temperature", "0", "--json"]
    result = CliRunner().invoke(app, ["chat", "tiny@candidate", *options], input="Hi\n")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 3
    folder = tmp_path / "cache" / "versions" / "tiny" / done.digest
    assert locate_model("tiny@v1", None) == folder
    other = put(store, copy_of(model, tmp_path / "other"))
    assert tiny(store).version(other.digest).withdraw(by="a test", reason="wrong data")
    with pytest.raises(RegistryError, match="is withdrawn"):
        locate_model("tiny@v2", None)


def copy_of(model, target):
    target.mkdir()
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (target / "manifest.json").unlink()
    write_manifest(target, {"of": "another"})
    return target
