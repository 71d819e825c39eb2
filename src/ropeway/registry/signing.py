"""Signatures: who stands for a version. Ed25519 over the core's bytes, beside the manifest, one file per key.

ROPEWAY_SIGNING_KEY    a private key's file (PEM); `publish` and `sign` sign with it
ROPEWAY_TRUSTED_KEYS   a folder of public keys (*.pub, PEM). When it is set, what none of them signed is neither
                       promoted, pulled nor verified: that is the policy

To change keys: put the new public key into the folder, `ropeway registry sign` what shall stay trusted with the new
private key, then take the old public key out. Source of the scheme: RFC 8032; encodings: RFC 8410.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ropeway.registry.layout import signature_key, signatures_prefix
from ropeway.registry.version_manifest import VersionManifest
from ropeway.runtime.errors import AbsentError, ConfigError, DataError
from ropeway.storage import Store

if TYPE_CHECKING:  # only a registry with keys needs the library
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key and the name its public half goes by."""

    keyid: str
    private: "Ed25519PrivateKey"

    def sign(self, core: VersionManifest) -> bytes:
        """Return the signature of a version."""
        return self.private.sign(core.document)


def load_signer() -> Signer | None:
    """Return the environment's signer, None without one; raise ConfigError for no key, or one others may read."""
    name = os.environ.get("ROPEWAY_SIGNING_KEY")
    if not name:
        return None
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = Path(name)
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"ROPEWAY_SIGNING_KEY: {path} can be read by others. `chmod 600` it, or make a new key")
        private = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"ROPEWAY_SIGNING_KEY: {path} cannot be read as a private key without a passphrase "
            f"({type(error).__name__}). `ropeway registry keygen` makes one"
        ) from None
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"ROPEWAY_SIGNING_KEY: {path} is not an Ed25519 key. `ropeway registry keygen` makes one")
    return Signer(_keyid(private.public_key()), private)


def load_trusted() -> "dict[str, Ed25519PublicKey] | None":
    """Return the trusted public keys by key id, None without a policy; raise ConfigError for a folder without keys."""
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
            raise ConfigError(f"ROPEWAY_TRUSTED_KEYS: {path} is no public key ({type(error).__name__})") from None
        if not isinstance(public, Ed25519PublicKey):
            raise ConfigError(f"ROPEWAY_TRUSTED_KEYS: {path} is not an Ed25519 key")
        trusted[_keyid(public)] = public
    if not trusted:
        raise ConfigError(f"ROPEWAY_TRUSTED_KEYS: {name} holds no *.pub. Put a public key there, or unset the variable")
    return trusted


def sign(store: Store, core: VersionManifest, signer: Signer) -> bool:
    """Store a version's signature; return False when that key had signed it before."""
    return store.put_if_absent(signature_key(core.name, core.digest, signer.keyid), signer.sign(core))


def list_signatures(store: Store, name: str, digest: str) -> list[str]:
    """Return the ids of the keys that signed a version, whether right or not."""
    prefix = signatures_prefix(name, digest)
    folder, _, start = prefix.rpartition("/")
    names = (key.rpartition("/")[2] for key in store.list_keys(f"{folder}/"))
    return sorted(name[len(start) : -len(".sig")] for name in names if name.startswith(start) and name.endswith(".sig"))


def check_policy(store: Store, core: VersionManifest) -> None:
    """Raise DataError unless the environment has no policy or one of its keys signed this version.

    A wrong signature under a trusted key's name is an error though another key signed rightly: somebody changed it.
    """
    trusted = load_trusted()
    if trusted is None:
        return
    good = [keyid for keyid, public in trusted.items() if _has_signed(store, core, keyid, public)]
    if not good:
        raise DataError(
            f"{store.url}: {core.name} {core.digest[:12]}… has no signature of a trusted key ({', '.join(trusted)}). "
            "Do not use it; or have it signed: `ropeway registry sign`"
        )


def _has_signed(store: Store, core: VersionManifest, keyid: str, public: "Ed25519PublicKey") -> bool:
    from cryptography.exceptions import InvalidSignature

    key = signature_key(core.name, core.digest, keyid)
    try:
        signature = store.get(key)
    except AbsentError:
        return False
    try:
        public.verify(signature, core.document)
    except InvalidSignature:
        raise DataError(f"{store.url}: {key} is not that key's signature of this version. Do not use it") from None
    return True


def make_keys(path: Path) -> str:
    """Write a new private key and, beside it, `.pub`; return the key id. Raise ConfigError when one of them exists."""
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    secret = private.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    public = private.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    try:
        for place, data, mode in ((path, secret, 0o600), (path.with_name(f"{path.name}.pub"), public, 0o644)):
            with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: {error.strerror}; keys are never overwritten. Choose another name"
        ) from None
    return _keyid(private.public_key())


def _keyid(public: "Ed25519PublicKey") -> str:
    """Return the first 16 hex digits of the sha256 of a public key's 32 bytes."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]
