"""A small scenario of every kind of table, for tests of what is done with scenarios."""

from __future__ import annotations

from simulations.scenario.schema import (
    Account,
    Chaos,
    Client,
    Gateway,
    NatBehaviour,
    Network,
    Policy,
    Portal,
    Relay,
    Resource,
    Scenario,
    User,
)

CHAOS = Chaos(faults=12, longest="15s", at_once=3, heals="60s")
SCENARIO = Scenario(
    format=1,
    name="small",
    duration="120s",
    networks=(
        Network(name="home", prefix="192.168.1.0/24", nat=NatBehaviour()),
        Network(name="cafe", prefix="192.168.2.0/24", nat=NatBehaviour(ports="random")),
        Network(name="office", prefix="10.20.0.0/24"),
    ),
    portals=(Portal(name="portal-1"), Portal(name="portal-2")),
    relays=(Relay(name="relay-1"),),
    gateways=(Gateway(name="gateway", network="office", site="hq"),),
    clients=(Client(name="laptop", network="home", user="grace"),),
    account=Account(
        users=(User(name="grace", groups=("staff",)),),
        sites=("hq",),
        resources=(Resource(name="intranet", sites=("hq",), address="10.20.0.80"),),
        policies=(Policy(name="staff-intranet", group="staff", resource="intranet"),),
    ),
    chaos=CHAOS,
)
