"""The probe of a relay's address: only the answer to this very question counts."""

from __future__ import annotations

from ipaddress import ip_address

from aioice import stun
from hypothesis import given
from hypothesis import strategies as st

from channel.binding import BindingProbe
from runtime.net.address import Address
from runtime.randomness import SeededRandomness

PROBE = BindingProbe(SeededRandomness(1, "probe"))


def answer_of_aioice(request: bytes, mapped: Address) -> bytes:
    """What an independent STUN implementation answers to a request."""
    asked = stun.parse_message(request)
    response = stun.Message(
        message_method=stun.Method.BINDING,
        message_class=stun.Class.RESPONSE,
        transaction_id=asked.transaction_id,
    )
    response.attributes["SOFTWARE"] = "another one"
    response.attributes["XOR-MAPPED-ADDRESS"] = tuple(mapped)
    response.add_fingerprint()
    return bytes(response)


@given(st.ip_addresses(), st.integers(1, 65_535), st.integers(0, 2**32))
def test_the_answer_of_another_implementation_is_understood(
    ip: object, port: int, seed: int
) -> None:
    probe = BindingProbe(SeededRandomness(seed, "probe"))
    mapped = Address.of(str(ip), port)
    assert len(probe.request) == 20
    assert probe.answer(answer_of_aioice(probe.request, mapped)) == mapped
    assert ip_address(mapped.host) == ip


def test_an_answer_to_another_request_or_none_at_all_proves_nothing() -> None:
    other = BindingProbe(SeededRandomness(2, "probe"))
    good = answer_of_aioice(PROBE.request, Address("192.0.2.1", 9))
    assert PROBE.answer(good) is not None
    assert other.answer(good) is None
    assert PROBE.answer(PROBE.request) is None
    for size in range(len(good)):
        assert PROBE.answer(good[:size]) is None
    assert PROBE.answer(good + b"\0") is None


def test_an_answer_without_a_mapped_address_proves_nothing() -> None:
    bare = b"\x01\x01" + PROBE.request[2:]
    assert PROBE.answer(bare) is None


@given(st.binary(max_size=80))
def test_no_bytes_raise(data: bytes) -> None:
    PROBE.answer(data)
    body = data[: len(data) // 4 * 4]
    PROBE.answer(b"\x01\x01" + len(body).to_bytes(2, "big") + PROBE.request[4:] + body)
