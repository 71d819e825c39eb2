"""`ropeway contains` and `ropeway forget`, over a registry of versions with stated records."""

import json

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.config.edit import set_forgotten
from ropeway.config.load_params import load_profile, load_profiles
from ropeway.data.record_identity import record_digest
from ropeway.models.conversation import Conversation
from ropeway.registry import Registry
from ropeway.runtime.errors import ConfigError, DataError, NotFoundError
from ropeway.runtime.workspace import Workspace
from tests.support.record_world import publish_records
from tests.support.shipped_params import read_shipped_params
from tests.support.tiny_run import BLOCK

ASKED = Conversation(("Where does Ada live?", "In London."))
CHECKED = Conversation(("Is it late?", "No."))
COPIED = Conversation(("Is it early?", "Yes."))
LETTER = "A letter from Ada."


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").touch()
    workspace = Workspace(tmp_path, "laptop")
    publish_records(workspace, 0, None)
    first = {("trained", ""): [ASKED, LETTER], ("validation", ""): [CHECKED], ("dropped", "near duplicate"): [COPIED]}
    publish_records(workspace, 1, first)
    publish_records(workspace, 2, {("trained", ""): [CHECKED], ("dropped", "contaminated"): [ASKED]})
    return workspace


def ask(*arguments):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    if result.exception:
        raise result.exception
    return result.stdout


def contains(*arguments):
    return json.loads(ask("contains", *arguments, "--json"))


def found(answer, number=0):
    return {one["version"]: (one["role"], one["reason"]) for one in answer["records"][number]["found"]}


