"""Keys: the private key that signs, and the public keys and root certificates that are trusted.

The variables are described in `signing.py`.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropeway.runtime.errors import ConfigError

if TYPE_CHECKING:  # only a registry with keys needs the library
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.x509 import Certificate

    PublicKey = EllipticCurvePublicKey | Ed25519PublicKey

REVOKED = "revoked.txt"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those of model-signing
_KEYID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Trust:
    """The content of ROPEWAY_TRUSTED_KEYS without what is revoked, and the revoked key ids.

    Attributes:
        keys: Public keys by key id.
        roots: Root certificates by file name.
    """

    keys: "Mapping[str, PublicKey]"
    roots: "Mapping[str, tuple[Certificate, ...]]" = field(default_factory=dict)
    revoked: frozenset[str] = field(default_factory=frozenset)


def load_private(path: Path) -> "EllipticCurvePrivateKey":
    """Return the private key in a PEM file.

    Raises:
        ConfigError: It is missing, readable by others, has a passphrase, or is not on a curve of the standard format.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

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
    if isinstance(private, Ed25519PrivateKey):
        raise ConfigError(
            f"ROPEWAY_SIGNING_KEY: {path} is an Ed25519 key, which the standard format does not have. Create a new key "
            "with `ropeway registry keygen`, and keep the old .pub file in ROPEWAY_TRUSTED_KEYS for the versions that "
            "it signed"
        )
    if not isinstance(private, EllipticCurvePrivateKey) or private.curve.name not in _CURVES:
        raise ConfigError(
            f"ROPEWAY_SIGNING_KEY: {path} is not a key on one of the curves {', '.join(_CURVES)}. `ropeway registry "
            "keygen` creates one"
        )
    return private


def load_trusted() -> Trust | None:
    """Return what ROPEWAY_TRUSTED_KEYS trusts, None without a policy; raise ConfigError if it trusts nothing."""
    name = os.environ.get("ROPEWAY_TRUSTED_KEYS")
    if name is None:
        return None
    if not name.strip():
        raise ConfigError(
            "ROPEWAY_TRUSTED_KEYS is empty, which states no policy. Name a folder of keys, or unset the variable"
        )
    if not Path(name).is_dir():
        raise ConfigError(f"ROPEWAY_TRUSTED_KEYS: {name} is not a folder. Name one with public keys (*.pub)")
    revoked = _load_revoked(Path(name) / REVOKED)
    keys = {keyid_of(public): public for path in sorted(Path(name).glob("*.pub")) if (public := _load_public(path))}
    files = {path.name: _load_roots(path) for path in sorted(Path(name).glob("*.crt"))}
    valid = {
        file: tuple(one for one in roots if keyid_of(one.public_key()) not in revoked) for file, roots in files.items()
    }
    roots = {file: certificates for file, certificates in valid.items() if certificates}
    if not (keys.keys() - revoked or roots):
        raise ConfigError(
            f"ROPEWAY_TRUSTED_KEYS: {name} has no *.pub or *.crt file of a key that is not revoked, so no version is "
            "trusted. Add the public key of a new key (`ropeway registry keygen`), or a root certificate"
        )
    return Trust({keyid: public for keyid, public in keys.items() if keyid not in revoked}, roots, revoked)


def _load_public(path: Path) -> "PublicKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        public = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"ROPEWAY_TRUSTED_KEYS: {path} is not a public key ({type(error).__name__}). Replace or remove it"
        ) from None
    if isinstance(public, Ed25519PublicKey) or (
        isinstance(public, EllipticCurvePublicKey) and public.curve.name in _CURVES
    ):
        return public
    raise ConfigError(
        f"ROPEWAY_TRUSTED_KEYS: {path} is neither a key on one of the curves {', '.join(_CURVES)} nor an Ed25519 key. "
        "Replace or remove it"
    )


def _load_roots(path: Path) -> "tuple[Certificate, ...]":
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return tuple(load_pem_x509_certificates(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"ROPEWAY_TRUSTED_KEYS: {path} is not a certificate in PEM ({type(error).__name__}). Replace or remove it"
        ) from None


def _load_revoked(path: Path) -> frozenset[str]:
    """Return the key ids in revoked.txt, one per line; text after `#` is a comment. Raise ConfigError for others."""
    if odd := [one.name for one in path.parent.iterdir() if _is_misnamed(one.name)]:
        raise ConfigError(f"ROPEWAY_TRUSTED_KEYS: {path.parent / odd[0]} would be ignored. Rename it to {REVOKED}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(f"ROPEWAY_TRUSTED_KEYS: {path} is a link to no file. Restore or remove it") from None
        return frozenset()
    except (OSError, ValueError) as error:
        raise ConfigError(f"ROPEWAY_TRUSTED_KEYS: {path} cannot be read ({type(error).__name__})") from None
    ids = [text for line in lines if (text := line.partition("#")[0].strip())]
    if wrong := [text for text in ids if not _KEYID.fullmatch(text)]:
        raise ConfigError(f"ROPEWAY_TRUSTED_KEYS: {path} has {wrong[0]!r}, expected key ids of 16 hex digits")
    return frozenset(ids)


def _is_misnamed(name: str) -> bool:
    """Return whether a file looks like the list of revoked keys, which is read under one name only."""
    return name != REVOKED and name.casefold() in (
        "revoked",
        REVOKED,
        f"{REVOKED}.txt",
        "revoke.txt",
        "revocations.txt",
    )


def make_keys(path: Path) -> str:
    """Write a new private key and its public key (`.pub`), and their folder (mode 700); return the key id.

    Raises:
        ConfigError: A file exists, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    secret = private.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    public = public_pem(private.public_key())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place, data, mode in ((path, secret, 0o600), (path.with_name(f"{path.name}.pub"), public, 0o644)):
            with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
    except FileExistsError as error:
        raise ConfigError(f"{error.filename} exists; a key is never overwritten. Choose another name") from None
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot write the key ({error.strerror}). Choose another folder") from None
    return keyid_of(private.public_key())


def public_pem(public: "PublicKey") -> bytes:
    """Return a public key in PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def keyid_of(public: Any) -> str:  # noqa: ANN401 - a public key of any kind that a certificate can have
    """Return the first 16 hex digits of the sha256 of a public key: of Ed25519 its 32 bytes, of others its DER form."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    raw = (
        public.public_bytes_raw()
        if isinstance(public, Ed25519PublicKey)
        else public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    return hashlib.sha256(raw).hexdigest()[:16]
