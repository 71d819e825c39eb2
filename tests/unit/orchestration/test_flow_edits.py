"""`--resume-from` edits one line of params.yaml, the one of its profile, and nothing else."""

import difflib
from contextlib import suppress
from pathlib import Path

import pytest

from ropeway.config import edit as edits
from ropeway.config.load_params import load_profile, load_profiles
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.lock import workspace_lock
from tests.support.shipped_params import read_shipped_params

ROOT = Path(__file__).parents[3]
RUN = "0123456789012345"  # digits alone: unquoted YAML would make a number of it


@pytest.fixture
def root(tmp_path):
    (tmp_path / "params.yaml").write_text(read_shipped_params(), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["llama2_13b_orca_8k", "smollm2", "laptop"])
def test_one_line_of_one_profile_changes(root, name, capsys):
    before, old = (root / "params.yaml").read_text(), load_profiles(root / "params.yaml")[1]
    edits.resume_from(root, name, RUN)
    after, new = (root / "params.yaml").read_text(), load_profiles(root / "params.yaml")[1]
    changed = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[:1] in "+-"]
    assert len(changed) == (2 if name == "llama2_13b_orca_8k" else 1)  # else a line is added
    assert changed[-1].startswith(f'+   resume_from: "{RUN}"')
    assert {one for one in old if new[one] != old[one]} == {name}
    assert new[name].resume_from == RUN
    assert f"resume_from of profile {name} to {RUN}" in capsys.readouterr().out
    edits.resume_from(root, name, f"{RUN}@40")
    assert load_profiles(root / "params.yaml")[1][name].resume_from == f"{RUN}@40"


def test_the_chosen_profile_is_the_default_and_writing_it_twice_changes_nothing(root):
    edits.resume_from(root, None, RUN)
    text = (root / "params.yaml").read_text()
    assert load_profiles(root / "params.yaml")[1]["laptop"].resume_from == RUN
    edits.resume_from(root, None, RUN)
    assert (root / "params.yaml").read_text() == text


@pytest.mark.parametrize(
    "edit", [lambda root: edits.resume_from(root, None, RUN), lambda root: edits.write_exact(root / "params.yaml", "x")]
)
def test_a_link_stays_a_link_and_the_permissions_stay(root, edit):
    (root / "params.yaml").rename(root / "own.yaml")
    (root / "own.yaml").chmod(0o666)  # more than the usual umask leaves
    (root / "params.yaml").symlink_to("own.yaml")
    before = (root / "own.yaml").read_bytes()
    edit(root)
    assert (root / "params.yaml").is_symlink()
    assert (root / "own.yaml").read_bytes() != before
    assert (root / "own.yaml").stat().st_mode & 0o777 == 0o666


def test_a_block_that_others_inherit_from_is_left_alone(root):
    path = root / "params.yaml"
    path.write_text(path.read_text() + "mine:\n  <<: *published\n  rng_seed: 7\n")
    text = path.read_text()
    with pytest.raises(ConfigError, match="would change other profiles"):
        edits.resume_from(root, "llama2_13b_orca_8k", RUN)
    assert path.read_text() == text
    edits.resume_from(root, "laptop", RUN)  # a line of its own is added
    assert load_profiles(path)[1]["laptop"].resume_from == RUN


@pytest.mark.parametrize("run", ["", "latest", RUN[:15], f"{RUN}@", f"{RUN}@x", RUN.replace("0", "G")])
def test_what_is_no_run_is_refused(root, run):
    text = (root / "params.yaml").read_text()
    with pytest.raises(ConfigError, match="expected FINGERPRINT or FINGERPRINT@STEP"):
        edits.resume_from(root, None, run)
    assert (root / "params.yaml").read_text() == text


def test_params_of_a_running_run_are_not_edited(root):
    text = (root / "params.yaml").read_text()
    with workspace_lock(root, command="another run"), pytest.raises(TemporaryError, match="another run"):
        edits.resume_from(root, None, RUN)
    assert (root / "params.yaml").read_text() == text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a: {b: 1}", "a: {resume_from: RUN, b: 1}"),
        ("a:\n    # first\n    b: 1  # why", "a:\n    # first\n    resume_from: RUN\n    b: 1  # why"),
        ("x: é\n'a':\n  resume_from: 'old'   # why", "x: é\n'a':\n  resume_from: RUN   # why"),
        ("a:\n  s: |\n    resume_from: x\n  resume_from: null", "a:\n  s: |\n    resume_from: x\n  resume_from: RUN"),
    ],
)
def test_the_value_is_written_where_the_key_stands_and_nothing_else_moves(old, new):
    assert edits.set_resume_from(old, "a", RUN) == new.replace("RUN", f'"{RUN}"')


