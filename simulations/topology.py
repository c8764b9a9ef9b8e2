"""From the networks of a scenario file to those of a world."""

from __future__ import annotations

from typing import Final

from simulations.net import links
from simulations.net import nat as nats
from simulations.net.firewall import Firewall, Rule
from simulations.net.routing import Network
from simulations.net.world import World
from simulations.scenario import schema
from simulations.scenario.units import (
    PPM,
    duration_ns,
    rate_bit_per_s,
    share_ppm,
    size_bytes,
)

_HAIRPINNING: Final[dict[str, nats.Hairpinning]] = {
    "none": "none",
    "internal_source": "internal",
    "external_source": "external",
}
ANY_IPV4: Final = "0.0.0.0/0"
ANY_IPV6: Final = "::/0"


def build_networks(world: World, scenario: schema.Scenario) -> dict[str, Network]:
    """Every network of the file by its name, the internet among them, and the links besides."""
    networks = {schema.INTERNET: world.internet}
    waiting = list(scenario.networks)
    while waiting:
        ready = [each for each in waiting if each.behind in networks]
        if not ready:
            raise ValueError(f"networks stand behind nothing: {[each.name for each in waiting]}")
        for each in ready:
            networks[each.name] = world.network(
                each.name,
                prefix=each.prefix,
                prefix6=each.prefix6,
                behind=networks[each.behind],
                nat=None if each.nat is None else nat_of(each.nat),
                firewall=firewall_of(each.firewall, has_ipv6=bool(each.prefix6)),
                uplink=quality_of(each.uplink),
                lan=quality_of(each.lan),
            )
        waiting = [each for each in waiting if each.name not in networks]
    for link in scenario.links:
        a, b = link.between
        world.link(networks[a], networks[b], quality_of(link.quality))
    return networks


def quality_of(written: schema.LinkQuality) -> links.LinkQuality:
    """What a file says of a way, in the world's units. Raises ValueError."""
    loss = share_ppm(written.loss) / PPM
    bursts = None
    if written.burst > 1 and loss > 0:
        # A bad state loses all; it lasts `burst` packets, and is as frequent as the loss asks for.
        end = 1 / written.burst
        bursts = links.Bursts(begin=min(1.0, end * loss / max(1e-9, 1 - loss)), end=end)
    return links.LinkQuality(
        latency_ns=duration_ns(written.latency),
        jitter_ns=duration_ns(written.jitter),
        loss=0.0 if bursts is not None else loss,
        bursts=bursts,
        duplicate=share_ppm(written.duplication) / PPM,
        reorder=share_ppm(written.reordering) / PPM,
        corrupt=share_ppm(written.corruption) / PPM,
        bandwidth_bps=rate_bit_per_s(written.bandwidth) if written.bandwidth else 0,
        queue_bytes=size_bytes(written.queue),
        mtu=written.mtu,
    )


def nat_of(written: schema.NatBehaviour) -> nats.NatBehaviour:
    """Raises ValueError."""
    return nats.NatBehaviour(
        mapping=written.mapping,
        filtering=written.filtering,
        ports=written.ports,
        hairpinning=_HAIRPINNING[written.hairpinning],
        timeout_ns=duration_ns(written.timeout),
        inbound_refresh=written.inbound_refresh,
        inbound_binding=written.inbound_binding,
        reply_binding=written.reply_binding,
        public_addresses=written.addresses,
    )


def firewall_of(
    written: schema.Firewall, *, has_ipv6: bool, block_udp: bool = False
) -> Firewall | None:
    """The rules, or None where everything passes. IPv4 that comes unasked is a NAT's business; and
    where there is none it passes. IPv6 passes only as an answer, or with `ipv6_inbound`."""
    udp = "drop" if block_udp and written.udp == "pass" else written.udp
    plain = udp == "pass" and not written.udp_ports and not written.tcp_ports
    if plain and (not has_ipv6 or written.ipv6_inbound):
        return None
    outbound = [Rule(protocol="tcp", ports=_ports(written.tcp_ports))]
    if udp == "pass":
        outbound.append(Rule(protocol="udp", ports=_ports(written.udp_ports)))
    inbound = []
    for prefix in (ANY_IPV4, *((ANY_IPV6,) if written.ipv6_inbound else ())):
        inbound.append(Rule(protocol="tcp", prefix=prefix))
        if udp == "pass":
            inbound.append(Rule(protocol="udp", prefix=prefix))
    return Firewall(outbound=tuple(outbound), inbound=tuple(inbound), rejects=udp == "reject")


def _ports(ports: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((port, port) for port in ports)
