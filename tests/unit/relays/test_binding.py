"""STUN Binding at the server core: NAT behaviour discovery (RFC 5780), clients of RFC 3489, and how
much an answer may weigh."""

from __future__ import annotations

import pytest

from relays.binding import CHANGE_HOST, CHANGE_PORT, places
from relays.stun import Attribute, MessageClass, Method, StunMessage
from runtime.net.address import Address
from tests.unit.relays.bench import UDP, Attributes, Bench, Caller, code_of

SOURCE = ("198.51.100.2", 40_000)
SOURCE_IPV6 = ("2001:db8::7", 40_000)
A, B = "203.0.113.6", "203.0.113.7"
CORNERS = {
    1: Address(A, 3478),
    2: Address(A, 3479),
    3: Address(B, 3478),
    4: Address(B, 3479),
}
CORNERS_IPV6 = {
    11: Address("2001:db8:6::6", 3478),
    12: Address("2001:db8:6::6", 3479),
    13: Address("2001:db8:6::7", 3478),
    14: Address("2001:db8:6::7", 3479),
}
CHANGE_REQUEST = Attribute.CHANGE_REQUEST


def discovering() -> Bench:
    bench = Bench.of(ipv6=True)
    known = {**CORNERS, **CORNERS_IPV6, 5: Address(A, 5349)}
    for number in known:
        bench.server.add_listener(number)
    assert bench.server.offer_discovery(known) == 8
    return bench


def sent(
    bench: Bench, data: bytes, listener: int = 1, source: tuple[str, int] = SOURCE
) -> list[tuple[int, bytes, tuple[str, int]]]:
    bench.server.receive(listener, memoryview(data), source, bench.now)
    return [(number, bytes(packet), to) for number, packet, to in bench.server.drain_transmits()]


def request(*attributes: tuple[int, bytes], fingerprint: bool = False) -> bytes:
    return StunMessage(
        method=Method.BINDING,
        message_class=MessageClass.REQUEST,
        transaction_id=b"transaction!",
        attributes=attributes,
    ).encode(fingerprint=fingerprint)


def ask(
    bench: Bench,
    *attributes: tuple[int, bytes],
    listener: int = 1,
    source: tuple[str, int] = SOURCE,
    fingerprint: bool = False,
) -> tuple[int, StunMessage, tuple[str, int]]:
    data = request(*attributes, fingerprint=fingerprint)
    ((number, packet, to),) = sent(bench, data, listener, source)
    headers = 48 if ":" in source[0] else 28
    assert len(packet) + headers <= 2 * (len(data) + headers)
    return number, StunMessage.decode(packet), to


# --- which listeners ------------------------------------------------------------------------------


def test_listeners_at_two_addresses_with_the_same_two_ports_belong_together() -> None:
    found = places({**CORNERS, **CORNERS_IPV6})
    assert {number: place.other for number, place in found.items()} == {
        1: CORNERS[4], 2: CORNERS[3], 3: CORNERS[2], 4: CORNERS[1],
        11: CORNERS_IPV6[14], 12: CORNERS_IPV6[13], 13: CORNERS_IPV6[12], 14: CORNERS_IPV6[11],
    }  # fmt: skip


@pytest.mark.parametrize("missing", [1, 2, 3, 4])
def test_three_corners_are_not_enough(missing: int) -> None:
    assert places({number: one for number, one in CORNERS.items() if number != missing}) == {}


def test_of_three_addresses_two_belong_together_and_the_third_is_alone() -> None:
    third = {5: Address("203.0.113.8", 3478), 6: Address("203.0.113.8", 3479)}
    assert sorted(places({**CORNERS, **third})) == [1, 2, 3, 4]


# --- RFC 5780 -------------------------------------------------------------------------------------


def test_an_answer_says_where_it_came_from_and_where_another_would() -> None:
    for fingerprint in (False, True):
        number, answer, to = ask(discovering(), fingerprint=fingerprint)
        assert (number, to) == (1, SOURCE)
        assert answer.xor_address(Attribute.XOR_MAPPED_ADDRESS) == SOURCE
        assert answer.address(Attribute.MAPPED_ADDRESS) == SOURCE
        assert answer.address(Attribute.RESPONSE_ORIGIN) == CORNERS[1]
        assert answer.address(Attribute.OTHER_ADDRESS) == CORNERS[4]


