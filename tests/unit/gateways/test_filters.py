"""The stateful filter of one client, by itself and against a reading that forgets nothing."""

from __future__ import annotations

from uuid import UUID

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel.messages import Filter, Resource
from gateways.filters import ClientFilter, Verdict
from tests.unit.clients.stage import (
    ACK,
    CLIENT_IPV4,
    CLIENT_IPV6,
    FIN_ACK,
    RANGE_IPV4,
    RANGE_IPV6,
    RST,
    SECOND,
    SERVER,
    SYN,
    SYN_ACK,
    WEB,
    answer,
    echo,
    ipv4,
    tcp,
    udp,
)
from tunnel.agent import own_addresses
from tunnel.packet import parse, prohibited

CLIENT = str(CLIENT_IPV4)


def client_filter(*resources: Resource) -> ClientFilter:
    sources = own_addresses(CLIENT_IPV4, CLIENT_IPV6)
    made = ClientFilter(sources, (RANGE_IPV4, RANGE_IPV6), lambda flow, ending, now: None)
    for resource in resources:
        made.grant(resource, 0)
    return made


def out(judge: ClientFilter, packet: bytes, now: int = 0) -> Verdict:
    header = parse(packet)
    assert header is not None
    return judge.from_client(packet, header, now)


def back(judge: ClientFilter, packet: bytes, now: int = 0) -> bool:
    header = parse(packet)
    assert header is not None
    return judge.to_client(packet, header, now) is not None


def test_what_is_granted_passes_and_is_answered() -> None:
    judge = client_filter(WEB)
    assert out(judge, udp()) is Verdict.FORWARD
    assert back(judge, answer())
    assert out(judge, tcp(SYN)) is Verdict.FORWARD
    assert back(judge, tcp(SYN_ACK, source=SERVER, destination=CLIENT, ports=(80, 40_000)))
    assert out(judge, tcp(ACK)) is Verdict.FORWARD
    assert out(judge, echo(8)) is Verdict.FORWARD
    assert back(judge, echo(0, source=SERVER, destination=CLIENT))


def test_what_is_not_granted_is_prohibited() -> None:
    judge = client_filter(WEB)
    assert out(judge, udp(ports=(40_000, 54))) is Verdict.PROHIBIT
    assert out(judge, udp(destination="10.0.1.5")) is Verdict.PROHIBIT
    assert out(judge, ipv4(47, bytes(20), CLIENT, SERVER)) is Verdict.PROHIBIT
    assert out(client_filter(), udp()) is Verdict.PROHIBIT


def test_another_source_is_dropped_and_counted() -> None:
    judge = client_filter(WEB)
    for source in ("100.64.0.2", "10.0.0.9", "0.0.0.0"):
        assert out(judge, udp(source=source)) is Verdict.DROP
    assert judge.spoofed == 3


def test_resources_never_initiate() -> None:
    judge = client_filter(WEB)
    assert not back(judge, answer())
    assert not back(judge, tcp(SYN, source=SERVER, destination=CLIENT, ports=(80, 22)))
    assert not back(judge, echo(8, source=SERVER, destination=CLIENT))
    assert out(judge, udp()) is Verdict.FORWARD
    assert not back(judge, answer(ports=(53, 40_001)))
    assert not back(judge, answer(ports=(54, 40_000)))
    assert not back(judge, udp(source=SERVER, destination="100.64.0.2", ports=(53, 40_000)))


def test_an_error_passes_only_if_it_quotes_a_flow() -> None:
    judge = client_filter(WEB)
    error = prohibited(udp())
    assert error is not None
    assert not back(judge, error)
    assert out(judge, udp()) is Verdict.FORWARD
    assert back(judge, error)
    # and the client may complain about an answer that it got
    complaint = prohibited(answer())
    assert complaint is not None
    assert out(judge, complaint) is Verdict.FORWARD
    stranger = prohibited(answer(ports=(54, 40_000)))
    assert stranger is not None
    assert out(judge, stranger) is Verdict.DROP


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "224.0.0.1",
        "255.255.255.255",
        "100.64.0.2",
        "0.1.2.3",
    ],
)
def test_some_addresses_are_never_reached_whatever_is_granted(address: str) -> None:
    everything = attrs.evolve(WEB, address="0.0.0.0/0", filters=())
    judge = client_filter(everything)
    assert out(judge, udp(destination="192.0.2.1")) is Verdict.FORWARD
    assert out(judge, udp(destination=address)) is Verdict.PROHIBIT


def test_the_most_specific_resource_decides() -> None:
    wide = attrs.evolve(WEB, id=UUID(int=7), address="10.0.0.0/8", filters=())
    judge = client_filter(wide, WEB)
    assert out(judge, tcp(SYN, ports=(40_000, 22))) is Verdict.PROHIBIT
    assert out(judge, tcp(SYN, destination="10.1.0.1", ports=(40_000, 22))) is Verdict.FORWARD


def test_of_two_resources_with_one_network_either_permits() -> None:
    ssh = attrs.evolve(
        WEB, id=UUID(int=7), filters=(Filter(protocol="tcp", port_start=22, port_end=22),)
    )
    judge = client_filter(WEB, ssh)
    assert out(judge, tcp(SYN, ports=(40_000, 22))) is Verdict.FORWARD
    assert out(judge, tcp(SYN)) is Verdict.FORWARD
    judge.withdraw(WEB.id, 0)
    assert out(judge, tcp(SYN, ports=(40_001, 80))) is Verdict.PROHIBIT
    assert out(judge, tcp(ACK, ports=(40_000, 22))) is Verdict.FORWARD


