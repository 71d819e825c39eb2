"""Signatures of versions in the format of OpenSSF model signing: a Sigstore bundle beside the manifest, one per key.

The bundle signs the path and sha256 of every file, so the `model_signing` command verifies a pulled folder without
Ropeway. Versions signed before 2026-12 have an Ed25519 signature of the version manifest instead; it still counts.

ROPEWAY_SIGNING_KEY           path of an elliptic curve private key (PEM); `publish` and `sign` sign with it
ROPEWAY_SIGNING_CERTIFICATE   its certificate and the intermediate ones (PEM), if users trust an authority, not the key
ROPEWAY_TRUSTED_KEYS          folder of public keys (*.pub), root certificates (*.crt) and `revoked.txt` (key ids). If
                              it is set, promote, pull, verify, review and reproduce refuse every version without a
                              signature by one of these keys or by a certificate of one of these roots. This is the
                              signature policy

Source: model-signing 1.1 (predicate https://model_signing/signature/v1.0), in-toto Statement v1, DSSE 1.0, RFC 8032.
See docs/decisions/0027.
"""

import hashlib
import json
import os
import tempfile
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropeway.registry.blobs import read_blob
from ropeway.registry.layout import signature_key, signatures_prefix
from ropeway.registry.signing_keys import Trust, keyid_of, load_private, load_trusted, public_pem
from ropeway.registry.version_manifest import VersionManifest
from ropeway.runtime.errors import ConfigError, DataError, NotFoundError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import NAME as MANIFEST
from ropeway.runtime.manifest import canonical_json, json_mapping
from ropeway.storage import Store

if TYPE_CHECKING:  # only a registry with keys needs the libraries, which take seconds to import
    from cryptography.x509 import Certificate
    from model_signing.hashing import Config

    from ropeway.registry.signing_keys import PublicKey

