import json
import sys

import pytest

from ropeway.orchestration import publish as champion
from ropeway.orchestration.dvc_stage import Site
from ropeway.orchestration.publish import check_publishing, publish_package
from ropeway.orchestration.revision import Revision
from ropeway.registry import ANY, Registry, Version
from ropeway.registry.signing import load_signer
from ropeway.registry.signing_keys import make_keys
from ropeway.runtime.errors import DataError, RegistryError
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.manifest import write_json, write_manifest
from ropeway.runtime.workspace import Workspace
from tests.support.gate_limits import make_limits
from tests.support.registry_world import make_pages

COMMIT = Revision("a" * 40, ())


class Profile:
    gate = make_limits()
    max_length = 512


class SkillProfile(Profile):
    gate = make_limits(max_passkey_decrease=0.1, max_task_decrease_errors=2.0)


def metrics(loss, rows="rows"):
    return {
        "sources": {"docs": {"base": {"loss": 8.0}, "tuned": {"loss": loss}}},
        "mean": {"base": 8.0, "tuned": loss},
        "validation": rows,
    }


def skills(passkeys=1.0, quiz=0.6):
    keys = {model: {"by_length": {"256": 1.0, "512": value}} for model, value in (("base", 0.0), ("tuned", passkeys))}
    task = {"version": "1", "shots": 0, "n": 100, "lower_is_better": [], "tuned": {"acc": quiz, "acc_stderr": 0.03}}
    return {"passkey": keys, "tasks": {"quiz": task}, "identities": {"passkey": "k", "tasks": "t"}}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    return Workspace(tmp_path, "laptop")


@pytest.fixture
def registry(workspace):
    return Registry.open(workspace.registry_url)


def no_measurement(*_):
    raise AssertionError("no champion had to be measured")


def make(workspace, loss, *, rows="rows", also=None, measure=no_measurement):
    """Make a package whose bytes tell its loss, and publish it; with `also`, skills, under a gate that sees them."""
    workspace.package.mkdir(parents=True, exist_ok=True)
    write_json(workspace.package / "weights.json", {"loss": loss})
    write_manifest(workspace.package, {})
    write_json(workspace.evaluation, metrics(loss, rows) | (also or {}))
    return publish_package(workspace, SkillProfile() if also else Profile(), COMMIT, measure)


def candidate(registry):
    return registry.artifact("laptop").alias("candidate").digest


def test_a_package_whose_card_is_rendered_again_is_the_version_that_it_was(workspace, registry):
    workspace.package.mkdir(parents=True)
    write_json(workspace.package / "weights.json", {"loss": 5.0})
    write_manifest(workspace.package, {})
    write_json(workspace.evaluation, metrics(5.0, "rows"))
    make_pages(workspace.package, workspace.pages, "# first words\n")
    first = publish_package(workspace, Profile(), COMMIT, no_measurement)
    assert "README.md" in registry.version("laptop@v1").describe()["files"]
    make_pages(workspace.package, workspace.pages, "# other words\n")
    again = publish_package(workspace, Profile(), COMMIT, no_measurement)
    assert (first.state, again.state) == ("Published", "Unchanged")
    assert again.digest == first.digest
    assert again.version == "laptop@v1"


@pytest.mark.parametrize("note", ["other", "nothing"])
def test_a_note_that_names_another_package_s_version_is_refused_and_nothing_is_called_published(workspace, note):
    workspace.package.mkdir(parents=True)
    for loss in (5.0, 4.0):
        write_json(workspace.package / "weights.json", {"loss": loss})
        write_manifest(workspace.package, {})
        write_json(workspace.evaluation, metrics(loss))
        make_pages(workspace.package, workspace.pages, f"# {loss}\n")
        last = publish_package(workspace, Profile(), COMMIT, no_measurement)
    notes = sorted((workspace.root / "registry").glob("models/laptop/packages/*.json"))
    assert len(notes) == 2
    (own,) = (path for path in notes if json.loads(path.read_bytes())["digest"] == last.digest)
    (other,) = set(notes) - {own}
    data = other.read_bytes() if note == "other" else b"{}"
    own.unlink()
    own.write_bytes(data)
    with pytest.raises(DataError, match=own.name):
        publish_package(workspace, Profile(), COMMIT, no_measurement)
    own.unlink()
    assert publish_package(workspace, Profile(), COMMIT, no_measurement).digest == last.digest


def test_a_new_package_is_published_once_with_its_lineage_and_becomes_candidate(workspace, registry):
    (workspace.root / "dvc.lock").write_text("schema: '2.0'\n")
    first = make(workspace, 5.0)
    assert (first.state, first.version, candidate(registry)) == ("Published", "laptop@v1", first.digest)
    kept = registry.version("laptop@v1").describe()
    assert kept["provenance"]["git"] == COMMIT.commit
    assert kept["provenance"]["evaluation"] == metrics(5.0)
    assert kept["provenance"]["verdict"]["passed"] is True
    assert list(kept["attachments"]) == ["dvc.lock"]
    again = make(workspace, 5.0)
    assert (again.state, again.version, again.verdict) == ("Unchanged", "laptop@v1", None)
    assert len(registry.artifact("laptop").alias("candidate").events) == 1


