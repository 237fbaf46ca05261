"""Keys of a deployment: a certificate authority, the SuperLink's certificate, and a key pair for each SuperNode."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedomc_speech.errors import SettingsError


def make_keys(folder: Path, nodes: int, hosts: Sequence[str] = ("127.0.0.1", "localhost"), days: int = 365) -> None:
    """Write ``ca.crt``, ``ca.key``, ``server.crt``, ``server.key``, and ``node-0``, ``node-0.pub`` and so on.

    Private keys can only be read by their owner. The machine of a SuperNode needs ``ca.crt`` and its own ``node-i``,
    nothing else. ``ca.key`` is only needed to make further certificates and may be kept elsewhere.

    Args:
        folder: the folder for the files; it is created if it is missing. Existing files are never replaced.
        nodes: number of SuperNodes.
        hosts: addresses and names under which the SuperLink is reached; the first is its common name.
        days: number of days for which the certificates are valid.

    Raises:
        SettingsError: a file exists already or cannot be written, or a number is impossible.
    """
    if nodes < 1 or days < 1 or not hosts:
        raise SettingsError(f"nodes={nodes}, days={days}, hosts={list(hosts)}: at least one of each is needed")
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = _root(authority, days)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(folder / "ca.key", _private(authority, PrivateFormat.PKCS8), 0o600)
        _write(folder / "ca.crt", root.public_bytes(Encoding.PEM))
        _write(folder / "server.key", _private(server, PrivateFormat.PKCS8), 0o600)
        _write(folder / "server.crt", _server(server, hosts, days, authority, root).public_bytes(Encoding.PEM))
        for number in range(nodes):
            key = ec.generate_private_key(ec.SECP256R1())
            _write(folder / f"node-{number}", _private(key, PrivateFormat.OpenSSH), 0o600)
            _write(folder / f"node-{number}.pub", key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    except OSError as error:
        raise SettingsError(f"keys cannot be written to {folder} ({error}): choose another, empty folder") from error


def _root(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    name = _name("fedomc certificate authority")
    return (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    days: int,
    authority: ec.EllipticCurvePrivateKey,
    root: x509.Certificate,
) -> x509.Certificate:
    return (
        _builder(_name(hosts[0]), root.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # some clocks are behind
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
