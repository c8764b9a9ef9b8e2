"""The bare world of the simulator, without anything of Holloway in it; a part of
`benchmarks.simulator`.

Hosts behind home NATs (a half of them symmetric) play ping-pong with servers on the internet: each
datagram crosses a NAT and two uplinks, which are two events. "plain" links have latency only,
"noisy" ones jitter, loss and a bandwidth too; "traced" is plain with a tap that sees every step;
"streams" are echoes over streams, whose acknowledgements and timers count as events as well. Rates
are per second of CPU time of this process. Memory is the growth of the resident set while hosts,
each in a network of its own behind a NAT, are added and have sent one datagram, over their number.
`python -m benchmarks.simulator_world [--quick]` measures once and prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from runtime.net.address import Address
from simulations.net.host import Host
from simulations.net.links import MS, UPLINK, LinkQuality
from simulations.net.nat import PORT_RESTRICTED, SYMMETRIC
from simulations.net.streams import Stream
from simulations.net.world import World

NS = 10**9
PORT = 3_478
SERVERS = 8
NOISY = LinkQuality(
    latency_ns=5 * MS, jitter_ns=2 * MS, loss=0.001, bandwidth_bps=10**9, queue_bytes=10**6
)


class Player:
    """A host that sends the next datagram when the answer to the last one came."""

    def __init__(self, host: Host, server: Address) -> None:
        self.host = host
        self.server = server
        host.bind(5_000, self.received)

    def received(self, data: bytes, source: Address, local: Address) -> None:
        self.host.send(5_000, self.server, data)

    def begin(self) -> None:
        for _ in range(4):
            self.host.send(5_000, self.server, bytes(100))


class Echo:
    """A server that sends back what comes, as datagrams and over streams."""

    def __init__(self, host: Host) -> None:
        self.host = host
        host.bind(PORT, self.received)
        host.listen(PORT, self.accept)

    def received(self, data: bytes, source: Address, local: Address) -> None:
        self.host.send(PORT, source, data)

    def accept(self, stream: Stream) -> None:
        stream.received = stream.send


class Talker:
    """A client whose stream carries one message back and forth."""

    def __init__(self, host: Host, server: Address) -> None:
        self.stream = host.connect(
            server, opened=self.opened, received=self.received, closed=self.closed
        )
        self.stream.send(bytes(100))

    def opened(self) -> None:
        return None

    def received(self, data: bytes) -> None:
        self.stream.send(data)

    def closed(self, code: int, reason: str) -> None:
        raise RuntimeError(f"a stream ended: {reason}")


def build(hosts: int, uplink: LinkQuality) -> tuple[World, list[Host], list[Address]]:
    world = World(1)
    cloud = world.network("cloud")
    servers = [Echo(world.host(f"server {n}", cloud)).host for n in range(SERVERS)]
    players = []
    for number in range(hosts):
        nat = PORT_RESTRICTED if number % 2 else SYMMETRIC
        home = world.network(f"home {number}", nat=nat, uplink=uplink)
        players.append(world.host(f"player {number}", home))
    return world, players, [Address(server.ipv4 or "", PORT) for server in servers]


def play(hosts: int, uplink: LinkQuality) -> World:
    world, players, servers = build(hosts, uplink)
    for number, host in enumerate(players):
        Player(host, servers[number % SERVERS]).begin()
    return world


def talk(hosts: int) -> World:
    world, players, servers = build(hosts, UPLINK)
    for number, host in enumerate(players):
        Talker(host, servers[number % SERVERS])
    return world


def rate(make: Callable[[], World], simulated_ns: int) -> dict[str, Any]:
    """Events and datagrams per second of CPU time, and simulated over CPU time."""
    world = make()
    world.run_for(100 * MS)
    gc.collect()
    events, sent = world.events, world.sent
    before = time.process_time()
    world.run_for(simulated_ns)
    passed = time.process_time() - before
    return {
        "events_per_s": round((world.events - events) / passed),
        "datagrams_per_s": round((world.sent - sent) / passed),
        "simulated_over_cpu": round(simulated_ns / NS / passed, 2),
    }


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_per_host(hosts: int) -> int:
    gc.collect()
    before = resident()
    world, players, servers = build(hosts, UPLINK)
    for number, host in enumerate(players):
        Player(host, servers[number % SERVERS])
        host.send(5_000, servers[number % SERVERS], b"one")
    world.run_for(NS // 100)
    gc.collect()
    return (resident() - before) // hosts


def measure(*, quick: bool) -> dict[str, Any]:
    """All figures."""
    hosts = 100 if quick else 1_000
    span = (2 if quick else 5) * NS * 100 // hosts

    def traced() -> World:
        world = play(hosts, UPLINK)
        world.watch(lambda sighting: None)
        return world

    per_host = memory_per_host(2_000 if quick else 5_000)
    parts = {
        "plain": rate(lambda: play(hosts, UPLINK), span),
        "noisy": rate(lambda: play(hosts, NOISY), span),
        "traced": rate(traced, span),
        "streams": rate(lambda: talk(hosts), span * 2),
    }
    return {
        "world_events_per_s": parts["plain"]["events_per_s"],
        "world_bytes_per_host": per_host,
        "world_hosts": hosts,
        "world_parts": parts,
    }


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv)))
