"""Signatures in the standard format: the standard tool accepts them; certificates, revocation and old ones count."""

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from model_signing import hashing, signing, verifying

from ropeway.registry import Registry
from ropeway.registry.layout import manifest_key, signature_key, versions_log
from ropeway.registry.signing import check_statement, load_signer, read_bundles
from ropeway.registry.signing_keys import keyid_of, load_trusted, make_keys
from ropeway.registry.version_manifest import VersionManifest, load_version_manifest
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import FileStore
from tests.support.registry_world import make_package, make_pages, put

BIRTH = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path):
    return FileStore(tmp_path / "registry")


@pytest.fixture
def key(tmp_path, monkeypatch):
    """A key that signs, trusted by `trusted/key.pub`; no policy is set."""
    (tmp_path / "trusted").mkdir()
    make_keys(tmp_path / "key")
    (tmp_path / "key.pub").rename(tmp_path / "trusted" / "key.pub")
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
    monkeypatch.delenv("ROPEWAY_TRUSTED_KEYS", raising=False)
    return tmp_path / "key"


@pytest.fixture
def policy(key, monkeypatch):
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(key.parent / "trusted"))
    return key.parent / "trusted"


def verify(store):
    return Registry(store).version("tiny@v1").verify()


def make_certificate(  # noqa: PLR0913 - what certificates differ by
    name, key, issuer=None, issuer_key=None, *, authority=False, signs=True, purposes=()
):
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(BIRTH)
        .not_valid_after(BIRTH + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=signs, key_cert_sign=authority, crl_sign=authority, **usage), critical=True
        )
    )
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return builder.sign(issuer_key or key, hashes.SHA256())


def pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def authority(key, tmp_path, monkeypatch):
    """A root, an intermediate authority and a certificate of the signing key; trusted is the root alone."""
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    root_key, middle_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    root = make_certificate("root", root_key, authority=True)
    middle = make_certificate("middle", middle_key, root, root_key, authority=True)
    chain = tmp_path / "chain.pem"
    chain.write_bytes(pem(make_certificate("trainer", private, middle, middle_key)) + pem(middle))
    (tmp_path / "trusted" / "key.pub").unlink()
    (tmp_path / "trusted" / "root.crt").write_bytes(pem(root))
    monkeypatch.setenv("ROPEWAY_SIGNING_CERTIFICATE", str(chain))
    return chain


@pytest.mark.usefixtures("key")
def test_the_standard_tool_accepts_a_pulled_package_and_rejects_a_changed_one(store, tmp_path):
    done = put(store, make_package(tmp_path / "package"))
    Registry(store).version("tiny@v1").pull(tmp_path / "pulled")
    (bundle,) = read_bundles(store, "tiny", done.digest).values()
    (tmp_path / "bundle.json").write_bytes(bundle)
    tool = verifying.Config().use_elliptic_key_verifier(public_key=tmp_path / "trusted" / "key.pub")
    tool.verify(tmp_path / "pulled", tmp_path / "bundle.json")
    (tmp_path / "pulled" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="mismatch"):
        tool.verify(tmp_path / "pulled", tmp_path / "bundle.json")


def test_a_signature_made_by_the_standard_tool_counts(store, key, tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_SIGNING_KEY")
    done = put(store, make_package(tmp_path / "package"))
    Registry(store).version("tiny@v1").pull(tmp_path / "tiny")
    config = signing.Config().use_elliptic_key_signer(private_key=key)
    config.sign(tmp_path / "tiny", tmp_path / "bundle.json")
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path / "trusted"))
    with pytest.raises(DataError):
        verify(store)
    (keyid,) = load_trusted().keys
    store.put_if_absent(signature_key("tiny", done.digest, keyid), (tmp_path / "bundle.json").read_bytes())
    assert verify(store).files == 4


