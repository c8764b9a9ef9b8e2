"""Scenarios of the tests, written as files are."""

from __future__ import annotations

from typing import Any

from simulations.scenario.schema import (
    Account,
    Check,
    Client,
    Fault,
    Gateway,
    NatBehaviour,
    Network,
    Policy,
    Portal,
    Relay,
    Resource,
    Scenario,
    Service,
    Traffic,
    User,
)

EASY = NatBehaviour()
HARD = NatBehaviour(mapping="address_and_port_dependent", ports="random")


def home(name: str, nat: NatBehaviour = EASY, **fields: Any) -> Network:
    """A network of one person."""
    return Network(name=name, prefix="192.168.1.0/24", nat=nat, **fields)


def office(nat: NatBehaviour = EASY) -> Network:
    """The network with the gateways and the service."""
    return Network(name="office", prefix="10.20.0.0/24", nat=nat)


def scenario(**changes: Any) -> Scenario:
    """A laptop at home may reach a service in the office, and asks it twice a second."""
    fields: dict[str, Any] = {
        "format": 1,
        "name": "one access",
        "duration": "10s",
        "networks": (home("home"), home("cafe"), office()),
        "portals": (Portal(name="portal"),),
        "relays": (Relay(name="relay"),),
        "gateways": (Gateway(name="gateway", network="office", site="hq"),),
        "clients": (Client(name="laptop", network="home", user="grace"),),
        "services": (Service(name="echo", network="office", address="10.20.0.80"),),
        "account": Account(
            users=(User(name="grace", groups=("engineers",)),),
            sites=("hq",),
            resources=(Resource(name="web", sites=("hq",), service="echo"),),
            policies=(Policy(name="engineers-web", group="engineers", resource="web"),),
        ),
        "traffic": (Traffic(every="500ms"),),
        "checks": (Check(kind="reach", source=("laptop",), to=("web",)),),
    }
    return Scenario(**fields | changes)


FAULTY = scenario(
    name="one of many faults",
    duration="60s",
    portals=tuple(Portal(name=f"portal-{n}") for n in range(3)),
    gateways=tuple(Gateway(name=f"gateway-{n}", network="office", site="hq") for n in range(2)),
    faults=(
        Fault(at="2s", kind="rebind", targets=("home",)),
        Fault(at="5s", kind="roam", targets=("laptop",), to="cafe"),
        Fault(at="9s", kind="crash", targets=("gateway-0",), duration="3s"),
        Fault(at="15s", kind="crash", targets=("portal-0",), duration="8s"),
        Fault(at="18s", kind="database", duration="2s"),
        Fault(at="24s", kind="partition", targets=("portal-1",), duration="5s"),
        Fault(at="32s", kind="drain", targets=("portal-2",), duration="15s"),
        Fault(at="36s", kind="clock_skew", targets=("laptop",), offset="-2h", drift_ppm=500),
        Fault(at="40s", kind="reconnect", targets=("laptop", "gateway-1", "relay")),
        Fault(at="44s", kind="restart", targets=("relay",)),
        Fault(at="48s", kind="upgrade", targets=("gateway-0", "gateway-1"), every="4s"),
    ),
)
"""Every part of the system is hit once, one after the other."""
