"""All 81 ordered pairs of NATs of the kernel, punched by our engines on real sockets: each gets the
path that the oracle says, by the rule of bindings that connection tracking has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import get_args

import attrs
import pytest

from runtime.clock import NS_PER_S
from runtime.net.address import Address
from simulations.kernel.lab import Host, Lab
from simulations.kernel.nats import (
    RACING,
    Hairpinning,
    KernelNat,
    install,
    install_ipv6_firewall,
)
from simulations.kernel.punch import Place, punch_all, relay_process
from simulations.oracle import Behaviour, Nat, Side, judge

pytestmark = pytest.mark.system

BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)
NINE = list(product(BEHAVIOURS, BEHAVIOURS))
RELAY = Address("203.0.113.6", 3478)
CLIENT, GATEWAY = "192.168.1.10/24", "10.20.30.10/24"


@attrs.frozen
class Streets:
    """Nine homes with a client each, nine offices with a gateway each, and a relay."""

    home_nats: list[Host]
    office_nats: list[Host]
    clients: list[Place]
    gateways: list[Place]

    def install(self, make: list[KernelNat]) -> None:
        for nats in (self.home_nats, self.office_nats):
            for nat, behaviour in zip(nats, make, strict=False):
                install(nat, behaviour)


@pytest.fixture(scope="module")
def streets() -> Iterator[Streets]:
    with Lab() as lab:
        core = lab.router("core")
        made = Streets([], [], [], [])
        for n in range(len(NINE)):
            home = lab.nat(f"home{n}", core, wan=f"198.51.100.{4 * n + 2}/30", lan="192.168.1.1/24")
            office = lab.nat(f"office{n}", core, wan=f"192.0.2.{4 * n + 2}/30", lan="10.20.30.1/24")
            made.home_nats.append(home)
            made.office_nats.append(office)
            made.clients.append(Place(lab.host(f"client{n}", home, CLIENT), CLIENT))
            made.gateways.append(Place(lab.host(f"gateway{n}", office, GATEWAY), GATEWAY))
        relay = lab.public_host("relay", core, f"{RELAY.host}/30")
        with relay_process(relay, RELAY, lab.directory):
            yield made


def kernel_nat(mapping: Behaviour, filtering: Behaviour, filters_per: str) -> KernelNat:
    """Ports in sequence where they change: with random ones, two of the hundreds of mappings that
    one NAT has here would have the same port now and then, and one of them would be lost."""
    return KernelNat(
        mapping=mapping,
        filtering=filtering,
        filters_per=filters_per,  # type: ignore[arg-type]
        ports="preserve" if mapping == "endpoint_independent" else "sequential",
    )


@pytest.mark.parametrize("filters_per", ["endpoint", "mapping"])
def test_all_81_pairs_get_the_path_that_the_oracle_says(streets: Streets, filters_per: str) -> None:
    streets.install([kernel_nat(m, f, filters_per) for m, f in NINE])
    outcomes = punch_all(list(product(streets.clients, streets.gateways)), RELAY)
    sides = [
        Side(
            nats=(
                Nat(mapping=m, filtering=f, filters_per=filters_per, reply_binding=True),  # type: ignore[arg-type]
            )
        )
        for m, f in NINE
    ]
    expected = [judge(one, other).path for one, other in product(sides, sides)]
    disagreements = [
        f"{client} with {gateway}: the kernel {got}, the oracle {wanted}"
        for (client, gateway), got, wanted in zip(
            product(NINE, NINE), outcomes, expected, strict=True
        )
        if got != wanted
    ]
    assert disagreements == []
    assert set(outcomes) == {"direct", "relayed"}


def test_plain_masquerade_at_both_ends_is_not_punched_when_one_checks_too_early(
    streets: Streets,
) -> None:
    racing, open_to_all = Nat(inbound_binding=True), Nat(filtering="endpoint_independent")
    install(streets.home_nats[0], RACING)
    install(streets.office_nats[0], RACING)
    install(streets.office_nats[1], KernelNat(filtering="endpoint_independent"))
    client, (first, second, *_) = streets.clients[0], streets.gateways
    outcomes = punch_all([(client, first), (client, second)], RELAY, late_ns=NS_PER_S)
    by_chance = judge(Side(nats=(racing,)), Side(nats=(racing,)))
    certain = judge(Side(nats=(racing,)), Side(nats=(open_to_all,)))
    assert by_chance.may_be_direct
    assert outcomes == [by_chance.path, certain.path] == ["relayed", "direct"]


@pytest.mark.parametrize("hairpinning", ["none", "internal_source", "external_source"])
def test_two_homes_of_one_carrier_meet_at_its_nat_only_if_that_hairpins(
    hairpinning: Hairpinning,
) -> None:
    with Lab() as lab:
        core = lab.router("core")
        carrier = lab.nat("carrier", core, wan="198.51.100.2/30", lan="100.64.0.1/24")
        install(carrier, KernelNat(hairpinning=hairpinning))
        places = []
        for n in (2, 3):
            home = lab.nat(f"home{n}", carrier, wan=f"100.64.0.{n}/24", lan="192.168.1.1/24")
            install(home, KernelNat())
            places.append(Place(lab.host(f"host{n}", home, CLIENT), CLIENT))
        relay = lab.public_host("relay", core, f"{RELAY.host}/30")
        with relay_process(relay, RELAY, lab.directory):
            [outcome] = punch_all([(places[0], places[1])], RELAY)
    side = Side(nats=(Nat(reply_binding=True), Nat(reply_binding=True, hairpinning=hairpinning)))
    assert outcome == judge(side, side, shared_nats=1).path


def test_ipv6_hosts_behind_firewalls_need_no_relay() -> None:
    with Lab() as lab:
        core = lab.router("core")
        places = []
        for n in (1, 2):
            nat = lab.nat(f"nat{n}", core, wan=f"198.51.100.{4 * n + 2}/30", lan="192.168.1.1/24")
            lab.route_ipv6(nat, core, wan=f"2001:db8:{n}::2/64", lan=f"2001:db8:{n}0::1/64")
            install_ipv6_firewall(nat)
            host = lab.host(f"host{n}", nat, CLIENT)
            lab.ipv6(host, f"2001:db8:{n}0::10/64")
            places.append(Place(host, f"2001:db8:{n}0::10/64"))
        [outcome] = punch_all([(places[0], places[1])], RELAY)
    side = Side(nats=(Nat(),), ipv6=True)
    assert outcome == judge(side, side).path == "direct"
