"""Certificates and a TLS server on loopback, with the faults that certificates have."""

import datetime as dt
import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = dt.timedelta(days=1)
FAULTS = ("self-signed", "unknown CA", "expired", "not yet valid", "other host", "plain HTTP")


@dataclass(frozen=True)
class Authority:
    """A CA of a test.

    Attributes:
        file: Its certificate, for AWS_CA_BUNDLE and SSL_CERT_FILE.
    """

    folder: Path
    file: Path
    key: ec.EllipticCurvePrivateKey
    name: x509.Name

    @classmethod
    def make(cls, folder: Path) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Test CA")
        certificate = _build(name, name, key.public_key(), DAY, is_ca=True).sign(key, hashes.SHA256())
        file = folder / "ca.pem"
        file.write_bytes(certificate.public_bytes(Encoding.PEM))
        return cls(folder, file, key, name)

    def server_context(self, fault: str = "") -> ssl.SSLContext:
        """Return a server's context for 127.0.0.1, with this fault of its certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name("server")
        begin = {"expired": -2 * DAY, "not yet valid": DAY}.get(fault, -DAY / 2)
        builder = _build(subject, subject if fault == "self-signed" else self.name, key.public_key(), DAY, begin=begin)
        host = x509.DNSName("other.example") if fault == "other host" else x509.IPAddress(ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([host]), critical=False)
        certificate = builder.sign(key if fault == "self-signed" else self.key, hashes.SHA256())
        file = self.folder / "server.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file.write_bytes(private + certificate.public_bytes(Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _build(subject, issuer, public, lasts, *, begin=-DAY / 2, is_ca=False) -> x509.CertificateBuilder:
    start = dt.datetime.now(dt.UTC) + begin
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + lasts)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
