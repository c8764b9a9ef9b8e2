"""The TURN server core, request by request: error codes, limits, expiry."""

from __future__ import annotations

from uuid import UUID

import pytest

from channel.credentials import turn_password, turn_username, turn_username_of
from relays.authentication import GRACE_S, MAX_REVOKED, StampedCredentials
from relays.requests import ServerLimits
from relays.stun import (
    Attribute,
    Integrity,
    Method,
    PasswordAlgorithm,
    StunMessage,
    user_hash,
)
from relays.turn import (
    FEATURE_PASSWORD_ALGORITHMS,
    channel_data,
    nonce_features,
    send_indication,
)
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from tests.unit.relays.bench import (
    LIFETIME_0,
    LISTENER,
    RELAY_HOST,
    RELAY_HOST_IPV6,
    UDP,
    UNIX_S,
    Bench,
    Caller,
    code_of,
    indication_of,
)

PEER = Address("192.0.2.10", 5000)
IPV6 = (Attribute.REQUESTED_ADDRESS_FAMILY, b"\2\0\0\0")
SOURCE = ("198.51.100.2", 40_000)


def even_port(reserve: bool) -> tuple[int, bytes]:
    return (Attribute.EVEN_PORT, b"\x80" if reserve else b"\0")


# --- binding, authentication ---------------------------------------------------------------------


def test_a_binding_request_is_told_where_it_came_from() -> None:
    bench = Bench.of()
    for source in (SOURCE, ("2001:db8::7", 1234)):
        answer = Caller(bench, source).bare(Method.BINDING)
        assert answer is not None
        assert answer.xor_address(Attribute.XOR_MAPPED_ADDRESS) == source


def test_an_attribute_that_must_be_understood_and_is_not_gets_420_with_its_number() -> None:
    caller = Caller(Bench.of())
    answer = caller.bare(Method.BINDING, [(0x7777, b""), (0xF777, b"")])
    assert code_of(answer) == 420
    assert answer is not None
    assert answer.value(Attribute.UNKNOWN_ATTRIBUTES) == b"\x77\x77"
    answer = caller.call(Method.ALLOCATE, [UDP, (Attribute.CHANGE_REQUEST, bytes(4))])
    assert code_of(answer) == 420
    assert answer.value(Attribute.UNKNOWN_ATTRIBUTES) == b"\0\x03"


def test_the_first_allocate_is_challenged_with_realm_nonce_and_sha_256() -> None:
    caller = Caller(Bench.of(credentials=StampedCredentials(bytes(32))))
    challenge = caller.learn_nonce()
    assert code_of(challenge) == 401
    assert challenge.text(Attribute.REALM) == "holloway"
    assert nonce_features(challenge.text(Attribute.NONCE) or "") == FEATURE_PASSWORD_ALGORITHMS
    assert challenge.password_algorithms(Attribute.PASSWORD_ALGORITHMS) == (2,)


def test_requests_lacking_a_part_of_the_credentials_get_400() -> None:
    caller = Caller(Bench.of())
    for missing in (Attribute.USERNAME, Attribute.REALM, Attribute.NONCE):
        message = StunMessage.decode(caller.encode(Method.ALLOCATE, [UDP]))
        rest = tuple(pair for pair in message.attributes if pair[0] != missing)
        shorter = StunMessage(
            method=message.method,
            message_class=message.message_class,
            transaction_id=message.transaction_id,
            attributes=rest,
        ).encode(key=caller.key, integrity=Integrity.SHA256)
        (answer,) = caller.bench.from_client(shorter, SOURCE)
        assert code_of(StunMessage.decode(answer)) == 400


def test_a_wrong_password_user_or_realm_gets_401() -> None:
    bench = Bench.of()
    assert code_of(Caller(bench, password="guess").call(Method.ALLOCATE, [UDP])) == 401
    stranger = Caller(bench, username="alice")
    stranger.username = "mallory"
    assert code_of(stranger.call(Method.ALLOCATE, [UDP])) == 401
    elsewhere = Caller(bench)
    elsewhere.realm = b"elsewhere"
    assert code_of(elsewhere.call(Method.ALLOCATE, [UDP])) == 401
    assert bench.server.allocations == 0