@pytest.mark.parametrize("fault", ["another name", "a file left out"])
def test_a_signature_of_something_else_by_the_same_key_is_refused(store, policy, key, tmp_path, fault, monkeypatch):
    monkeypatch.delenv("ROPEWAY_SIGNING_KEY")
    done = put(store, make_package(tmp_path / "package"))
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(key))
    signer, manifest = load_signer(), load_version_manifest(store, "tiny", done.digest)
    if fault == "another name":
        bundle = signer.sign(VersionManifest("other", manifest.files, manifest.facts))
    else:  # the standard tool would accept this one: it does not look at an ignored path
        monkeypatch.delenv("ROPEWAY_TRUSTED_KEYS")
        Registry(store).version("tiny@v1").pull(tmp_path / "tiny")
        monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(policy))
        left_out = hashing.Config().set_ignored_paths(paths=["model.safetensors"])
        config = signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(left_out)
        config.sign(tmp_path / "tiny", tmp_path / "bundle.json")
        bundle = (tmp_path / "bundle.json").read_bytes()
    store.put_if_absent(signature_key("tiny", done.digest, signer.keyid), bundle)
    with pytest.raises(DataError, match="not a valid signature"):
        verify(store)


@pytest.mark.parametrize("facts", [{"kind": "package", "params": "forged"}, {}, {"kind": "package", "pages": True}])
@pytest.mark.usefixtures("policy")
def test_facts_that_the_signed_manifest_does_not_have_are_refused(store, tmp_path, facts):
    done = put(store, make_package(tmp_path / "package"))
    manifest = load_version_manifest(store, "tiny", done.digest)
    forged = VersionManifest("tiny", manifest.files, facts)
    (keyid,) = load_trusted().keys
    store.put_if_absent(manifest_key("tiny", forged.digest), forged.document)
    bundle = store.get(signature_key("tiny", done.digest, keyid))
    store.put_if_absent(signature_key("tiny", forged.digest, keyid), bundle)
    event = {"digest": forged.digest, "published_at": "2026", "provenance": {}, "attachments": {}}
    store.put_if_absent(versions_log("tiny").key(2), canonical_json(event))
    version = Registry(store).version("tiny@v2")
    for act in (
        version.verify,
        lambda: version.pull(tmp_path / "pulled"),
        lambda: version.promote("candidate", expect=None, by="a", reason="b"),
    ):
        with pytest.raises(DataError, match=r"facts .* manifest\.json"):
            act()
    assert verify(store).files == 4


@pytest.mark.usefixtures("policy")
def test_the_facts_of_a_version_with_pages_are_those_of_its_own_manifest(store, tmp_path):
    package = make_package(tmp_path / "package", digests={"raw": "a"}, rate=1e-05)
    make_pages(package, tmp_path / "pages", "a card")
    Registry(store).artifact("tiny").publish(package, provenance={}, attachments={}, pages=tmp_path / "pages")
    assert verify(store).files == 5


