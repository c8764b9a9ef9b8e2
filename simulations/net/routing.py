"""Networks, the address realms they form, and where a packet goes next.

A network is a LAN with a router. The router leads up to the parent network; the root is the
internet. A NAT at the router begins a new realm of IPv4 addresses below it, so the same private
address may stand for different hosts in different realms; of IPv6 there is one realm.

Within a realm a packet takes the fewest hops over the tree and the links besides it (the oldest
ones at equal count); nothing routes around a link that is down. What a realm does not know goes up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Final

from simulations.net.firewall import Firewall, FirewallState
from simulations.net.links import Link, LinkQuality, Pipe
from simulations.net.nat import Nat

if TYPE_CHECKING:
    from simulations.net.world import World

MAX_ROUTES: Final = 4_096
FIRST_HOST: Final = 2  # the router has the first address

NO_ROUTE: Final = 0
TO_HOST: Final = 1
DOWN: Final = 2
UP: Final = 3
SIDE: Final = 4

Hop = tuple[int, Any]
"""What to do, and with what: a Host, a Network, (the other Network, Pipe), None."""


class Pool:
    """The addresses of a prefix. Which one is drawn follows from the name of who draws, so that
    leaving somebody out disturbs nobody else (unless two names meet), and who comes back has the
    address that it had, if that is free."""

    def __init__(self, prefix: str) -> None:
        self.network: IPv4Network | IPv6Network = ip_network(prefix)

    def draw(self, taken: Realm, name: str, *, besides: Collection[str] = ()) -> str:
        """One that is not taken, and none of `besides`. Raises RuntimeError when there is none."""
        first = int(self.network.network_address)
        size = self.network.num_addresses - 1 - FIRST_HOST  # the last one is the broadcast address
        make = IPv4Address if self.network.version == 4 else IPv6Address
        begin = int.from_bytes(sha256(name.encode()).digest()[:8], "big")
        for step in range(min(size, len(taken) + len(besides) + 1)):
            address = str(make(first + FIRST_HOST + (begin + step) % size))
            if address not in taken and address not in besides:
                return address
        raise RuntimeError(f"{self.network} has no address left")

    def holds(self, address: str) -> bool:
        return ip_address(address) in self.network


Realm = dict[str, "tuple[Network, Hop]"]
"""Who has an address: the network where it is, and the last hop from there: to the host, or down to
the network whose NAT has it outside."""


class Network:
    """Made by `World.network`. `uplink` leads to the parent (there: up), `lan` joins the hosts to
    the router and to one another (there: from a host to the router, back: to a host)."""

    def __init__(
        self,
        world: World,
        name: str,
        parent: Network | None,
        *,
        pool4: Pool | None,
        pool6: Pool | None,
        realm4: Realm,
        realm6: Realm,
        uplink: LinkQuality,
        lan: LinkQuality,
        firewall: Firewall | None,
    ) -> None:
        self.world = world
        self.name = name
        self.parent = parent
        self.pool4 = pool4
        self.pool6 = pool6
        self.realm4 = realm4
        self.realm6 = realm6
        self.nat: Nat | None = None
        self.firewall = None if firewall is None else FirewallState(firewall)
        self.uplink = Link(world, f"{name} uplink", uplink)
        self.lan = Link(world, f"{name} lan", lan)
        self.links: list[tuple[Network, Pipe]] = []
        self.linked_children: list[Network] = []
        self.routes: dict[str, Hop] = {}
        """What `find_hop` answered; the world forgets it when anything is placed elsewhere."""

    @property
    def outer(self) -> tuple[str, ...]:
        """The outside addresses of the NAT."""
        return () if self.nat is None else self.nat.addresses

    def rebind(self) -> None:
        """The NAT forgets every mapping, as when the router was started anew."""
        if self.nat is None:
            raise ValueError(f"{self.name} has no NAT")
        self.nat.forget()

    def renumber(self, *addresses: str) -> None:
        """The NAT gets other outside addresses (drawn from the parent's, if not given) and forgets
        its mappings, as when the provider gives another lease."""
        self.world.renumber(self, addresses)

    def is_under(self, other: Network) -> bool:
        """Whether it is that network or below it."""
        each: Network | None = self
        while each is not None:
            if each is other:
                return True
            each = each.parent
        return False

    def __repr__(self) -> str:
        return f"<network {self.name}>"


def find_hop(network: Network, host: str) -> Hop:
    """Where a packet to an address goes next from a network's router."""
    v6 = ":" in host
    end = (network.realm6 if v6 else network.realm4).get(host)
    if end is None:
        return (UP, None) if network.parent is not None else (NO_ROUTE, None)
    at, last_hop = end
    if at is network:
        return last_hop
    below: dict[Network, Network] = {}  # on the goal's branch of the tree: the next one towards it
    each = at
    while each.parent is not None:
        below[each.parent] = each
        each = each.parent
    if network.world.has_links:
        return _shortest(network, at, below)
    down = below.get(network)
    return (UP, None) if down is None else (DOWN, down)


def _shortest(start: Network, goal: Network, below: dict[Network, Network]) -> Hop:
    """The first hop of a way of the fewest hops between two networks of a realm (breadth first). It
    stays in the realm: a way out of one leads back through the same NAT."""
    first: dict[Network, Hop] = {}
    seen = {start}
    queue = deque([start])
    while queue:
        network = queue.popleft()
        for neighbour, hop in _neighbours(network, below):
            if neighbour in seen:
                continue
            seen.add(neighbour)
            first[neighbour] = first.get(network, hop)
            if neighbour is goal:
                return first[neighbour]
            queue.append(neighbour)
    return (NO_ROUTE, None)


def _neighbours(network: Network, below: dict[Network, Network]) -> Iterator[tuple[Network, Hop]]:
    """Those that may be on a short way: of the children only those that have links, or such below
    them, or that lie towards the goal."""
    if network.parent is not None:
        yield network.parent, (UP, None)
    for other, pipe in network.links:
        yield other, (SIDE, (other, pipe))
    towards = below.get(network)
    for child in (
        network.linked_children if towards is None else (*network.linked_children, towards)
    ):
        yield child, (DOWN, child)
