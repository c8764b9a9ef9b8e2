"""Membership of a cluster, tried over TLS in memory."""

from __future__ import annotations

import ssl

import pytest

from runtime.cluster.membership import (
    Membership,
    MembershipError,
    authority_fingerprint,
    check_node_name,
    make_secret,
    peer_name,
)
from runtime.randomness import SeededRandomness
from runtime.secret import Secret

SECRET = make_secret(SeededRandomness(1, "secret"))
OTHER = make_secret(SeededRandomness(2, "secret"))


def shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends after the handshake and one byte from the server. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = server.wrap_bio(to_server, to_client, server_side=True)
    other = client.wrap_bio(to_client, to_server)
    for _ in range(4):
        for end in (other, one):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    one.do_handshake()
    one.write(b"!")
    assert other.read(1) == b"!"
    return one, other


def test_two_nodes_that_know_the_secret_prove_their_names_over_tls_1_3():
    server, client = shake_hands(Membership(SECRET, "a").server, Membership(SECRET, "b").client)
    assert peer_name(server.getpeercert()) == "b"
    assert peer_name(client.getpeercert()) == "a"
    assert server.version() == client.version() == "TLSv1.3"


def test_whoever_knows_another_secret_is_refused_on_both_sides():
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(Membership(SECRET, "a").server, Membership(OTHER, "b").client)
    careless = Membership(OTHER, "b").client
    careless.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(Membership(SECRET, "a").server, careless)


def test_whoever_shows_no_certificate_is_refused():
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake_hands(Membership(SECRET, "a").server, nobody)


def test_tls_1_2_is_refused():
    old = Membership(SECRET, "b").client
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake_hands(Membership(SECRET, "a").server, old)


def test_the_authority_is_the_same_wherever_the_secret_is():
    assert authority_fingerprint(SECRET) == authority_fingerprint(Secret(SECRET.reveal()))
    assert authority_fingerprint(SECRET) != authority_fingerprint(OTHER)
    assert (
        authority_fingerprint(Secret("x" * 32)).hex()
        == "a3e54d8054c14add386450af8f247fda7d9a728a4f92ebf191c86667f7dd1739"
    )


@pytest.mark.parametrize("secret", [Secret("short"), Secret(b""), Secret(bytes(2_000))])
def test_a_secret_that_could_be_guessed_or_is_endless_is_refused(secret: Secret):
    with pytest.raises(ValueError, match="at random") as caught:
        Membership(secret, "a")
    assert "short" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a-", "a" * 64, "a/b", "ä", "a\n"])
def test_names_that_are_none(name: str):
    with pytest.raises(ValueError, match="not the name"):
        check_node_name(name)


@pytest.mark.parametrize(
    "certificate",
    [
        None,
        {},
        {"subjectAltName": (("DNS", "node:a"),)},
        {"subjectAltName": (("URI", "a"),)},
        {"subjectAltName": (("URI", "node:A b"),)},
        {"subjectAltName": (("URI", "node:a"), ("URI", "node:b"))},
    ],
)
def test_a_certificate_that_does_not_name_one_node_is_refused(certificate: object):
    with pytest.raises(MembershipError):
        peer_name(certificate)


def test_a_membership_shows_no_secret():
    assert repr(Membership(SECRET, "a")) == "<Membership of a>"
