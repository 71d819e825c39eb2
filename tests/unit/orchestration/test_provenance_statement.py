"""The statements beside a version are valid in their published formats and name its files and inputs."""

import hashlib
import json

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from ropeway.orchestration.provenance_statement import write_statements
from ropeway.orchestration.revision import Revision
from ropeway.registry import Registry
from ropeway.registry.signing import load_signer
from ropeway.registry.signing_keys import load_trusted, make_keys
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import write_json, write_manifest
from ropeway.runtime.workspace import Workspace

COMMIT = "c" * 40
HUB = {"kind": "huggingface", "repo": "team/chats", "commit": "d" * 40, "files": ["a.parquet"]}
FILES = {"kind": "files", "files": {"data/a.jsonl": "1" * 64, "https://x.org/b.jsonl": {"etag": "7", "bytes": 3}}}
CARD = {"license": "apache-2.0", "license_link": "https://www.apache.org/licenses/LICENSE-2.0", "dataset_licenses": {}}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A workspace with a package that has every file that the statements are made of."""
    for name in ("ROPEWAY_REGISTRY", "ROPEWAY_SIGNING_KEY", "ROPEWAY_TRUSTED_KEYS"):
        monkeypatch.delenv(name, raising=False)
    found = Workspace(tmp_path, "tiny")
    found.package.mkdir(parents=True)
    params = {"card": {**CARD, "dataset_licenses": {"hub": "cc-by-4.0"}}, "rng_seed": 1}
    digests = {"base": "b" * 64, "data": "a" * 64}
    sources = [{"name": "hub", "kind": "conversation", "identity": HUB}]
    sources += [{"name": "own", "kind": "document", "identity": FILES}]
    write_json(
        found.package / "card.json",
        {
            "name": "tiny", "parameters": 42, "applied_steps": 3, "fingerprint": "f" * 16, "params": params,
            "base": {"kind": "hub", "name": "team/base", "origin": {"commit": "e" * 40}}, "sources": sources,
        },
    )  # fmt: skip
    write_json(found.package / "eval.json", {"mean": {"tuned": 2.5}, "sources": {"hub": {"tuned": {"loss": 2.5}}}})
    write_json(found.package / "config.json", {"architectures": ["LlamaForCausalLM"]})
    run = {"name": "tiny", "params": params, "digests": digests, "fingerprint": "f" * 16}
    write_json(found.package / "run.json", run | {"sources": {"hub": HUB, "own": FILES}})
    write_manifest(found.package, {"digests": digests})
    write_json(found.timings, {"attempts": [{"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.24.0"}]})
    return found


def statement_of(path):
    return json.loads(path.read_bytes())


def test_both_files_are_valid_in_their_published_formats(workspace):
    written = write_statements(workspace, Revision(COMMIT, ("a.py",)))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(written["mlbom.cdx.json"].read_text()) is None
    statement = statement_of(written["provenance.intoto.json"])
    parsed = json_format.ParseDict(statement, statement_pb2.Statement())
    Statement.copy_from_pb(parsed).validate()
    json_format.ParseDict(statement["predicate"], provenance_pb2.Provenance())  # refuses unknown fields


def test_the_statement_names_every_file_and_input_and_the_bill_of_materials(workspace):
    written = write_statements(workspace, Revision(COMMIT, ("a.py",)))
    statement = statement_of(written["provenance.intoto.json"])
    package = workspace.package
    assert {one["name"]: one["digest"]["sha256"] for one in statement["subject"]} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in package.iterdir()
    }
    built, details = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    assert built["internalParameters"] == {"uncommittedFiles": ["a.py"]}
    inputs = {one["name"]: one["digest"] for one in built["resolvedDependencies"]}
    assert inputs == {
        "code": {"gitCommit": COMMIT},
        "base": {"sha256": "b" * 64},
        "data": {"sha256": "a" * 64},
        "hub": {"gitCommit": "d" * 40},
        "own: data/a.jsonl": {"sha256": "1" * 64},
    }
    bom = written["mlbom.cdx.json"].read_bytes()
    assert details["byproducts"][0]["digest"] == {"sha256": hashlib.sha256(bom).hexdigest()}


def test_the_bill_of_materials_names_data_with_licenses_base_and_libraries(workspace):
    bom = statement_of(write_statements(workspace, Revision(COMMIT, ()))["mlbom.cdx.json"])
    parts = {part["bom-ref"]: part for part in bom["components"]}
    assert set(parts) == {"data:hub", "data:own", "base", "python", "torch", "transformers"}
    assert parts["data:hub"]["licenses"] == [{"license": {"name": "cc-by-4.0"}}]
    assert {"name": "ropeway:license", "value": "not recorded"} in parts["data:own"]["properties"]
    assert {"name": "ropeway:sha256:data/a.jsonl", "value": "1" * 64} in parts["data:own"]["properties"]
    assert parts["torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    model = bom["metadata"]["component"]
    assert model["version"] == "f" * 16
    parameters = model["modelCard"]["modelParameters"]
    assert (parameters["approach"], parameters["modelArchitecture"]) == ({"type": "supervised"}, "LlamaForCausalLM")
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["value"] == "2.5"


def test_equal_packages_give_equal_statements(workspace):
    first, again = (
        {name: path.read_bytes() for name, path in write_statements(workspace, Revision(COMMIT, ())).items()}
        for _ in range(2)
    )
    assert first == again


def test_a_signed_statement_is_verified_by_another_library_and_guarded_by_verify(workspace, tmp_path, monkeypatch):
    (tmp_path / "trusted").mkdir()
    make_keys(tmp_path / "key")
    (tmp_path / "key.pub").rename(tmp_path / "trusted" / "key.pub")
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path / "trusted"))
    written = write_statements(workspace, Revision(COMMIT, ()))
    envelope = Envelope.from_dict(statement_of(written["provenance.intoto.json"]))
    ((keyid, public),) = load_trusted().keys.items()
    assert set(envelope.verify([SSlibKey.from_crypto(public, keyid)], 1)) == {keyid}
    artifact = Registry.open(workspace.registry_url).artifact("tiny")
    done = artifact.publish(workspace.package, provenance={}, attachments=written)
    version = artifact.version(done.digest)
    assert version.verify().provenance == "trusted"
    assert set(version.attestations()) == {f"{keyid}.sigstore.json", *written}
    make_keys(tmp_path / "new")  # the key is rotated: the version stays valid, its statement is not trusted any more
    (tmp_path / "new.pub").rename(tmp_path / "trusted" / "key.pub")
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "new"))
    assert version.sign(load_signer())
    assert version.verify().provenance == "not trusted"
    monkeypatch.delenv("ROPEWAY_TRUSTED_KEYS")
    assert version.verify().provenance == "not checked"


@pytest.mark.parametrize("forged", ["payload", "unsigned", "other files"])
def test_a_statement_that_somebody_replaced_is_not_trusted(workspace, tmp_path, monkeypatch, forged):
    (tmp_path / "trusted").mkdir()
    make_keys(tmp_path / "key")
    (tmp_path / "key.pub").rename(tmp_path / "trusted" / "key.pub")
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path / "trusted"))
    path = write_statements(workspace, Revision(COMMIT, ()))["provenance.intoto.json"]
    if forged == "payload":
        path.write_text(json.dumps({**statement_of(path), "payload": "e30="}))
    elif forged == "unsigned":
        path.write_text(json.dumps({"_type": "https://in-toto.io/Statement/v1", "subject": []}))
    else:
        path.write_bytes(load_signer().sign_statement({"subject": [{"name": "x", "digest": {"sha256": "0" * 64}}]}))
    artifact = Registry.open(workspace.registry_url).artifact("tiny")
    done = artifact.publish(workspace.package, provenance={}, attachments={path.name: path})
    if forged == "other files":
        with pytest.raises(DataError, match="other files"):
            artifact.version(done.digest).verify()
    else:
        assert artifact.version(done.digest).verify().provenance == "not trusted"


def test_a_package_without_a_card_has_no_statements_and_says_so(workspace, capsys):
    (workspace.package / "card.json").unlink()
    assert write_statements(workspace, Revision(COMMIT, ())) == {}
    assert "card.json" in capsys.readouterr().out
