import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ropeway.cli import registry_commands as options
from ropeway.cli.registry_commands import registry_app
from ropeway.registry import Registry
from ropeway.registry.layout import blob_key, tombstone_key
from ropeway.registry.tables import draw_version
from ropeway.runtime.errors import ConfigError, DataError, RegistryError
from ropeway.storage import open_store
from tests.support.registry_world import make_package, make_pages, move, put

LONG_KEY = "a.rather.long.key.of.what.was.measured.in.this.one"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A workspace with two published versions; the first is the candidate."""
    (tmp_path / "params.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    store = open_store((tmp_path / "registry").as_uri())
    digests = [
        put(store, make_package(tmp_path / f"p{n}", b"%d" % n, steps=n, **{LONG_KEY: 8.325262546539307})).digest
        for n in range(2)
    ]
    move(store, digests[0])
    return store, digests


def ask(*arguments: str, width: int = 200) -> str:
    result = CliRunner().invoke(registry_app, list(arguments), env={"COLUMNS": str(width)})
    if result.exception:
        raise result.exception
    return result.stdout


def ask_json(*arguments: str):
    return json.loads(ask(*arguments, "--json"))


def test_list_shows_models_and_versions(world):
    store, digests = world
    (model,) = ask_json("list")
    assert (model["name"], model["versions"], model["latest"]) == ("tiny", 2, digests[1])
    assert model["aliases"] == {"candidate": digests[0]}
    assert [version["aliases"] for version in ask_json("list", "tiny")] == [["candidate"], []]
    assert digests[1][:12] in ask("list")
    assert "tiny@v2" in ask("list", "tiny")
    store.put_if_absent(tombstone_key("tiny", digests[0]), b"{}")
    assert "candidate, withdrawn" in ask("list", "tiny")


def test_lists_show_the_newest_and_say_how_to_see_the_rest(world, monkeypatch):
    _, digests = world
    ask("promote", "tiny@v2", "candidate", "--reason", "newer")
    monkeypatch.setattr(options, "_PAGE", 1)
    for words, all_numbers in ((("list", "tiny"), [1, 2]), (("history", "tiny@candidate"), [1, 2])):
        result = CliRunner().invoke(registry_app, list(words), env={"COLUMNS": "200"})
        assert (digests[0][:12] in result.stdout.partition("from")[0], digests[1][:12] in result.stdout) == (
            False,
            True,
        )
        assert all(part in result.stderr for part in ("1 earlier", "of 2", "--before 2", "--all"))
        shown = CliRunner().invoke(registry_app, [*words, "--all"], env={"COLUMNS": "200"})
        assert shown.stderr == ""
        assert all(digest[:12] in shown.stdout for digest in digests)
        assert [one.get("number", one.get("version")) for one in ask_json(*words)] == all_numbers
        assert [one["digest"] for one in ask_json(*words, "--limit", "1")] == [digests[1]]
        assert [one["digest"] for one in ask_json(*words, "--limit", "1", "--before", "2")] == [digests[0]]
        with pytest.raises(ConfigError, match="--limit"):
            ask(*words, "--limit", "1", "--all")
    assert "1 " in ask("history", "tiny@candidate", "--before", "2")
    for selected in (("--limit", "1"), ("--before", "2"), ("--all",)):
        with pytest.raises(ConfigError, match="name it"):
            ask("list", *selected)


def test_history_and_show_say_claimed_where_nobody_authenticated_the_name(world, monkeypatch):
    store, digests = world
    monkeypatch.setattr(options, "identity_of", lambda name: "authenticated" if name == "anna" else "claimed")
    ask("promote", "tiny@v2", "candidate", "--by", "anna", "--reason", "a test")
    ask("promote", "tiny@v2", "other", "--by", "ben", "--reason", "a test")
    moved = [ask_json("history", f"tiny@{alias}")[-1]["identity"] for alias in ("candidate", "other")]
    assert moved == ["authenticated", "claimed"]
    assert [row for row in ask("history", "tiny@candidate").splitlines() if "anna" in row and "claimed" not in row]
    assert "ben (claimed)" in ask("history", "tiny@other")
    ask("rollback", "tiny@candidate", "--by", "anna", "--reason", "back")
    assert ask_json("history", "tiny@candidate")[-1]["identity"] == "authenticated"
    answer = {"by": "eve", "comment": "no", "production": None, "via": "an older Ropeway"}
    Registry(store).artifact("tiny").version(digests[0]).review("reject", answer)
    assert "reject by eve (claimed)" in ask("show", "tiny@v1")


@pytest.mark.usefixtures("world")
def test_an_empty_registry_says_so(tmp_path):
    url = (tmp_path / "none").as_uri()
    assert url in ask("list", "--registry", url)
    assert ask_json("list", "--registry", url) == []


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    "words",
    [
        ("list", "other"),
        ("show", "tiny@v9"),
        ("show", "other@v1"),
        ("history", "tiny@production"),
        ("verify", "tiny@production"),
        ("diff", "tiny@v1", "tiny@v9"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_what_the_registry_does_not_hold_ends_with_one_code(words, as_json):
    with pytest.raises(RegistryError, match=words[-1].partition("@")[0]) as caught:
        ask(*words, *(["--json"] if as_json else []))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_longer_than_the_terminal_and_no_key_or_digest_is_broken(world, width):
    _, digests = world
    for words in (("list",), ("list", "tiny"), ("show", "tiny@v1"), ("history", "tiny@candidate")):
        text = ask(*words, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert digests[0][:12] in text
        assert digests[0][:13] not in text
    assert "tiny@v1 and tiny@v2" not in ask("diff", "tiny@v1", "tiny@v2", width=width)
    shown = ask("show", "tiny@v1", width=width)
    assert re.search(rf"^{re.escape(LONG_KEY)}\s+8\.325$", shown, re.MULTILINE)
    assert re.search(r"config\.json +2 +[0-9a-f]{12}$", shown, re.MULTILINE)


DRIFT = {
    "limits": {"max_psi": 0.25},
    "note": "",
    "references": [
        {
            "version": "tiny@v1",
            "note": "",
            "measures": [{"name": "languages", "exceeds": ["PSI 0.9"]}, {"name": "length", "exceeds": []}],
        },
        {"version": "tiny@v0", "note": "it has no profile", "measures": []},
    ],
}


@pytest.mark.parametrize(
    ("provenance", "row"),
    [
        ({"git": "a" * 40, "dirty": False}, "made by aaaaaaaaaaaa, clean"),
        (
            {"git": "a" * 40, "dirty": True, "dirty_files": ["x.py"]},
            "made by aaaaaaaaaaaa, uncommitted changes in x.py",
        ),
        ({}, "made by no commit"),
        ({"drift": DRIFT}, "data drift tiny@v1: above a limit: languages; tiny@v0: it has no profile"),
        (
            {"drift": {"note": "there is no earlier version", "references": []}},
            "data drift not compared: there is no earlier version",
        ),
        ({"drift": {"references": 7}}, "data drift not compared: no earlier version"),
    ],
)
def test_show_says_in_a_line_each_who_made_a_version_and_how_its_data_differs(provenance, row):
    facts = {
        "name": "tiny", "number": 3, "digest": "d" * 64, "withdrawn": False, "aliases": [], "signed_by": [],
        "published_at": "2026-12-01T00:00:00Z", "bytes": 1, "files": {}, "attachments": {}, "facts": {},
    }  # fmt: skip
    console = Console(width=200, file=io.StringIO())
    console.print(draw_version({**facts, "provenance": provenance}))
    assert row in [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_show_has_lineage_files_and_how_to_fetch_it(world):
    _, digests = world
    version = ask_json("show", "tiny@candidate")
    assert (version["number"], version["digest"], version["facts"]["steps"]) == (1, digests[0], 0)
    assert version["provenance"] == {"git": "abc", "dirty": False}
    assert set(version["files"]) == {"config.json", "manifest.json", "model.safetensors", "plots/loss.svg"}
    words = ask("show", "tiny@candidate")
    for part in ("tiny@v1", digests[0][:12], "steps", "model.safetensors", f"registry pull tiny@{digests[0][:12]}"):
        assert part in words


@pytest.mark.parametrize(
    ("checks", "shown"),
    [
        (
            [
                {"passed": True, "words": "docs: 2.000, tiny@v1 2.000: +0.000"},
                {"passed": False, "words": "quiz, acc: 0.4, tiny@v1 0.6"},
            ],
            ["gate, failed 1 quiz, acc: 0.4, tiny@v1 0.6"],
        ),
        (None, []),
        ([3], []),
    ],
    ids=["two comparisons", "an older version", "not a comparison"],
)
def test_show_names_the_comparisons_of_the_gate_that_failed(world, tmp_path, checks, shown):
    store, _ = world
    verdict = {"passed": False, "against": "tiny@v1", "lines": [], "checks": checks}
    package = make_package(tmp_path / "rejected", b"rejected")
    Registry(store).artifact("tiny").publish(package, provenance={"verdict": verdict}, attachments={})
    lines = [" ".join(line.split()) for line in ask("show", "tiny@v3").splitlines()]
    assert "gate not passed, compared with tiny@v1" in lines
    assert [line for line in lines if line.startswith("gate, failed")] == shown


def test_pull_and_verify_from_the_command_line(world, tmp_path):
    _, digests = world
    done = ask_json("pull", "tiny@candidate")
    assert Path(done["folder"]) == tmp_path / f"tiny-{digests[0][:12]}"
    assert "already complete" in ask("pull", "tiny@v1")
    assert "pulled to" in ask("pull", "tiny@v2", "--to", "there")
    assert ask_json("verify", "tiny@v2")["files"] == 4
    assert "all as published" in ask("verify", "tiny@v2", "--folder", "there")
    with pytest.raises(DataError):
        ask("verify", "tiny@v1", "--folder", "there")


def test_promote_rollback_and_history_from_the_command_line(world):
    _, digests = world
    assert ask_json("promote", "tiny@v1", "production", "--expect", "none", "--reason", "first")["moved"]
    said = ask("promote", "tiny@v2", "production", "--expect", "v1", "--reason", "better", "--by", "ana")
    assert said == f"tiny@production now points to {digests[1]}\nbefore: {digests[0]}\n"
    assert "already points" in ask("promote", "tiny@v2", "production", "--reason", "again")
    with pytest.raises(RegistryError, match=digests[1]):
        ask("promote", "tiny@v1", "production", "--expect", "none", "--reason", "stale")
    with pytest.raises(RegistryError, match=f"points to {digests[1]}, expected {digests[0]}"):
        ask("rollback", "tiny@production", "--expect", "v1", "--reason", "stale")
    with pytest.raises(ConfigError, match="NAME@ALIAS"):
        ask("rollback", "tiny@v1", "--reason", "not an alias")
    assert ask_json("rollback", "tiny@production", "--expect", "v2", "--reason", "worse")["digest"] == digests[0]
    events = ask_json("history", "tiny@production")
    assert [(event["version"], event["reason"]) for event in events] == [(1, "first"), (2, "better"), (1, "worse")]
    assert "better" in ask("history", "tiny@production")
    with pytest.raises(ConfigError, match="expected NAME@ALIAS"):
        ask("history", "tiny@v1")


@pytest.mark.usefixtures("world")
def test_publish_from_the_command_line_keeps_what_is_attached(tmp_path):
    make_package(tmp_path / "new", b"new")
    (tmp_path / "facts.json").write_text('{"git": "def"}')
    (tmp_path / "dvc.lock").write_text("")
    arguments = ["publish", "new", "--name", "tiny", "--provenance", "facts.json", "--attach", "dvc.lock"]
    assert ask_json(*arguments)["number"] == 3
    assert "tiny@v3 was published before" in ask(*arguments)
    version = ask_json("show", "tiny@v3")
    assert version["provenance"] == {"git": "def"}
    assert list(version["attachments"]) == ["dvc.lock"]
    assert "README.md" not in version["files"]
    make_pages(tmp_path / "new", tmp_path / "pages", "# the card\n")
    assert ask_json(*arguments)["number"] == 4
    assert "README.md" in ask_json("show", "tiny@v4")["files"]
    for content in ("[]", "{"):
        (tmp_path / "facts.json").write_text(content)
        with pytest.raises(ConfigError, match="expected a JSON"):
            ask(*arguments)


def test_a_missing_blob_is_stored_again_by_publishing_a_pulled_copy(world, tmp_path):
    store, _ = world
    (tmp_path / "elsewhere").mkdir()
    url, copy = store.url, tmp_path / "elsewhere" / "copy"
    package = make_package(tmp_path / "with pages", b"9", steps=9)
    make_pages(package, tmp_path / "pages", "# the card\n")
    ask("publish", str(package), "--name", "paged", "--registry", url)
    ask("pull", "paged@v1", "--to", str(copy), "--registry", url)
    (file,) = [file for file in Registry(store).version("paged@v1").manifest.files if file.path == "model.safetensors"]
    store.delete(blob_key(file.sha256))
    with pytest.raises(DataError, match=r"model\.safetensors: .* is missing"):
        ask("verify", "paged@v1", "--registry", url)
    again = CliRunner().invoke(registry_app, ["publish", str(copy), "--name", "paged", "--registry", url])
    assert (again.exit_code, again.stderr) == (0, "")
    assert "paged@v1 was published before" in again.stdout
    assert "1 missing blob" in again.stdout
    assert ask_json("publish", str(copy), "--name", "paged", "--registry", url)["blobs"] == 0
    ask("verify", "paged@v1", "--registry", url)


@pytest.mark.parametrize(
    "words",
    [
        ("show", "tiny"),
        ("history", "tiny@v1"),
        ("rollback", "tiny@v1", "--reason", "worse"),
        ("promote", "tiny@v1", "V1", "--reason", "better"),
        ("promote", "tiny@v1", "production", "--reason", " "),
    ],
)
@pytest.mark.usefixtures("world")
def test_an_argument_that_can_never_be_right_ends_with_the_code_of_a_wrong_configuration(words):
    with pytest.raises(ConfigError) as caught:
        ask(*words)
    assert caught.value.exit_code == 64


def test_withdraw_diff_and_gc_from_the_command_line(world):
    store, digests = world
    assert "is withdrawn" in ask("withdraw", "tiny@v2", "--reason", "leaks", "--by", "ana")
    assert not ask_json("withdraw", "tiny@v2", "--reason", "leaks", "--by", "ana")["created"]
    with pytest.raises(RegistryError, match=r"tiny@candidate.*not withdrawn"):
        ask("withdraw", "tiny@v1", "--reason", "leaks")
    found = ask_json("diff", "tiny@v1", "tiny@v2")
    assert found["facts"] == {"facts.steps": [0, 1]}
    assert "model.safetensors" in ask("diff", "tiny@v1", f"tiny@{digests[1]}")
    store.put_if_absent("blobs/sha256/aa/" + "a" * 64, b"orphan")
    assert ask_json("gc")["in_grace_period"] == 1
    assert "1 file (6 bytes) and 0 incomplete uploads" in ask("gc", "--grace-hours", "0")
    assert ask_json("gc", "--grace-hours", "0", "--apply")["keys"] == ["blobs/sha256/aa/" + "a" * 64]
    assert ask_json("verify", "tiny@v1")["files"] == 4


def test_retire_lists_and_withdraws_from_the_command_line(world):
    _, digests = world
    found = {"applied": False, "keep": 1, "digests": []}
    assert ask_json("retire", "tiny", "--keep", "1") == found  # v1 is the candidate
    ask("promote", "tiny@v2", "candidate", "--reason", "better")
    assert ask_json("retire", "tiny", "--keep", "1")["digests"] == [digests[0]]
    assert "1 versions would be withdrawn" in ask("retire", "tiny", "--keep", "1")
    assert "1 versions withdrawn" in ask("retire", "tiny", "--keep", "1", "--apply", "--by", "ana")
    assert ask_json("retire", "tiny", "--keep", "1")["digests"] == []


@pytest.mark.usefixtures("world")
def test_signing_from_the_command_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="not set"):
        ask("sign", "tiny@v1")
    assert "ROPEWAY_SIGNING_KEY" in ask("keygen", str(tmp_path / "key"))
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
    keyid = ask_json("sign", "tiny@v1")["keyid"]
    assert "was signed before" in ask("sign", "tiny@v1")
    assert ask_json("show", "tiny@v1")["signed_by"] == [keyid]
    assert keyid in ask("show", "tiny@v1")
    written = ask_json("attestations", "tiny@v1", "--to", str(tmp_path / "attestations"))
    assert written["files"] == [f"{keyid}.sigstore.json"]
    assert [path.name for path in (tmp_path / "attestations").iterdir()] == written["files"]
    with pytest.raises(ConfigError, match="empty folder"):
        ask("attestations", "tiny@v1", "--to", str(tmp_path / "attestations"))


def test_a_long_transfer_is_counted_and_the_count_ends_with_it(world, monkeypatch):
    store, _ = world
    monkeypatch.setattr(options, "_LONG_BYTES", 1)
    monkeypatch.setattr("ropeway.runtime.progress.is_live_terminal", lambda _stream: True)
    counted = []
    monkeypatch.setattr("rich.progress.Progress.advance", lambda _self, _task, count: counted.append(count))
    with options.progress_bar(store, "verify", 100):
        verified = Registry(store).version("tiny@v1").verify()
    assert sum(counted) == verified.bytes
    Registry(store).version("tiny@v1").verify()
    assert sum(counted) == verified.bytes


@pytest.mark.usefixtures("world")
def test_the_registry_comes_from_the_option_else_the_environment_else_the_workspace(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWAY_REGISTRY", (tmp_path / "empty").as_uri())
    assert ask_json("list") == []
    assert len(ask_json("list", "--registry", (tmp_path / "registry").as_uri())) == 1


def test_what_others_wrote_into_a_registry_cannot_steer_the_terminal(world, tmp_path):
    store, _ = world
    package = make_package(tmp_path / "evil", b"evil", words="\x1b]0;owned\x07[bold]not markup[/bold]")
    put(store, package)
    words = ask("show", "tiny@v3")
    assert "\x1b" not in words
    assert "[bold]not markup[/bold]" in words


def test_importing_the_commands_loads_nothing_heavy():
    code = (
        "import sys, ropeway.cli.registry_commands;"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'boto3', 'prefect', 'rich.table') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
