"""The preshared key: both ends agree on it, and it is bound to everything that names the tunnel."""

from __future__ import annotations

import hmac
import pickle
import struct
from hashlib import sha256
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.randomness import SeededRandomness
from tunnel.preshared import KemError, KemKey, encapsulate, preshared_key

CONTEXT: dict[str, Any] = {
    "account": UUID(int=1),
    "connection": UUID(int=2),
    "client": UUID(int=3),
    "gateway": UUID(int=4),
    "client_tunnel_key": b"c" * 32,
    "gateway_tunnel_key": b"g" * 32,
    "kem_public_key": b"k" * 1184,
    "ciphertext": b"x" * 1088,
}


def test_both_ends_agree_on_the_secret() -> None:
    key = KemKey.generate()
    secret, ciphertext = encapsulate(key.public_bytes())
    assert len(key.public_bytes()) == 1184
    assert len(ciphertext) == 1088
    assert key.decapsulate(ciphertext) == secret
    assert len(secret) == 32


def test_the_same_randomness_gives_the_same_key() -> None:
    first = KemKey.generate(SeededRandomness(7, "kem"))
    second = KemKey.generate(SeededRandomness(7, "kem"))
    assert first.public_bytes() == second.public_bytes()


def test_a_tampered_ciphertext_gives_another_secret() -> None:
    key = KemKey.generate()
    secret, ciphertext = encapsulate(key.public_bytes())
    assert key.decapsulate(bytes([ciphertext[0] ^ 1]) + ciphertext[1:]) != secret


def test_the_derivation_is_the_one_that_is_written_down() -> None:
    secret = b"s" * 32
    parts = [value.bytes if isinstance(value, UUID) else value for value in CONTEXT.values()]
    salt = sha256(b"".join(struct.pack("!I", len(part)) + part for part in parts)).digest()
    extracted = hmac.digest(salt, secret, "sha256")
    expected = hmac.digest(extracted, b"holloway/1 wg-psk\x01", "sha256")
    assert preshared_key(secret, **CONTEXT) == expected


@pytest.mark.parametrize("name", list(CONTEXT))
def test_a_change_of_any_part_of_the_context_changes_the_key(name: str) -> None:
    value = CONTEXT[name]
    other = UUID(int=99) if isinstance(value, UUID) else value[:-1] + b"!"
    assert preshared_key(b"s" * 32, **CONTEXT) != preshared_key(
        b"s" * 32, **{**CONTEXT, name: other}
    )


def test_a_key_shows_nothing_of_itself() -> None:
    key = KemKey.generate()
    assert repr(key) == "KemKey(...)"
    with pytest.raises(TypeError):
        pickle.dumps(key)


@given(st.binary(max_size=1300))
def test_input_of_any_bytes_raises_nothing_but_its_own_error(data: bytes) -> None:
    key = KemKey(bytes(64))
    for use in (key.decapsulate, encapsulate):
        try:
            use(data)
        except KemError:
            continue


def test_a_public_key_whose_coefficients_are_not_reduced_is_refused() -> None:
    with pytest.raises(KemError):
        encapsulate(b"\xff" * 1184)
