"""Firewalls at the edge of a network: a list of what may leave, a list of what may enter unasked,
and a memory of what left, whose answers may enter. Default deny on both lists.

`Firewall` is the rules, `FirewallState` one that runs. A packet is judged with inside addresses:
before a NAT on the way out, after it on the way in.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final, Literal

import attrs

from runtime.net.address import Address
from simulations.net.packets import PROTOCOL_NAMES, UDP

NS: Final = 10**9
Network = IPv4Network | IPv6Network


def _network(text: str | Network | None) -> Network | None:
    return ip_network(text) if text else None


@attrs.frozen(kw_only=True)
class Rule:
    """What it allows: a protocol, the ports of the destination (pairs of first and last; none
    means all), and the prefix of the address outside (CIDR; none means any)."""

    protocol: Literal["udp", "tcp", "any"] = "any"
    ports: tuple[tuple[int, int], ...] = ()
    prefix: Network | None = attrs.field(default=None, converter=_network)

    def allows(self, protocol: int, outside: Address, port: int) -> bool:
        if self.protocol not in ("any", PROTOCOL_NAMES[protocol]):
            return False
        if self.ports and not any(first <= port <= last for first, last in self.ports):
            return False
        return self.prefix is None or ip_address(outside.host) in self.prefix


ANY: Final = (Rule(),)


@attrs.frozen(kw_only=True)
class Firewall:
    """The rules. `family`: what it looks at; the rest passes. `rejects`: what may not leave is
    answered by ICMP "prohibited", otherwise dropped in silence (what may not enter is always).
    `passes_icmp` False makes it a black hole for "too big" and the like. A flow is forgotten
    `udp_timeout_ns` or `tcp_timeout_ns` after its last packet, either way."""

    outbound: tuple[Rule, ...] = ANY
    inbound: tuple[Rule, ...] = ()
    family: Literal["any", "ipv4", "ipv6"] = "any"
    rejects: bool = False
    passes_icmp: bool = True
    udp_timeout_ns: int = 120 * NS
    tcp_timeout_ns: int = 7_440 * NS
    max_flows: int = 65_536


STATEFUL: Final = Firewall()
STATEFUL6: Final = Firewall(family="ipv6")
UDP_DROPPED: Final = Firewall(outbound=(Rule(protocol="tcp"),))
UDP_REJECTED: Final = Firewall(outbound=(Rule(protocol="tcp"),), rejects=True)
WEB_ONLY: Final = Firewall(outbound=(Rule(protocol="tcp", ports=((80, 80), (443, 443))),))

Flow = tuple[int, Address, Address]


class FirewallState:
    """A firewall that runs. `rules` may be replaced at any time; what is established stays."""

    def __init__(self, rules: Firewall) -> None:
        self.rules = rules
        self.refusal = ""
        self.refused = 0
        self._flows: dict[Flow, int] = {}  # (protocol, inside, outside) -> last packet
        self._sweep_at = 64

    def leaves(self, protocol: int, inside: Address, outside: Address, now: int, v6: bool) -> bool:
        """Whether a packet from inside may go; False and `refusal`."""
        if self._looks_away(v6):
            return True
        flow = (protocol, inside, outside)
        if not self._is_live(flow, now):
            if not any(r.allows(protocol, outside, outside.port) for r in self.rules.outbound):
                return self._refuse("firewall")
            if not self._has_room(now):
                return self._refuse("firewall table full")
        self._flows[flow] = now
        return True

    def enters(self, protocol: int, outside: Address, inside: Address, now: int, v6: bool) -> bool:
        """Whether a packet from outside may come in; False and `refusal`."""
        if self._looks_away(v6):
            return True
        flow = (protocol, inside, outside)
        if not self._is_live(flow, now):
            if not any(r.allows(protocol, outside, inside.port) for r in self.rules.inbound):
                return self._refuse("firewall")
            if not self._has_room(now):
                return self._refuse("firewall table full")
        self._flows[flow] = now
        return True

    def forget(self) -> None:
        """Lose the memory of all flows, as a reboot does."""
        self._flows.clear()

    def statistics(self) -> dict[str, int]:
        return {"flows": len(self._flows), "refused": self.refused}

    def _looks_away(self, v6: bool) -> bool:
        family = self.rules.family
        return family != "any" and (family == "ipv6") != v6

    def _refuse(self, why: str) -> bool:
        self.refusal = why
        self.refused += 1
        return False

    def _timeout_ns(self, protocol: int) -> int:
        return self.rules.udp_timeout_ns if protocol == UDP else self.rules.tcp_timeout_ns

    def _is_live(self, flow: Flow, now: int) -> bool:
        last = self._flows.get(flow)
        return last is not None and now - last <= self._timeout_ns(flow[0])

    def _has_room(self, now: int) -> bool:
        most = self.rules.max_flows
        if len(self._flows) >= min(self._sweep_at, most):
            for flow in [each for each in self._flows if not self._is_live(each, now)]:
                del self._flows[flow]
            self._sweep_at = max(64, 2 * len(self._flows))
        return len(self._flows) < most
