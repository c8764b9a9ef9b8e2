"""What `holloway netcheck` found, and the pure rules by which it is concluded from observations.

The terms are those of RFC 4787 (mapping, filtering, port assignment, hairpinning), found out in the
manner of RFC 5780. A word that nobody measured is `not_measured`, with the reason in `notes`: a
report never says more than what was seen. What servers answer is not proved by anything; one that
lies can make an easy NAT look hard, and two that agree the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from itertools import pairwise
from typing import Final, Literal

import attrs

from relays.peers import LOWEST_PEER_PORT, PeerPolicy
from runtime.net.address import Address

MappingBehaviour = Literal[
    "endpoint_independent",
    "address_dependent",
    "address_and_port_dependent",
    "endpoint_dependent",  # one of the two before: no server with two ports tells which
    "not_measured",
]
Filtering = Literal[
    "endpoint_independent", "address_dependent", "address_and_port_dependent", "not_measured"
]
Ports = Literal["preserve", "sequential", "range", "random", "not_measured"]
Hairpinning = Literal["none", "internal_source", "external_source", "not_measured"]
Udp = Literal["works", "partly", "blocked", "not_measured"]

LEAST_SAMPLES: Final = 4
"""Sockets from whose mapped ports one may guess how a NAT assigns them."""
LONGEST_STEP: Final = 16
"""Between two mapped ports of a NAT that hands out one after the other, and to others as well."""
RANGE_PORTS: Final = 4_096
"""Ports at random that lie so near each other are of a block: for four of all 64,512 that has a
chance of 1 in 1,000."""


@attrs.frozen(kw_only=True)
class Answer:
    """What one server said to one socket: where the packet seemed to come from."""

    server: Address
    local: Address
    mapped: Address


@attrs.frozen(kw_only=True)
class ServerFinding:
    """One address of a named server. `round_trip_ns` of the first answer; `error` is the code of an
    error response, whose sender is reachable too."""

    name: str
    address: str
    reachable: bool
    round_trip_ns: int | None = None
    mapped: str | None = None
    error: int | None = None


@attrs.frozen(kw_only=True)
class Nat:
    """How the way out of this machine translates addresses of one family. `present` is None where
    nobody answered."""

    present: bool | None = None
    mapping: MappingBehaviour = "not_measured"
    filtering: Filtering = "not_measured"
    ports: Ports = "not_measured"
    hairpinning: Hairpinning = "not_measured"
    public_hosts: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class FamilyFinding:
    """One IP family. `local_host` is the address from which servers are reached, None where this
    machine has none; `servers` are those with an address of this family."""

    family: Literal["ipv4", "ipv6"]
    local_host: str | None
    udp: Udp
    servers: tuple[ServerFinding, ...] = ()
    nat: Nat = Nat()
    notes: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class PortalFinding:
    """A TLS handshake over TCP with the portal, which took `handshake_ns`. `proved`: its
    certificate was held against the pin of a token; None where there was no token, so that anybody
    may have answered."""

    address: str
    reachable: bool
    proved: bool | None = None
    handshake_ns: int | None = None
    error: str = ""


@attrs.frozen(kw_only=True)
class Link:
    """The interface by which the way out begins. `prefix` is that of its address there."""

    name: str
    mtu: int
    prefix: str = ""


@attrs.frozen(kw_only=True)
class Report:
    """Everything that a check found. `packets_sent` is the bound that was kept to."""

    ipv4: FamilyFinding
    ipv6: FamilyFinding
    portal: PortalFinding | None = None
    link: Link | None = None
    packets_sent: int = 0
    notes: tuple[str, ...] = ()

    @property
    def families(self) -> tuple[FamilyFinding, FamilyFinding]:
        return self.ipv4, self.ipv6

    @property
    def best_round_trip_ns(self) -> int | None:
        """The shortest to a server, of IPv4 where there is one."""
        for family in self.families:
            times = [s.round_trip_ns for s in family.servers if s.round_trip_ns is not None]
            if times:
                return min(times)
        return None


# --- rules ---------------------------------------------------------------------------------------


def is_translated(answers: Sequence[Answer]) -> bool | None:
    """Whether there is a NAT: some server saw another address than the socket has."""
    if not answers:
        return None
    return any(answer.mapped != answer.local for answer in answers)


def mapping_of(answers: Sequence[Answer]) -> MappingBehaviour:
    """From what several servers said to one socket (RFC 5780, section 4.3).

    Servers at one IP address say something about ports only, those at several about addresses.
    """
    by_host: dict[str, dict[int, Address]] = {}
    for answer in answers:
        by_host.setdefault(answer.server.host, {})[answer.server.port] = answer.mapped
    all_mapped = {mapped for ports in by_host.values() for mapped in ports.values()}
    twice = [set(ports.values()) for ports in by_host.values() if len(ports) > 1]
    if any(len(mapped) > 1 for mapped in twice):
        return "address_and_port_dependent"
    if len(by_host) < 2:
        return "not_measured"
    if len(all_mapped) == 1:
        return "endpoint_independent"
    return "address_dependent" if twice else "endpoint_dependent"


def ports_of(answers: Sequence[Answer]) -> Ports:
    """A guess from the mapped ports of several sockets towards one server, in the order in which
    they were opened."""
    if len(answers) < LEAST_SAMPLES:
        return "not_measured"
    kept = sum(answer.mapped.port == answer.local.port for answer in answers)
    if kept * 4 >= len(answers) * 3:  # one may have been taken by somebody else
        return "preserve"
    mapped = [answer.mapped.port for answer in answers]
    steps = [after - before for before, after in pairwise(mapped)]
    if all(1 <= step <= LONGEST_STEP for step in steps):
        return "sequential"
    return "range" if max(mapped) - min(mapped) < RANGE_PORTS else "random"


def filtering_of(*, from_other_host: bool, from_other_port: bool) -> Filtering:
    """From which of a server's other addresses an answer came in (RFC 5780, section 4.4)."""
    if from_other_host:
        return "endpoint_independent"
    return "address_dependent" if from_other_port else "address_and_port_dependent"


def hairpinning_of(
    sources: Sequence[Address], locals_: Mapping[int, Address], *, asked: bool
) -> Hairpinning:
    """From where own packets to own mapped addresses came in. `sources` are those seen."""
    if not asked:
        return "not_measured"
    if not sources:
        return "none"
    inside = {local.host for local in locals_.values()}
    return "internal_source" if sources[0].host in inside else "external_source"


def may_be_other(other: Address, server: Address) -> bool:
    """Whether packets may go to what `server` says is its other address. A public one may not name
    a place in a private network; none may name this machine, a group or a low port."""
    is_public = PeerPolicy.of().allows
    return (
        other.family == server.family
        and other.port >= LOWEST_PEER_PORT
        and may_be_asked(other.host)
        and (is_public(other.host) or not is_public(server.host))
    )


def may_be_asked(host: str) -> bool:
    """Whether a packet may go to an address that servers say is ours: a place elsewhere that is no
    group, and not this machine."""
    address = ip_address(host)
    return not (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or (address.version == 4 and address.is_reserved)
    )
