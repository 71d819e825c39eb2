import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.config.load_params import load_profile, load_profiles
from ropeway.onboarding.derive import Entry, Machine
from ropeway.onboarding.start import InitRequest, start_profile
from ropeway.onboarding.write_profile import add_profile, render_profile
from ropeway.runtime.errors import ConfigError
from tests.support.families import FAMILIES, save_family
from tests.support.shipped_params import read_shipped_params

ROOT = Path(__file__).parents[3]
CPU = Machine(0, 2, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_family(FAMILIES["qwen2"], folder)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    asks = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "chat_template.jinja").write_text(template + asks)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(read_shipped_params(), encoding="utf-8")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    chats = [
        {"messages": [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": f"{n + 1}."}]}
        for n in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chats))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_profile_is_added_and_selected_and_nothing_else_changes(root, model):
    before = (root / "params.yaml").read_text()
    started = start_profile(root, InitRequest("mine", str(model), ["chats.jsonl"], CPU))
    after = (root / "params.yaml").read_text()
    assert after == before.replace("\nprofile: laptop\n", "\nprofile: mine\n") + "\n" + started.block
    name, profile = load_profile(root / "params.yaml")
    assert (name, profile.model_name, profile.base.kind) == ("mine", str(model), "folder")
    assert (profile.template, profile.what_counts, profile.superhot) == ("base", "answers", False)
    assert profile.max_length == 128
    assert profile.card.license == "mit"
    assert profile.datasets[0]["chats"].max_val_set == 6
    assert profile.sources["chats"].expected_rows == 60


def test_the_sample_shows_what_is_supervised(root, model):
    started = start_profile(root, InitRequest("mine", str(model), ["chats.jsonl"], CPU))
    ids, supervised = started.measured.sample
    shown = [number for number, counts in zip(ids, supervised, strict=True) if counts]
    assert started.measured.encoder.tokenizer.decode(shown, skip_special_tokens=False) == "1.<|im_end|>"


def test_a_usual_profile_has_at_most_25_lines_of_which_a_person_chose_three(root, model):
    started = start_profile(root, InitRequest("mine", str(model), ["chats.jsonl"], CPU))
    assert len(started.block.splitlines()) <= 25


def test_from_scratch_the_vocabulary_is_what_the_text_gives(root):
    started = start_profile(root, InitRequest("mine", "scratch", ["chats.jsonl"], CPU, license="mit"))
    profile = load_profile(root / "params.yaml")[1]
    assert profile.expected_model.vocab_size == started.measured.base.vocabulary == 300
    assert profile.expected_model.max_position_embeddings == profile.max_length


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "laptop"}, "there is a profile 'laptop'"),
        ({"name": "a/b"}, "expected a profile name"),
        ({"name": "finetune"}, "the name of a preset"),
        ({"name": "presets"}, "choose another name"),
        ({"name": "1e5"}, "choose another name"),
        ({"base": "scratch", "lora": True}, "--lora"),
        ({"machine": Machine(64, 64, 80.0)}, "do not fill one step of 64 ranks"),
        ({"base": "nowhere"}, "--base nowhere: expected a folder"),
        ({"data": ["nothing.jsonl"]}, "no such file or folder"),
        ({"machine": Machine(2, 2, 0.6)}, "does not fit 2 GPUs"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(root, model, change, says):
    before = (root / "params.yaml").read_bytes()
    request = {"name": "mine", "base": str(model), "data": ["chats.jsonl"], "machine": CPU, **change}
    with pytest.raises(ConfigError, match=says):
        start_profile(root, InitRequest(**request))
    assert (root / "params.yaml").read_bytes() == before


def test_the_largest_batch_that_fits_the_gpus_is_chosen(root, model):
    start_profile(root, InitRequest("mine", str(model), ["chats.jsonl"], Machine(2, 2, 40.0)))
    profile = load_profile(root / "params.yaml")[1]
    assert (profile.per_device_train_batch_size, profile.deepspeed_config) == (1, "configs/zero_config_pretrain.json")
    assert profile.gradient_accumulation_steps * 2 == profile.global_batch_size
    assert profile.use_flash_attention


def test_the_command_prints_what_it_found_as_json(root, model):
    words = ["init", "mine", "--base", str(model), "--data", "chats.jsonl", "--gpus", "0", "--lora", "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    found = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert found["sources"]["chats"]["records"] == "60"
    assert found["plan"]["rows"] is not None or found["plan"]["rows_per_source"]["chats"] == 54
    assert load_profile(root / "params.yaml")[1].peft_model


def test_a_block_is_yaml_with_its_reasons_and_reads_back(root):
    block = render_profile("mine", "head", [Entry("preset", "scratch"), Entry("max_length", 128, "because " * 20)])
    assert block.splitlines()[:2] == ["# head", "mine:"]
    assert "  # because" in block
    entries = [Entry("preset", "laptop"), Entry("rng_seed", 7, "a seed"), Entry("save_minutes", None)]
    add_profile(root / "params.yaml", "mine", render_profile("mine", "head", entries))
    _, profiles = load_profiles(root / "params.yaml")
    assert profiles["mine"] == profiles["laptop"].model_copy(update={"rng_seed": 7})


def test_an_invalid_profile_is_not_written(root):
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(ConfigError, match="rng_seed"):
        add_profile(
            root / "params.yaml",
            "mine",
            render_profile("mine", "head", [Entry("preset", "laptop"), Entry("rng_seed", -1)]),
        )
    assert (root / "params.yaml").read_bytes() == before


def test_what_a_template_cannot_write_is_counted_and_said(root, model):
    system = {"role": "system", "content": "Be kind.", "name": "boss"}
    chats = (root / "chats.jsonl").read_text().splitlines()
    odd = [json.dumps({"messages": [system, *json.loads(one)["messages"]]}) for one in chats[:30]]
    (root / "chats.jsonl").write_text("\n".join([*odd, *chats[30:]]) + "\n")
    points = " ".join(start_profile(root, InitRequest("mine", str(model), ["chats.jsonl"], CPU)).open_points)
    assert "30 of 60 records cannot be written in the template" in points
    assert "the run will stop" in points


@pytest.mark.parametrize("line", ['profile: "laptop"', "profile: laptop   # mine", "profile:   laptop"])
def test_the_selected_profile_may_be_written_in_any_way(root, line):
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("profile: laptop", line, 1))
    add_profile(path, "mine", render_profile("mine", "head", [Entry("preset", "laptop")]))
    assert load_profiles(path)[0] == "mine"


def test_a_profile_from_scratch_as_base_is_scratch(root):
    started = start_profile(root, InitRequest("mine", "laptop", ["chats.jsonl"], CPU))
    assert load_profile(root / "params.yaml")[1].base.kind == "scratch"
    assert any("card" in point for point in started.open_points)


def test_line_ends_and_links_of_the_file_stay(root):
    path, real = root / "params.yaml", root / "real.yaml"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    path.rename(real)
    path.symlink_to(real.name)
    before = real.read_bytes()
    add_profile(path, "mine", render_profile("mine", "head", [Entry("preset", "laptop")]))
    assert path.is_symlink()
    after = real.read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") == before.count(b"\n") + 4
    assert after.startswith(before[: before.index(b"profile: laptop")])


@pytest.mark.parametrize(
    ("stated", "link"),
    [("cc0-1.0", "https://spdx.org/licenses/CC0-1.0.html"), ("house rules", "unknown")],
)
def test_a_license_link_is_only_made_of_a_known_identifier(root, stated, link):
    start_profile(root, InitRequest("mine", "scratch", ["chats.jsonl"], CPU, license=stated))
    card = load_profile(root / "params.yaml")[1].card
    assert (card.license, card.license_link) == (stated, link)


def test_documents_are_counted_in_the_chunks_of_the_final_length(root, model):
    (root / "book.txt").write_text("A sentence of the book that goes on and on. " * 2000)
    started = start_profile(root, InitRequest("mine", str(model), ["book.txt"], CPU, context=128))
    profile = load_profile(root / "params.yaml")[1]
    options = profile.datasets[0]["book"]
    count = len(started.measured.lengths["book"].tokens)
    assert options.max_chunk_size == 3 * 128
    assert count == -(-len((root / "book.txt").read_text()) // options.max_chunk_size)
    assert options.max_val_set == count // 10
    assert profile.split_by == "chunk"


def test_the_license_of_a_profile_goes_with_its_base(root, model):
    path = root / "params.yaml"
    card = "  card: {license: mit, license_name: MIT, license_link: x, base_model: owner/name}\n"
    path.write_text(
        f"{path.read_text()}first:\n  preset: finetune\n  model_name: {model}\n"
        f"  datasets: [c: {{}}]\n  sources: {{c: {{kind: python_docs, part: topics, expected_rows: null}}}}\n{card}"
    )
    start_profile(root, InitRequest("mine", "first", ["chats.jsonl"], CPU))
    found = load_profile(path)[1].card
    assert (found.license, found.license_name, found.base_model) == ("mit", "MIT", "owner/name")


def test_a_long_path_is_wrapped_and_read_back(root, model):
    folder = root / ("a folder of chats with  two blanks: and a # sign " * 3).strip()
    folder.mkdir()
    (root / "chats.jsonl").rename(folder / "chats, as they were exported from the tool.jsonl")
    started = start_profile(root, InitRequest("mine", str(model), [str(folder)], CPU))
    source = load_profile(root / "params.yaml")[1].sources[started.data[0].name]
    assert list(source.paths) == [f"{folder.name}/**/*.jsonl"]
    assert max(map(len, started.block.splitlines())) <= 240


def test_the_plan_knows_rows_and_hours_before_prepare(root, model):
    plan = start_profile(root, InitRequest("mine", str(model), ["chats.jsonl"], CPU)).plan
    profile = load_profile(root / "params.yaml")[1]
    assert profile.layout == "packed"
    assert plan.optimizer_steps == plan.rows // profile.global_batch_size * profile.num_train_epochs > 0
    assert plan.speed.card == "cpu"
    assert 0 < plan.hours["expected"] <= plan.hours["at_most"]


def test_data_and_base_in_the_workspace_are_ignored_by_git_and_the_commit_has_the_file(root, model):
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    shutil.copytree(model, root / "models" / "base")
    (root / "data").mkdir()
    shutil.move(root / "chats.jsonl", root / "data" / "chats.jsonl")
    arguments = ["init", "mine", "--base", "models/base", "--data", "data/chats.jsonl"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert (root / "data" / ".gitignore").read_text() == "/chats.jsonl\n"
    assert (root / "models" / ".gitignore").read_text() == "/base\n"
    (command,) = (line for line in done.stdout.splitlines() if "git commit" in line)
    assert command.count("data/.gitignore") == command.count("models/.gitignore") == 2
