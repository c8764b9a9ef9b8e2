"""Tokens, join statements, TURN credentials and the portal's certificate."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import datetime, timedelta
from uuid import UUID

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from channel.credentials import (
    TOKEN_KINDS,
    DecodedToken,
    InvalidToken,
    TokenKind,
    UntrustedPortal,
    decode_token,
    device_key_of,
    encode_token,
    hash_token,
    join_statement,
    pin_of,
    sign_join,
    turn_expiry,
    turn_password,
    turn_username,
    verify_join,
    verify_portal,
)
from runtime.randomness import SeededRandomness
from runtime.secret import Secret
from tests.unit.channel.certificates import NOW, Authority

KEYS = st.binary(min_size=32, max_size=32)
PORTALS = st.sampled_from(["portal.example.com:443", "192.0.2.1:8443", "[2001:db8::1]:443"])
TOKEN = encode_token("client", UUID(int=7), b"s" * 32, "portal.example.com:443", b"p" * 32)


# --- tokens ------------------------------------------------------------------------------------


@given(st.sampled_from(TOKEN_KINDS), st.uuids(), KEYS, PORTALS, KEYS)
def test_a_token_says_what_was_put_into_it(
    kind: TokenKind, id: UUID, secret: bytes, portal: str, pin: bytes
) -> None:
    token = encode_token(kind, id, secret, portal, pin)
    expected = DecodedToken(kind=kind, id=id, secret=secret, portal=portal, pin=pin)
    assert decode_token(token) == expected
    assert decode_token(f"  {token.reveal_text()}\n") == expected
    assert token.reveal_text().startswith(f"hlw_{kind}_")


@given(st.text(max_size=700) | st.text("hlw_clientgateway-AQ", max_size=200))
def test_no_text_raises_anything_but_invalid_token(text: str) -> None:
    with pytest.raises(InvalidToken):
        decode_token(text)


@given(st.data())
def test_one_wrong_character_is_noticed(data: st.DataObject) -> None:
    text = TOKEN.reveal_text()
    place = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.characters(min_codepoint=33, max_codepoint=126))
    if character == text[place]:
        return
    with pytest.raises(InvalidToken) as caught:
        decode_token(text[:place] + character + text[place + 1 :])
    assert text[20:40] not in str(caught.value)


def test_a_token_cut_short_or_of_another_kind_is_refused() -> None:
    text = TOKEN.reveal_text()
    for wrong in (text[:-1], text[:30], text + "A", text.replace("client", "gateway"), ""):
        with pytest.raises(InvalidToken):
            decode_token(wrong)
    with pytest.raises(InvalidToken):
        decode_token(Secret(b"\xff\xfe"))


def test_the_secret_of_a_token_is_not_printed() -> None:
    decoded = decode_token(TOKEN)
    assert "ssss" not in repr(decoded)
    assert "hlw_" not in repr(TOKEN)


def test_the_hash_is_the_one_written_down() -> None:
    expected = hashlib.sha256(b"holloway/1 token" + b"client" + UUID(int=7).bytes + b"s" * 32)
    assert hash_token("client", UUID(int=7), b"s" * 32) == expected.digest()
    assert decode_token(TOKEN).hash == expected.digest()


# --- joining -----------------------------------------------------------------------------------


def test_a_join_is_signed_for_one_challenge_one_token_and_one_tunnel_key() -> None:
    seed = b"d" * 32
    statement = join_statement(b"n" * 32, "portal", UUID(int=7), b"k" * 32)
    assert statement == b"holloway/1 join" + b"n" * 32 + b"portal" + UUID(int=7).bytes + b"k" * 32
    signature = sign_join(seed, statement)
    assert verify_join(device_key_of(seed), signature, statement)
    for other in (
        join_statement(b"m" * 32, "portal", UUID(int=7), b"k" * 32),
        join_statement(b"n" * 32, "portal2", UUID(int=7), b"k" * 32),
        join_statement(b"n" * 32, "portal", UUID(int=8), b"k" * 32),
        join_statement(b"n" * 32, "portal", UUID(int=7), b"l" * 32),
    ):
        assert not verify_join(device_key_of(seed), signature, other)
    assert not verify_join(device_key_of(b"e" * 32), signature, statement)
    with pytest.raises(ValueError, match="32 bytes"):
        join_statement(b"n" * 16, "portal", UUID(int=7), b"k" * 32)


@given(st.binary(max_size=40) | KEYS, st.binary(max_size=70), st.binary(max_size=40))
def test_no_key_or_signature_raises(key: bytes, signature: bytes, statement: bytes) -> None:
    assert not verify_join(key, signature, statement)


# --- relays ------------------------------------------------------------------------------------


@given(st.integers(0, 2**40 - 1), st.integers(0, 2**32), KEYS, st.uuids())
def test_turn_credentials_are_those_written_down(
    expiry: int, seed: int, stamp: bytes, relay: UUID
) -> None:
    username = turn_username(expiry, SeededRandomness(seed, "turn"))
    assert turn_expiry(username) == expiry
    assert len(username.partition(":")[2]) == 16
    message = b"holloway/1 turn\0" + str(relay).encode() + b"\0" + username.encode()
    mac = hmac.new(stamp, message, hashlib.sha256).digest()
    assert turn_password(stamp, relay, username) == base64.urlsafe_b64encode(mac).decode().rstrip(
        "="
    )


@given(st.text(max_size=40))
def test_no_user_name_raises_anything_but_value_error(username: str) -> None:
    with pytest.raises(ValueError, match="not a user name"):
        turn_expiry(username)


# --- the portal's certificate ------------------------------------------------------------------


@pytest.mark.parametrize("host", ["portal.example.com", "192.0.2.1", "2001:db8::1"])
def test_a_leaf_of_the_pinned_authority_under_its_name_is_trusted(host: str) -> None:
    authority = Authority("one")
    leaf, _ = authority.issue(host)
    verify_portal([leaf, authority.certificate], pin=authority.pin, host=host, at=NOW)


def test_anything_else_is_not_trusted() -> None:
    authority, stranger = Authority("one"), Authority("one")
    leaf, _ = authority.issue("portal.example.com")
    foreign, _ = stranger.issue("portal.example.com")
    name, late = "portal.example.com", NOW + timedelta(days=60)
    ca = authority.certificate
    refused: list[tuple[list[x509.Certificate], str, datetime]] = [
        ([], name, NOW),
        ([leaf], name, NOW),
        ([ca], name, NOW),
        ([foreign, stranger.certificate], name, NOW),
        ([foreign, ca], name, NOW),
        ([foreign, stranger.certificate, ca], name, NOW),
        ([leaf, ca], "other.example.com", NOW),
        ([leaf, ca], "192.0.2.1", NOW),
        ([leaf, ca], "not a name", NOW),
        ([leaf, ca], name, late),
        ([leaf, ca], name, NOW - timedelta(days=60)),
        ([leaf, *[ca] * 8], name, NOW),
    ]
    for chain, host, at in refused:
        with pytest.raises(UntrustedPortal):
            verify_portal(chain, pin=authority.pin, host=host, at=at)


def test_a_pin_is_the_hash_of_the_public_key_alone() -> None:
    authority = Authority("one")
    renewed = Authority("two", key=authority.key)
    assert pin_of(authority.certificate) == pin_of(renewed.certificate) == authority.pin
    assert len(authority.pin) == 32
    assert Authority("one").pin != authority.pin