def test_an_offer_that_was_cut_down_on_the_way_gets_400() -> None:
    caller = Caller(Bench.of(), algorithm=PasswordAlgorithm.MD5)
    caller.learn_nonce()
    caller.offer = b"\0\1\0\0"
    assert code_of(caller.call(Method.ALLOCATE, [UDP])) == 400


def test_old_credentials_are_for_relays_that_stand_alone() -> None:
    old = Caller(Bench.of(), algorithm=PasswordAlgorithm.MD5)
    old.integrity = Integrity.SHA1
    assert old.allocate().host == RELAY_HOST
    stamped = StampedCredentials(bytes(32))
    old = Caller(Bench.of(credentials=stamped), algorithm=PasswordAlgorithm.MD5)
    old.integrity = Integrity.SHA1
    assert code_of(old.call(Method.ALLOCATE, [UDP])) == 401


def test_a_user_may_hide_his_name_behind_its_hash_where_names_are_known() -> None:
    for credentials, code in ((None, 0), (StampedCredentials(bytes(32)), 401)):
        caller = Caller(Bench.of(credentials=credentials))
        message = StunMessage.decode(caller.encode(Method.ALLOCATE, [UDP]))
        hidden = (Attribute.USERHASH, user_hash("alice", "holloway"))
        attributes = tuple(hidden if a[0] == Attribute.USERNAME else a for a in message.attributes)
        data = StunMessage(
            method=message.method,
            message_class=message.message_class,
            transaction_id=message.transaction_id,
            attributes=attributes,
        ).encode(key=caller.key, integrity=Integrity.SHA256)
        (answer,) = caller.bench.from_client(data, SOURCE)
        assert code_of(StunMessage.decode(answer)) == code


def test_a_nonce_holds_for_an_hour_and_for_one_source() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    caller.allocate()
    other = Caller(bench, ("198.51.100.2", 40_001))
    other.nonce, other.offer = caller.nonce, caller.offer
    assert code_of(other.call(Method.ALLOCATE, [UDP])) == 438
    for _ in range(6):
        bench.advance(590)
        assert code_of(caller.refresh()) == 0
    bench.advance(100)
    stale = caller.refresh()
    assert code_of(stale) == 438
    assert stale.value(Attribute.NONCE) not in (None, caller.nonce)
    caller.nonce = stale.value(Attribute.NONCE) or b""
    assert code_of(caller.refresh()) == 0


def test_stamped_user_names_begin_before_their_expiry_and_last_beyond_it() -> None:
    relay_id, stamp = UUID(int=7), b"s" * 32
    credentials = StampedCredentials(stamp)
    bench = Bench.of(credentials=credentials)
    name = turn_username(UNIX_S + 60, SeededRandomness(1, "name"))
    caller = Caller(bench, password=turn_password(stamp, relay_id, name))
    caller.username = name
    assert code_of(caller.call(Method.ALLOCATE, [UDP])) == 401  # the portal has not greeted yet
    credentials.relay_id = relay_id
    caller.allocate()
    bench.advance(120)
    assert code_of(caller.refresh()) == 0
    late = Caller(bench, ("198.51.100.2", 40_001), password=caller.password)
    late.username = name
    assert code_of(late.call(Method.ALLOCATE, [UDP])) == 401
    credentials.relay_id = UUID(int=8)
    assert code_of(caller.refresh()) == 401


def test_a_user_name_keeps_nothing_alive_for_ever() -> None:
    relay_id, stamp = UUID(int=7), b"s" * 32
    credentials = StampedCredentials(stamp)
    credentials.relay_id = relay_id
    bench = Bench.of(credentials=credentials)
    name = turn_username(UNIX_S + 60, SeededRandomness(1, "name"))
    caller = Caller(bench, password=turn_password(stamp, relay_id, name))
    caller.username = name
    caller.allocate()
    refreshed = 0
    for _ in range(40):
        bench.advance(300)
        caller.learn_nonce()
        refreshed += code_of(caller.refresh()) == 0
    assert refreshed == (60 + GRACE_S) // 300
    assert bench.server.allocations == 0


