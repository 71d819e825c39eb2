"""A version's core: what determines the model and nothing else. Its canonical JSON's sha256 is the version's identity.

No time, host or revision is in it, so the same package published twice, or made again with the same bytes, is the same
version. Those facts stand beside the version's number (`publishing.py`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ropeway.registry.layout import check_digest, check_name, is_digest, manifest_key
from ropeway.registry.rules import PackageFile, check_content, check_files, scan_folder
from ropeway.runtime.errors import AbsentError, DataError, RegistryError
from ropeway.runtime.manifest import NAME as MANIFEST
from ropeway.runtime.manifest import canonical_json, check_file, file_sha256, load_manifest
from ropeway.storage import MAX_DOCUMENT_BYTES, Store

Facts = dict[str, Any]
FORMAT = "ropeway-version/1"
_REMEDY = "Run `dvc repro package`"
_PAGES_REMEDY = "Run `dvc repro report_package`"


@dataclass(frozen=True, slots=True)
class VersionManifest:
    """What a version is.

    Attributes:
        files: Every file of the package, its own manifest.json among them, sorted by path.
        facts: What that manifest says beside its files.
    """

    name: str
    files: tuple[PackageFile, ...]
    facts: Mapping[str, Any]

    @property
    def document(self) -> bytes:
        """The canonical JSON that is stored, and later signed."""
        return canonical_json(
            {"format": FORMAT, "name": self.name, "files": [asdict(file) for file in self.files], "facts": self.facts}
        )

    @property
    def digest(self) -> str:
        """The version's identity."""
        return hashlib.sha256(self.document).hexdigest()

    def includes(self, package: "VersionManifest") -> bool:
        """Return whether this holds every file of a package alone; the manifest of a version names its pages too."""
        own = {file for file in self.files if file.path != MANIFEST}
        return own >= {file for file in package.files if file.path != MANIFEST}

    @property
    def total_bytes(self) -> int:
        """The size of a pulled package."""
        return sum(file.bytes for file in self.files)


def package_digest(folder: Path, name: str) -> str:
    """Return the digest that `publish` would give a package; sizes are checked, bytes are not hashed again."""
    return build_package_manifest(folder, name, verify=False).digest


def build_version_manifest(package: Path, pages: Path | None, name: str) -> tuple[VersionManifest, dict[str, Path]]:
    """Return the core of a package with its pages, and where each of its files lies; every byte is hashed.

    `pages` holds README.md and pages with a manifest.json of the whole version; None for a package alone.

    Raises:
        DataError: As in `build_package_manifest`, or the pages are of another package.
    """
    core = build_package_manifest(package, name, verify=True)
    places = {file.path: package / file.path for file in core.files}
    if pages is None:
        return core, places
    manifest, own = _read_pages(pages), package / MANIFEST
    stated = manifest.pop("files")
    inside = {file.path: {"sha256": file.sha256, "bytes": file.bytes} for file in core.files if file.path != MANIFEST}
    added = set(scan_folder(pages)) - {MANIFEST}
    if manifest.get("package") != file_sha256(own) or set(stated) != {*inside, *added} or added & set(inside):
        raise DataError(f"{pages}: the pages are not those of {package}. {_PAGES_REMEDY}")
    for path in sorted(added):
        check_file(pages / path, stated[path], remedy=_PAGES_REMEDY)
        check_content(pages / path, path)
    if faults := [path for path, entry in inside.items() if any(stated[path].get(key) != entry[key] for key in entry)]:
        raise DataError(f"{pages / MANIFEST}: {faults[0]} is another one in the package. {_PAGES_REMEDY}")
    files = [PackageFile(path, entry["sha256"], entry["bytes"]) for path, entry in stated.items()]
    whole = pages / MANIFEST
    files.append(PackageFile(MANIFEST, file_sha256(whole), whole.stat().st_size))
    check_files(files)
    places = {**places, **{path: pages / path for path in (*added, MANIFEST)}}
    return VersionManifest(name, tuple(sorted(files, key=lambda file: file.path)), manifest), places


def _read_pages(pages: Path) -> Facts:
    try:
        manifest: Facts = json.loads((pages / MANIFEST).read_bytes())
        if isinstance(manifest["files"], dict):
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{pages}: holds no manifest of a version. {_PAGES_REMEDY}")


def build_package_manifest(folder: Path, name: str, *, verify: bool) -> VersionManifest:
    """Return the core of a package folder; `verify` hashes every file again and looks at how it begins.

    Raises:
        DataError: No manifest, other bytes than it says, a link, a path, suffix or size against the rules.
        RegistryError: `name` cannot be a model's.
    """
    check_name(name)
    if not folder.is_dir():
        raise DataError(f"{folder}: no package there. {_REMEDY}")
    scan_folder(folder)
    own = folder / MANIFEST
    try:
        manifest = load_manifest(folder, remedy=_REMEDY, verify=verify)
        files = [PackageFile(path, facts["sha256"], facts["bytes"]) for path, facts in manifest.pop("files").items()]
        files.append(PackageFile(MANIFEST, file_sha256(own), own.stat().st_size))
        core = VersionManifest(name, tuple(sorted(files, key=lambda file: file.path)), manifest)
        document_bytes = len(core.document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{own}: not a package's manifest ({error}). {_REMEDY}") from None
    check_files(core.files)
    if document_bytes > MAX_DOCUMENT_BYTES:
        raise DataError(f"{own}: its facts make a version of {document_bytes:,} bytes; {MAX_DOCUMENT_BYTES:,} fit")
    if verify:
        for file in core.files:
            check_content(folder / file.path, file.path)
    return core


def load_version_manifest(store: Store, name: str, digest: str) -> VersionManifest:
    """Return a stored version's core, checked against its digest and against every rule.

    Raises:
        RegistryError: The registry does not hold that version.
        DataError: What it holds is not that version, or not one that may be pulled.
    """
    check_name(name)
    check_digest(digest)
    key = manifest_key(name, digest)
    try:
        document = store.get(key)
    except AbsentError:
        raise RegistryError(f"{store.url}: holds no version {digest[:12]}… of {name}") from None
    if (found := hashlib.sha256(document).hexdigest()) != digest:
        raise DataError(
            f"{store.url}: {key} hashes to {found[:12]}…, not to its name; it was changed after it was published. "
            "Do not use this version; restore that file from a copy of the registry"
        )
    core = _parse_manifest(document, f"{store.url}: {key}")
    if core.name != name:
        raise DataError(f"{store.url}: {key} is a version of {core.name!r}, not of {name}")
    check_files(core.files)
    return core


def _parse_manifest(document: bytes, where: str) -> VersionManifest:
    """Return the core a document spells; anything but exactly this form is refused."""
    try:
        tree = json.loads(document)
        if canonical_json(tree) == document and _is_version_manifest(tree):  # no key twice, no number spelled otherwise
            return VersionManifest(tree["name"], tuple(PackageFile(**file) for file in tree["files"]), tree["facts"])
    except (ValueError, RecursionError):
        pass
    raise DataError(f"{where}: not a version this Ropeway can read; expected canonical JSON of format {FORMAT}")


def _is_version_manifest(tree: object) -> bool:
    """Return whether a JSON tree has a core's keys and types, its files sorted by path."""
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
