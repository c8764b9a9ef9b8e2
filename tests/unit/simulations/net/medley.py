"""A random world with everything in it, for properties that hold whatever happens.

`python -m tests.unit.simulations.net.medley SEED` runs one and prints its trace and counts.
"""

from __future__ import annotations

import sys
from random import Random
from typing import Any, get_args

from runtime.net.address import Address
from simulations.net.firewall import STATEFUL, STATEFUL6, UDP_DROPPED, UDP_REJECTED, WEB_ONLY
from simulations.net.host import Host
from simulations.net.links import Bursts, LinkQuality
from simulations.net.nat import Behaviour, Hairpinning, NatBehaviour, Ports
from simulations.net.partition import Partition
from simulations.net.routing import Network
from simulations.net.streams import Stream
from simulations.net.world import World

MS = 10**6
NS = 10**9
PORTS = (5_000, 5_001)


class Medley:
    """A world that is built and disturbed at random, from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.world = World(seed)
        self.networks: list[Network] = [self.world.internet]
        self.hosts: list[Host] = []
        self.seen: list[Address] = []
        self.streams: list[Stream] = []
        self.cuts: list[Partition] = []
        for number in range(self.random.randint(2, 7)):
            self.networks.append(self.network(number))
        for number in range(self.random.randint(2, 10)):
            self.hosts.append(self.host(number))
        first = self.networks[1]
        if first.realm4 is self.world.internet.realm4:
            self.world.link(self.world.internet, first, LinkQuality(latency_ns=MS))

    def quality(self) -> LinkQuality:
        draw = self.random
        return LinkQuality(
            latency_ns=draw.choice([0, 0, 5 * MS, 40 * MS]),
            jitter_ns=draw.choice([0, 0, 3 * MS]),
            loss=draw.choice([0, 0, 0.1]),
            bursts=draw.choice([None, None, Bursts(begin=0.1, end=0.3)]),
            duplicate=draw.choice([0, 0, 0.1]),
            reorder=draw.choice([0, 0, 0.2]),
            corrupt=draw.choice([0, 0, 0.1]),
            bandwidth_bps=draw.choice([0, 0, 500_000]),
            queue_bytes=draw.choice([3_000, 65_536]),
            mtu=draw.choice([1_500, 1_500, 1_280, 800]),
        )

    def nat(self) -> NatBehaviour | None:
        draw = self.random
        if draw.random() < 0.3:
            return None
        return NatBehaviour(
            mapping=draw.choice(get_args(Behaviour)),
            filtering=draw.choice(get_args(Behaviour)),
            ports=draw.choice(get_args(Ports)),
            hairpinning=draw.choice(get_args(Hairpinning)),
            timeout_ns=draw.choice([2 * NS, 30 * NS]),
            inbound_refresh=draw.random() < 0.5,
            inbound_binding=draw.random() < 0.5,
            public_addresses=draw.choice([1, 1, 3]),
            keeps_parity=draw.random() < 0.5,
            range_ports=4,
            last_port=draw.choice([1_040, 65_535]),
        )

    def network(self, number: int) -> Network:
        draw = self.random
        return self.world.network(
            f"network {number}",
            prefix=f"10.{number}.0.0/24",
            prefix6=draw.choice(["", f"2001:db8:{number + 1}::/64"]),
            behind=draw.choice(self.networks),
            nat=self.nat(),
            firewall=draw.choice(
                [None, None, STATEFUL, STATEFUL6, UDP_DROPPED, UDP_REJECTED, WEB_ONLY]
            ),
            uplink=self.quality(),
            lan=draw.choice([LinkQuality(), self.quality()]),
        )

    def host(self, number: int) -> Host:
        host = self.world.host(f"host {number}", self.random.choice(self.networks))
        self.settle(host)
        return host

    def settle(self, host: Host) -> None:
        """Bind and listen, as after a start."""

        def received(data: bytes, source: Address, local: Address) -> None:
            self.seen.append(source)
            if data[:1] == b"?":
                host.send(local.port, source, b"!" + data[1:])

        def accept(stream: Stream) -> None:
            def echo(data: bytes) -> None:
                stream.send(data)

            stream.received = echo
            self.streams.append(stream)

        host.bind(PORTS[0], received)
        host.listen(443, accept)

    def act(self) -> None:
        """One random thing."""
        draw = self.random
        host = draw.choice(self.hosts)
        network = draw.choice(self.networks[1:])
        action = draw.randrange(30)
        if action < 12:
            host.send(draw.choice(PORTS), self.somewhere(), b"?" + bytes(draw.randrange(1_400)))
        elif action < 16:
            self.streams.append(
                host.connect(
                    self.somewhere()._replace(port=443),
                    protocol=draw.choice(["udp", "tcp"]),
                    opened=lambda: None,
                    received=lambda data: None,
                    closed=lambda code, reason: None,
                )
            )
        elif action < 19 and self.streams:
            draw.choice(self.streams).send(bytes(draw.randrange(5_000)))
        elif action == 19 and self.streams:
            draw.choice(self.streams).close(1, "bye")
        elif action == 20:
            host.move(draw.choice(self.networks))
        elif action == 21:
            host.pause()
        elif action == 22:
            host.resume()
        elif action == 23:
            host.crash(answers=draw.random() < 0.5)
        elif action == 24 and not host.alive:
            host.restart()
            self.settle(host)
        elif action == 25:
            self.cuts.append(self.world.partition([host], [network], one_way=draw.random() < 0.5))
        elif action == 26 and self.cuts:
            self.cuts.pop().heal()
        elif action == 27:
            network.uplink.change(self.quality())
        elif action == 28 and network.nat is not None:
            draw.choice([network.rebind, network.renumber])()
        elif action == 29:
            host.drift(draw.choice([-100, 0, 200]))

    def somewhere(self) -> Address:
        draw = self.random
        if self.seen and draw.random() < 0.4:
            return draw.choice(self.seen)
        host = draw.choice(self.hosts)
        hosts = [each for each in (host.ipv4, host.ipv6, *host.network.outer) if each]
        return Address(draw.choice(hosts or ["203.0.113.1"]), draw.choice(PORTS))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.act()
            self.world.run_for(self.random.choice([0, MS, 10 * MS, NS // 4]))


def main(seed: int) -> tuple[str, dict[str, Any]]:
    medley = Medley(seed)
    medley.run(150)
    return medley.world.trace, medley.world.statistics()


if __name__ == "__main__":
    print(*main(int(sys.argv[1])))