def test_a_revoked_user_loses_what_it_has_and_gets_nothing_until_its_names_have_expired() -> None:
    relay_id, stamp = UUID(int=7), b"s" * 32
    credentials = StampedCredentials(stamp)
    credentials.relay_id = relay_id
    bench = Bench.of(credentials=credentials)

    def caller(user: str, expiry: int, port: int) -> Caller:
        name = turn_username_of(expiry, user)
        made = Caller(bench, ("198.51.100.2", port), password=turn_password(stamp, relay_id, name))
        made.username = name
        return made

    revoked = [caller("A" * 16, UNIX_S + life, 40_000 + life) for life in (3_600, 7_200)]
    other = caller("B" * 16, UNIX_S + 3_600, 50_000)
    for one in (*revoked, other):
        one.allocate()
    credentials.revoke("A" * 16, until_unix_s=UNIX_S + 7_200, unix_s=UNIX_S)
    assert bench.server.revoke_user("A" * 16) == 2
    assert bench.server.allocations == 1
    for one in revoked:
        assert code_of(one.call(Method.ALLOCATE, [UDP])) == 401
    assert code_of(other.refresh()) == 0


def test_the_memory_of_revoked_users_is_bounded() -> None:
    credentials = StampedCredentials(b"s" * 32)
    for number in range(MAX_REVOKED + 10):
        credentials.revoke(f"{number:016}", until_unix_s=UNIX_S + 60, unix_s=UNIX_S)
    assert credentials.revoked_users == MAX_REVOKED
    credentials.revoke("A" * 16, until_unix_s=UNIX_S + 120, unix_s=UNIX_S + 61)
    assert credentials.revoked_users == 1


# --- allocate ------------------------------------------------------------------------------------


def test_an_allocation_tells_relayed_and_mapped_address_and_lifetime() -> None:
    bench = Bench.of()
    answer = Caller(bench).call(Method.ALLOCATE, [UDP, (Attribute.LIFETIME, b"\0\0\xff\xff")])
    relayed = answer.xor_address(Attribute.XOR_RELAYED_ADDRESS)
    assert relayed is not None
    assert relayed.host == RELAY_HOST
    assert 49_152 <= relayed.port <= 65_535
    assert (1, relayed.port) in bench.sockets.open_ports.values()
    assert answer.xor_address(Attribute.XOR_MAPPED_ADDRESS) == SOURCE
    assert answer.integer(Attribute.LIFETIME, 4) == 3600


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ([], 400),
        ([(Attribute.REQUESTED_TRANSPORT, b"\x11")], 400),
        ([(Attribute.REQUESTED_TRANSPORT, b"\x06\0\0\0")], 442),
        ([UDP, IPV6], 440),
        ([UDP, (Attribute.REQUESTED_ADDRESS_FAMILY, b"\7\0\0\0")], 440),
        ([UDP, (Attribute.LIFETIME, b"\0")], 400),
        ([UDP, even_port(True), (Attribute.RESERVATION_TOKEN, bytes(8))], 400),
        ([UDP, IPV6, (Attribute.RESERVATION_TOKEN, bytes(8))], 400),
        ([UDP, (Attribute.RESERVATION_TOKEN, bytes(8))], 508),
    ],
)
def test_an_allocate_that_cannot_be_served_gets_its_code(
    attributes: list[tuple[int, bytes]], code: int
) -> None:
    bench = Bench.of()
    assert code_of(Caller(bench).call(Method.ALLOCATE, attributes)) == code
    assert not bench.sockets.open_ports


def test_a_repeated_allocate_gets_the_same_answer_and_another_one_437() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    data = caller.encode(Method.ALLOCATE, [UDP])
    (first,) = bench.from_client(data, SOURCE)
    (second,) = bench.from_client(data, SOURCE)
    assert first == second
    assert bench.server.allocations == 1
    assert code_of(caller.call(Method.ALLOCATE, [UDP])) == 437


