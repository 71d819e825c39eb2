"""The documentation says what the code does: blocks are marked, commands exist, the reference is complete."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from ropeway.cli.main import app
from ropeway.config.load_params import read_block
from ropeway.config.params import Profile
from ropeway.config.stages import READS
from ropeway.runtime import environment
from ropeway.runtime.errors import RopewayError
from tools.docs import check_links, diagrams, reference
from tools.docs.blocks import DOCS, Block, find_blocks, find_faults, find_pages

ROOT = Path(__file__).parents[2]
BLOCKS = [block for page in find_pages() for block in find_blocks(page)]
COMMANDS = dict(reference.commands(typer.main.get_command(app), "ropeway"))
PAGES = {name: render() for name, render in reference.PAGES.items()}


def shell_commands(block):
    """Yield each command of a shell block as words: without variables before it and comments after it."""
    for line in block.code.splitlines():
        for part in re.split(r"\||&&|<\(|;", line):
            words = shlex.split(part.replace(")", " "), comments=True) if part.count("'") % 2 == 0 else []
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def test_every_code_block_is_marked_as_run_or_not_run():
    assert len(BLOCKS) > 40
    assert [fault for block in BLOCKS for fault in find_faults(block)] == []


@pytest.mark.parametrize(
    ("info", "code", "fault"),
    [
        ("", "ropeway run", "no info string"),
        ("sh", "ropeway run", "found 'sh'"),
        ("sh not-run", "ropeway run", "REASON"),
        ("sh not-run", "# not run here", "REASON"),
    ],
)
def test_a_block_without_a_mark_or_a_reason_is_refused(info, code, fault):
    (found,) = find_faults(Block("page.md", 3, info, code))
    assert "docs/page.md:3" in found
    assert fault in found


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.info.startswith("yaml profile")], ids=lambda block: block.place
)
def test_a_fragment_of_a_profile_is_valid(block):
    profile = {**read_block(ROOT / "params.yaml", "laptop"), **YAML(typ="safe", pure=True).load(block.code)}
    if block.code.startswith(("sources:", "datasets:")):
        assert {"sources", "datasets"} <= YAML(typ="safe", pure=True).load(block.code).keys()
    TypeAdapter(Profile).validate_python(profile)


def test_commands_and_options_of_the_pages_exist():
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    seen = 0
    for block in BLOCKS:
        if not block.info.startswith("sh "):
            continue
        for words in shell_commands(block):
            if words[0] == "make":
                assert words[1] in targets, block.place
            if words[0] != "ropeway":
                continue
            seen += 1
            name = next((one for size in (3, 2) if (one := " ".join(words[:size])) in COMMANDS), None)
            assert name, f"{block.place}: {' '.join(words)}"
            known = {word for one in COMMANDS[name].params for word in (*one.opts, *one.secondary_opts)}
            stated = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert stated <= known, f"{block.place}: {' '.join(words)}"
    assert seen > 40


@pytest.mark.parametrize(
    ("element", "fault"),
    [
        ('<a href="other.html#there">', None),
        ('<a href="https://example.org/">', None),
        ('<a href="gone.html">', "no such file"),
        ('<a href="other.html#gone">', "no such anchor"),
        ('<a href="#gone">', "no such anchor"),
        ('<img src="gone.svg">', "no such file"),
        ('<script src="https://example.org/a.js">', "from the network"),
    ],
)
def test_a_broken_link_or_a_load_from_the_network_is_found(tmp_path, element, fault):
    (tmp_path / "index.html").write_text(element, encoding="utf-8")
    (tmp_path / "other.html").write_text('<p id="there">', encoding="utf-8")
    found = check_links.find_faults(tmp_path)
    assert [fault in one for one in found] == ([True] if fault else [])


def test_everything_that_is_generated_is_on_a_page():
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    assert [name for name in reference.PAGES if f"<!-- generated: {name} -->" not in text] == []


def test_a_marker_that_nothing_generates_is_an_error():
    with pytest.raises(KeyError, match="parms"):
        reference.fill("# Page\n\n<!-- generated: parms -->\n")


def test_every_key_of_a_profile_has_a_description():
    for name in Profile.model_fields:
        assert f"{{#param-{name}}}" in PAGES["params"], name
    for model in [Profile, *reference.sections()]:
        for name in model.model_fields:
            kind, meaning = reference.describe_field(model, name)
            if model is Profile:
                assert meaning, name
            assert kind, f"{model.__name__}.{name}"
            assert meaning or name in ("kind", "type"), f"{model.__name__}.{name}"


def test_every_command_and_option_is_in_the_reference():
    assert len(COMMANDS) > 20
    for name, command in COMMANDS.items():
        section = PAGES["commands"].partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for parameter in command.params:
            if "--help" not in parameter.opts:
                assert f"`{parameter.opts[0]}`" in section or f"`{parameter.name.upper()}`" in section, name


def test_every_environment_variable_is_in_the_reference():
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "flows").glob("*.py"), ROOT / "Makefile"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files if path.name != "environment.py")
    named = set(re.findall(r"\bROPEWAY_[A-Z0-9_]+[A-Z0-9]\b", text))
    named |= set(re.findall(r"\b(?:AWS|HF|WANDB)_[A-Z0-9_]+[A-Z0-9]\b", text))
    documented = {one.name for group in environment.VARIABLES.values() for one in group}
    documented |= {*environment.INTERNAL, *environment.RENAMED}
    assert named - documented - {f"ROPEWAY_POOL_{step.upper()}" for step in (*READS, "publish")} == set()
    known = {name.partition("<")[0] for name in documented - environment.RENAMED.keys()}  # ROPEWAY_POOL_<STAGE>
    assert {name for name in known if name not in text} == set()
    assert all(f"`{name}`" in PAGES["environment"] for name in documented)


def test_messages_of_the_failure_page_exist():
    said = "\n".join(text for path in (ROOT / "src").rglob("*.py") for text in find_texts(path))
    page = (DOCS / "tasks" / "when-something-fails.md").read_text(encoding="utf-8")
    rows = page.partition("## By message")[2].partition("## The run is up")[0]
    fragments = re.findall(r"(?m)^\| `([^`]+)`", rows)
    assert len(fragments) > 20
    assert [one for one in fragments if one not in said] == []


def test_the_sections_of_a_review_are_those_of_its_template():
    template = (ROOT / "src/ropeway/reporting/templates/review.md.jinja").read_text(encoding="utf-8")
    page = (DOCS / "tasks" / "review-and-promote.md").read_text(encoding="utf-8")
    rows = page.partition("| summary |")[2].partition("\n\n")[0]
    sections = re.findall(r"(?m)^\| ([^|]+) \|", rows)
    assert len(sections) > 4
    assert [one for one in sections if f"## {one}" not in template] == []


def find_texts(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr | ast.Constant):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)


def all_errors(error=RopewayError):
    return {error}.union(*(all_errors(child) for child in error.__subclasses__()))


def test_every_exit_code_is_in_the_reference():
    for code in {error.exit_code for error in all_errors()}:
        assert f"| `{code}` |" in PAGES["exit-codes"], code


@pytest.mark.parametrize("name", sorted(diagrams.PICTURES))
def test_a_picture_is_what_the_code_draws(name):
    path = DOCS / "diagrams" / f"{name}.svg"
    assert path.read_text(encoding="utf-8") == diagrams.PICTURES[name](), "run `python -m tools.docs.diagrams`"


def test_the_stage_picture_has_the_stages_of_dvc_yaml():
    stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    picture = (DOCS / "diagrams" / "stages.svg").read_text(encoding="utf-8")
    assert all(f">{name}</text>" in picture for name in stages)
    written = {path: name for name, stage in stages.items() for path in outputs(stage)}
    direct = {
        (written[folder(dep)], name)
        for name, stage in stages.items()
        for dep in stage.get("deps", [])
        if dep.startswith("runs/")
    }
    drawn = diagrams.stage_edges()
    assert drawn <= direct
    assert closure(drawn) == closure(direct)


def outputs(stage):
    for kind in ("outs", "metrics", "plots"):
        for out in stage.get(kind, []):
            yield folder(out if isinstance(out, str) else next(iter(out)))


def folder(path):
    return "/".join(path.split("/")[:3])


def closure(edges):
    grown = edges | {(a, d) for a, b in edges for c, d in edges if b == c}
    return grown if grown == edges else closure(grown)


def test_modules_that_the_pages_name_exist():
    named = set()
    for page in find_pages():
        text = page.read_text(encoding="utf-8")
        named |= {(page.name, path) for path in re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|jinja|jsonl?|ya?ml))`", text)}
    places = (ROOT, ROOT / "src" / "ropeway", ROOT / "src" / "ropeway" / "reporting")
    assert len(named) > 20
    made = (".identity/", "base/", "raw/", "tokens/", "package/", "data/", "runs/", ".work/")  # by a run
    checked = {(page, path) for page, path in named if not path.startswith(made) or path.endswith(".py")}
    assert {one for one in checked if not any((place / one[1]).exists() for place in places)} == set()


def test_links_between_pages_and_to_files_resolve():
    links = 0
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path = target.partition("#")[0]
            if path and "://" not in path:
                links += 1
                assert (page.parent / path).exists(), f"{page.relative_to(ROOT)}: {target}"
    assert links > 60
