"""Netcheck in the simulator's own world: what it captures of a network is that network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from clients.netcheck.core import SOCKETS, Endpoint, Netcheck
from clients.netcheck.export import to_fragment
from clients.netcheck.findings import FamilyFinding, Report
from relays.stun import (
    Attribute,
    MessageClass,
    Method,
    StunMessage,
    address_value,
    xor_address_value,
)
from runtime.net.address import Address
from simulations.net.host import Host, Receiver
from simulations.net.world import World
from simulations.run import run
from simulations.scenario.capture import add, load_capture
from simulations.scenario.schema import Behaviour, Hairpinning, NatBehaviour, PortAssignment
from simulations.topology import build_networks

from .scenarios import home, office, scenario

NS = 10**9
AT = datetime(2026, 1, 2, tzinfo=UTC)
FIRST_PORT, SECOND_PORT = 3_478, 3_479
LOCAL_PORTS = (50_123, 41_007, 60_000, 33_333, 45_678, 52_001)
NONE6 = FamilyFinding(family="ipv6", local_host=None, udp="not_measured")
KINDS = get_args(Behaviour)


class StunServer:
    """RFC 5780 on two hosts: each answers at two ports, and from the other three if asked."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = hosts
        for at, host in enumerate(hosts):
            for port in (FIRST_PORT, SECOND_PORT):
                host.bind(port, self._receiver(at, port))

    def _receiver(self, at: int, port: int) -> Receiver:
        return lambda data, source, _: self.answer(at, port, data, source)

    def answer(self, at: int, port: int, data: bytes, source: Address) -> None:
        request = StunMessage.decode(data)
        change = request.integer(Attribute.CHANGE_REQUEST, 4) or 0
        other_port = FIRST_PORT + SECOND_PORT - port
        other = Address(self.hosts[1 - at].ipv4 or "", other_port)
        answer = StunMessage(
            method=Method.BINDING,
            message_class=MessageClass.SUCCESS,
            transaction_id=request.transaction_id,
            attributes=(
                (Attribute.XOR_MAPPED_ADDRESS, xor_address_value(source, request.transaction_id)),
                (Attribute.OTHER_ADDRESS, address_value(other)),
            ),
        )
        self.hosts[1 - at if change & 4 else at].send(
            other_port if change & 2 else port, source, answer.encode()
        )


def captured(nat: NatBehaviour | None, file: Path) -> NatBehaviour | None:
    """What netcheck makes of a network with such a NAT, read from what it exports."""
    world = World(1)
    networks = build_networks(world, scenario(networks=(home("home", nat),) if nat else ()))
    servers = [world.host(f"server-{number}", world.internet) for number in range(4)]
    StunServer(servers[:2])
    StunServer(servers[2:])
    laptop = world.host("laptop", networks["home" if nat else "internet"])
    core = Netcheck(
        [
            Endpoint(host.name, Address(host.ipv4 or "", port))
            for host, port in zip(
                (servers[0], servers[0], servers[2]),
                (FIRST_PORT, SECOND_PORT, FIRST_PORT),
                strict=True,
            )
        ],
        {number: Address(laptop.ipv4 or "", port) for number, port in enumerate(LOCAL_PORTS)},
        randomness=world.randomness("netcheck"),
        now=world.now,
    )
    assert len(LOCAL_PORTS) == SOCKETS

    def send() -> None:
        for socket, data, to in core.transmits:
            laptop.send(LOCAL_PORTS[socket], to, data)
        core.transmits.clear()

    def take(number: int, data: bytes, source: Address) -> None:
        core.receive(number, data, source, world.now)
        send()

    for number, port in enumerate(LOCAL_PORTS):
        laptop.bind(port, lambda data, source, _, n=number: take(n, data, source))
    send()
    while (due := core.poll_timeout()) is not None:
        world.run_for(max(1, due - world.now))
        core.handle_timeout(world.now)
        send()
    assert world.now < 15 * NS
    report = Report(ipv4=core.finding(), ipv6=NONE6)
    file.write_text(to_fragment(report, name="flat", user="grace", at=AT))
    return load_capture(file).networks[0].nat


@pytest.mark.parametrize(("mapping", "filtering"), list(product(KINDS, KINDS)))
def test_a_captured_nat_is_the_one_that_was_there(
    mapping: Behaviour, filtering: Behaviour, tmp_path: Path
) -> None:
    ways: list[tuple[PortAssignment, Hairpinning]] = [
        ("preserve", "none"), ("random", "external_source"), ("sequential", "none"),
        ("range", "internal_source"),
    ]  # fmt: skip
    for ports, hairpinning in ways:
        nat = NatBehaviour(
            mapping=mapping, filtering=filtering, ports=ports, hairpinning=hairpinning
        )
        found = captured(nat, tmp_path / "capture.toml")
        assert found is not None
        assert (found.mapping, found.filtering) == (mapping, filtering)
        # A block in which ports are counted, and for one machine alone, is a sequence.
        assert found.ports == ("sequential" if ports == "range" else ports)
        if mapping == "endpoint_independent":
            assert found.hairpinning == hairpinning


def test_a_network_without_a_nat_is_captured_without_one(tmp_path: Path) -> None:
    assert captured(None, tmp_path / "capture.toml") is None


@pytest.mark.parametrize("mapping", KINDS)
def test_a_client_in_the_captured_network_gets_the_path_of_one_in_the_real_one(
    mapping: Behaviour, tmp_path: Path
) -> None:
    ports: PortAssignment = "preserve" if mapping == "endpoint_independent" else "random"
    nat = NatBehaviour(mapping=mapping, ports=ports)
    file = tmp_path / "capture.toml"
    captured(nat, file)
    real = scenario(networks=(home("home", nat), office()))
    outcomes = {pair.client: pair.outcome for pair in run(add(real, load_capture(file)), 1).pairs}
    assert outcomes["laptop"] == outcomes["flat-client"]