def test_quotas_are_486_for_a_user_or_a_source_and_508_for_the_relay() -> None:
    limits = ServerLimits(allocations_per_username=2, allocations_per_source=3, allocations=4)
    bench = Bench.of(limits=limits)

    def code(source: tuple[str, int], username: str) -> int:
        return code_of(Caller(bench, source, username).call(Method.ALLOCATE, [UDP]))

    assert [code(("198.51.100.2", port), "alice") for port in (1, 2, 3)] == [0, 0, 486]
    assert [code(("198.51.100.2", port), "bob") for port in (4, 5)] == [0, 486]
    assert code(("198.51.100.3", 1), "bob") == 0
    limits = ServerLimits(allocations=1)
    bench = Bench.of(limits=limits)
    assert [code(("198.51.100.2", port), "bob") for port in (4, 5)] == [0, 508]
    assert bench.server.load == 1.0


def test_ports_of_other_programs_are_passed_over_until_none_is_free() -> None:
    bench = Bench.of(ports=(50_000, 50_003))
    bench.sockets.busy = {50_000, 50_001, 50_002}
    assert Caller(bench).allocate().port == 50_003
    other = Caller(bench, ("198.51.100.2", 2))
    assert code_of(other.call(Method.ALLOCATE, [UDP])) == 508


def test_a_pair_of_ports_is_reserved_for_half_a_minute() -> None:
    bench = Bench.of()
    answer = Caller(bench).call(Method.ALLOCATE, [UDP, even_port(True)])
    first = answer.xor_address(Attribute.XOR_RELAYED_ADDRESS)
    token = answer.value(Attribute.RESERVATION_TOKEN)
    assert first is not None
    assert token is not None
    assert first.port % 2 == 0
    second = Caller(bench, ("198.51.100.2", 2)).allocate((Attribute.RESERVATION_TOKEN, token))
    assert second.port == first.port + 1
    again = Caller(bench, ("198.51.100.2", 3))
    token_attribute = (Attribute.RESERVATION_TOKEN, token)
    assert code_of(again.call(Method.ALLOCATE, [UDP, token_attribute])) == 508
    answer = Caller(bench, ("198.51.100.2", 4)).call(Method.ALLOCATE, [UDP, even_port(True)])
    bench.advance(31)
    token_attribute = (
        Attribute.RESERVATION_TOKEN,
        answer.value(Attribute.RESERVATION_TOKEN) or b"",
    )
    assert code_of(again.call(Method.ALLOCATE, [UDP, token_attribute])) == 508
    assert len(bench.sockets.open_ports) == 3


def test_an_even_port_without_a_reservation_bears_no_token() -> None:
    answer = Caller(Bench.of()).call(Method.ALLOCATE, [UDP, even_port(False)])
    relayed = answer.xor_address(Attribute.XOR_RELAYED_ADDRESS)
    assert relayed is not None
    assert relayed.port % 2 == 0
    assert Attribute.RESERVATION_TOKEN not in answer


def test_an_ipv6_address_is_relayed_for_a_client_that_came_by_ipv4() -> None:
    bench = Bench.of(ipv6=True)
    caller = Caller(bench)
    relayed = caller.allocate(IPV6)
    assert relayed.host == RELAY_HOST_IPV6
    assert code_of(caller.permit("2001:db8::9")) == 0
    assert code_of(caller.permit("192.0.2.10")) == 443
    peer = ("2001:db8::9", 5000)
    ((to, packet),) = bench.from_peer(b"hello", peer, relayed)
    assert to == SOURCE
    assert indication_of(packet) == (peer, b"hello")