_ED25519_BYTES = 64
IN_TOTO = "application/vnd.in-toto+json"


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key, its certificates (leaf first, none without an authority), and the id of its public key."""

    keyid: str
    key: Path
    certificates: tuple["Certificate", ...] = ()

    def sign(self, manifest: VersionManifest) -> bytes:
        """Return the Sigstore bundle that signs the files of a version."""
        from model_signing import signing

        with tempfile.TemporaryDirectory(prefix="ropeway-sign-") as folder:
            config = signing.Config().set_hashing_config(_listed_files(manifest))
            if self.certificates:
                leaf, *chain = (_write_certificate(Path(folder), one) for one in self.certificates)
                # The library cannot read an empty chain; the leaf again changes nothing.
                config.use_certificate_signer(
                    private_key=self.key, signing_certificate=leaf, certificate_chain=chain or [leaf]
                )
            else:
                config.use_elliptic_key_signer(private_key=self.key)
            bundle = Path(folder) / "bundle.json"
            config.sign(manifest.name, bundle)
            return bundle.read_bytes()

    def sign_statement(self, statement: Mapping[str, object]) -> bytes:
        """Return a DSSE envelope of an in-toto statement."""
        from securesystemslib.dsse import Envelope
        from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

        private = load_private(self.key)
        public = SSlibKey.from_crypto(private.public_key(), self.keyid)
        envelope = Envelope(json.dumps(statement, sort_keys=True).encode(), IN_TOTO, {})
        envelope.sign(CryptoSigner(private, public))
        return json.dumps(envelope.to_dict()).encode()


def load_signer() -> Signer | None:
    """Return the signer of ROPEWAY_SIGNING_KEY, or None; raise ConfigError if it is invalid or readable by others."""
    name, certificate = os.environ.get("ROPEWAY_SIGNING_KEY"), os.environ.get("ROPEWAY_SIGNING_CERTIFICATE")
    if not name:
        if certificate:
            raise ConfigError("ROPEWAY_SIGNING_CERTIFICATE: set without ROPEWAY_SIGNING_KEY. Set both, or neither")
        return None
    path = Path(name)
    public = load_private(path).public_key()
    if not certificate:
        return Signer(keyid_of(public), path)
    from cryptography.x509 import load_pem_x509_certificates

    try:
        chain = tuple(load_pem_x509_certificates(Path(certificate).read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"ROPEWAY_SIGNING_CERTIFICATE: {certificate} has no certificate in PEM ({type(error).__name__}). Expected "
            "the certificate of the signing key, then the intermediate ones"
        ) from None
    if chain[0].public_key() != public:
        raise ConfigError(
            f"ROPEWAY_SIGNING_CERTIFICATE: the first certificate in {certificate} is of another key than {path}"
        )
    return Signer(keyid_of(public), path, chain)


def sign(store: Store, manifest: VersionManifest, signer: Signer) -> bool:
    """Store a signature of a version; return False if this key already signed it."""
    key = signature_key(manifest.name, manifest.digest, signer.keyid)
    if store.exists(key):
        return False
    return store.put_if_absent(key, signer.sign(manifest))


def list_signatures(store: Store, name: str, digest: str) -> list[str]:
    """Return the ids of the keys with a signature of a version; the signatures are not verified."""
    prefix = signatures_prefix(name, digest)
    folder, _, start = prefix.rpartition("/")
    names = store.list_names(f"{folder}/", start)
    return sorted(name[len(start) : -len(".sig")] for name in names if name.endswith(".sig"))


def read_bundles(store: Store, name: str, digest: str) -> dict[str, bytes]:
    """Return the Sigstore bundles of a version by key id; an Ed25519 signature is not one."""
    signatures = {
        keyid: store.get(signature_key(name, digest, keyid)) for keyid in list_signatures(store, name, digest)
    }
    return {keyid: data for keyid, data in signatures.items() if len(data) != _ED25519_BYTES}


def check_policy(store: Store, manifest: VersionManifest) -> None:
    """Raise DataError unless there is no signature policy or a trusted key signed this version.

    An invalid signature of a trusted key is an error even if another trusted key signed the version: it was changed. So
    are facts that are not those of the package's manifest.json, which the signature covers: a bundle signs files alone.
    """
    trust = load_trusted()
    if trust is None:
        return
    good = [keyid for keyid, public in trust.keys.items() if _has_signed(store, manifest, keyid, public)]
    if not good and not (trust.roots and _has_certified(store, manifest, trust)):
        raise DataError(
            f"{store.url}: {manifest.name} {manifest.digest[:12]}… has no signature of a trusted key "
            f"({', '.join([*trust.keys, *trust.roots])}). Do not use it, or sign it with a trusted key: `ropeway "
            "registry sign`"
        )
    _check_facts(store, manifest)


def _check_facts(store: Store, manifest: VersionManifest) -> None:
    """Raise DataError unless the facts of a version are all keys but `files` of its manifest.json."""
    own = next((file for file in manifest.files if file.path == MANIFEST), None)
    signed = json_mapping(read_blob(store, own)) if own else {}
    if canonical_json({key: value for key, value in signed.items() if key != "files"}) != canonical_json(
        manifest.facts
    ):
        raise DataError(
            f"{store.url}: the facts of {manifest.name} {manifest.digest[:12]}… are not those of its {MANIFEST}, which "
            "is signed. Do not use the version: its facts were changed and its signature was copied"
        )


def _has_signed(store: Store, manifest: VersionManifest, keyid: str, public: "PublicKey") -> bool:
    key = signature_key(manifest.name, manifest.digest, keyid)
    try:
        signature = store.get(key)
    except NotFoundError:
        return False
    if not _is_valid(signature, manifest, public):
        raise DataError(f"{store.url}: {key} is not a valid signature of this version. Do not use the version")
    return True


def _is_valid(signature: bytes, manifest: VersionManifest, public: "PublicKey") -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not isinstance(public, Ed25519PublicKey):
        return _is_valid_bundle(signature, manifest, public=public)
    try:
        public.verify(signature, manifest.document)
    except InvalidSignature:
        return False
    return True


def _has_certified(store: Store, manifest: VersionManifest, trust: Trust) -> bool:
    """Return whether a key with a certificate of a trusted root signed a version.

    No certificate of the bundle may be of a revoked key or limited to other purposes, such as TLS servers. The roots
    are those of keys that are not revoked, so this covers the whole chain.
    """
    for keyid, bundle in read_bundles(store, manifest.name, manifest.digest).items():
        chain = _read_chain(bundle)
        if (
            chain
            and chain[0].keyid == keyid
            and all(one.may_sign_code and one.keyid not in trust.revoked for one in chain)
            and _is_valid_bundle(bundle, manifest, roots=[one for roots in trust.roots.values() for one in roots])
        ):
            return True
    return False


def _is_valid_bundle(
    bundle: bytes, manifest: VersionManifest, *, public: "PublicKey | None" = None, roots: "Sequence[Certificate]" = ()
) -> bool:
    """Return whether a bundle is a signature of exactly the files and the name of a version."""
    from model_signing import verifying

    with tempfile.TemporaryDirectory(prefix="ropeway-verify-") as folder:
        config = verifying.Config().set_hashing_config(_listed_files(manifest))
        path = Path(folder) / "bundle.json"
        path.write_bytes(bundle)
        if public is not None:
            own = Path(folder) / "key.pub"
            own.write_bytes(public_pem(public))
            config.use_elliptic_key_verifier(public_key=own)
        else:
            config.use_certificate_verifier(
                certificate_chain=[_write_certificate(Path(folder), root) for root in roots]
            )
        try:
            config.verify(manifest.name, path)
            return bool(_signed_statement(bundle)["subject"][0]["name"] == manifest.name)
        except Exception:  # noqa: BLE001 - bytes of the store: the library raises whatever they lead to
            return False


def _signed_statement(bundle: bytes) -> Any:  # noqa: ANN401 - JSON
    return parse_json(b64decode(parse_json(bundle)["dsseEnvelope"]["payload"]))


@dataclass(frozen=True, slots=True)
class _ChainLink:
    """A certificate of a bundle: the id of its key, and whether its extended key usage, if it has one, allows code."""

    keyid: str
    may_sign_code: bool


def _read_chain(bundle: bytes) -> list[_ChainLink]:
    """Return the certificates in a bundle, leaf first; an empty list if it has none or one cannot be read."""
    from cryptography.x509 import load_der_x509_certificate

    try:
        listed = parse_json(bundle)["verificationMaterial"]["x509CertificateChain"]["certificates"]
        chain = [load_der_x509_certificate(b64decode(one["rawBytes"])) for one in listed]
        return [_ChainLink(keyid_of(one.public_key()), _may_sign_code(one)) for one in chain]
    except Exception:  # noqa: BLE001 - as above
        return []


def _may_sign_code(certificate: "Certificate") -> bool:
    """Return whether a certificate has no extended key usage, or one with code signing or any usage (RFC 5280)."""
    from cryptography.x509 import ExtendedKeyUsage, ExtensionNotFound
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        usage = certificate.extensions.get_extension_for_class(ExtendedKeyUsage).value
    except ExtensionNotFound:
        return True
    return not {ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}.isdisjoint(usage)


def check_statement(envelope: bytes, manifest: VersionManifest, trust: Trust) -> bool:
    """Return whether a trusted key signed a statement about exactly the files of a version.

    False for one that is not signed, or signed by another key: a key that was trusted earlier, or one that only a
    certificate makes trusted. Signing a version later does not sign its statement.

    Raises:
        DataError: A trusted key signed it, but it is about other files.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import Key, SSlibKey  # type: ignore[attr-defined]

    keys: list[Key] = [SSlibKey.from_crypto(public, keyid) for keyid, public in trust.keys.items()]
    try:
        opened = Envelope.from_dict(parse_json(envelope))
        opened.verify(keys, 1)
        subjects = parse_json(opened.payload)["subject"]
        stated = {subject["name"]: subject["digest"]["sha256"] for subject in subjects}
    except Exception:  # noqa: BLE001 - as above
        return False
    if stated != {file.path: file.sha256 for file in manifest.files}:
        raise DataError(
            f"{manifest.name} {manifest.digest[:12]}…: its provenance statement is about other files. The model's "
            "files are intact; do not rely on its provenance"
        )
    return True


def _listed_files(manifest: VersionManifest) -> "Config":
    """Return a hashing configuration that takes files and digests from a version manifest and reads nothing."""
    from model_signing import hashing
    from model_signing import manifest as manifests
    from model_signing._hashing.hashing import Digest

    kind = manifests.SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}
    )
    items = [kind.new_item(file.path, Digest("sha256", bytes.fromhex(file.sha256))) for file in manifest.files]

    class Listed(hashing.Config):
        def hash(self, model_path: object, *, files_to_hash: object = None) -> manifests.Manifest:  # noqa: ARG002
            return manifests.Manifest(manifest.name, items, kind)

        def add_ignored_paths(self, *, model_path: object, paths: object) -> None:
            """Ignore nothing: a signature that leaves files out is of other files."""

    return Listed()


def _write_certificate(folder: Path, certificate: "Certificate") -> Path:
    from cryptography.hazmat.primitives.serialization import Encoding

    data = certificate.public_bytes(Encoding.PEM)
    path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.pem"
    path.write_bytes(data)
    return path