def test_every_answer_that_has_room_for_it_names_the_software_and_no_version() -> None:
    _, answer, _ = ask(Bench.of())
    assert answer.value(Attribute.SOFTWARE) == b"Holloway"
    caller = Caller(Bench.of())
    assert Attribute.SOFTWARE not in caller.learn_nonce()
    for answer in (
        caller.call(Method.ALLOCATE, [UDP]),
        caller.refresh(),
        caller.permit("10.0.0.1"),
    ):
        assert answer.value(Attribute.SOFTWARE) == b"Holloway"


def test_the_shortest_request_by_ipv6_has_no_room_for_the_origin() -> None:
    _, answer, _ = ask(discovering(), listener=11, source=SOURCE_IPV6)
    assert answer.address(Attribute.OTHER_ADDRESS) == CORNERS_IPV6[14]
    assert Attribute.RESPONSE_ORIGIN not in answer
    _, answer, _ = ask(discovering(), listener=11, source=SOURCE_IPV6, fingerprint=True)
    assert answer.address(Attribute.RESPONSE_ORIGIN) == CORNERS_IPV6[11]


@pytest.mark.parametrize(
    ("change", "listener"),
    [(0, 2), (CHANGE_PORT, 1), (CHANGE_HOST, 4), (CHANGE_HOST | CHANGE_PORT, 3)],
)
def test_an_answer_comes_from_the_address_that_was_asked_for(change: int, listener: int) -> None:
    number, answer, to = ask(discovering(), (CHANGE_REQUEST, change.to_bytes(4, "big")), listener=2)
    assert (number, to) == (listener, SOURCE)
    assert answer.address(Attribute.RESPONSE_ORIGIN) == CORNERS[listener]
    assert answer.address(Attribute.OTHER_ADDRESS) == CORNERS[3]


def test_a_relay_without_a_second_address_refuses_to_answer_from_one() -> None:
    bench = Bench.of()
    for attribute, value in (
        (CHANGE_REQUEST, b"\0\0\0\6"),
        (Attribute.RESPONSE_PORT, b"\x20\0"),
        (Attribute.PADDING, bytes(64)),
    ):
        _, answer, _ = ask(bench, (attribute, value))
        assert code_of(answer) == 420
        assert answer.value(Attribute.UNKNOWN_ATTRIBUTES) == attribute.to_bytes(2, "big")
    _, answer, _ = ask(bench, (CHANGE_REQUEST, bytes(4)))
    assert code_of(answer) == 0
    assert Attribute.OTHER_ADDRESS not in answer


def test_an_answer_goes_to_another_port_of_the_address_that_asked() -> None:
    for value in (b"\x20\x01", b"\x20\x01\0\0"):
        number, answer, to = ask(discovering(), (Attribute.RESPONSE_PORT, value))
        assert (number, to) == (1, (SOURCE[0], 0x2001))
        assert answer.xor_address(Attribute.XOR_MAPPED_ADDRESS) == SOURCE


def test_a_padded_request_gets_an_answer_as_large_and_no_larger_than_a_packet() -> None:
    for asked, given in ((0, 0), (64, 64), (1500, 1500), (9000, 1500)):
        _, answer, _ = ask(discovering(), (Attribute.PADDING, bytes(asked)))
        assert answer.value(Attribute.PADDING) == bytes(given)


@pytest.mark.parametrize(
    "attributes",
    [
        [(CHANGE_REQUEST, b"\6")],
        [(Attribute.RESPONSE_PORT, b"\x20")],
        [(Attribute.RESPONSE_PORT, b"\0\x35")],
        [(Attribute.RESPONSE_PORT, b"\x20\0"), (Attribute.PADDING, bytes(64))],
    ],
)
def test_what_makes_no_sense_gets_400(attributes: Attributes) -> None:
    _, answer, to = ask(discovering(), *attributes)
    assert code_of(answer) == 400
    assert to == SOURCE