def test_a_draining_relay_sends_newcomers_away_and_keeps_its_guests() -> None:
    bench = Bench.of()
    guest = Caller(bench)
    guest.allocate()
    bench.server.drain()
    assert code_of(Caller(bench, ("198.51.100.2", 2)).call(Method.ALLOCATE, [UDP])) == 508
    assert code_of(guest.refresh()) == 0
    assert code_of(guest.permit(PEER.host)) == 0
    alternate = Address("192.0.2.99", 3478)
    bench = Bench.of(alternate=alternate)
    bench.server.drain()
    answer = Caller(bench).call(Method.ALLOCATE, [UDP])
    assert code_of(answer) == 300
    assert answer.address(Attribute.ALTERNATE_SERVER) == alternate


# --- refresh, permissions, channels --------------------------------------------------------------


def test_an_allocation_ends_when_it_is_not_refreshed() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    caller.allocate()
    bench.advance(599)
    assert caller.refresh().integer(Attribute.LIFETIME, 4) == 600
    bench.advance(599)
    assert bench.server.allocations == 1
    bench.advance(2)
    assert bench.server.allocations == 0
    assert not bench.sockets.open_ports
    assert code_of(caller.refresh()) == 437


def test_a_shorter_lifetime_counts_from_the_refresh() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    caller.allocate((Attribute.LIFETIME, b"\0\0\x0e\x10"))
    assert caller.refresh().integer(Attribute.LIFETIME, 4) == 600
    bench.advance(601)
    assert bench.server.allocations == 0


def test_refresh_with_a_lifetime_of_zero_gives_the_allocation_back() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    caller.allocate()
    assert caller.refresh(LIFETIME_0).integer(Attribute.LIFETIME, 4) == 0
    assert not bench.sockets.open_ports
    assert code_of(caller.refresh(LIFETIME_0)) == 437
    caller.allocate()


def test_another_user_on_the_same_five_tuple_gets_441() -> None:
    bench = Bench.of()
    Caller(bench).allocate()
    thief = Caller(bench, username="bob")
    assert code_of(thief.refresh()) == 441
    assert code_of(thief.permit(PEER.host)) == 441
    assert code_of(thief.bind(0x4000, PEER)) == 441
    assert bench.server.allocations == 1


def test_who_is_at_a_five_tuple_now_may_give_back_what_another_user_left_there() -> None:
    bench = Bench.of()
    Caller(bench).allocate()
    heir = Caller(bench, username="bob")
    assert heir.refresh(LIFETIME_0).integer(Attribute.LIFETIME, 4) == 0
    assert not bench.sockets.open_ports
    heir.allocate()


def test_requests_without_an_allocation_get_437() -> None:
    caller = Caller(Bench.of())
    assert code_of(caller.permit(PEER.host)) == 437
    assert code_of(caller.bind(0x4000, PEER)) == 437


def test_data_flows_both_ways_by_indications_while_the_permission_lasts() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    relayed = caller.allocate()
    indication = send_indication(PEER, b"ping", bytes(12))
    assert bench.to_peers(indication, SOURCE) == []
    assert bench.from_peer(b"pong", PEER, relayed) == []
    assert code_of(caller.permit(PEER.host)) == 0
    assert bench.to_peers(indication, SOURCE) == [(PEER, b"ping", str(relayed.port))]
    ((to, packet),) = bench.from_peer(b"pong", PEER, relayed)
    assert to == SOURCE
    assert indication_of(packet) == (PEER, b"pong")
    assert bench.from_peer(b"pong", ("192.0.2.11", 5000), relayed) == []
    bench.advance(299)
    assert bench.to_peers(indication, SOURCE)
    bench.advance(1)
    assert bench.to_peers(indication, SOURCE) == []
    assert bench.from_peer(b"pong", PEER, relayed) == []


