"""The control channel's choice between QUIC and WebSocket, in virtual time."""

from __future__ import annotations

from typing import cast

from channel.transports import TransportOptions
from simulations.hosts.agent import AgentHost
from simulations.hosts.channel import AgentChannel
from simulations.hosts.portal import PortalNode
from simulations.net.packets import Sighting
from simulations.run import Run
from simulations.scenario.schema import Client, Fault, Network

from .scenarios import EASY, home, office, scenario

S = 10**9
MS = 10**6
OPTIONS = TransportOptions()
HOTEL = Network(name="hotel", prefix="10.9.0.0/24", nat=EASY)


class Rehearsal:
    """A run that is looked at while it goes: the laptop's channel, and when it sent what
    over which transport (ns)."""

    def __init__(self, *faults: Fault, starts: bool = True) -> None:
        laptop = Client(name="laptop", network="hotel", user="grace", starts=starts)
        self.run = Run(
            scenario(
                duration="300s",
                networks=(HOTEL, home("home"), office()),
                clients=(laptop,),
                faults=faults,
                checks=(),
            ),
            1,
        )
        self.sent_at: dict[str, list[int]] = {"udp": [], "tcp": []}
        self.run.world.watch(self._saw)
        self.run.settle()
        self.run.begin()

    def _saw(self, seen: Sighting) -> None:
        portal = self.run.installation.slots["portal"].host.ipv4
        to_portal = seen.destination.host == portal
        if seen.what == "sent" and seen.stream and seen.origin == "laptop" and to_portal:
            self.sent_at[seen.protocol].append(seen.now - self.run.zero)

    @property
    def tcp_at(self) -> list[int]:
        return self.sent_at["tcp"]

    @property
    def channel(self) -> AgentChannel:
        return cast(AgentHost, self.run.installation.slots["laptop"].life).channel

    def is_on(self, transport: str) -> bool:
        return self.channel.connected and self.channel.transport == transport

    def until(self, at_s: float) -> None:
        world = self.run.world
        world.run_for(self.run.zero + round(at_s * S) - world.now)

    def when_on(self, transport: str, within_s: int) -> int:
        """The instant (ns)."""
        assert self.run.world.run_until(lambda: self.is_on(transport), limit_ns=within_s * S)
        return self.run.world.now - self.run.zero


def test_behind_a_firewall_that_blocks_udp_a_client_comes_by_websocket_after_the_head_start() -> (
    None
):
    there = Rehearsal(
        Fault(at="0s", kind="block_udp", targets=("hotel",)),
        Fault(at="1s", kind="start", targets=("laptop",)),
        starts=False,
    )
    there.until(2)
    joined_at = there.when_on("websocket", within_s=5)
    assert there.tcp_at[0] == S + OPTIONS.websocket_after_ns
    assert joined_at < there.tcp_at[0] + S // 2
    assert there.channel.dials == 1


def test_once_udp_passes_again_it_goes_on_over_quic_with_a_single_loss() -> None:
    there = Rehearsal(
        Fault(at="0s", kind="block_udp", targets=("hotel",), duration="100s"),
        Fault(at="1s", kind="start", targets=("laptop",)),
        starts=False,
    )
    there.until(99)
    assert there.is_on("websocket")
    assert there.channel.connections == 1  # nobody looked in vain at its cost
    back_at = there.when_on("quic", within_s=200)
    assert back_at <= 100 * S + OPTIONS.return_interval_ns * 4 * 3 // 2
    assert (there.channel.moves, there.channel.connections) == (1, 2)
    assert there.channel.dials == 1
    assert there.channel.last_error == ""
    there.until(back_at / S + 10)
    # Not a word by TCP any more, and the portal knows of one connection.
    assert there.tcp_at[-1] < back_at
    portal = there.run.installation.slots["portal"].life
    assert isinstance(portal, PortalNode)
    assert portal.channels == len(("laptop", "gateway", "relay"))


def test_where_websocket_worked_last_it_has_not_to_wait() -> None:
    there = Rehearsal(
        Fault(at="0s", kind="block_udp", targets=("hotel",)),
        Fault(at="1s", kind="start", targets=("laptop",)),
        Fault(at="20s", kind="reconnect", targets=("laptop",)),
        starts=False,
    )
    there.until(20)
    there.when_on("websocket", within_s=3)
    assert there.channel.connections == 2
    firsts = [min(at for at in sent if at > 20 * S) for sent in there.sent_at.values()]
    assert firsts[0] == firsts[1]


def test_a_portal_that_is_merely_slow_does_not_make_it_leave_quic() -> None:
    """It is known that UDP passes here: the portal has twice the time."""
    there = Rehearsal(
        Fault(at="2s", kind="pause", targets=("portal",), duration="2800ms"),
        Fault(at="2100ms", kind="reconnect", targets=("laptop",)),
    )
    there.until(2)
    assert there.is_on("quic")
    there.until(2.2)
    assert not there.channel.connected
    there.when_on("quic", within_s=4)
    assert there.tcp_at == []
    assert there.channel.connections == 2


def test_a_portal_that_is_very_slow_is_asked_both_ways_and_quic_is_taken_if_it_is_first() -> None:
    there = Rehearsal(
        Fault(at="2s", kind="pause", targets=("portal",), duration="4s"),
        Fault(at="2100ms", kind="reconnect", targets=("laptop",)),
    )
    there.until(2.2)
    there.when_on("quic", within_s=6)
    assert there.tcp_at
    there.until(30)
    assert there.is_on("quic")
    assert there.channel.connections == 2


def test_who_roams_from_a_network_without_udp_to_one_with_it_is_on_quic_at_once() -> None:
    there = Rehearsal(
        Fault(at="0s", kind="block_udp", targets=("hotel",)),
        Fault(at="1s", kind="start", targets=("laptop",)),
        Fault(at="10s", kind="roam", targets=("laptop",), to="home", duration="20s"),
        starts=False,
    )
    there.until(9.9)
    assert there.is_on("websocket")
    there.until(10)
    assert there.when_on("quic", within_s=1) < 10 * S + 300 * MS
    assert there.channel.dials == 1  # the same door, and no failure of it
    there.until(30)
    # QUIC follows to where it is blocked; there it is missed, and what worked is remembered.
    there.when_on("websocket", within_s=12)
