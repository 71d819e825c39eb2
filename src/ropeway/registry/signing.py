"""Signatures of versions: Ed25519 over the version manifest, stored beside it, one file per key.

ROPEWAY_SIGNING_KEY    path of a private key (PEM); `publish` and `sign` sign with it
ROPEWAY_TRUSTED_KEYS   folder of public keys (*.pub, PEM). If it is set, promote, pull and verify refuse every version
                       without a signature by one of these keys. This is the signature policy

To rotate keys: add the new public key to the folder, sign the trusted versions again with `ropeway registry sign` and
the new private key, then remove the old public key. Source: RFC 8032 (Ed25519), RFC 8410 (encodings).
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ropeway.registry.layout import signature_key, signatures_prefix
from ropeway.registry.version_manifest import VersionManifest
from ropeway.runtime.errors import ConfigError, DataError, NotFoundError
from ropeway.storage import Store

if TYPE_CHECKING:  # only a registry with keys needs the library
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key and the id of its public key."""

    keyid: str
    private: "Ed25519PrivateKey"

    def sign(self, manifest: VersionManifest) -> bytes:
        """Return the signature of a version."""
        return self.private.sign(manifest.document)


def load_signer() -> Signer | None:
    """Return the signer of ROPEWAY_SIGNING_KEY, or None; raise ConfigError if it is invalid or readable by others."""
    name = os.environ.get("ROPEWAY_SIGNING_KEY")
    if not name:
        return None
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = Path(name)
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(
                f"ROPEWAY_SIGNING_KEY: {path} can be read by other users. Run `chmod 600` on it, or create a new key"
            )
        private = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"ROPEWAY_SIGNING_KEY: {path} cannot be read as a private key without a passphrase "
            f"({type(error).__name__}). `ropeway registry keygen` creates one"
        ) from None
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"ROPEWAY_SIGNING_KEY: {path} is not an Ed25519 key. `ropeway registry keygen` creates one")
    return Signer(_keyid(private.public_key()), private)


def load_trusted() -> "dict[str, Ed25519PublicKey] | None":
    """Return the trusted public keys by key id, None without a policy; raise ConfigError if the folder has no keys."""
    name = os.environ.get("ROPEWAY_TRUSTED_KEYS")
    if not name:
        return None
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    trusted = {}
    for path in sorted(Path(name).glob("*.pub")):
        try:
            public = load_pem_public_key(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"ROPEWAY_TRUSTED_KEYS: {path} is not a public key ({type(error).__name__}). Replace or remove it"
            ) from None
        if not isinstance(public, Ed25519PublicKey):
            raise ConfigError(f"ROPEWAY_TRUSTED_KEYS: {path} is not an Ed25519 key. Replace or remove it")
        trusted[_keyid(public)] = public
    if not trusted:
        raise ConfigError(f"ROPEWAY_TRUSTED_KEYS: {name} has no *.pub file. Add a public key, or unset the variable")
    return trusted


def sign(store: Store, manifest: VersionManifest, signer: Signer) -> bool:
    """Store a signature of a version; return False if this key already signed it."""
    return store.put_if_absent(signature_key(manifest.name, manifest.digest, signer.keyid), signer.sign(manifest))


def list_signatures(store: Store, name: str, digest: str) -> list[str]:
    """Return the ids of the keys with a signature of a version; the signatures are not verified."""
    prefix = signatures_prefix(name, digest)
    folder, _, start = prefix.rpartition("/")
    names = (key.rpartition("/")[2] for key in store.list_keys(f"{folder}/"))
    return sorted(name[len(start) : -len(".sig")] for name in names if name.startswith(start) and name.endswith(".sig"))


def check_policy(store: Store, manifest: VersionManifest) -> None:
    """Raise DataError unless there is no signature policy or a trusted key signed this version.

    An invalid signature of a trusted key is an error even if another trusted key signed the version: it was changed.
    """
    trusted = load_trusted()
    if trusted is None:
        return
    good = [keyid for keyid, public in trusted.items() if _has_signed(store, manifest, keyid, public)]
    if not good:
        raise DataError(
            f"{store.url}: {manifest.name} {manifest.digest[:12]}… has no signature of a trusted key "
            f"({', '.join(trusted)}). Do not use it, or sign it with a trusted key: `ropeway registry sign`"
        )


def _has_signed(store: Store, manifest: VersionManifest, keyid: str, public: "Ed25519PublicKey") -> bool:
    from cryptography.exceptions import InvalidSignature

    key = signature_key(manifest.name, manifest.digest, keyid)
    try:
        signature = store.get(key)
    except NotFoundError:
        return False
    try:
        public.verify(signature, manifest.document)
    except InvalidSignature:
        raise DataError(
            f"{store.url}: {key} is not a valid signature of this version. Do not use the version"
        ) from None
    return True


def make_keys(path: Path) -> str:
    """Write a new private key and its public key (`.pub`); return the key id. Raise ConfigError if a file exists."""
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    secret = private.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    public = private.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    try:
        for place, data, mode in ((path, secret, 0o600), (path.with_name(f"{path.name}.pub"), public, 0o644)):
            with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
    except FileExistsError as error:
        raise ConfigError(f"{error.filename} exists; a key is never overwritten. Choose another name") from None
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot write the key ({error.strerror}). Choose another folder") from None
    return _keyid(private.public_key())


def _keyid(public: "Ed25519PublicKey") -> str:
    """Return the first 16 hex digits of the sha256 of a public key's 32 bytes."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]
