"""Engines on real sockets behind real kernel NATs with the relay as a process, and our ICE agent
before aioice's. Everything runs in namespaces with public-looking addresses."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import attrs
import pytest

from channel.messages import Candidate, Candidates, IceCredentials, IpText
from relays.stun import MessageClass, StunError, StunMessage
from runtime.clock import NS_PER_S
from runtime.net.address import Address
from runtime.randomness import SystemRandomness
from simulations.kernel.lab import Host, Lab
from simulations.kernel.punch import CLOCK, End, connect, relay_process, relay_server
from tests.unit.tunnel.network import CONNECTION, ip_packet
from tunnel.connection import PathLost
from tunnel.ice.agent import IceAgent, Outgoing
from tunnel.ice.candidates import Base, priority_of

pytestmark = pytest.mark.system

RELAY = Address("203.0.113.6", 3478)


@attrs.frozen(kw_only=True)
class Network:
    """A client and a gateway behind a NAT each, a public host, and a relay that serves."""

    client_nat: Host
    gateway_nat: Host
    client: Host
    gateway: Host
    public: Host
    relay: Host


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Lab() as lab:
        core = lab.router("core")
        client_nat = lab.nat("home", core, wan="198.51.100.2/30", lan="192.168.1.1/24")
        gateway_nat = lab.nat("office", core, wan="192.0.2.2/30", lan="10.20.30.1/24")
        made = Network(
            client_nat=client_nat,
            gateway_nat=gateway_nat,
            client=lab.host("client", client_nat, "192.168.1.10/24"),
            gateway=lab.host("gateway", gateway_nat, "10.20.30.10/24"),
            public=lab.public_host("public", core, "198.51.100.130/30"),
            relay=lab.public_host("relay", core, f"{RELAY.host}/30"),
        )
        with relay_process(made.relay, RELAY, lab.directory):
            yield made


class Tunnel:
    """Two ends that talk: each sends a numbered packet every 50 ms while `run` runs."""

    def __init__(self, network: Network) -> None:
        relays = [relay_server(RELAY)]
        self.client = End(network.client, "192.168.1.10/24", relays)
        self.gateway = End(network.gateway, "10.20.30.10/24", relays)
        self.sent = 0
        connect(self.client, self.gateway, CONNECTION)

    def kinds(self) -> list[str | None]:
        return [end.path_kind(CONNECTION) for end in (self.client, self.gateway)]

    def run(self, until: Callable[[], bool], what: str, timeout_s: float = 40.0) -> None:
        deadline = time.monotonic() + timeout_s
        send_at = time.monotonic()
        ends = (self.client, self.gateway)
        while not until():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
            if time.monotonic() >= send_at:
                send_at += 0.05
                self.sent += 1
                for end in ends:
                    end.engine.send_packet(CONNECTION, ip_packet(self.sent), CLOCK.monotonic_ns())
            for end in ends:
                if end.alive:
                    end.flush()
            now = CLOCK.monotonic_ns()
            timeouts = [end.poll_timeout() for end in ends if end.alive]
            wait_s = min(
                [send_at - time.monotonic()]
                + [(at - now) / NS_PER_S for at in timeouts if at is not None]
            )
            readable, _, _ = select.select(
                [end.socket for end in ends if end.alive], [], [], max(0.0, wait_s)
            )
            for end in ends:
                if end.alive:
                    if end.socket in readable:
                        end.receive()
                    end.engine.handle_timeout(CLOCK.monotonic_ns())

    def run_until_both_hear(self, count: int = 20) -> None:
        wanted = [len(end.packets) + count for end in (self.client, self.gateway)]
        self.run(
            lambda: (
                len(self.client.packets) >= wanted[0] and len(self.gateway.packets) >= wanted[1]
            ),
            "packets flow both ways",
        )

    def close(self) -> None:
        for end in (self.client, self.gateway):
            end.engine.close(CONNECTION, CLOCK.monotonic_ns())
            end.socket.close()


@pytest.fixture
def tunnel(network: Network) -> Iterator[Callable[[], Tunnel]]:
    """Makes a tunnel between the two LANs; the NATs are easy again for the next test."""
    made: list[Tunnel] = []

    def make() -> Tunnel:
        made.append(Tunnel(network))
        return made[-1]

    yield make
    for each in made:
        each.close()
    for nat in (network.client_nat, network.gateway_nat):
        nat.set_nat("port_restricted")
        nat.flush_bindings()


def test_two_port_restricted_nats_are_punched_and_later_hardening_is_relayed(
    network: Network, tunnel: Callable[[], Tunnel]
) -> None:
    made = tunnel()
    made.run_until_both_hear()
    made.run(
        lambda: made.kinds() == ["direct", "direct"],
        "the direct path",
    )
    path = made.client.engine.path(CONNECTION)
    assert path is not None
    assert (path.local.host, path.remote.host) == ("198.51.100.2", "192.0.2.2")

    for nat in (network.client_nat, network.gateway_nat):
        nat.set_nat("symmetric")
        nat.flush_bindings()
    made.run(
        lambda: made.kinds() == ["relayed", "relayed"],
        "the relay takes over",
    )
    made.run_until_both_hear()

    for nat in (network.client_nat, network.gateway_nat):
        nat.set_nat("port_restricted")
        nat.flush_bindings()
    made.run(
        lambda: made.kinds() == ["direct", "direct"],
        "the direct path comes back",
        timeout_s=60,
    )
    made.run_until_both_hear()
    for end in (made.client, made.gateway):
        assert len(end.packets) == len(set(end.packets)), "nothing is delivered twice"


def test_two_symmetric_nats_meet_at_the_relay(
    network: Network, tunnel: Callable[[], Tunnel]
) -> None:
    for nat in (network.client_nat, network.gateway_nat):
        nat.set_nat("symmetric")
        nat.flush_bindings()
    made = tunnel()
    made.run_until_both_hear()
    assert made.kinds() == ["relayed", "relayed"]


def test_a_peer_that_falls_silent_is_noticed(
    tunnel: Callable[[], Tunnel],
) -> None:
    made = tunnel()
    made.run_until_both_hear()
    made.gateway.alive = False
    made.run(lambda: made.client.happened(PathLost), "the loss of the path")


AIOICE = """
import asyncio, json, sys
from aioice import Candidate, Connection

