"""Whole sessions in the simulator, for `benchmarks.simulator`: clients at home, behind a NAT of
their own each, whose gateways stand in offices. A session is signalled (request, decision, grant,
candidates), punched, handshaken, and carries one packet each way to an echo service and back.
"""

from __future__ import annotations

import gc
import os
import time

import attrs

from simulations.run import Run, rare_collection
from simulations.scenario.schema import (
    Account,
    Client,
    Gateway,
    LinkQuality,
    NatBehaviour,
    Network,
    Policy,
    Portal,
    Relay,
    Resource,
    Scenario,
    Service,
    User,
)

NS = 10**9
CLIENTS_PER_GATEWAY = 250
PROVIDERS = 64
BEGIN_WITHIN_NS = 5 * NS // 2
"""All sessions of a crowd begin within so much virtual time, however many they are: those that
stand cost something too, and are not what is measured."""
PATIENCE_NS = 60 * NS
_STATM = "/proc/self/statm"


@attrs.frozen(kw_only=True)
class Crowd:
    """What one measurement gave. Times in s, of this process."""

    hosts: int
    sessions: int
    direct: int
    join_cpu_s: float
    session_cpu_s: float
    virtual_s: float
    real_s: float
    bytes_per_host: int
    events: int

    @property
    def sessions_per_cpu_s(self) -> float:
        return self.sessions / self.session_cpu_s


def crowd(clients: int) -> Scenario:
    """So many clients with a network, a NAT and a user each, and gateways for them."""
    sites = [f"site-{n}" for n in range(max(1, clients // CLIENTS_PER_GATEWAY))]
    names = [f"client-{n}" for n in range(clients)]
    # Relays bound what a /24 of sources may ask without credentials: as many providers.
    providers = [
        Network(name=f"isp-{n}", prefix=f"198.19.{n}.0/24", uplink=LinkQuality())
        for n in range(min(PROVIDERS, clients))
    ]
    homes = [
        Network(
            name=f"home-{n}",
            prefix="192.168.1.0/24",
            nat=NatBehaviour(),
            behind=f"isp-{n % PROVIDERS}",
        )
        for n in range(clients)
    ]
    offices = [Network(name=site, prefix="10.20.0.0/24", nat=NatBehaviour()) for site in sites]
    return Scenario(
        format=1,
        name=f"a crowd of {clients}",
        settle="120s",
        networks=(*providers, *homes, *offices),
        portals=(Portal(name="portal"),),
        relays=(Relay(name="relay"),),
        gateways=tuple(Gateway(name=f"gateway-{s}", network=s, site=s) for s in sites),
        clients=tuple(
            Client(name=name, network=f"home-{n}", user=name) for n, name in enumerate(names)
        ),
        services=tuple(
            Service(name=f"echo-{site}", network=site, address=f"10.20.0.{100 + n}")
            for n, site in enumerate(sites)
        ),
        account=Account(
            users=tuple(User(name=name) for name in names),
            sites=tuple(sites),
            resources=tuple(
                Resource(name=f"web-{site}", sites=(site,), service=f"echo-{site}")
                for site in sites
            ),
            policies=tuple(
                Policy(name=f"all-{site}", group="everyone", resource=f"web-{site}")
                for site in sites
            ),
        ),
    )


def measure(clients: int, seed: int = 1) -> Crowd:
    """Let a crowd join, and then each client have one session."""
    gc.collect()
    before_bytes = _resident_bytes()
    scenario = crowd(clients)
    began, cpu = time.perf_counter(), time.process_time()
    run = Run(scenario, seed)
    with rare_collection():
        run.settle()
        run.begin()
        joined_cpu = time.process_time()
        _let_all_ask(run)
        done_cpu = time.process_time()
    result = run.result()
    return Crowd(
        hosts=len(run.installation.slots),
        sessions=run.traffic.answers,
        direct=sum(pair.outcome == "direct" for pair in result.pairs),
        join_cpu_s=joined_cpu - cpu,
        session_cpu_s=done_cpu - joined_cpu,
        virtual_s=run.world.now / NS,
        real_s=time.perf_counter() - began,
        bytes_per_host=(_resident_bytes() - before_bytes) // len(run.installation.slots),
        events=result.counters["events"],
    )


def _let_all_ask(run: Run) -> None:
    """Each client once; until the last answer."""
    clients = run.scenario.clients
    resources = [each.name for each in run.scenario.account.resources]
    for n, client in enumerate(clients):
        pair = run.traffic.pair(client.name, resources[n % len(resources)])
        run.world.after(n * BEGIN_WITHIN_NS // len(clients), run.traffic.ask, pair)
    run.world.run_until(
        lambda: run.traffic.answers >= len(clients), limit_ns=PATIENCE_NS, check_every_ns=NS // 10
    )


def _resident_bytes() -> int:
    with open(_STATM) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
