"""The bare world: networks, hosts and what travels between them, in virtual time. It knows nothing
of Holloway.

How a datagram travels
    `Host.send` makes a `Packet` and puts it onto the host's LAN. At each router `find_hop` says
    where it goes: to a host of this LAN, down to a child network, up to the parent, or over a link
    besides the tree. On the way up it meets the firewall, then the NAT (its source is translated),
    then the uplink; on the way down the uplink, the NAT (its destination is translated), then the
    firewall. A packet from inside to the NAT's own outside address turns there (hairpinning). At
    the end the host gives it to the socket of its port. A packet of a stream travels the same way.
    Whatever keeps a packet from arriving drops it with one of the reasons in `packets.DROPS`, so
    that at any time: sent + copied = delivered + dropped + in flight.

What an event is
    A call that is due at an instant (`heap.py`). A pipe that takes time, or may do harm, costs one
    event for each packet; what lies between (routers, NATs, firewalls, perfect pipes) is walked
    through on the spot. The delivery is always an event of its own instant's or later order, so a
    receiver is never called from within a `send`.

What is deterministic
    Everything. Time is an integer, events of one instant happen in the order of asking, and every
    component (a pipe, a NAT) draws from a stream of its own, made of the world's seed and its name:
    one more or one less component moves no other's. Names are therefore unique. The trace is a hash
    over every sending, drop and delivery (instant, ends, size) and over what `note` was given.
    Contents are not in it, since ML-KEM draws from the operating system.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from heapq import heappush
from typing import Any, Final

from runtime.randomness import SeededRandomness
from simulations.net.firewall import Firewall
from simulations.net.heap import Part, Timeline
from simulations.net.host import Host
from simulations.net.links import PERFECT, UPLINK, Link, LinkQuality
from simulations.net.nat import Nat, NatBehaviour
from simulations.net.packets import Failure, FailureKind, Packet, Sighting, Tap, What
from simulations.net.partition import Partition
from simulations.net.routing import (
    DOWN,
    MAX_ROUTES,
    NO_ROUTE,
    SIDE,
    TO_HOST,
    UP,
    Hop,
    Network,
    Pool,
    find_hop,
)

__all__ = ["INTERNET", "INTERNET6", "Host", "Network", "Part", "Partition", "World"]

INTERNET: Final = "198.18.0.0/15"
"""Where public IPv4 addresses come from that are not given (RFC 2544: nobody's on the internet)."""
INTERNET6: Final = "2001:db8::/32"
HOME: Final = "192.168.1.0/24"
"""The prefix of a network behind a NAT for which none is given."""
_TRACE_BLOCK: Final = 4_096


class World(Timeline):
    """See the head of this file."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.has_links = False
        self.dropped: dict[str, int] = {}
        self.sent = 0
        self.copies = 0
        self.delivered_count = 0
        self.hosts: dict[str, Host] = {}
        self.networks: dict[str, Network] = {}
        self.partitions: list[Partition] = []
        self._taps: list[Tap] = []
        self._routed: list[Network] = []  # those that know routes
        self._numbers: dict[str, int] = {}
        self._next_host = 0
        self._next_stream = 0
        self._trace = hashlib.sha256()
        self._trace_block = array("q")
        self.internet = Network(
            self, "internet", None, pool4=Pool(INTERNET), pool6=Pool(INTERNET6), realm4={},
            realm6={}, uplink=PERFECT, lan=PERFECT, firewall=None,
        )  # fmt: skip
        self.networks["internet"] = self.internet

    def randomness(self, name: str) -> SeededRandomness:
        """The stream of that name: adding one for somebody else disturbs none."""
        return SeededRandomness(self.seed, name)

    # --- building ---

    def network(
        self,
        name: str,
        *,
        prefix: str = "",
        prefix6: str = "",
        behind: Network | None = None,
        nat: NatBehaviour | None = None,
        firewall: Firewall | None = None,
        uplink: LinkQuality = UPLINK,
        lan: LinkQuality = PERFECT,
        outer: Sequence[str] = (),
    ) -> Network:
        """A network behind another one, or on the internet.

        `prefix` and `prefix6`: where its hosts' addresses are drawn from. With neither, IPv4
        addresses come from the parent's prefix, or with a NAT from HOME. With `prefix6` alone it is
        IPv6 only. `outer`: the NAT's outside addresses, otherwise drawn from the parent's prefix.
        Raises ValueError for a name or an address that is taken.
        """
        parent = self.internet if behind is None else behind
        self._claim(name, self.networks)
        if nat is not None and not prefix:
            prefix = HOME
        pool4 = Pool(prefix) if prefix else None if prefix6 else parent.pool4
        network = Network(
            self, name, parent, pool4=pool4, pool6=Pool(prefix6) if prefix6 else None,
            realm4=parent.realm4 if nat is None else {}, realm6=self.internet.realm6,
            uplink=uplink, lan=lan, firewall=firewall,
        )  # fmt: skip
        if nat is not None:
            network.nat = Nat(name, (), nat, seed=self.seed)
            self._number(network, nat, outer)
        self.networks[name] = network
        self._forget_routes()
        return network

    def link(self, a: Network, b: Network, quality: LinkQuality) -> Link:
        """Join two networks besides the tree (there: from a to b). Raises ValueError unless they
        share the realm of IPv4 addresses."""
        if a is b or a.realm4 is not b.realm4:
            raise ValueError(f"{a.name} and {b.name} are not two networks of one address realm")
        link = Link(self, f"{a.name} {b.name} {len(a.links)}", quality)
        a.links.append((b, link.there))
        b.links.append((a, link.back))
        for each in (a, b):
            while each.parent is not None and each not in each.parent.linked_children:
                each.parent.linked_children.append(each)
                each = each.parent
        self.has_links = True
        self._forget_routes()
        return link

    def host(
        self, name: str, network: Network, *, ipv4: str | None = None, ipv6: str | None = None
    ) -> Host:
        """A host on a network. An address that is not given is drawn, where the network has the
        family; "" is none. Raises ValueError for a name or an address that is taken."""
        self._claim(name, self.hosts)
        host = Host(self, name, network, self._next_host, None, None)
        self._next_host += 1
        self._place(host, network, ipv4, ipv6)
        self.hosts[name] = host
        return host

    def remove_host(self, host: Host) -> None:
        """Out of the world: a crash without answers, and its addresses are free."""
        host.crash(answers=False)
        self._displace(host)
        del self.hosts[host.name]

    def partition(
        self, a: Sequence[Host | Network], b: Sequence[Host | Network], *, one_way: bool = False
    ) -> Partition:
        """From now on nothing that hosts of one side sent reaches the other (with `one_way` only
        what a sends is kept from b), until it is healed. A network stands for all in and below it;
        a packet is dropped on the way into it. A relay that is in neither side still helps."""
        cut = Partition(self.partitions, a, b, one_way=one_way)
        self.partitions.append(cut)
        return cut

    # --- what befalls networks and hosts ---

    def move_host(
        self, host: Host, network: Network, ipv4: str | None = None, ipv6: str | None = None
    ) -> None:
        """For `Host.move`."""
        self._displace(host)
        self._place(host, network, ipv4, ipv6)

    def renumber(self, network: Network, addresses: Sequence[str]) -> None:
        """For `Network.renumber`."""
        nat = network.nat
        if nat is None:
            raise ValueError(f"{network.name} has no NAT")
        old = nat.addresses
        self._number(network, nat.behaviour, addresses)
        for address in old:
            if address not in nat.addresses:
                del self._outside(network).realm4[address]
        self._forget_routes()

    # --- seeing ---

    def watch(self, tap: Tap) -> None:
        """Call it with a `Sighting` of every packet at every step. It must not act in the world."""
        self._taps.append(tap)

    def unwatch(self, tap: Tap) -> None:
        self._taps.remove(tap)

    def note(self, *what: object) -> None:
        """Add to the trace: numbers, strings, bytes and tuples of them."""
        self._hash_block()
        self._trace.update(repr((self.now, *what)).encode())

    @property
    def trace(self) -> str:
        """The hash (hex) of all that happened so far."""
        self._hash_block()
        return self._trace.hexdigest()

    def statistics(self) -> dict[str, Any]:
        """Counts since the start; `dropped` by reason; `in_flight` is counted, not computed."""
        return {
            "events": self.events,
            "sent": self.sent,
            "copied": self.copies,
            "delivered": self.delivered_count,
            "dropped": dict(sorted(self.dropped.items())),
            "in_flight": self.in_flight(),
            "hosts": len(self.hosts),
            "networks": len(self.networks),
        }

    def in_flight(self) -> int:
        """Packets that are on their way or wait at a paused host. Walks over the heap."""
        flying = sum(
            1
            for event in self.events_to_come()
            if event[3]
            and isinstance(event[3][0], Packet)
            and not isinstance(event[3][-1], Failure)
        )
        return flying + sum(host.waiting() for host in self.hosts.values())

    # --- the way of a packet ---

    def transmit(self, packet: Packet, host: Host) -> None:
        """A packet leaves a host (for hosts and their streams)."""
        now = self.now
        packet.sent_at = now
        packet.number = self.sent
        self.sent += 1
        source, destination = packet.source, packet.destination
        number = self._numbers.get(destination.host)
        if number is None:
            number = self._numbers[destination.host] = len(self._numbers)
        block = self._trace_block
        block.extend((now, 1, host.number, source.port, number, destination.port, packet.size))
        if len(block) > _TRACE_BLOCK:
            self._hash_block()
        if self._taps:
            self._show("sent", packet, host.name)
        if not source.host:
            self.drop(packet, "no address", host.name)
            return
        network = host.network
        hop = self._hop(network, destination.host)
        pipe = network.lan.there
        if hop[0] == TO_HOST or (pipe.free and packet.size <= pipe.mtu):
            self._forward(packet, network, hop)
        else:
            pipe.carry(packet, self._at, network)

    def _hop(self, network: Network, host: str) -> Hop:
        return network.routes.get(host) or self._find_hop(network, host)

    def _find_hop(self, network: Network, host: str) -> Hop:
        routes = network.routes
        if not routes:
            self._routed.append(network)
        elif len(routes) >= MAX_ROUTES:
            routes.clear()
        hop = routes[host] = find_hop(network, host)
        return hop

    def _forget_routes(self) -> None:
        for network in self._routed:
            network.routes.clear()
        self._routed.clear()

    def _at(self, packet: Packet, network: Network) -> None:
        """A packet is at a router, on the inner side."""
        self._forward(packet, network, self._hop(network, packet.destination.host))

    def _forward(self, packet: Packet, network: Network, hop: Hop) -> None:
        """From a router's inner side over the next hop."""
        kind, target = hop
        if kind == UP:
            self._ascend(packet, network)
        elif kind == TO_HOST:
            self._to_host(packet, target)
        elif kind == DOWN:
            self._descend(packet, target)
        elif kind == SIDE:
            other, pipe = target
            if not self.partitions or self._may_enter(packet, other):
                pipe.carry(packet, self._at, other)
        else:
            assert kind == NO_ROUTE
            self.drop(packet, "no route", network.name)

    def _ascend(self, packet: Packet, network: Network) -> None:
        """From a router's inner side up to the parent."""
        firewall = network.firewall
        if firewall is not None and not firewall.leaves(
            packet.protocol, packet.source, packet.destination, self.now, packet.v6
        ):
            self.drop(packet, firewall.refusal, network.name)
            if firewall.rules.rejects:
                self.tell(packet, "prohibited")
            return
        nat = network.nat
        if nat is not None and not packet.v6:
            if packet.destination.host in nat.addresses:
                self._turn(packet, network, nat)
                return
            outside = nat.outbound(packet.protocol, packet.source, packet.destination, self.now)
            if outside is None:
                self.drop(packet, nat.refusal, network.name)
                return
            packet.source = outside
            if self._taps:
                self._show("translated", packet, network.name)
        pipe = network.uplink.there
        if pipe.free and packet.size <= pipe.mtu:
            self._at(packet, network.parent)  # type: ignore[arg-type]
        else:
            pipe.carry(packet, self._at, network.parent)

    def _turn(self, packet: Packet, network: Network, nat: Nat) -> None:
        """Hairpinning."""
        ends = nat.hairpin(packet.protocol, packet.source, packet.destination, self.now)
        if ends is None:
            self.drop(packet, nat.refusal, network.name)
            return
        packet.source, packet.destination = ends
        if self._taps:
            self._show("translated", packet, network.name)
        self._at(packet, network)

    def _descend(self, packet: Packet, network: Network) -> None:
        """From the parent's router down to a network's router."""
        if self.partitions and not self._may_enter(packet, network):
            return
        pipe = network.uplink.back
        if pipe.free and packet.size <= pipe.mtu:
            self._enter(packet, network)
        else:
            pipe.carry(packet, self._enter, network)

    def _enter(self, packet: Packet, network: Network) -> None:
        """At a router, on the outer side."""
        nat = network.nat
        if nat is not None and not packet.v6:
            inside = nat.inbound(packet.protocol, packet.source, packet.destination, self.now)
            if inside is None:
                self.drop(packet, nat.refusal, network.name)
                return
            packet.destination = inside
            if self._taps:
                self._show("translated", packet, network.name)
        firewall = network.firewall
        if firewall is not None and not firewall.enters(
            packet.protocol, packet.source, packet.destination, self.now, packet.v6
        ):
            self.drop(packet, firewall.refusal, network.name)
            return
        hop = self._hop(network, packet.destination.host)
        if hop[0] == UP:
            self.drop(packet, "no route", network.name)  # what came from above does not go back
        else:
            self._forward(packet, network, hop)

    def _to_host(self, packet: Packet, host: Host) -> None:
        """Over the LAN to one of its hosts."""
        if self.partitions and not self._may_enter(packet, host):
            return
        pipe = host.network.lan.back
        if not pipe.free or packet.size > pipe.mtu:
            pipe.carry(packet, self._arrive, host, packet.destination.host)
        elif packet.sent_at != self.now:
            host.arrive(packet)
        else:
            self.serial += 1
            heappush(
                self.heap,
                (self.now, self.serial, self._arrive, (packet, host, packet.destination.host)),
            )

    def _arrive(self, packet: Packet, host: Host, address: str) -> None:
        if address not in (host.ipv4, host.ipv6):
            self.drop(packet, "no route", host.name)  # it moved away meanwhile
        else:
            host.arrive(packet)

    def _may_enter(self, packet: Packet, place: Host | Network) -> bool:
        for cut in self.partitions:
            if cut.keeps(packet.origin, place):
                self.drop(packet, "partition", place.name)
                return False
        return True

    # --- for the components ---

    def drop(self, packet: Packet, why: str, where: str) -> None:
        """Count and show it."""
        self.dropped[why] = self.dropped.get(why, 0) + 1
        self._trace_block.extend((self.now, 2, packet.number))
        if self._taps:
            self._show("dropped", packet, where, why)

    def delivered(self, packet: Packet, host: Host) -> None:
        self.delivered_count += 1
        self._trace_block.extend((self.now, 3, packet.number, host.number))
        if self._taps:
            self._show("delivered", packet, host.name)

    def copied(self, twin: Packet, where: str) -> None:
        self.copies += 1
        if self._taps:
            self._show("copied", twin, where)

    def tell(
        self, packet: Packet, kind: FailureKind, *, mtu: int = 0, by: Host | None = None
    ) -> None:
        """ICMP to the sender of a packet that was dropped here and now, by a router or a host. It
        takes as long as the packet took, is not lost, and passes whatever let the packet out,
        unless a firewall of the sender's keeps ICMP away, or a partition the host's."""
        place: Host | Network | None = packet.origin
        while place is not None:
            if by is not None and any(cut.keeps(by, place) for cut in self.partitions):
                return
            if isinstance(place, Host):
                place = place.network
                continue
            if place.firewall is not None and not place.firewall.rules.passes_icmp:
                return
            place = place.parent
        failure = Failure(kind, packet.wanted, mtu)
        self.after(self.now - packet.sent_at, self._tell, packet, failure)

    def _tell(self, packet: Packet, failure: Failure) -> None:
        packet.origin.fail(packet, failure)

    def next_stream(self) -> int:
        self._next_stream += 1
        return self._next_stream

    # --- helpers ---

    def _show(self, what: What, packet: Packet, where: str, why: str = "") -> None:
        sighting = Sighting.of(self.now, what, where, why, packet)
        for tap in self._taps:
            tap(sighting)

    def _hash_block(self) -> None:
        block = self._trace_block
        if block:
            if sys.byteorder == "big":
                block.byteswap()
            self._trace.update(block.tobytes())
            self._trace_block = array("q")

    def _claim(self, name: str, taken: dict[str, Any]) -> None:
        if name in taken:
            raise ValueError(f"there is a {name!r} already")

    def _outside(self, network: Network) -> Network:
        assert network.parent is not None
        return network.parent

    def _number(self, network: Network, behaviour: NatBehaviour, given: Sequence[str]) -> None:
        """Give a NAT outside addresses, in the parent's realm."""
        nat, parent = network.nat, self._outside(network)
        assert nat is not None
        own = (parent, (DOWN, network))
        for address in given:
            if parent.realm4.get(address, own) != own:
                raise ValueError(f"{address} is taken")
        addresses = list(given)
        for _ in range(0 if given else behaviour.public_addresses):
            if parent.pool4 is None:
                raise ValueError(f"{parent.name} has no IPv4 addresses for {network.name}")
            drawn = parent.pool4.draw(parent.realm4, network.name, besides=nat.addresses)
            addresses.append(drawn)
            parent.realm4[drawn] = own
        for address in given:
            parent.realm4[address] = own
        nat.renumber(addresses)

    def _place(self, host: Host, network: Network, ipv4: str | None, ipv6: str | None) -> None:
        if ipv4 is None and network.pool4 is not None:
            ipv4 = network.pool4.draw(network.realm4, host.name)
        if ipv6 is None and network.pool6 is not None:
            ipv6 = network.pool6.draw(network.realm6, host.name)
        for address, realm in ((ipv4, network.realm4), (ipv6, network.realm6)):
            if address and address in realm:
                raise ValueError(f"{address} is taken")
        host.network, host.ipv4, host.ipv6 = network, ipv4 or None, ipv6 or None
        if ipv4:
            network.realm4[ipv4] = (network, (TO_HOST, host))
        if ipv6:
            network.realm6[ipv6] = (network, (TO_HOST, host))
        self._forget_routes()

    def _displace(self, host: Host) -> None:
        if host.ipv4:
            del host.network.realm4[host.ipv4]
        if host.ipv6:
            del host.network.realm6[host.ipv6]
        self._forget_routes()