def test_where_answers_come_from_does_not_change_how_many_there_are() -> None:
    bench = discovering()
    changes = [b"\0\0\0\0", b"\0\0\0\2", b"\0\0\0\4", b"\0\0\0\6"]
    answered = sum(
        len(sent(bench, request((CHANGE_REQUEST, changes[turn % 4])), listener=1 + turn % 3))
        for turn in range(300)
    )
    assert answered == bench.server.limits.unauthenticated_burst


# --- RFC 3489 -------------------------------------------------------------------------------------

CLASSIC_ID = b"sixteen bytes id"


def classic(*attributes: tuple[int, bytes]) -> bytes:
    body = b"".join(
        kind.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value
        for kind, value in attributes
    )
    return b"\0\1" + len(body).to_bytes(2, "big") + CLASSIC_ID + body


def read_classic(packet: bytes) -> tuple[int, dict[int, bytes]]:
    assert packet[4:20] == CLASSIC_ID
    assert int.from_bytes(packet[2:4], "big") == len(packet) - 20
    found, offset = {}, 20
    while offset < len(packet):
        kind, size = (int.from_bytes(packet[offset + at : offset + at + 2], "big") for at in (0, 2))
        found[kind] = packet[offset + 4 : offset + 4 + size]
        offset += 4 + size
    return int.from_bytes(packet[:2], "big"), found


def plain(address: tuple[str, int]) -> bytes:
    host = bytes(int(part) for part in address[0].split("."))
    return b"\0\1" + address[1].to_bytes(2, "big") + host


def test_a_client_without_the_magic_cookie_is_answered_in_its_words() -> None:
    ((number, packet, to),) = sent(discovering(), classic())
    assert (number, to) == (1, SOURCE)
    assert len(packet) + 28 <= 2 * (20 + 28)
    assert read_classic(packet) == (
        0x0101,
        {
            Attribute.MAPPED_ADDRESS: plain(SOURCE),
            Attribute.CHANGED_ADDRESS: plain(CORNERS[4]),
            Attribute.SOURCE_ADDRESS: plain(CORNERS[1]),
        },
    )


def test_a_classic_client_is_answered_from_where_it_wants_but_never_elsewhere() -> None:
    elsewhere = (0x0002, plain(("192.0.2.66", 53)))
    ((number, packet, to),) = sent(discovering(), classic((CHANGE_REQUEST, b"\0\0\0\6"), elsewhere))
    assert (number, to) == (4, SOURCE)
    assert read_classic(packet)[1][Attribute.SOURCE_ADDRESS] == plain(CORNERS[4])


def test_a_relay_with_one_address_tells_a_classic_client_its_own_and_no_more() -> None:
    bench = Bench.of()
    ((_, packet, _),) = sent(bench, classic((CHANGE_REQUEST, bytes(4))))
    assert read_classic(packet) == (0x0101, {Attribute.MAPPED_ADDRESS: plain(SOURCE)})
    assert sent(bench, classic((CHANGE_REQUEST, b"\0\0\0\2"))) == []


def test_a_classic_request_with_unknown_attributes_gets_420() -> None:
    ((_, packet, _),) = sent(Bench.of(), classic((0x0077, b"abcd"), (0x8077, b"abcd")))
    kind, found = read_classic(packet)
    assert kind == 0x0111
    assert found[Attribute.ERROR_CODE][2:4] == bytes((4, 20))
    assert found[Attribute.UNKNOWN_ATTRIBUTES] == b"\0\x77\0\x77"


@pytest.mark.parametrize(
    "data",
    [
        classic()[:-1],
        classic() + b"x",
        classic((CHANGE_REQUEST, b"\0")),
        b"\0\1\0\4" + CLASSIC_ID + b"\0\3\0\4",
        b"\0\2\0\0" + CLASSIC_ID,
        classic(*[(0x8001, b"")] * 17),
    ],
)
def test_what_only_looks_like_a_classic_request_is_not_answered(data: bytes) -> None:
    assert sent(discovering(), data) == []


def test_classic_clients_are_within_the_same_rate_as_all_strangers() -> None:
    bench = discovering()
    answered = sum(len(sent(bench, classic())) for _ in range(300))
    assert answered == bench.server.limits.unauthenticated_burst
