"""The manifest of a version: its files and the facts that determine the model. Its sha256 is the version's identity.

It is canonical JSON without time, host or git revision, so equal packages are the same version. Those facts are in the
version's event (`publishing.py`).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ropeway.registry.layout import check_digest, check_name, is_digest, manifest_key
from ropeway.registry.rules import PackageFile, check_content, check_files, scan_folder
from ropeway.runtime.errors import DataError, NotFoundError, RegistryError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import NAME as MANIFEST
from ropeway.runtime.manifest import canonical_json, check_file, file_sha256, load_manifest
from ropeway.storage import MAX_DOCUMENT_BYTES, Store

Facts = dict[str, Any]
FORMAT = "ropeway-version/1"
_BATCH = 1000  # manifests in memory at once, about 10 kB each
_REMEDY = "Run `dvc repro package`"
_PAGES_REMEDY = "Run `dvc repro report_package`"


@dataclass(frozen=True, slots=True)
class VersionManifest:
    """The content of a version.

    Attributes:
        files: Every file of the package, including its manifest.json, sorted by path.
        facts: All other keys of the package's manifest.json.
    """

    name: str
    files: tuple[PackageFile, ...]
    facts: Mapping[str, Any]

    @property
    def document(self) -> bytes:
        """The canonical JSON that is stored and signed."""
        return canonical_json(
            {"format": FORMAT, "name": self.name, "files": [asdict(file) for file in self.files], "facts": self.facts}
        )

    @property
    def digest(self) -> str:
        """The sha256 of the document: the identity of the version."""
        return hashlib.sha256(self.document).hexdigest()

    def includes(self, package: "VersionManifest") -> bool:
        """Return whether this version has every file of a package; it can have report pages in addition."""
        files = {file for file in self.files if file.path != MANIFEST}
        return files >= {file for file in package.files if file.path != MANIFEST}

    @property
    def total_bytes(self) -> int:
        """The total size of the files of the version."""
        return sum(file.bytes for file in self.files)


def package_digest(folder: Path, name: str) -> str:
    """Return the digest that `publish` would give a package; checks file sizes but does not hash the files."""
    return build_package_manifest(folder, name, verify=False).digest


def build_version_manifest(package: Path, pages: Path | None, name: str) -> tuple[VersionManifest, dict[str, Path]]:
    """Return the manifest of a package with its report pages, and the path of each file; hashes every byte.

    `pages` is a folder with README.md, report pages and a manifest.json of the whole version; None without pages.

    Raises:
        DataError: As in `build_package_manifest`, or the pages belong to another package.
    """
    manifest = build_package_manifest(package, name, verify=True)
    paths = {file.path: package / file.path for file in manifest.files}
    if pages is None:
        return manifest, paths
    facts = _read_pages(pages)
    listed = facts.pop("files")
    packaged = {
        file.path: {"sha256": file.sha256, "bytes": file.bytes} for file in manifest.files if file.path != MANIFEST
    }
    added = set(scan_folder(pages)) - {MANIFEST}
    same_package = facts.get("package") == file_sha256(package / MANIFEST)
    if not same_package or set(listed) != {*packaged, *added} or added & set(packaged):
        raise DataError(f"{pages}: the pages do not belong to the package {package}. {_PAGES_REMEDY}")
    for path in sorted(added):
        check_file(pages / path, listed[path], remedy=_PAGES_REMEDY)
        check_content(pages / path, path)
    if faults := [
        path for path, entry in packaged.items() if any(listed[path].get(key) != entry[key] for key in entry)
    ]:
        raise DataError(
            f"{pages / MANIFEST}: the entry of {faults[0]} differs from the file in the package. {_PAGES_REMEDY}"
        )
    files = [PackageFile(path, entry["sha256"], entry["bytes"]) for path, entry in listed.items()]
    whole = pages / MANIFEST
    files.append(PackageFile(MANIFEST, file_sha256(whole), whole.stat().st_size))
    check_files(files)
    paths = {**paths, **{path: pages / path for path in (*added, MANIFEST)}}
    return VersionManifest(name, tuple(sorted(files, key=lambda file: file.path)), facts), paths


def _read_pages(pages: Path) -> Facts:
    try:
        manifest: Facts = parse_json((pages / MANIFEST).read_bytes())
        if isinstance(manifest["files"], dict):
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{pages / MANIFEST}: missing, or not the manifest of a version. {_PAGES_REMEDY}")


def build_package_manifest(folder: Path, name: str, *, verify: bool) -> VersionManifest:
    """Return the manifest of a package folder; `verify` hashes every file and checks its first bytes.

    Raises:
        DataError: The manifest is missing, a file does not match it, or a link, path, suffix or size breaks a rule.
        RegistryError: `name` is not a valid model name.
    """
    check_name(name)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a package folder, found none. {_REMEDY}")
    scan_folder(folder)
    own = folder / MANIFEST
    try:
        facts = load_manifest(folder, remedy=_REMEDY, verify=verify)
        entries = facts.pop("files")
        files = [PackageFile(path, entry["sha256"], entry["bytes"]) for path, entry in entries.items()]
        files.append(PackageFile(MANIFEST, file_sha256(own), own.stat().st_size))
        manifest = VersionManifest(name, tuple(sorted(files, key=lambda file: file.path)), facts)
        document_bytes = len(manifest.document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{own}: not the manifest of a package ({error}). {_REMEDY}") from None
    check_files(manifest.files)
    if document_bytes > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{own}: the version manifest would have {document_bytes:,} bytes, expected {MAX_DOCUMENT_BYTES:,} at most"
        )
    if verify:
        for file in manifest.files:
            check_content(folder / file.path, file.path)
    return manifest


def load_version_manifest(store: Store, name: str, digest: str) -> VersionManifest:
    """Return the manifest of a stored version; verify its digest and every package rule.

    Raises:
        RegistryError: The registry does not have this version.
        DataError: The stored manifest does not match its digest, or breaks a rule.
    """
    check_name(name)
    check_digest(digest)
    try:
        document = store.get(manifest_key(name, digest))
    except NotFoundError:
        raise RegistryError(
            f"{store.url}: no version {digest[:12]}… of {name}. `ropeway registry list {name}` shows the versions"
        ) from None
    return _check_manifest(document, store, name, digest)


def load_version_manifests(store: Store, name: str, digests: Sequence[str]) -> Iterator[VersionManifest]:
    """Yield `load_version_manifest` of each digest, in their order; read in batches, which are parallel on S3.

    Raises:
        RegistryError, DataError: As `load_version_manifest`, for the first version that has a fault.
    """
    for start in range(0, len(digests), _BATCH):
        batch = digests[start : start + _BATCH]
        try:
            documents = store.get_many([manifest_key(name, digest) for digest in batch])
        except NotFoundError:  # which one it was is found by reading them one by one
            yield from (load_version_manifest(store, name, digest) for digest in batch)
            continue
        for digest, document in zip(batch, documents, strict=True):
            yield _check_manifest(document, store, name, digest)


def _check_manifest(document: bytes, store: Store, name: str, digest: str) -> VersionManifest:
    key = manifest_key(name, digest)
    if (found := hashlib.sha256(document).hexdigest()) != digest:
        raise DataError(
            f"{store.url}: {key} hashes to {found[:12]}…, expected {digest[:12]}…; it was changed after it was "
            "published. Do not use this version; restore the file from a backup of the registry"
        )
    manifest = _parse_manifest(document, f"{store.url}: {key}")
    if manifest.name != name:
        raise DataError(f"{store.url}: {key} is the manifest of model {manifest.name!r}, expected {name}")
    check_files(manifest.files)
    return manifest


def _parse_manifest(document: bytes, where: str) -> VersionManifest:
    """Return the manifest in a document; raise DataError unless it is canonical JSON of this exact form."""
    try:
        tree = parse_json(document)
        # canonical_json(tree) == document rejects duplicate keys and other spellings of numbers.
        if canonical_json(tree) == document and _is_version_manifest(tree):
            return VersionManifest(tree["name"], tuple(PackageFile(**file) for file in tree["files"]), tree["facts"])
    except ValueError:
        pass
    raise DataError(
        f"{where}: not a version manifest; expected canonical JSON of format {FORMAT}. If a newer Ropeway wrote it, "
        "upgrade Ropeway"
    )


def _is_version_manifest(tree: object) -> bool:
    """Return whether a JSON tree has the keys and types of a version manifest and its files are sorted by path."""
    if not isinstance(tree, dict) or set(tree) != {"format", "name", "files", "facts"} or tree["format"] != FORMAT:
        return False
    files = tree["files"]
    return (
        isinstance(tree["name"], str)
        and isinstance(tree["facts"], dict)
        and isinstance(files, list)
        and all(isinstance(file, dict) and set(file) == {"path", "sha256", "bytes"} for file in files)
        and all(isinstance(file["path"], str) and is_digest(file["sha256"]) for file in files)
        and all(type(file["bytes"]) is int for file in files)  # True is an int to isinstance
        and files == sorted(files, key=lambda file: file["path"])
    )
