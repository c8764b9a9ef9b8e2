"""A NAT in the terms of RFC 4787 (UDP) and RFC 5382 (TCP): IPv4 only, a core.

Packets go in with the instant; a translated address comes out, or None and `refusal` says why.

- A mapping says which outside address and port stand for an inside address and port. It holds for
  every destination (endpoint-independent), for one host (address-dependent), or for one address and
  port. No two mappings of a protocol share an outside address and port (REQ-3: no overloading).
- A mapping remembers whom the inside sent to; the filter lets in what comes from anywhere, from
  those hosts, or from those addresses and ports (section 5).
- Both age: `timeout_ns` after the last packet from inside (or from outside too, with
  `inbound_refresh`) a mapping is gone, and so is each peer that it lets in, by its own last packet.
- With `inbound_binding` a packet from outside that is dropped leaves an entry of its own, as the
  connection tracking of Linux does with masquerade: for `block_ns` after it, a flow from inside to
  that peer cannot use that outside port, and is mapped to another one, for this peer alone; and the
  peer does not get in at that port, whatever the filter would say.
- With `reply_binding` what goes to a peer leaves from where the last packet of that peer came in,
  whatever the mapping would be (as of a flow that connection tracking knows), until `timeout_ns`
  went by without a packet of the two or that mapping is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final, Literal

import attrs

from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from simulations.net.packets import UDP

NS: Final = 10**9
FIRST_PORT: Final = 1_024
LAST_PORT: Final = 65_535

Behaviour = Literal["endpoint_independent", "address_dependent", "address_and_port_dependent"]
Ports = Literal["preserve", "random", "sequential", "range"]
Hairpinning = Literal["none", "internal", "external"]


@attrs.frozen(kw_only=True)
class NatBehaviour:
    """How a NAT maps, filters and ages.

    `ports`: "preserve" keeps the inside port where it is free; "random"; "sequential" gives one
    after the other; "range" gives each inside host a block of `range_ports` of its own (until it
    has no mapping and another host needs it) and counts within it. `hairpinning`: the source that
    an inside host sees of a packet from inside to its outside address: none get through, its
    "internal" one or its "external" one (REQ-9a). `public_addresses`: how many; an inside host
    keeps to one ("paired", REQ-2). `keeps_parity`: another port than the wanted one is odd where
    that is odd (REQ-4). Ports to give: `first_port` to `last_port`.
    """

    mapping: Behaviour = "endpoint_independent"
    filtering: Behaviour = "address_and_port_dependent"
    ports: Ports = "preserve"
    hairpinning: Hairpinning = "none"
    timeout_ns: int = 30 * NS
    tcp_timeout_ns: int = 7_440 * NS  # RFC 5382, REQ-5
    inbound_refresh: bool = False
    inbound_binding: bool = False
    reply_binding: bool = False
    block_ns: int = 30 * NS  # the kernel's nf_conntrack_udp_timeout
    public_addresses: int = 1
    keeps_parity: bool = False
    range_ports: int = 512
    first_port: int = FIRST_PORT
    last_port: int = LAST_PORT
    max_mappings: int = 65_536


RFC_4787: Final = NatBehaviour(
    filtering="address_dependent",
    hairpinning="external",
    timeout_ns=300 * NS,
    inbound_refresh=True,
    keeps_parity=True,
)
"""All that RFC 4787 asks for, with the stricter filter of the two that REQ-8 recommends."""
FULL_CONE: Final = NatBehaviour(filtering="endpoint_independent")
RESTRICTED_CONE: Final = NatBehaviour(filtering="address_dependent")
PORT_RESTRICTED: Final = NatBehaviour()
SYMMETRIC: Final = NatBehaviour(mapping="address_and_port_dependent", ports="random")


class Mapping:
    """One row of the table. `peers`, which the filter asks: the addresses, and the hosts, that the
    inside sent to, and when last."""

    __slots__ = ("inside", "key", "outside", "peers", "protocol", "refreshed_at", "sweep_at")

    def __init__(
        self, protocol: int, inside: Address, outside: Address, key: object, now: int
    ) -> None:
        self.protocol = protocol
        self.inside = inside
        self.outside = outside
        self.key = key
        self.refreshed_at = now
        self.peers: dict[Address | str, int] = {}
        self.sweep_at = 256

    def sent_to(self, peer: Address, now: int, timeout_ns: int) -> None:
        self.refreshed_at = self.peers[peer] = self.peers[peer.host] = now
        if len(self.peers) > self.sweep_at:
            self.peers = {each: at for each, at in self.peers.items() if now - at <= timeout_ns}
            self.sweep_at = max(256, 2 * len(self.peers))


@attrs.frozen(kw_only=True)
class NatStatistics:
    """The tables (with what has expired and not been swept yet), and what was refused so far."""

    mappings: int
    blocks: int
    replies: int
    translated_out: int
    translated_in: int
    filtered: int
    unmapped: int
    exhausted: int


class Nat:
    """One NAT. `behaviour` may be replaced while it runs, but for the number of addresses."""

    def __init__(
        self, name: str, addresses: Sequence[str], behaviour: NatBehaviour, *, seed: int
    ) -> None:
        self.name = name
        self.addresses = tuple(addresses)
        self.behaviour = behaviour
        self.refusal = ""
        self._random = Random(SeededRandomness(seed, f"nat {name}").bytes(32))
        self._by_inside: dict[tuple[int, Address, object], Mapping] = {}
        self._by_outside: dict[tuple[int, Address], Mapping] = {}
        self._blocks: dict[tuple[int, Address, Address], int] = {}  # until when
        self._replies: dict[tuple[int, Address, Address], tuple[Mapping, int]] = {}  # and when
        self._pairs: dict[str, str] = {}  # inside host -> its public address
        self._ranges: dict[str, int] = {}  # inside host -> first port of its block
        self._next_port = 0
        self._sweep_at = self._sweep_blocks_at = self._sweep_replies_at = 64
        self._has_blocked = False
        self._out = self._in = self._filtered = self._unmapped = self._exhausted = 0

    # --- packets ---

    def outbound(
        self, protocol: int, source: Address, destination: Address, now: int
    ) -> Address | None:
        """The outside source of a packet from inside; makes or refreshes its mapping (REQ-6).
        None when there is no port or no room."""
        lasts_ns = self._timeout_ns(protocol)
        mapping = self._reply(protocol, source, destination, now) if self._replies else None
        if mapping is None:
            part = _part(destination, self.behaviour.mapping)
            mapping = self._by_inside.get((protocol, source, part))
            if mapping is None or now - mapping.refreshed_at > lasts_ns:
                mapping = self._map(protocol, source, part, destination, now)
            if mapping is not None and self._has_blocked:
                mapping = self._beside_blocks(mapping, destination, now)
        if mapping is None:
            self._exhausted += 1
            return None
        mapping.sent_to(destination, now, lasts_ns)
        self._out += 1
        return mapping.outside

    def inbound(
        self, protocol: int, source: Address, destination: Address, now: int
    ) -> Address | None:
        """The inside destination of a packet to an outside address; None where it is filtered."""
        lasts_ns = self._timeout_ns(protocol)
        mapping = self._by_outside.get((protocol, destination))
        if mapping is None or now - mapping.refreshed_at > lasts_ns:
            self._unmapped += 1
            self._refuse("nat no mapping", protocol, source, destination, now)
            return None
        shut_out = self._has_blocked and self._is_blocked(protocol, destination, source, now)
        if shut_out or not self._admits(mapping, source, now, lasts_ns):
            self._filtered += 1
            self._refuse("nat filter", protocol, source, destination, now)
            return None
        if self.behaviour.inbound_refresh:
            mapping.refreshed_at = now
            for peer in (source, source.host):
                if peer in mapping.peers:
                    mapping.peers[peer] = now
        if self.behaviour.reply_binding:
            self._note_reply(mapping, source, now)
        self._in += 1
        return mapping.inside

    def hairpin(
        self, protocol: int, source: Address, destination: Address, now: int
    ) -> tuple[Address, Address] | None:
        """The source and destination of a packet from inside to one of the own outside addresses,
        as it comes back to the inside (section 6)."""
        if self.behaviour.hairpinning == "none":
            self.refusal = "nat no hairpinning"
            return None
        outside = self.outbound(protocol, source, destination, now)
        if outside is None:
            return None
        inside = self.inbound(protocol, outside, destination, now)
        if inside is None:
            return None
        return (outside if self.behaviour.hairpinning == "external" else source), inside

    # --- what happens to it ---

    def forget(self) -> None:
        """Lose every table, as a reboot does."""
        self._by_inside.clear()
        self._by_outside.clear()
        self._blocks.clear()
        self._replies.clear()
        self._pairs.clear()
        self._ranges.clear()

    def renumber(self, addresses: Sequence[str]) -> None:
        """Other public addresses from now on; the mappings of the old ones are gone."""
        self.addresses = tuple(addresses)
        self.forget()

    def statistics(self) -> NatStatistics:
        return NatStatistics(
            mappings=len(self._by_outside),
            blocks=len(self._blocks),
            replies=len(self._replies),
            translated_out=self._out,
            translated_in=self._in,
            filtered=self._filtered,
            unmapped=self._unmapped,
            exhausted=self._exhausted,
        )

    def mappings(self, now: int) -> list[tuple[int, Address, Address]]:
        """(protocol, inside, outside) of every mapping that holds, the oldest first."""
        return [
            (each.protocol, each.inside, each.outside)
            for each in self._by_outside.values()
            if not self._is_over(each, now)
        ]

    # --- mappings ---

    def _timeout_ns(self, protocol: int) -> int:
        return self.behaviour.timeout_ns if protocol == UDP else self.behaviour.tcp_timeout_ns

    def _is_over(self, mapping: Mapping, now: int) -> bool:
        return now - mapping.refreshed_at > self._timeout_ns(mapping.protocol)

    def _admits(self, mapping: Mapping, source: Address, now: int, lasts_ns: int) -> bool:
        filtering = self.behaviour.filtering
        if filtering == "endpoint_independent":
            return True
        peer = source if filtering == "address_and_port_dependent" else source.host
        last = mapping.peers.get(peer)
        return last is not None and now - last <= lasts_ns

    def _map(
        self, protocol: int, source: Address, part: object, peer: Address, now: int
    ) -> Mapping | None:
        """A new mapping, or None and `refusal`. `part` is what its key has of the destination."""
        key = (protocol, source, part)
        old = self._by_inside.get(key)
        if old is not None:
            self._remove(old)
        if not self._has_room(now):
            self.refusal = "nat table full"
            return None
        avoid = peer if part is not None else None
        outside = self._free_outside(protocol, source, avoid, now)
        if outside is None:
            self.refusal = "nat no port"
            return None
        mapping = Mapping(protocol, source, outside, key, now)
        self._by_inside[key] = self._by_outside[(protocol, outside)] = mapping
        return mapping

    def _remove(self, mapping: Mapping) -> None:
        self._by_inside.pop(mapping.key, None)  # type: ignore[call-overload]
        if self._by_outside.get((mapping.protocol, mapping.outside)) is mapping:
            del self._by_outside[(mapping.protocol, mapping.outside)]

    def _has_room(self, now: int) -> bool:
        most = self.behaviour.max_mappings
        if len(self._by_outside) >= min(self._sweep_at, most):
            for mapping in [each for each in self._by_outside.values() if self._is_over(each, now)]:
                self._remove(mapping)
            self._sweep_at = max(64, 2 * len(self._by_outside))
        return len(self._by_outside) < most

    # --- ports ---

    def _free_outside(
        self, protocol: int, inside: Address, avoid: Address | None, now: int
    ) -> Address | None:
        host = self._address_for(inside.host)
        span = self._ports_for(inside, now)
        if span is None:
            return None
        first, last = span
        port = self._wanted_port(inside.port, first, last)
        step = 1
        if self.behaviour.keeps_parity and last > first:
            port += (port ^ inside.port) & 1
            port = port if port <= last else port - 2
            step = 2
        for _ in range((last - first) // step + 1):
            outside = Address(host, port)
            if self._is_free(protocol, outside, avoid, now):
                if self.behaviour.ports in ("sequential", "range"):
                    self._next_port = port + 1
                return outside
            port += step
            if port > last:
                port = first + ((first ^ port) & 1 if step == 2 else 0)
        return None

    def _is_free(self, protocol: int, outside: Address, avoid: Address | None, now: int) -> bool:
        holder = self._by_outside.get((protocol, outside))
        if holder is not None:
            if not self._is_over(holder, now):
                return False
            self._remove(holder)
        return avoid is None or not self._is_blocked(protocol, outside, avoid, now)

    def _wanted_port(self, inside_port: int, first: int, last: int) -> int:
        """Where to begin looking."""
        ports = self.behaviour.ports
        if ports == "preserve" and (first <= inside_port <= last):
            return inside_port
        if ports in ("sequential", "range"):
            return self._next_port if first <= self._next_port <= last else first
        return first + int(self._random.random() * (last - first + 1))

    def _ports_for(self, inside: Address, now: int) -> tuple[int, int] | None:
        """The first and last port that may be given to an inside address; None if there is no block
        left. Well-known ones keep to themselves where ports are preserved (REQ-3a)."""
        behaviour = self.behaviour
        first, last = behaviour.first_port, behaviour.last_port
        if behaviour.ports == "preserve" and 0 < inside.port < FIRST_PORT:
            return 1, FIRST_PORT - 1
        if behaviour.ports != "range":
            return first, last
        block = self._ranges.get(inside.host)
        if block is None:
            block = self._free_block(inside.host)
            if block is None:
                self._release_blocks(now)
                block = self._free_block(inside.host)
            if block is None:
                return None
            self._ranges[inside.host] = block
        return block, min(block + behaviour.range_ports - 1, last)

    def _free_block(self, inside_host: str) -> int | None:
        """The first port of the lowest block of its address that no host has."""
        behaviour = self.behaviour
        address = self._address_for(inside_host)
        held = {block for host, block in self._ranges.items() if self._address_for(host) == address}
        blocks = range(behaviour.first_port, behaviour.last_port + 1, behaviour.range_ports)
        return next((block for block in blocks if block not in held), None)

    def _release_blocks(self, now: int) -> None:
        """Take back the blocks of hosts that have no mapping any more."""
        live = {inside.host for _, inside, _ in self.mappings(now)}
        self._ranges = {host: block for host, block in self._ranges.items() if host in live}

    def _address_for(self, inside_host: str) -> str:
        if len(self.addresses) == 1:
            return self.addresses[0]
        address = self._pairs.get(inside_host)
        if address is None:
            address = self.addresses[len(self._pairs) % len(self.addresses)]
            self._pairs[inside_host] = address
        return address

    # --- answers ---

    def _reply(self, protocol: int, inside: Address, peer: Address, now: int) -> Mapping | None:
        """The mapping by which this peer came in, while that is remembered."""
        key = (protocol, inside, peer)
        known = self._replies.get(key)
        if known is None:
            return None
        if not self._is_remembered(*known, now):
            del self._replies[key]
            return None
        self._replies[key] = known[0], now
        return known[0]

    def _note_reply(self, mapping: Mapping, peer: Address, now: int) -> None:
        most = self.behaviour.max_mappings
        if len(self._replies) >= min(self._sweep_replies_at, most):
            self._replies = {
                key: known
                for key, known in self._replies.items()
                if self._is_remembered(*known, now)
            }
            self._sweep_replies_at = max(64, 2 * len(self._replies))
            if len(self._replies) >= most:
                return
        self._replies[mapping.protocol, mapping.inside, peer] = mapping, now

    def _is_remembered(self, mapping: Mapping, at: int, now: int) -> bool:
        holds = self._by_outside.get((mapping.protocol, mapping.outside)) is mapping
        lasts_ns = self._timeout_ns(mapping.protocol)
        return holds and now - at <= lasts_ns and not self._is_over(mapping, now)

    # --- entries of dropped packets ---

    def _refuse(
        self, why: str, protocol: int, source: Address, destination: Address, now: int
    ) -> None:
        self.refusal = why
        if not self.behaviour.inbound_binding:
            return
        most = self.behaviour.max_mappings
        if len(self._blocks) >= min(self._sweep_blocks_at, most):
            self._blocks = {key: until for key, until in self._blocks.items() if until >= now}
            self._sweep_blocks_at = max(64, 2 * len(self._blocks))
            if len(self._blocks) >= most:
                return
        self._has_blocked = True
        self._blocks[(protocol, destination, source)] = now + self.behaviour.block_ns

    def _is_blocked(self, protocol: int, outside: Address, peer: Address, now: int) -> bool:
        until = self._blocks.get((protocol, outside, peer))
        return until is not None and until >= now

    def _beside_blocks(self, mapping: Mapping, peer: Address, now: int) -> Mapping | None:
        """The mapping itself, or one for this peer alone if an entry stands in its way."""
        key = (mapping.protocol, mapping.inside, ("flow", peer))
        own = self._by_inside.get(key)
        if own is None or self._is_over(own, now):
            if not self._is_blocked(mapping.protocol, mapping.outside, peer, now):
                return mapping
            own = None
        if not mapping.peers:
            self._remove(mapping)  # it was made for this packet
        return own or self._map(*key, peer, now)


def _part(address: Address, behaviour: Behaviour) -> object:
    if behaviour == "endpoint_independent":
        return None
    return address.host if behaviour == "address_dependent" else address