def test_withdrawing_a_resource_ends_its_flows_at_once() -> None:
    judge = client_filter(WEB)
    assert out(judge, udp()) is Verdict.FORWARD
    assert [str(network) for network in judge.withdraw(WEB.id, 0)] == ["10.0.0.0/24"]
    assert judge.flows() == 0
    assert not back(judge, answer())
    assert out(judge, udp()) is Verdict.PROHIBIT


def test_new_filters_end_the_flows_that_they_forbid_and_no_others() -> None:
    judge = client_filter(WEB)
    assert out(judge, udp()) is Verdict.FORWARD
    assert out(judge, tcp(SYN)) is Verdict.FORWARD
    narrowed = attrs.evolve(WEB, filters=(Filter(protocol="tcp", port_start=80, port_end=80),))
    assert judge.update(narrowed, 0)
    assert not back(judge, answer())
    assert out(judge, tcp(ACK)) is Verdict.FORWARD
    assert not judge.update(attrs.evolve(WEB, id=UUID(int=9)), 0)


def test_tcp_of_a_flow_that_lived_elsewhere_is_reset() -> None:
    judge = client_filter(WEB)
    assert out(judge, tcp(ACK, data=b"more")) is Verdict.RESET
    assert out(judge, tcp(SYN_ACK)) is Verdict.RESET
    assert out(judge, tcp(RST)) is Verdict.DROP


def test_flows_time_out_by_their_protocol() -> None:
    judge = client_filter(WEB)
    assert out(judge, udp()) is Verdict.FORWARD
    assert not back(judge, answer(), 61 * SECOND)
    assert out(judge, udp(), 100 * SECOND) is Verdict.FORWARD
    assert back(judge, answer(), 101 * SECOND)
    assert back(judge, answer(), 400 * SECOND)
    assert not back(judge, answer(), 701 * SECOND)
    assert out(judge, tcp(SYN)) is Verdict.FORWARD
    syn_ack = tcp(SYN_ACK, source=SERVER, destination=CLIENT, ports=(80, 40_000))
    assert back(judge, syn_ack, SECOND)
    assert back(judge, syn_ack, 7_000 * SECOND)
    assert out(judge, tcp(FIN_ACK), 7_001 * SECOND) is Verdict.FORWARD
    fin = tcp(FIN_ACK, source=SERVER, destination=CLIENT, ports=(80, 40_000))
    assert back(judge, fin, 7_002 * SECOND)
    assert out(judge, tcp(ACK), 7_003 * SECOND) is Verdict.FORWARD
    assert not back(judge, fin, 7_040 * SECOND)


def fragment(packet: bytes, *, position: int, more: bool) -> bytes:
    flags = (0x2000 if more else 0) | position
    return packet[:6] + flags.to_bytes(2, "big") + packet[8:]


def test_fragments_follow_the_first_of_their_packet() -> None:
    judge = client_filter(WEB)
    later = fragment(ipv4(17, bytes(32), CLIENT, SERVER), position=4, more=False)
    assert out(judge, later) is Verdict.DROP
    assert out(judge, fragment(udp(b"x" * 24), position=0, more=True)) is Verdict.FORWARD
    assert out(judge, later) is Verdict.FORWARD
    answers = fragment(ipv4(17, bytes(32), SERVER, CLIENT), position=4, more=False)
    assert not back(judge, answers)
    assert back(judge, fragment(answer(b"x" * 24), position=0, more=True))
    assert back(judge, answers)
    assert not back(judge, answers, 31 * SECOND)
    judge.withdraw(WEB.id, 0)
    assert out(judge, later) is Verdict.DROP


PORTS = st.sampled_from([53, 80, 4_000, 4_001])
ADDRESSES = st.sampled_from([CLIENT, "100.64.0.2", SERVER, "10.0.0.6", "10.0.1.1"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["out", "back", "grant", "withdraw"]),
        st.sampled_from([6, 17]),
        ADDRESSES,
        ADDRESSES,
        PORTS,
        PORTS,
    ),
    max_size=40,
)


@given(STEPS)
def test_the_filter_agrees_with_a_plain_reading(
    steps: list[tuple[str, int, str, str, int, int]],
) -> None:
    judge = client_filter(WEB)
    granted = True
    flows: set[tuple[int, str, int, str, int]] = set()
    for action, protocol, source, destination, source_port, destination_port in steps:
        if action == "grant":
            judge.grant(WEB, 0)
            granted = True
            continue
        if action == "withdraw":
            judge.withdraw(WEB.id, 0)
            granted = False
            flows.clear()
            continue
        ports = (source_port, destination_port)
        if protocol == 6:
            packet = tcp(SYN, source=source, destination=destination, ports=ports)
        else:
            packet = udp(source=source, destination=destination, ports=ports)
        if action == "back":
            key = (protocol, destination, destination_port, source, source_port)
            assert back(judge, packet) is (key in flows)
            continue
        key = (protocol, source, source_port, destination, destination_port)
        allowed = (
            granted
            and source == CLIENT
            and destination in (SERVER, "10.0.0.6")
            and (protocol, destination_port) in ((6, 80), (17, 53))
        )
        assert (out(judge, packet) is Verdict.FORWARD) is allowed
        if allowed:
            flows.add(key)


@given(st.binary(max_size=100), st.sampled_from([0x45, 0x60]))
def test_no_packet_raises_or_passes_by_accident(body: bytes, first: int) -> None:
    judge = client_filter(WEB)
    packet = bytes([first]) + body
    header = parse(packet)
    if header is None:
        return
    assert judge.from_client(packet, header, 0) is not Verdict.FORWARD
    assert not judge.to_client(packet, header, 0)