def test_an_ed25519_signature_of_an_earlier_release_counts(store, policy, tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_SIGNING_KEY")
    done = put(store, make_package(tmp_path / "package"))
    old = ed25519.Ed25519PrivateKey.generate()
    public = old.public_key()
    (policy / "old.pub").write_bytes(
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(DataError, match="no signature"):
        verify(store)
    manifest = load_version_manifest(store, "tiny", done.digest)
    store.put_if_absent(signature_key("tiny", done.digest, keyid_of(public)), old.sign(manifest.document))
    assert verify(store).files == 4
    assert read_bundles(store, "tiny", done.digest) == {}


@pytest.mark.usefixtures("authority", "policy")
def test_a_certificate_of_a_trusted_root_counts(store, tmp_path):
    statement = tmp_path / "provenance.intoto.json"
    statement.write_bytes(load_signer().sign_statement({"subject": []}))
    package = make_package(tmp_path / "package")
    Registry(store).artifact("tiny").publish(package, provenance={}, attachments={statement.name: statement})
    assert (verify(store).files, verify(store).provenance) == (5, "not trusted")  # a statement names no certificate


@pytest.mark.parametrize("fault", ["revoked", "another root", "moved"])
@pytest.mark.usefixtures("authority")
def test_a_certified_signature_is_refused(store, policy, tmp_path, fault):
    done = put(store, make_package(tmp_path / "package"))
    keyid = load_signer().keyid
    if fault == "revoked":
        (policy / "revoked.txt").write_text(f"{keyid}  # left the team\n\n")
    elif fault == "another root":
        other = ec.generate_private_key(ec.SECP256R1())
        (policy / "root.crt").write_bytes(pem(make_certificate("root", other, authority=True)))
    else:  # stored under the id of a key that is not revoked
        (policy / "revoked.txt").write_text(keyid)
        bundle = store.get(signature_key("tiny", done.digest, keyid))
        store.put_if_absent(signature_key("tiny", done.digest, "0" * 16), bundle)
    with pytest.raises(DataError, match="no signature of a trusted key"):
        verify(store)


@pytest.mark.parametrize("number", [1, 2], ids=["intermediate", "root"])
@pytest.mark.usefixtures("key")
def test_a_chain_with_a_revoked_authority_is_refused(store, authority, policy, tmp_path, number):
    put(store, make_package(tmp_path / "package"))
    assert verify(store).files == 4
    chain = [*x509.load_pem_x509_certificates(authority.read_bytes())]
    chain += x509.load_pem_x509_certificates((policy / "root.crt").read_bytes())
    other = make_certificate("other", ec.generate_private_key(ec.SECP256R1()), authority=True)
    (policy / "other.crt").write_bytes(pem(other))  # without a trusted root, the policy itself is refused
    assert verify(store).files == 4
    (policy / "revoked.txt").write_text(keyid_of(chain[number].public_key()))
    with pytest.raises(DataError, match="no signature of a trusted key"):
        verify(store)
    (policy / "revoked.txt").write_text(keyid_of(other.public_key()))
    assert verify(store).files == 4
    assert list(load_trusted().roots) == ["root.crt"]


def test_a_policy_whose_only_root_is_revoked_is_refused(authority, policy):
    assert authority.is_file()
    (root,) = x509.load_pem_x509_certificates((policy / "root.crt").read_bytes())
    (policy / "revoked.txt").write_text(keyid_of(root.public_key()))
    with pytest.raises(ConfigError, match="not revoked"):
        load_trusted()


TLS, CODE, ANY = (
    getattr(x509.ExtendedKeyUsageOID, name) for name in ("SERVER_AUTH", "CODE_SIGNING", "ANY_EXTENDED_KEY_USAGE")
)


@pytest.mark.parametrize(
    ("purposes", "accepted"),  # of the leaf and the intermediate
    [
        (([TLS], []), False),
        (([CODE], [TLS]), False),
        (([TLS, CODE], []), True),
        (([CODE], [CODE]), True),
        (([ANY], []), True),
    ],
)
def test_a_certificate_counts_only_if_it_may_sign_code(store, key, policy, monkeypatch, purposes, accepted):
    tmp_path, (leaf, middle) = policy.parent, purposes
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    root_key, middle_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = make_certificate("root", root_key, authority=True)
    between = make_certificate("middle", middle_key, root, root_key, authority=True, purposes=middle)
    own = make_certificate("printer.example", private, between, middle_key, purposes=leaf)
    (policy / "key.pub").unlink()
    (policy / "root.crt").write_bytes(pem(root))
    (tmp_path / "chain.pem").write_bytes(pem(own) + pem(between))
    monkeypatch.setenv("ROPEWAY_SIGNING_CERTIFICATE", str(tmp_path / "chain.pem"))
    put(store, make_package(tmp_path / "package"))
    if accepted:
        assert verify(store).files == 4
        return
    with pytest.raises(DataError, match="no signature of a trusted key"):
        verify(store)


def test_a_certificate_that_may_not_sign_is_refused(store, key, policy, tmp_path, monkeypatch):
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    root_key = ec.generate_private_key(ec.SECP256R1())
    root = make_certificate("root", root_key, authority=True)
    (policy / "key.pub").unlink()
    (policy / "root.crt").write_bytes(pem(root))
    (tmp_path / "leaf.pem").write_bytes(pem(make_certificate("mailer", private, root, root_key, signs=False)))
    monkeypatch.setenv("ROPEWAY_SIGNING_CERTIFICATE", str(tmp_path / "leaf.pem"))
    put(store, make_package(tmp_path / "package"))
    with pytest.raises(DataError, match="no signature of a trusted key"):
        verify(store)


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_policy_is_refused_and_not_taken_for_none(monkeypatch, empty):
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", empty)
    with pytest.raises(ConfigError, match="ROPEWAY_TRUSTED_KEYS is empty"):
        load_trusted()


def test_a_revoked_key_counts_no_longer(store, policy, tmp_path):
    put(store, make_package(tmp_path / "package"))
    (policy / "revoked.txt").write_text(load_signer().keyid)
    with pytest.raises(ConfigError, match="not revoked"):
        verify(store)
    make_keys(tmp_path / "new")
    (tmp_path / "new.pub").rename(policy / "new.pub")
    with pytest.raises(DataError, match="no signature"):
        verify(store)


@pytest.mark.parametrize(
    "bundle",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"}',
        json.dumps(
            {"verificationMaterial": {"publicKey": 7}, "dsseEnvelope": {"payload": [], "signatures": []}}
        ).encode(),
    ],
    ids=range(8),
)
@pytest.mark.usefixtures("policy")
def test_whatever_stands_for_a_signature_is_refused_by_name(store, tmp_path, monkeypatch, bundle):
    monkeypatch.delenv("ROPEWAY_SIGNING_KEY")
    done = put(store, make_package(tmp_path / "package"))
    (keyid,) = load_trusted().keys
    store.put_if_absent(signature_key("tiny", done.digest, keyid), bundle)
    with pytest.raises(DataError, match="not a valid signature"):
        verify(store)


@pytest.mark.parametrize("name", ["ROPEWAY_SIGNING_KEY", "ROPEWAY_SIGNING_CERTIFICATE", "revoked.txt", "root.crt"])
def test_settings_that_cannot_be_used_are_named(authority, policy, tmp_path, name):
    if name == "ROPEWAY_SIGNING_KEY":
        old = ed25519.Ed25519PrivateKey.generate()
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (tmp_path / "key").write_bytes(old.private_bytes(*form))
    elif name == "ROPEWAY_SIGNING_CERTIFICATE":  # of another key
        other = ec.generate_private_key(ec.SECP256R1())
        authority.write_bytes(pem(make_certificate("other", other)))
    else:
        (policy / name).write_text("what")
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        (load_signer if name.startswith("ROPEWAY") else load_trusted)()


@pytest.mark.usefixtures("policy")
def test_a_statement_is_trusted_for_exactly_the_files_that_it_names(store, tmp_path):
    done = put(store, make_package(tmp_path / "package"))
    manifest = load_version_manifest(store, "tiny", done.digest)
    subject = [{"name": file.path, "digest": {"sha256": file.sha256}} for file in manifest.files]
    envelope = load_signer().sign_statement({"subject": subject})
    assert check_statement(envelope, manifest, load_trusted())
    with pytest.raises(DataError, match="other files"):
        check_statement(load_signer().sign_statement({"subject": subject[1:]}), manifest, load_trusted())
    changed = json.loads(envelope)
    changed["payload"] = base64.b64encode(json.dumps({"subject": subject[::-1]}).encode()).decode()
    for bad in (json.dumps(changed).encode(), b"", b"{}", b"[]", b"7", b"{" * 100_000):
        assert not check_statement(bad, manifest, load_trusted())


def test_keygen_makes_a_folder_that_only_its_owner_can_enter(tmp_path):
    make_keys(tmp_path / "new" / "inner" / "key")
    assert (tmp_path / "new" / "inner").stat().st_mode & 0o777 == 0o700


def test_a_policy_whose_folder_is_missing_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="none is not a folder"):
        load_trusted()


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("name", ["Revoked.txt", "revoked", "revoked.txt.txt"])
def test_a_list_of_revoked_keys_under_another_name_is_not_ignored(tmp_path, monkeypatch, name):
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path / "trusted"))
    (tmp_path / "trusted" / name).write_text("a" * 16)
    with pytest.raises(ConfigError, match="Rename"):
        load_trusted()


@pytest.mark.usefixtures("key")
def test_a_list_of_revoked_keys_that_leads_nowhere_is_not_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path / "trusted"))
    (tmp_path / "trusted" / "revoked.txt").symlink_to("none")
    with pytest.raises(ConfigError, match="link"):
        load_trusted()


@pytest.mark.usefixtures("key")
def test_a_public_key_of_an_unknown_kind_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path / "trusted"))
    body = base64.b64encode(bytes.fromhex("300f300706032b65010500030400aabbcc"))
    (tmp_path / "trusted" / "odd.pub").write_bytes(
        b"-----BEGIN PUBLIC KEY-----\n" + body + b"\n-----END PUBLIC KEY-----\n"
    )
    with pytest.raises(ConfigError, match=r"odd\.pub"):
        load_trusted()
