"""The installation's authority: what it makes, keeps, renews and refuses."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from channel.credentials import UntrustedPortal, verify_portal
from portal.authority import (
    CA_LIFE,
    RENEW_BEFORE_END,
    SERVER_LIFE,
    Authority,
    AuthorityError,
)
from runtime.clock import VirtualClock
from runtime.randomness import SeededRandomness

START = datetime(2026, 11, 1, tzinfo=UTC)
NAMES = ("portal.example.org", "192.0.2.7", "2001:db8::7")


def authority(directory: Path, clock: VirtualClock | None = None) -> Authority:
    return Authority(
        directory,
        clock=clock or VirtualClock(utc_start=START),
        randomness=SeededRandomness(1, "authority"),
    )


def test_the_pin_is_the_hash_of_the_key_of_the_ca_and_survives_a_restart(tmp_path: Path) -> None:
    first = authority(tmp_path / "authority")
    spki = first.certificate.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    assert first.pin == sha256(spki).digest()
    assert authority(tmp_path / "authority").pin == first.pin
    assert first.certificate.not_valid_after_utc == START + CA_LIFE


def test_files_are_for_the_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "authority"
    authority(directory).server_certificate(NAMES)
    assert directory.stat().st_mode & 0o777 == 0o700
    found = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert found == dict.fromkeys(("ca.pem", "ca-key.pem", "server.pem", "server-key.pem"), 0o600)


def test_a_server_certificate_comes_with_the_ca_behind_it_and_names_what_was_asked(
    tmp_path: Path,
) -> None:
    ours = authority(tmp_path)
    served = ours.server_certificate(NAMES)
    leaf, ca = x509.load_pem_x509_certificates(served.chain_pem)
    assert ca == ours.certificate
    leaf.verify_directly_issued_by(ca)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(name.value) for name in names} == set(NAMES)
    assert served.not_after == START + SERVER_LIFE
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(served.chain_file, served.key_file)
    assert "PRIVATE KEY" not in repr(served)


@pytest.mark.parametrize("name", NAMES)
def test_an_agent_that_knows_the_pin_trusts_the_chain(tmp_path: Path, name: str) -> None:
    ours = authority(tmp_path)
    chain = x509.load_pem_x509_certificates(ours.server_certificate(NAMES).chain_pem)
    verify_portal(chain, pin=ours.pin, host=name, at=START)
    with pytest.raises(UntrustedPortal):
        verify_portal(chain, pin=bytes(32), host=name, at=START)
    with pytest.raises(UntrustedPortal):
        verify_portal(chain, pin=ours.pin, host="other.example.org", at=START)


def test_a_certificate_is_kept_until_a_third_of_its_life_is_left(tmp_path: Path) -> None:
    clock = VirtualClock(utc_start=START)
    ours = authority(tmp_path, clock)
    first = ours.server_certificate(NAMES)
    assert ours.server_certificate(reversed(NAMES)).chain_pem == first.chain_pem
    assert authority(tmp_path, clock).server_certificate(NAMES).chain_pem == first.chain_pem
    clock.advance((SERVER_LIFE - RENEW_BEFORE_END) // timedelta(microseconds=1) * 1_000)
    second = ours.server_certificate(NAMES)
    assert second.not_after == first.not_after + (SERVER_LIFE - RENEW_BEFORE_END)
    assert second.key_pem != first.key_pem


def test_other_names_mean_another_certificate(tmp_path: Path) -> None:
    ours = authority(tmp_path)
    first = ours.server_certificate(NAMES)
    other = ours.server_certificate(("localhost",))
    assert other.chain_pem != first.chain_pem
    assert other.names == ("localhost",)


def test_a_pair_that_a_crash_left_unmatched_is_replaced(tmp_path: Path) -> None:
    ours = authority(tmp_path)
    first = ours.server_certificate(NAMES)
    old_chain = first.chain_file.read_bytes()
    ours.server_certificate(("localhost",))
    first.chain_file.write_bytes(old_chain)
    again = ours.server_certificate(NAMES)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(again.chain_file, again.key_file)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    authority(tmp_path)
    (tmp_path / "ca-key.pem").chmod(0o640)
    with pytest.raises(AuthorityError, match="chmod 600"):
        authority(tmp_path)


@pytest.mark.parametrize("name", ["ca.pem", "ca-key.pem"])
def test_a_damaged_file_is_named_and_never_replaced(tmp_path: Path, name: str) -> None:
    authority(tmp_path)
    (tmp_path / name).write_bytes(b"nothing of use")
    with pytest.raises(AuthorityError, match=name):
        authority(tmp_path)


def test_a_lost_key_is_not_made_anew_behind_the_agents_backs(tmp_path: Path) -> None:
    authority(tmp_path)
    (tmp_path / "ca-key.pem").unlink()
    with pytest.raises(AuthorityError, match="ca-key"):
        authority(tmp_path)


def test_a_first_start_that_crashed_half_way_is_completed_with_the_same_pin(tmp_path: Path) -> None:
    first = authority(tmp_path)
    first.server_certificate(NAMES)
    (tmp_path / "ca.pem").unlink()
    second = authority(tmp_path)
    assert second.pin == first.pin
    leaf, ca = x509.load_pem_x509_certificates(second.server_certificate(NAMES).chain_pem)
    leaf.verify_directly_issued_by(ca)


def test_a_foreign_ca_certificate_is_refused(tmp_path: Path) -> None:
    authority(tmp_path / "ours")
    authority(tmp_path / "theirs")
    (tmp_path / "ours" / "ca.pem").write_bytes((tmp_path / "theirs" / "ca.pem").read_bytes())
    with pytest.raises(AuthorityError, match="does not belong"):
        authority(tmp_path / "ours")


@pytest.mark.parametrize("name", ["", "a b", "-a.example", "*.example", "a..b", "x" * 64, "ä.de"])
def test_what_is_neither_a_name_nor_an_address_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        authority(tmp_path).server_certificate((name,))


def test_a_certificate_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 to"):
        authority(tmp_path).server_certificate(())
