"""Statements about a version for other tools: an in-toto statement with SLSA provenance, and a CycloneDX ML-BOM.

Both are stored beside the version, as attachments. The statement names every file of the version and the digest of the
ML-BOM; with ROPEWAY_SIGNING_KEY it is a DSSE envelope signed by that key. See docs/decisions/0027.
Source: https://in-toto.io/Statement/v1, https://slsa.dev/spec/v1.0/provenance.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path

from ropeway.config.addresses import strip_signature
from ropeway.orchestration.revision import Revision
from ropeway.registry.signing import load_signer
from ropeway.registry.versions import ML_BOM, STATEMENT
from ropeway.reporting.ml_bom import build_ml_bom
from ropeway.runtime.errors import DataError
from ropeway.runtime.git import ask_git
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import NAME as MANIFEST
from ropeway.runtime.manifest import Json, canonical_json, file_sha256, json_mapping, write_atomic
from ropeway.runtime.workspace import Workspace

BUILD_TYPE = "urn:ropeway:run:1"
_NEEDED = ("card.json", "config.json", "eval.json", "run.json")
_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://slsa.dev/provenance/v1"
_BUILDER = "urn:ropeway:builder:own-machine"  # SLSA level 1: the operator of the machine states it


def write_statements(workspace: Workspace, revision: Revision) -> dict[str, Path]:
    """Write both files under .work and return them by name; without card.json, print that there are none.

    Raises:
        DataError: A JSON file of the package is missing or damaged.
        ConfigError: ROPEWAY_SIGNING_KEY is not usable.
    """
    if missing := [name for name in _NEEDED if not (workspace.package / name).is_file()]:
        print(f"no provenance statement and no ML-BOM: the package has no {missing[0]}", flush=True)
        return {}
    whole = workspace.pages if workspace.pages.is_dir() else workspace.package
    manifest = _read(whole / MANIFEST)
    version = importlib.metadata.version("ropeway")
    timings = json_mapping(workspace.timings.read_bytes()) if workspace.timings.is_file() else {}
    files = {path: str(facts["sha256"]) for path, facts in manifest["files"].items()}
    files[MANIFEST] = file_sha256(whole / MANIFEST)
    bom = canonical_json(
        build_ml_bom(
            {**manifest, "files": {path: {"sha256": digest} for path, digest in files.items()}},
            _read(workspace.package / "card.json"),
            _read(workspace.package / "config.json"),
            _read(workspace.package / "eval.json"),
            timings,
            version=version,
        )
    )
    statement = build_statement(
        files,
        _read(workspace.package / "run.json"),
        revision,
        repository=ask_git(workspace.root, "remote", "get-url", "origin"),
        version=version,
        ml_bom=bom,
    )
    signer = load_signer()
    folder = workspace.root / ".work" / "statements" / workspace.profile
    written = {
        ML_BOM: bom,
        STATEMENT: signer.sign_statement(statement) if signer else canonical_json(statement),
    }
    for name, data in written.items():
        write_atomic(folder / name, data)
    return {name: folder / name for name in written}


def build_statement(
    files: Mapping[str, str],
    run: Json,
    revision: Revision,
    *,
    repository: str | None,
    version: str,
    ml_bom: bytes,
) -> dict[str, object]:
    """Return an in-toto statement with SLSA provenance.

    Args:
        files: sha256 of every file of the version, by path.
        run: run.json of the package.
        revision: The commit of the workspace.
        repository: URL of the git remote; None if there is none. Credentials in it are removed.
        version: The installed version of Ropeway.
        ml_bom: The ML-BOM, named as a byproduct.
    """
    return {
        "_type": _TYPE,
        "subject": [{"name": path, "digest": {"sha256": digest}} for path, digest in sorted(files.items())],
        "predicateType": _PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"profile": run["name"], "params": run["params"]},
                "internalParameters": {"uncommittedFiles": list(revision.dirty)},
                "resolvedDependencies": list(_list_inputs(run, revision, repository)),
            },
            "runDetails": {
                "builder": {"id": _BUILDER, "version": {"ropeway": version}},
                "metadata": {"invocationId": str(run["fingerprint"])},
                "byproducts": [{"name": ML_BOM, "digest": {"sha256": hashlib.sha256(ml_bom).hexdigest()}}],
            },
        },
    }


def _list_inputs(run: Json, revision: Revision, repository: str | None) -> Iterator[dict[str, object]]:
    """Yield the code, the folders that the training read, and the files of the sources whose sha256 is known."""
    if revision.commit:
        address = _git_uri(repository or "")
        where = {"uri": f"git+{address}@{revision.commit}"} if address else {}
        yield {"name": "code", **where, "digest": {"gitCommit": revision.commit}}
    for name, digest in sorted(run["digests"].items()):
        yield {"name": name, "digest": {"sha256": digest}}
    for source, identity in sorted(run["sources"].items()):
        if commit := identity.get("commit"):
            uri = f"https://huggingface.co/datasets/{identity['repo']}/tree/{commit}"
            yield {"name": source, "uri": uri, "digest": {"gitCommit": commit}}
            continue
        files = identity.get("files")
        for path, digest in sorted(files.items()) if isinstance(files, Mapping) else ():
            if isinstance(digest, str):
                yield {"name": f"{source}: {path}", "digest": {"sha256": digest}}


def _git_uri(remote: str) -> str | None:
    """Return the URI of a git remote without credentials; None for a path on this machine.

    >>> _git_uri("git@example.org:team/model.git"), _git_uri("https://ana:key@example.org/model.git"), _git_uri("/srv")
    ('ssh://git@example.org/team/model.git', 'https://example.org/model.git', None)
    """
    if "://" in remote:
        scheme, _, rest = strip_signature(remote).partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" if scheme != "file" else None
    host, colon, path = remote.partition(":")
    return f"ssh://{host}/{path}" if colon and "/" not in host else None


def _read(path: Path) -> Json:
    try:
        found = parse_json(path.read_bytes())
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise DataError(f"{path}: missing, or not a JSON mapping. Run `dvc repro package report_package`")