async def main():
    controlling, our, ours, address = json.loads(sys.argv[1])
    connection = Connection(
        ice_controlling=controlling, use_ipv6=False,
        local_username="aioiceAI", local_password="a" * 32,
    )
    connection.remote_username, connection.remote_password = our, ours
    await connection.gather_candidates()
    print(json.dumps([c.to_sdp() for c in connection.local_candidates]), flush=True)
    await connection.add_remote_candidate(Candidate.from_sdp(address))
    await connection.add_remote_candidate(None)
    await connection.connect()
    await connection.send(b"Hello from aioice")
    print(json.dumps((await connection.recv()).decode()), flush=True)
    await connection.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("aioice_controls", [True, False])
def test_our_agent_finds_a_path_with_aioices(network: Network, aioice_controls: bool) -> None:
    address = "198.51.100.130"
    with network.public.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 0))
    sock.setblocking(False)
    local = Address(*sock.getsockname())
    now = CLOCK.monotonic_ns()
    ours = IceCredentials(fragment="oursOURS", password="o" * 32)
    agent = IceAgent(
        local=ours,
        remote=IceCredentials(fragment="aioiceAI", password="a" * 32),
        controlling=not aioice_controls,
        randomness=SystemRandomness(),
        transaction_prefix=b"test",
        now=now,
    )
    base = Base(address=local, socket=local, priority=priority_of("host", 65_535))
    agent.set_bases([base], now)
    sdp = f"1 1 udp {base.priority} {local.host} {local.port} typ host"
    arguments = json.dumps([aioice_controls, ours.fragment, ours.password, sdp])
    process = network.public.spawn(
        [sys.executable, "-c", AIOICE, arguments],
        stdout=subprocess.PIPE,
    )
    with process, sock:
        assert process.stdout is not None
        for text in json.loads(process.stdout.readline()):
            agent.add_candidates(_candidates_of(text), CLOCK.monotonic_ns())
        greeting = _exchange(agent, sock, base)
        assert greeting == b"Hello from aioice"
        assert json.loads(process.stdout.readline()) == "hello from us"
        assert agent.path() is not None
        assert process.wait(timeout=30) == 0


def _candidates_of(sdp: str) -> Candidates:
    _, _, _, priority, host, port, *_ = sdp.split()
    candidate = Candidate(
        kind="host", address=IpText(host), port=int(port), priority=int(priority), foundation="1"
    )
    return Candidates(connection_id=CONNECTION, generation=0, add=(candidate,))


def _exchange(agent: IceAgent, sock: socket.socket, base: Base) -> bytes | None:
    """Run the agent until the peer's data came, and ours went out."""
    greeting = None
    deadline = time.monotonic() + 30
    said = False
    while greeting is None or not said:
        assert time.monotonic() < deadline, "no path within 30 s"
        now = CLOCK.monotonic_ns()
        agent.handle_timeout(now)
        for outgoing in agent.drain_checks():
            _send(sock, outgoing)
        if agent.selected is not None and greeting is not None:
            sock.sendto(b"hello from us", agent.selected.remote.address)
            said = True
        at = agent.poll_timeout()
        wait_s = 0.05 if at is None else min(0.05, max(0.0, (at - now) / NS_PER_S))
        if not select.select([sock], [], [], wait_s)[0]:
            continue
        data, source = sock.recvfrom(65_535)
        try:
            message = StunMessage.decode(data)
        except StunError:
            greeting = data
            continue
        now = CLOCK.monotonic_ns()
        if message.message_class is MessageClass.REQUEST:
            agent.receive_request(message, base, Address(*source), now)
        else:
            agent.receive_response(message, base, Address(*source), now)
    return greeting


def _send(sock: socket.socket, outgoing: Outgoing) -> None:
    with contextlib.suppress(OSError):
        sock.sendto(outgoing.data, outgoing.remote)