TRAINED_THEN_DROPPED = {"laptop@v2": ("trained", ""), "laptop@v3": ("dropped", "contaminated")}
FORMS = {
    "messages": {
        "messages": [{"role": "user", "content": ASKED.turns[0]}, {"role": "assistant", "content": "In London."}]
    },
    "alpaca": {"instruction": ASKED.turns[0], "output": ASKED.turns[1]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED.turns[0]}, {"from": "gpt", "value": "In London."}]},
    "with other white space": {"prompt": "Where  does Ada live?\n", "completion": " In London."},
    "the version's own columns": {
        "talk": [{"from": "human", "value": ASKED.turns[0]}, {"from": "gpt", "value": "In London."}],
        "note": "a field that it ignores",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_record_is_found_in_every_form_that_sources_read(form):
    answer = contains(json.dumps(FORMS[form]))
    assert found(answer) == TRAINED_THEN_DROPPED
    assert answer["records"][0]["found"][0]["source"] == "chat"
    assert record_digest(ASKED).hex() in answer["records"][0]["digests"]


def test_a_digest_or_its_beginning_is_looked_up_as_it_is():
    digest = record_digest(CHECKED).hex()
    for given in (digest, digest[:18], digest[:21]):
        assert found(contains(given)) == {"laptop@v2": ("validation", ""), "laptop@v3": ("trained", "")}
    assert found(contains(record_digest(COPIED).hex())) == {"laptop@v2": ("dropped", "near duplicate")}
    assert found(contains("0" * 32)) == {}


def test_a_version_without_an_index_is_named_as_not_known():
    by_name = {one["version"]: one for one in contains("0" * 32)["versions"]}
    assert "published before" in by_name["laptop@v1"]["unknown"]
    assert (by_name["laptop@v2"]["indexed"], by_name["laptop@v2"]["absent"]) == (4, 1)
    assert "not known" in ask("contains", "0" * 32)


def test_the_records_of_a_file_are_counted_by_version(tmp_path):
    lines = [FORMS["alpaca"], FORMS["messages"], {"text": LETTER}, {"text": "not in it"}, {"other": 1}]
    path = tmp_path / "leave.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + "{broken\n")
    answer = contains(str(path))
    by_name = {one["version"]: one for one in answer["versions"]}
    assert (by_name["laptop@v2"]["trained"], by_name["laptop@v2"]["absent"]) == (3, 1)
    assert by_name["laptop@v3"]["dropped"] == {"contaminated": 2}
    assert sum(answer["unreadable"].values()) == 2
    assert answer["records"][2]["where"] == f"{path}:3"
    (tmp_path / "letter.txt").write_text(f"{LETTER}\n")
    assert found(contains(str(tmp_path / "letter.txt"))) == {"laptop@v2": ("trained", "")}
    (tmp_path / "digests.txt").write_text(f"{record_digest(ASKED).hex()}  # Ada\n\n{record_digest(LETTER).hex()}\n")
    answer = contains(str(tmp_path / "digests.txt"))
    assert [found(answer, number) for number in range(2)] == [TRAINED_THEN_DROPPED, {"laptop@v2": ("trained", "")}]
    table = ask("contains", str(path)).splitlines()
    assert any(line.split()[:3] == ["laptop@v2", "3", "0"] for line in table)


def test_an_index_that_the_version_does_not_name_is_not_relied_on(workspace):
    publish_records(workspace, 3, {("trained", ""): [COPIED]}, stated="0" * 64)
    last = contains(record_digest(COPIED).hex())["versions"][-1]
    assert "names 000000000000" in last["unknown"]


def test_withdrawn_versions_say_so_and_a_collected_index_is_not_known(workspace):
    registry = Registry.open(workspace.registry_url)
    registry.version("laptop@v2").withdraw(by="a test", reason="it has Ada's text")
    version = contains(record_digest(ASKED).hex())["versions"][1]
    assert (version["withdrawn"], version["trained"]) == (True, 1)
    index = next(file for file in registry.version("laptop@v2").attachments if file.path == "records.index")
    (workspace.root / "registry" / "blobs" / "sha256" / index.sha256[:2] / index.sha256).unlink()
    assert "no object" in contains(record_digest(ASKED).hex())["versions"][1]["unknown"]


def test_what_is_no_record_and_a_model_without_versions_are_errors(workspace):
    for given in ("nothing", '{"other": 1}', "[]", "12ab"):
        with pytest.raises(ConfigError):
            ask("contains", given)
    with pytest.raises(NotFoundError, match="no version of other"):
        ask("contains", "0" * 32, "--name", "other")
    assert Registry.open(workspace.registry_url).version("laptop@v2").verify().files > 0, "attachments are verified"


@pytest.fixture
def params(workspace):
    path = workspace.root / "params.yaml"
    path.write_text(read_shipped_params("tiny") + BLOCK)
    return path


def forget(*arguments):
    return json.loads(ask("forget", *arguments, "--json"))


def test_forget_adds_digests_with_their_reason_and_names_the_versions_that_hold_them(params):
    before = params.read_text()
    digest = record_digest(ASKED).hex()
    found = forget(json.dumps(FORMS["alpaca"]), "--reason", "asked  by Ada")
    assert (found["digests"], found["added"], found["profile"]) == ([digest], [digest], "tiny")
    assert [(one["version"], one["trained"], one["withdrawn"]) for one in found["holders"]] == [("laptop@v2", 1, False)]
    assert found["unknown"] == ["laptop@v1"]
    assert load_profile(params)[1].forget == [digest]
    assert f'- "{digest}"  # asked by Ada\n' in params.read_text()
    assert [line for line in before.splitlines() if line not in params.read_text().splitlines()] == []
    again = forget(digest)
    assert (again["added"], load_profile(params)[1].forget) == ([], [digest])
    more = record_digest(LETTER).hex()
    assert forget(json.dumps({"text": LETTER}))["added"] == [more]
    assert load_profile(params)[1].forget == [digest, more]
    listed = forget("--list")
    assert (listed["digests"], [one["trained"] for one in listed["holders"]]) == ([digest, more], [2])


def test_forget_prints_the_command_that_withdraws_until_it_is_done(params):
    text = ask("forget", json.dumps(FORMS["messages"]))
    assert "ropeway registry withdraw laptop@v2" in text
    Registry.open(Workspace(params.parent, "laptop").registry_url).version("laptop@v2").withdraw(
        by="a test", reason="asked"
    )
    left = ask("forget", "--list")
    assert "registry withdraw" not in left
    assert "every version that holds them is withdrawn" in left


def test_forget_of_a_preset_reaches_the_profiles_that_take_it(params):
    digest = record_digest(ASKED).hex()
    forget(digest, "--profile", "llama2_13b_orca_8k")
    profiles = load_profiles(params)[1]
    assert {name for name, one in profiles.items() if one.forget == [digest]} >= {"llama2_13b_orca_8k"}


def test_forget_refuses_a_shortened_digest_and_half_a_command(params):
    before = params.read_text()
    for arguments in ((record_digest(ASKED).hex()[:20],), (), ("0" * 32, "--list")):
        with pytest.raises(ConfigError):
            ask("forget", *arguments)
    assert params.read_text() == before


def test_forget_keeps_a_link_and_the_mode_of_params(params):
    own = params.with_name("shared.yaml")
    params.rename(own)
    own.chmod(0o600)
    params.symlink_to(own.name)
    ask("forget", "ab" * 16)
    assert params.is_symlink()
    assert "ab" * 16 in own.read_text()
    assert own.stat().st_mode & 0o777 == 0o600


def test_forget_refuses_to_delete_comments_between_brackets():
    text = 'a:\n  forget: [ # ticket 1\n    "00", # ticket 2\n  ]\n'
    with pytest.raises(ConfigError, match="comments"):
        set_forgotten(text, "a", ["00", "11"], ["11"])


def test_a_pasted_text_and_bytes_that_are_no_text_are_named_errors(params):
    for given in ("a pasted text " * 400, '{"text": "\udcff"}'):
        with pytest.raises((ConfigError, DataError)):
            ask("contains", given)
    before = params.read_bytes()
    for reason in ("a\udcffb", "a\x07b"):
        with pytest.raises(ConfigError, match="--reason"):
            ask("forget", "ab" * 16, "--reason", reason)
    assert params.read_bytes() == before
