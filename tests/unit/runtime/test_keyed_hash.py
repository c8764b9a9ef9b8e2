"""`runtime.keyed_hash` beside the standard library."""

from __future__ import annotations

import hmac
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.keyed_hash import HmacSha256, hmac_blake2s, hmac_sha1, hmac_sha256

HASHES = {"sha1": hmac_sha1, "sha256": hmac_sha256, "blake2s": hmac_blake2s}


@pytest.mark.parametrize(("name", "ours"), HASHES.items())
@given(key=st.binary(max_size=200), message=st.binary(max_size=200))
def test_it_gives_the_bytes_of_the_standard_library(
    name: str, ours: Callable[[bytes, bytes], bytes], key: bytes, message: bytes
) -> None:
    assert ours(key, message) == hmac.new(key, message, name).digest()


def test_it_gives_the_bytes_of_rfc_2202() -> None:
    """RFC 2202, section 3, cases 2 and 6 (a key longer than a block)."""
    short = hmac_sha1(b"Jefe", b"what do ya want for nothing?")
    assert short.hex() == "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79"
    long = hmac_sha1(b"\xaa" * 80, b"Test Using Larger Than Block-Size Key - Hash Key First")
    assert long.hex() == "aa4ae5e15272d00e95705637ce8a3b55ed402112"


@given(key=st.binary(max_size=200), messages=st.lists(st.binary(max_size=200), max_size=3))
def test_one_key_serves_several_messages(key: bytes, messages: list[bytes]) -> None:
    begun = HmacSha256(key)
    for message in messages:
        assert begun.digest(message) == hmac.new(key, message, "sha256").digest()
