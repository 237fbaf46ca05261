"""What ``make_keys`` writes, as those read it who must trust it."""

import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedomc_speech.deployment import make_keys
from fedomc_speech.errors import SettingsError


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def trusts(authority: Path, server: Path, name: str) -> bool:
    try:
        subject: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        subject = x509.DNSName(name)
    verifier = PolicyBuilder().store(Store([certificate(authority)])).build_server_verifier(subject)  # type: ignore[arg-type]
    try:
        verifier.verify(certificate(server), [])
    except VerificationError:
        return False
    return True


def test_the_certificate_is_for_these_hosts_and_from_this_authority(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        make_keys(folder, 1, ("127.0.0.1", "link.example"), days=7)
    server = ours / "server.crt"
    assert trusts(ours / "ca.crt", server, "127.0.0.1") and trusts(ours / "ca.crt", server, "link.example")
    assert not trusts(ours / "ca.crt", server, "127.0.0.2")
    assert not trusts(theirs / "ca.crt", server, "127.0.0.1")
    assert (certificate(server).not_valid_after_utc - certificate(server).not_valid_before_utc).days == 7
    key = load_pem_private_key((ours / "server.key").read_bytes(), None)
    assert key.public_key() == certificate(server).public_key()


def test_each_node_has_a_pair_of_its_own_and_secrets_are_the_owners(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", 3)
    publics = set()
    for number in range(3):
        private = load_ssh_private_key((tmp_path / "keys" / f"node-{number}").read_bytes(), None)
        public = load_ssh_public_key((tmp_path / "keys" / f"node-{number}.pub").read_bytes())
        assert private.public_key() == public
        publics.add(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    assert len(publics) == 3
    secrets = {path.name for path in (tmp_path / "keys").iterdir() if path.stat().st_mode & 0o077 == 0}
    assert secrets == {"ca.key", "server.key", "node-0", "node-1", "node-2"}


def test_nothing_is_replaced_and_nonsense_is_refused(tmp_path: Path) -> None:
    make_keys(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SettingsError, match="choose another"):
        make_keys(tmp_path, 2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(SettingsError, match="nodes=0"):
        make_keys(tmp_path / "none", 0)