def test_what_the_gate_rejects_is_published_and_moves_nothing(workspace, registry):
    first = make(workspace, 5.0)
    second = make(workspace, 5.5)
    assert (second.state, second.version, candidate(registry)) == ("Rejected", "laptop@v2", first.digest)
    assert make(workspace, 5.5).state == "Unchanged"
    assert candidate(registry) == first.digest


@pytest.mark.parametrize(
    ("lost", "line"),
    [
        ({"passkeys": 0.0}, "passkeys at 512 tokens: 0.000, laptop@v1 1.000"),
        ({"quiz": 0.4}, "quiz, acc: 0.400, laptop@v1 0.600"),
    ],
    ids=["long context", "task"],
)
def test_a_run_with_a_lower_loss_that_lost_a_skill_does_not_become_candidate(workspace, registry, lost, line):
    first = make(workspace, 5.0, also=skills())
    second = make(workspace, 4.0, also=skills(**lost))
    assert (second.state, candidate(registry)) == ("Rejected", first.digest)
    assert second.comparison.startswith("better than")
    (failed,) = second.verdict.failed
    assert failed.startswith(line)
    kept = registry.version("laptop@v2").describe()["provenance"]["verdict"]
    assert [check["words"] for check in kept["checks"] if not check["passed"]] == [failed]
    assert make(workspace, 3.0, also=skills()).state == "Published"


def test_an_older_champion_is_measured_on_what_it_lacks_and_then_compared(workspace, registry):
    make(workspace, 5.0)
    asked = []

    def measure(version, sections):
        asked.append((str(version), set(sections)))
        return skills(passkeys=0.9)

    second = make(workspace, 4.9, also=skills(passkeys=0.85), measure=measure)
    assert asked == [("laptop@v1", {"passkey", "tasks"})]
    assert second.state == "Published"
    assert "docs: 4.900, laptop@v1 5.000: -0.100 nats/token, allowed +0.010" in second.verdict.lines
    assert "passkeys at 512 tokens: 0.850, laptop@v1 0.900: -0.050, allowed -0.100" in second.verdict.lines
    assert registry.version("laptop@v2").describe()["provenance"]["opponent"]["validation"] == "rows"


def test_what_a_champion_was_measured_on_before_stays_comparable(workspace):
    known = {name: value for name, value in skills().items() if name != "tasks"}
    make(workspace, 5.0, also={**known, "identities": {"passkey": "k"}})

    def measure(_version, sections):
        assert set(sections) == {"tasks"}
        return {"tasks": skills()["tasks"], "identities": {"tasks": "t"}}

    second = make(workspace, 4.9, also=skills(), measure=measure)
    assert second.state == "Published", second.verdict


def test_an_older_champion_that_cannot_be_measured_is_not_beaten_and_the_metrics_are_named(workspace):
    make(workspace, 5.0)
    second = make(workspace, 4.0, also=skills(), measure=lambda *_: None)
    assert second.state == "Rejected"
    assert [line.split(":")[0] for line in second.verdict.failed] == ["passkeys", "task quiz"]
    assert all("laptop@v1 was not evaluated on" in line for line in second.verdict.failed)


def test_a_run_that_died_between_publishing_and_promoting_is_finished_by_the_next(workspace, registry, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Version, "promote", lambda *_, **__: sys.exit("killed"))
        with pytest.raises(SystemExit):
            make(workspace, 5.0)
    assert candidate(registry) is None
    again = make(workspace, 5.0)
    assert (again.state, again.version, candidate(registry)) == ("Published", "laptop@v1", again.digest)


def test_a_candidate_that_was_moved_back_stays_there(workspace, registry):
    first, _ = make(workspace, 5.0), make(workspace, 4.0)
    registry.artifact("laptop").rollback("candidate", by="anna", reason="it swears")
    again = make(workspace, 4.0)
    assert again.state == "Unchanged"
    assert "was moved to another version since" in again.words
    assert candidate(registry) == first.digest


def test_production_is_the_one_to_beat_where_there_is_one(workspace, registry):
    first, _ = make(workspace, 5.0), make(workspace, 4.0)
    registry.artifact("laptop").version(first.digest).promote("production", expect=None, by="anna", reason="reviewed")
    third = make(workspace, 4.9)
    assert third.state == "Published"
    assert "docs: 4.900, laptop@v1 5.000: -0.100 nats/token, allowed +0.010" in third.verdict.lines


