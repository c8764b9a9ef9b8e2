"""TURN's data packets and the nonce cookie; rate limits; addresses of this machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relays.peers import PeerPolicy, RateLimiter, source_prefix
from relays.stun import Attribute, MessageClass, Method, StunMessage
from relays.transports.local import local_addresses
from relays.turn import (
    FIRST_CHANNEL,
    LAST_CHANNEL_OF_RFC_5766,
    NS,
    channel_data,
    data_indication,
    is_channel_data,
    is_data_indication,
    is_send_indication,
    nonce_cookie,
    nonce_features,
    read_channel_data,
    read_indication,
    send_indication,
)
from runtime.net.address import Address

addresses = st.builds(
    Address,
    st.one_of(
        st.ip_addresses(v=4),
        st.ip_addresses(v=6).filter(lambda ip: int(ip) >> 48 != 0),  # not an embedded form
    ).map(str),
    st.integers(0, 65_535),
)
identifiers = st.binary(min_size=12, max_size=12)


@given(st.integers(FIRST_CHANNEL, LAST_CHANNEL_OF_RFC_5766), st.binary(max_size=300), st.binary())
def test_channel_data_round_trips_whatever_padding_follows(
    number: int, data: bytes, padding: bytes
) -> None:
    packet = memoryview(channel_data(number, data) + padding)
    assert is_channel_data(packet)
    unpacked = read_channel_data(packet)
    assert unpacked is not None
    assert (unpacked[0], bytes(unpacked[1])) == (number, data)
    assert read_channel_data(packet[: 3 + len(data)]) is None


@given(addresses, st.binary(max_size=300), identifiers, st.booleans())
def test_indications_round_trip_and_are_what_the_codec_reads(
    peer: Address, data: bytes, transaction_id: bytes, is_send: bool
) -> None:
    build = send_indication if is_send else data_indication
    packet = memoryview(build(peer, data, transaction_id))
    assert is_send_indication(packet) == is_send
    assert is_data_indication(packet) != is_send
    unpacked = read_indication(packet)
    assert unpacked is not None
    assert (unpacked[0], bytes(unpacked[1])) == (peer, data)
    message = StunMessage.decode(packet)
    assert message.method == (Method.SEND if is_send else Method.DATA)
    assert message.message_class is MessageClass.INDICATION
    assert message.xor_address(Attribute.XOR_PEER_ADDRESS) == peer
    assert message.value(Attribute.DATA) == data


@given(st.binary(max_size=80), st.booleans())
def test_no_bytes_make_the_readers_of_data_raise(body: bytes, framed: bool) -> None:
    if framed:
        body += bytes(-len(body) % 4)
        body = b"\0\x16" + len(body).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + bytes(12) + body
    read_indication(memoryview(body))
    read_channel_data(memoryview(body))
    is_channel_data(body)


@given(st.integers(0, 2**24 - 1), st.text(max_size=20))
def test_the_features_of_a_nonce_round_trip(features: int, rest: str) -> None:
    assert nonce_features(nonce_cookie(features) + rest) == features


@given(st.text(max_size=40))
def test_any_text_is_a_nonce_with_or_without_features(nonce: str) -> None:
    assert 0 <= nonce_features(nonce) < 2**24
    assert 0 <= nonce_features("obMatJos2" + nonce) < 2**24


@given(
    per_second=st.integers(1, 50),
    burst=st.integers(1, 100),
    gaps_ms=st.lists(st.integers(0, 2000), max_size=200),
)
def test_a_rate_limiter_never_gives_more_than_burst_and_rate(
    per_second: int, burst: int, gaps_ms: list[int]
) -> None:
    limiter = RateLimiter(per_second=per_second, burst=burst, max_keys=10)
    start = now = 5 * NS
    taken = 0
    for gap_ms in gaps_ms:
        now += gap_ms * 10**6
        taken += limiter.take("key", now)
        assert taken <= burst + (now - start) * per_second // NS + 1


def test_a_rate_limiter_is_bounded_in_memory_and_still_limits() -> None:
    limiter = RateLimiter(per_second=1, burst=2, max_keys=100)
    given_away = sum(limiter.take(f"source {number}", 0) for number in range(10_000))
    assert len(limiter) <= 101
    assert given_away <= 102
    later = 100 * NS
    assert limiter.take("anybody", later)
    assert len(limiter) < 10


def test_prefixes_are_a_24_and_a_56() -> None:
    assert source_prefix("192.0.2.1") == source_prefix("192.0.2.255")
    assert source_prefix("192.0.2.1") != source_prefix("192.0.3.1")
    assert source_prefix("2001:db8:0:1::1") == source_prefix("2001:db8:0:ff::9")
    assert source_prefix("2001:db8:0:1::1") != source_prefix("2001:db8:0:100::1")


@given(st.one_of(st.text(max_size=30), st.ip_addresses().map(str)))
def test_any_text_has_an_answer_as_a_peer(host: str) -> None:
    assert PeerPolicy.of().allows(host) in (True, False)


def test_this_machine_knows_its_loopback_addresses() -> None:
    assert "127.0.0.1" in local_addresses()
    assert all(Address.of(host, 0).host == host for host in local_addresses())