def test_data_flows_both_ways_by_a_channel_while_it_lasts() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    relayed = caller.allocate()
    packet = channel_data(0x4001, b"ping")
    assert bench.to_peers(packet, SOURCE) == []
    assert code_of(caller.bind(0x4001, PEER)) == 0
    assert bench.to_peers(packet + b"pad", SOURCE) == [(PEER, b"ping", str(relayed.port))]
    assert bench.from_peer(b"pong", PEER, relayed) == [(SOURCE, channel_data(0x4001, b"pong"))]
    ((_, other_port),) = bench.from_peer(b"pong", (PEER.host, 6000), relayed)
    assert indication_of(other_port) == ((PEER.host, 6000), b"pong")
    bench.advance(301)
    assert bench.to_peers(packet, SOURCE) == []  # the permission ended, the channel did not
    assert code_of(caller.permit(PEER.host)) == 0
    assert bench.to_peers(packet, SOURCE)
    caller.refresh()
    bench.advance(299)
    assert code_of(caller.permit(PEER.host)) == 0
    assert bench.to_peers(packet, SOURCE) == []  # the channel ended
    assert bench.to_peers(send_indication(PEER, b"ping", bytes(12)), SOURCE)


def test_a_channel_number_and_a_peer_belong_together_until_the_channel_ends() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    caller.allocate()
    other = Address("192.0.2.11", 5000)
    assert code_of(caller.bind(0x4001, PEER)) == 0
    assert code_of(caller.bind(0x4001, PEER)) == 0
    assert code_of(caller.bind(0x4001, other)) == 400
    assert code_of(caller.bind(0x4002, PEER)) == 400
    bench.advance(599)
    caller.refresh()
    bench.advance(2)
    assert code_of(caller.bind(0x4001, other)) == 0
    assert code_of(caller.bind(0x4002, PEER)) == 0


def test_a_channel_that_ended_may_be_bound_again_as_it_was() -> None:
    bench = Bench.of()
    caller = Caller(bench)
    caller.allocate()
    caller.bind(0x4001, PEER)
    bench.advance(301)
    caller.refresh()
    bench.advance(300)
    assert code_of(caller.bind(0x4001, PEER)) == 0


@pytest.mark.parametrize(
    ("number", "code"), [(0x3FFF, 400), (0x4000, 0), (0x7FFF, 0), (0x8000, 400)]
)
def test_channel_numbers_lie_in_their_range(number: int, code: int) -> None:
    caller = Caller(Bench.of())
    caller.allocate()
    assert code_of(caller.bind(number, PEER)) == code


def test_permissions_and_channels_of_one_allocation_are_limited() -> None:
    bench = Bench.of(limits=ServerLimits(permissions_per_allocation=3, channels_per_allocation=2))
    caller = Caller(bench)
    caller.allocate()
    assert code_of(caller.permit("192.0.2.1", "192.0.2.2")) == 0
    assert code_of(caller.permit("192.0.2.3", "192.0.2.4")) == 508
    assert code_of(caller.bind(0x4000, ("192.0.2.1", 2000))) == 0
    assert code_of(caller.bind(0x4001, ("192.0.2.1", 2001))) == 0
    assert code_of(caller.bind(0x4002, ("192.0.2.1", 2002))) == 508
    bench.advance(301)
    assert code_of(caller.permit("192.0.2.3", "192.0.2.4")) == 0


# --- listeners with connections ------------------------------------------------------------------


def test_a_connection_is_answered_in_full_and_as_often_as_it_asks() -> None:
    bench = Bench.of(limits=ServerLimits(unauthenticated_per_second=1, unauthenticated_burst=1))
    bench.server.add_listener(LISTENER, reliable=True)
    bare = bytes.fromhex("000300002112a442") + bytes(12)  # an Allocate request of 20 bytes
    for _ in range(5):
        (answer,) = bench.from_client(bare, SOURCE)
        assert len(answer) > 2 * len(bare)


def test_an_allocation_ends_with_its_connection() -> None:
    bench = Bench.of()
    bench.server.add_listener(LISTENER, reliable=True)
    Caller(bench, SOURCE).allocate()
    bench.server.client_gone(LISTENER, ("198.51.100.3", 1))
    assert bench.server.allocations == 1
    bench.server.client_gone(LISTENER, SOURCE)
    bench.server.client_gone(LISTENER, SOURCE)
    assert bench.server.allocations == 0
    assert bench.sockets.open_ports == {}