@pytest.mark.parametrize("comment", ["", "  # mine"])
@pytest.mark.parametrize("written", ["laptop", "'laptop'", '"laptop"'])
def test_the_chosen_profile_is_replaced_however_it_is_written(root, written, comment):
    path = root / "params.yaml"
    text = path.read_text()
    assert text.count("profile: laptop") == 1
    path.write_text(text.replace("profile: laptop", f"profile: {written}{comment}"))
    edits.choose_profile(root, "smollm2")
    assert path.read_text() == text.replace("profile: laptop", f"profile: smollm2{comment}")


@pytest.mark.parametrize("written", ["laptop", '"laptop"  # mine'])
def test_a_served_run_puts_the_persons_profile_back_byte_by_byte(root, written):
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("profile: laptop", f"profile: {written}"))
    before = path.read_bytes()
    for name in ("smollm2", "laptop", "smollm2"):
        with suppress(TemporaryError), edits.borrow_profile(root, name):
            assert load_profile(path)[0] == name
            raise TemporaryError
        assert path.read_bytes() == before


def test_what_a_person_edits_or_chooses_during_a_served_run_stays(root):
    path = root / "params.yaml"
    before = path.read_text()
    with edits.borrow_profile(root, "smollm2"):
        path.write_text(path.read_text() + "# a comment\n")
    assert path.read_text() == before + "# a comment\n"
    with edits.borrow_profile(root, "smollm2"):
        edits.choose_profile(root, "llama2_13b_orca_8k")
    assert load_profile(path)[0] == "llama2_13b_orca_8k"


def kill_while_borrowed(root, name):
    """Leave what a served run leaves that is killed."""
    borrowed = edits.borrow_profile(root, name)
    borrowed.__enter__()
    text, note = (root / "params.yaml").read_bytes(), (root / ".work" / "profile.json").read_bytes()
    borrowed.__exit__(None, None, None)
    (root / "params.yaml").write_bytes(text)
    (root / ".work" / "profile.json").write_bytes(note)


@pytest.mark.parametrize("name", ["laptop", "smollm2", "llama2_13b_orca_8k"])
def test_after_a_kill_the_next_served_run_puts_the_persons_profile_back(root, name):
    before = (root / "params.yaml").read_bytes()
    kill_while_borrowed(root, "smollm2")
    assert load_profile(root / "params.yaml")[0] == "smollm2"
    with edits.borrow_profile(root, name):
        assert load_profile(root / "params.yaml")[0] == name
    assert (root / "params.yaml").read_bytes() == before


def test_a_person_who_chooses_after_a_kill_keeps_the_choice(root):
    kill_while_borrowed(root, "smollm2")
    edits.choose_profile(root, "smollm2")
    with edits.borrow_profile(root, "laptop"):
        pass
    assert load_profile(root / "params.yaml")[0] == "smollm2"


def test_a_line_that_a_person_edits_after_a_kill_stays(root):
    path = root / "params.yaml"
    kill_while_borrowed(root, "smollm2")
    path.write_text(path.read_text().replace("profile: smollm2", "profile: llama2_13b_orca_8k"))
    with edits.borrow_profile(root, "laptop"):
        pass
    assert load_profile(path)[0] == "llama2_13b_orca_8k"


def test_an_edit_that_is_saved_while_the_line_is_written_is_not_lost(root, monkeypatch):
    path = root / "params.yaml"
    select = edits.select_profile

    def save_meanwhile(*arguments):
        if "# saved" not in path.read_text():
            path.write_text(path.read_text() + "# saved\n")
        return select(*arguments)

    monkeypatch.setattr(edits, "select_profile", save_meanwhile)
    edits.choose_profile(root, "smollm2")
    assert path.read_text().endswith("# saved\n")
    assert load_profile(path)[0] == "smollm2"
