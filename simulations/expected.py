"""Asks the oracle about the pairs of a run: what it is told is where both ends stand at the end.

The oracle knows nothing of Holloway, and this is where its words meet those of scenario files. No
answer is given where it cannot be: where policy forbids the pair, where one of the two is down or
lies, and while networks are parted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from simulations import oracle
from simulations.build import Installation, Slot
from simulations.hosts.relay import RELAY_PORT
from simulations.hosts.relay_links import DOOR_PORT
from simulations.net.routing import Network
from simulations.result import Expected
from simulations.scenario import schema
from simulations.traffic import Pair

NO_ANSWER: Final[tuple[Expected, str]] = ("", "")


class Judge:
    """The oracle's word on each pair of an installation as it is now."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._written = {each.name: each for each in installation.scenario.networks}
        self._sites_by_resource = {
            each.name: each.sites for each in installation.scenario.account.resources
        }
        self._sides: dict[tuple[str, bool], oracle.Side] = {}
        self._verdicts: dict[tuple[object, ...], oracle.Verdict] = {}
        has_relay = any(
            slot.is_online and not slot.hostile for slot in installation.of_kind("relay")
        )
        self._transports: tuple[oracle.Transport, ...] = ("udp", "stream") if has_relay else ()

    def expected(self, pair: Pair) -> tuple[Expected, str]:
        """The path that the pair must have, and why."""
        installation = self._installation
        client = installation.slots[pair.client]
        if not pair.may() or client.hostile or not client.is_up or installation.world.partitions:
            return NO_ANSWER
        gateway = self._gateway(pair)
        if gateway is None:
            return "none", "no gateway of the resource is up"
        if gateway.hostile:
            return NO_ANSWER
        here, there = client.host.network, gateway.host.network
        one, other = self._side(client), self._side(gateway)
        shared = self._shared(here, there)
        key = (one, other, shared, here is there)
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = oracle.judge(
                one,
                other,
                shared_nats=shared,
                same_lan=here is there,
                relay_transports=self._transports,
            )
        return verdict.path, verdict.why

    def _gateway(self, pair: Pair) -> Slot | None:
        """The one that carried the pair, if it is up; else any that could."""
        used = self._installation.slots.get(pair.gateway)
        if used is not None and used.is_online:
            return used
        sites = self._sites_by_resource[pair.resource]
        for written in self._installation.scenario.gateways:
            slot = self._installation.slots[written.name]
            if written.site in sites and slot.is_online and not slot.hostile:
                return slot
        return None

    # --- where somebody stands -------------------------------------------------------------------

    def _side(self, slot: Slot) -> oracle.Side:
        key = (slot.host.network.name, slot.host.ipv6 is not None)
        side = self._sides.get(key)
        if side is None:
            behind = self._behind(slot.host.network)
            udp, streams = way_out((network.firewall, False) for network in behind)
            side = self._sides[key] = oracle.Side(
                nats=tuple(_nat(each.nat) for each in behind if each.nat is not None),
                udp=udp,
                streams=streams,
                ipv6=slot.host.ipv6 is not None,
            )
        return side

    def _behind(self, network: Network) -> list[schema.Network]:
        """The networks of the file from the inside outwards."""
        found, name = [], network.name
        while name in self._written:
            found.append(self._written[name])
            name = self._written[name].behind
        return found

    def _shared(self, here: Network, there: Network) -> int:
        """How many NATs both have in common, which are the outermost."""
        ours = [each.name for each in self._behind(here) if each.nat is not None]
        theirs = [each.name for each in self._behind(there) if each.nat is not None]
        return len(set(ours) & set(theirs))


def way_out(
    firewalls: Iterable[tuple[schema.Firewall, bool]], relay_port: int = RELAY_PORT
) -> tuple[Literal["open", "relays", "blocked"], bool]:
    """What gets out through all of these, as `oracle.Side` has it: UDP, and connections to a
    relay's door, over TCP or over UDP to the same port. With each goes whether a fault blocks its
    UDP."""
    udp: Literal["open", "relays", "blocked"] = "open"
    streams = True
    for firewall, is_blocked in firewalls:
        passes_udp = firewall.udp == "pass" and not is_blocked
        ports = firewall.udp_ports
        if not passes_udp or (ports and relay_port not in ports):
            udp = "blocked"
        elif ports and udp == "open":
            udp = "relays"
        over_udp = passes_udp and (not ports or DOOR_PORT in ports)
        over_tcp = not firewall.tcp_ports or DOOR_PORT in firewall.tcp_ports
        streams = streams and (over_udp or over_tcp)
    return udp, streams


def _nat(written: schema.NatBehaviour) -> oracle.Nat:
    return oracle.Nat(
        mapping=written.mapping,
        filtering=written.filtering,
        ports=written.ports,
        hairpinning=written.hairpinning,
        filters_per="mapping",
        inbound_binding=written.inbound_binding,
        reply_binding=written.reply_binding,
    )
