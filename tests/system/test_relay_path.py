"""DONT-FRAGMENT and ICMP errors through the relay as a process: a path with a narrow link in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from relays.client import Allocated, Permitted, Received, Unreachable
from relays.turn import IcmpError
from runtime.net.address import Address
from simulations.kernel.lab import Lab
from tests.system.test_relay_foreign import (
    CLIENT,
    CLIENT_IPV6,
    PEER,
    RELAY,
    RELAY_IPV6,
    Driven,
    Network,
    metric,
    relay_process,
    udp_socket,
)

pytestmark = pytest.mark.system

PEER_IPV6 = "2001:db8:10::2"
NARROW_MTU = 1300
TOO_BIG = {"ipv4": IcmpError(3, 4, NARROW_MTU), "ipv6": IcmpError(2, 0, NARROW_MTU)}
PORT_UNREACHABLE = {"ipv4": IcmpError(3, 3), "ipv6": IcmpError(1, 4)}


@pytest.fixture(scope="module")
def narrow() -> Iterator[Network]:
    """The router's link to the peer takes 1300 bytes."""
    with Lab() as lab:
        core = lab.router("core")
        network = Network(
            relay=lab.public_host("relay", core, f"{RELAY}/30", f"{RELAY_IPV6}/64"),
            client=lab.public_host("client", core, f"{CLIENT}/30", f"{CLIENT_IPV6}/64"),
            peer=lab.public_host("peer", core, f"{PEER}/24", f"{PEER_IPV6}/64"),
            folder=lab.directory,
        )
        core.ip(f"link set {network.peer.uplink} mtu {NARROW_MTU}")
        yield network


@pytest.mark.parametrize(("family", "host"), [("ipv4", PEER), ("ipv6", PEER_IPV6)])
def test_what_must_stay_whole_is_dropped_where_it_does_not_fit_and_the_client_is_told(
    narrow: Network, family: str, host: str
) -> None:
    with relay_process(narrow):
        driven, listening = Driven(narrow, family="both"), udp_socket(narrow.peer, host)
        peer = Address(host, listening.getsockname()[1])
        with driven.socket, listening:
            allocated = driven.until(Allocated)
            assert isinstance(allocated, Allocated)
            assert allocated.additional is not None
            relayed = allocated.relayed if family == "ipv4" else allocated.additional
            driven.client.permit(peer, driven.now())
            driven.until(Permitted)
            listening.sendto(b"no stranger", relayed)
            driven.until(Received)
            told = [Unreachable(peer=peer, error=TOO_BIG[family])]

            # The first one finds the narrow link out, the second one is not even sent.
            for _ in range(2):
                driven.client.send(peer, bytes(1400), driven.now(), dont_fragment=True)
                assert driven.until(Unreachable) == told[0]
            driven.client.send(peer, b"small", driven.now(), dont_fragment=True)
            driven.turn()
            assert listening.recv(2048) == b"small"

            # What may be fragmented arrives.
            driven.client.send(peer, bytes(1400), driven.now())
            driven.turn()
            if family == "ipv4":
                assert listening.recv(2048) == bytes(1400)
            driven.turn()
            assert driven.events == []


@pytest.mark.parametrize(("family", "host"), [("ipv4", PEER), ("ipv6", PEER_IPV6)])
def test_a_closed_port_of_a_peer_is_told_and_disturbs_no_other_datagram(
    narrow: Network, family: str, host: str
) -> None:
    with relay_process(narrow):
        driven, listening = Driven(narrow, family="both"), udp_socket(narrow.peer, host)
        open_, closed = Address(host, listening.getsockname()[1]), Address(host, 9_999)
        with driven.socket, listening:
            driven.until(Allocated)
            driven.client.permit(open_, driven.now())
            driven.client.permit(closed, driven.now())
            driven.until(Permitted)
            for number in range(6):
                driven.client.send(closed, b"knock", driven.now())
                driven.client.send(open_, str(number).encode(), driven.now())
                assert driven.until(Unreachable) == Unreachable(
                    peer=closed, error=PORT_UNREACHABLE[family]
                )
                assert listening.recv(2048) == str(number).encode()
            assert metric(narrow, "send_dropped_refused") == 0
            assert metric(narrow, "icmp_relayed") == 6
            assert metric(narrow, "input_failures") == 0