def test_under_a_policy_an_unsigned_version_is_not_the_one_to_beat(workspace, registry, tmp_path, monkeypatch):
    first = make(workspace, 5.0)
    make_keys(tmp_path / "key")
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path))
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
    for act in (lambda: check_publishing(workspace), lambda: make(workspace, 4.0)):
        with pytest.raises(DataError, match="has no signature of a trusted key"):
            act()
    assert candidate(registry) == first.digest
    registry.artifact("laptop").version(first.digest).sign(load_signer())
    check_publishing(workspace)
    assert make(workspace, 4.0).state == "Published"


def test_another_writer_who_moves_candidate_meanwhile_is_not_overwritten(workspace, registry):
    first = make(workspace, 5.0)

    def overtake(*_):
        registry.artifact("laptop").version(first.digest).promote("candidate", expect=ANY, by="b", reason="again")
        write_json(workspace.root / "other" / "weights.json", {})
        write_manifest(workspace.root / "other", {})
        theirs = registry.artifact("laptop").publish(workspace.root / "other", provenance={}, attachments={})
        registry.artifact("laptop").version(theirs.digest).promote(
            "candidate", expect=first.digest, by="b", reason="faster"
        )
        return metrics(5.0, "others")

    with pytest.raises(RegistryError, match="was not moved"):
        make(workspace, 4.0, rows="others", measure=overtake)


def test_on_other_rows_the_champion_is_measured_before_they_are_compared(workspace):
    make(workspace, 5.0)
    asked = []

    def measure(version, sections):
        asked.append((str(version), sections))
        return metrics(6.0, "others")

    second = make(workspace, 5.9, rows="others", measure=measure)
    assert asked == [("laptop@v1", {"losses": "others"})]
    assert second.state == "Published"
    assert "docs: 5.900, laptop@v1 6.000: -0.100 nats/token, allowed +0.010" in second.verdict.lines


def test_a_champion_that_cannot_be_measured_on_these_rows_is_not_beaten(workspace):
    make(workspace, 5.0)
    second = make(workspace, 4.0, rows="others", measure=lambda *_: None)
    assert second.state == "Rejected"
    assert "laptop@v1 was evaluated on other validation rows" in second.verdict.lines[1]


@pytest.mark.parametrize("code", [0, 65])
def test_the_champion_is_pulled_verified_measured_once_and_removed(workspace, registry, monkeypatch, code):
    first = make(workspace, 5.0)
    program = "import json, pathlib, sys; folder, out = map(pathlib.Path, sys.argv[1:3])\n"
    program += f"if {code}: print('another tokenizer'); sys.exit({code})\n"
    program += "out.write_text(json.dumps([json.loads((folder / 'weights.json').read_text())['loss']]))"
    calls, said = [], []

    def command(_workspace, folder, out, sections):
        assert list(sections) == ["losses", "passkey"]
        calls.append(folder)
        return [sys.executable, "-c", program, str(folder), str(out)]

    monkeypatch.setattr(champion, "command", command)
    with workspace_lock(workspace.root, command="test") as held:
        for _ in range(2):
            found = champion.measure_champion(
                Site(workspace.root, held),
                workspace,
                registry.version("laptop@v1"),
                {"losses": "b" * 64, "passkey": "c" * 64},
                said.append,
            )
            assert found == (None if code else [5.0])
    assert len(calls) == (2 if code else 1)
    assert not calls[0].exists()
    assert calls[0].name.startswith(first.digest[:12])
    assert ("another tokenizer" in said) is bool(code)


def test_metrics_that_are_no_mapping_are_refused(workspace):
    make(workspace, 5.0)
    workspace.evaluation.write_text(json.dumps([]))
    write_json(workspace.package / "weights.json", {"loss": 1})
    write_manifest(workspace.package, {})
    with pytest.raises(Exception, match=r"eval\.json: .*object, found list"):
        publish_package(workspace, Profile(), COMMIT, no_measurement)


def test_a_champion_whose_manifest_is_lost_is_damage_and_no_first_version(workspace, registry):
    first = make(workspace, 5.0)
    (manifest,) = (workspace.root / "registry" / "models" / "laptop" / "manifests").glob("*")
    manifest.unlink()
    for act in (lambda: make(workspace, 7.0), lambda: check_publishing(workspace)):
        with pytest.raises(DataError, match="missing"):
            act()
    with pytest.raises(DataError, match=manifest.name):
        registry.version("laptop@v1").verify()
    assert candidate(registry) == first.digest
    write_json(workspace.package / "weights.json", {"loss": 5.0})
    write_manifest(workspace.package, {})
    again = registry.artifact("laptop").publish(workspace.package, provenance={}, attachments={})  # as the message says
    assert again.digest == first.digest
    assert registry.version("laptop@v1").verify().files
