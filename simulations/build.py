"""From a scenario to a world with everything in it that the file says, not yet running.

Names are those of the file. Every host is a `Slot`: a place where one life after the other of the
same process is started, as faults have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, Protocol
from uuid import UUID

import attrs

from actors.policy.engine import visible_resources
from channel.messages import ClientInit, GatewayInit
from runtime.inspection import CrashReport
from runtime.net.address import Address, split_host_port
from simulations.account import AccountBook
from simulations.checks.interface import Observer, Subject, hears
from simulations.hosts.agent import ENGINE_PORT, ClientHost, GatewayHost
from simulations.hosts.database import Database
from simulations.hosts.hostile import HostileClient, HostileGateway, HostileRelay
from simulations.hosts.portal import DOOR_PORT, PortalNode
from simulations.hosts.relay import RELAY_PORT, RelayHost
from simulations.hosts.service import EchoService, Masquerade
from simulations.net.routing import Network
from simulations.net.world import Host, World
from simulations.regions import Countries, public_ip
from simulations.result import Node
from simulations.scenario import schema
from simulations.topology import build_networks

Kind = Literal["portal", "relay", "gateway", "client", "service"]
DOMAIN: Final = "portal.example"
MAX_CRASHES_KEPT: Final = 100


class Life(Protocol):
    """One life of a process on a host."""

    @property
    def is_over(self) -> bool: ...
    @property
    def is_online(self) -> bool: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...


@attrs.define(eq=False)
class Slot:
    """A host of the file and the process on it. `lives` counts its starts."""

    name: str
    kind: Kind
    host: Host
    starts: bool
    make: Callable[[int], Life]
    hostile: str = ""
    lives: int = 0
    life: Life | None = None

    @property
    def is_up(self) -> bool:
        """Whether a process runs."""
        return self.life is not None and not self.life.is_over

    @property
    def is_online(self) -> bool:
        """Whether it runs, and whom it belongs to knows it."""
        return self.life is not None and not self.life.is_over and self.life.is_online

    def start(self) -> None:
        """Start the process, on a host that is up again if it was down. Nothing if it runs."""
        if self.is_up:
            return
        if not self.host.alive:
            self.host.restart()
        self.lives += 1
        self.life = self.make(self.lives)

    def crash(self) -> None:
        """The process is killed; the host's kernel answers for it."""
        if self.life is not None and not self.life.is_over:
            self.life.kill()
        self.host.crash()

    def stop(self) -> None:
        """The process ends in good order."""
        if self.life is not None and not self.life.is_over:
            self.life.stop()


class Installation:
    """Everything of one run. `scenario` has no populations any more."""

    def __init__(
        self, scenario: schema.Scenario, seed: int, observers: tuple[Observer, ...] = ()
    ) -> None:
        if not scenario.portals:
            raise ValueError("a scenario has at least one portal")
        self.scenario = scenario
        self.observers = observers
        self.world = World(seed)
        self.networks = build_networks(self.world, scenario)
        self.regions = Countries(
            self.networks, {each.name: each.country for each in scenario.networks}
        )
        self.database = Database(self.world, observers)
        self.slots: dict[str, Slot] = {}
        self.answer: Callable[[str, bytes], None] = _nowhere
        self.crashes: list[CrashReport] = []
        self._addresses_by_name: dict[str, tuple[str, ...]] = {}
        self._door_by_portal = {
            portal.name: f"n{number}.{DOMAIN}:{DOOR_PORT}"
            for number, portal in enumerate(scenario.portals, 1)
        }
        self.portal = self._door_by_portal[scenario.portals[0].name]
        self._introduced = hears(observers, "introduced")
        for service in scenario.services:
            self._add_service(service)
        self.account = AccountBook(
            self.world,
            self.database,
            scenario,
            portal=self.portal,
            addresses=self._resource_addresses(),
            regions=self.regions,
        )
        self._introduce_account()
        for portal in scenario.portals:
            self._add_portal(portal)
        for relay in scenario.relays:
            self._add_relay(relay)
        for gateway in scenario.gateways:
            self._add_gateway(gateway)
        for client in scenario.clients:
            self._add_client(client)

    # --- acting ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all that starts at once."""
        for slot in self.slots.values():
            if slot.starts:
                slot.start()

    def of_kind(self, kind: Kind) -> list[Slot]:
        """All hosts of a kind, in the order of the file."""
        return [slot for slot in self.slots.values() if slot.kind == kind]

    def nodes(self) -> tuple[Node, ...]:
        """Networks and hosts, for the drawing."""
        networks = [
            Node(
                name=network.name,
                kind="network",
                behind=network.behind,
                label=nat_label(network.nat) if network.nat is not None else network.prefix,
            )
            for network in self.scenario.networks
        ]
        hosts = [
            Node(
                name=slot.name,
                kind=slot.kind,
                behind=slot.host.network.name,
                label=slot.host.ipv4 or slot.host.ipv6 or "",
            )
            for slot in self.slots.values()
        ]
        return (Node(name=schema.INTERNET, kind="network"), *networks, *hosts)

    def nats_of(self, network: Network) -> str:
        """The NATs between a network and the internet, from the inside outwards, and where UDP is
        kept in."""
        written = {each.name: each for each in self.scenario.networks}
        labels, name = [], network.name
        while name in written:
            nat = written[name].nat
            if nat is not None:
                labels.append(nat_label(nat))
            if written[name].firewall.udp != "pass":
                labels.append("no UDP")
            name = written[name].behind
        return ", ".join(labels)

    def visible(self, client: str) -> list[str]:
        """The resources that a client may see now, by name; that its user may reach, if the portal
        does not know it yet."""
        snapshot = self.account.snapshot()
        client_id = self.account.id("client", client)
        if client_id.int not in snapshot.clients.by_key:
            address = public_ip(self.slots[client].host)
            names = self.account.addresses
            return [name for name in names if self.account.may(client, name, address)]
        return [self.account.name(id) for id in visible_resources(snapshot, client_id)]

    # --- hosts -----------------------------------------------------------------------------------

    def _add_service(self, written: schema.Service) -> None:
        host = self._host(written.name, written.network, written.address)
        self._slot(written.name, "service", host, lambda life: EchoService(self.world, host))

    def _add_portal(self, written: schema.Portal) -> None:
        host = self._host(written.name, written.network)
        door = self._door_by_portal[written.name]
        self._addresses_by_name[split_host_port(door)[0]] = tuple(
            each for each in (host.ipv4, host.ipv6) if each is not None
        )

        def make(life: int) -> PortalNode:
            return PortalNode(
                self.world,
                host,
                self.database,
                portal=self.portal,
                door=door,
                alone=len(self.scenario.portals) == 1,
                observers=self.observers,
                on_crash=self._crashed,
                account_ids=lambda: (self.account.account_id,),
                regions=self.regions,
            )

        self._slot(written.name, "portal", host, make, starts=written.starts)

    def _add_relay(self, written: schema.Relay) -> None:
        host = self._host(written.name, written.network)

        def make(life: int) -> RelayHost:
            common: dict[str, Any] = {
                "name": written.name,
                "region": written.region,
                "token": self.account.token("relay", "relays"),
                "life": life,
                "lookup": self.lookup,
                "observers": self.observers,
            }
            if written.hostile:
                return HostileRelay(self.world, host, habit=written.hostile, **common)
            return RelayHost(self.world, host, **common)

        self._slot(written.name, "relay", host, make, written.hostile, starts=written.starts)

    def _add_gateway(self, written: schema.Gateway) -> None:
        host = self._host(written.name, written.network)
        seed = self.world.randomness(f"device {written.name}").bytes(32)

        def make(life: int) -> GatewayHost:
            common: dict[str, Any] = {
                "name": written.name,
                "token": self.account.token("gateway", written.site),
                "device_seed": seed,
                "life": life,
                "lookup": self.lookup,
                "observers": self.observers,
                "network": lambda answer: Masquerade(host, answer),
                "client_name": self.account.name,
                "on_init": self._gateway_known,
            }
            if written.hostile:
                resources = self.account.all_packed_addresses()
                return HostileGateway(
                    self.world, host, habit=written.hostile, resources=resources, **common
                )
            return GatewayHost(self.world, host, **common)

        self._slot(written.name, "gateway", host, make, written.hostile, starts=written.starts)

    def _add_client(self, written: schema.Client) -> None:
        host = self._host(written.name, written.network)
        name = written.name

        def make(life: int) -> ClientHost:
            common: dict[str, Any] = {
                "name": name,
                "token": self.account.token("client", written.user),
                "device_seed": self.world.randomness(f"device {name}").bytes(32),
                "life": life,
                "lookup": self.lookup,
                "observers": self.observers,
                "on_answer": lambda packet: self.answer(name, packet),
                "on_init": self._client_known,
            }
            if written.hostile:
                return HostileClient(
                    self.world,
                    host,
                    habit=written.hostile,
                    targets=self.targets,
                    resources=self.account.all_packed_addresses(),
                    **common,
                )
            return ClientHost(self.world, host, **common)

        self._slot(name, "client", host, make, written.hostile, starts=written.starts)

    def _host(self, name: str, network: str, address: str = "") -> Host:
        ipv6 = address if ":" in address else None
        ipv4 = "" if ipv6 else address or None
        return self.world.host(name, self.networks[network], ipv4=ipv4, ipv6=ipv6)

    def _slot(
        self,
        name: str,
        kind: Kind,
        host: Host,
        make: Callable[[int], Life],
        hostile: str = "",
        *,
        starts: bool = True,
    ) -> None:
        self.slots[name] = Slot(name, kind, host, starts, make, hostile)

    def targets(self) -> list[Address]:
        """Where gateways and relays can be found on the internet, by who looks for them."""
        found = []
        for slot in (*self.of_kind("gateway"), *self.of_kind("relay")):
            port = RELAY_PORT if slot.kind == "relay" else ENGINE_PORT
            network: Network | None = slot.host.network
            seen = [each for each in (slot.host.ipv4, slot.host.ipv6) if each is not None]
            while network is not None:
                seen += network.outer
                network = network.parent
            found += [Address(each, port) for each in seen]
        return found

    # --- names -----------------------------------------------------------------------------------

    def lookup(self, name: str) -> tuple[str, ...]:
        """The addresses of a name of the portal; an address is itself."""
        return self._addresses_by_name.get(name, (name,) if name[-1:].isdigit() else ())

    def _resource_addresses(self) -> dict[str, str]:
        addresses = {}
        for resource in self.scenario.account.resources:
            address = resource.address
            if resource.service:
                host = self.slots[resource.service].host
                address = host.ipv4 or host.ipv6 or ""
            if not address:
                raise ValueError(f"resource {resource.name!r} has no address")
            addresses[resource.name] = address
        return addresses

    def _client_known(self, name: str, init: ClientInit) -> None:
        interface = init.interface
        self._known("client", name, init.client_id, interface.ipv4.packed, interface.ipv6.packed)

    def _gateway_known(self, name: str, init: GatewayInit) -> None:
        interface = init.interface
        self._known("gateway", name, init.gateway_id, interface.ipv4.packed, interface.ipv6.packed)

    def _known(self, kind: str, name: str, id: UUID, *addresses: bytes) -> None:
        if self.account.knows_device(kind, name, id) or self._introduced:
            subject = Subject(kind=kind, name=name, id=id, addresses=addresses)
            for introduced in self._introduced:
                introduced(self.world.now, subject)

    def _introduce_account(self) -> None:
        account = self.scenario.account
        named = [("account", self.scenario.name)]
        named += [("user", each.name) for each in account.users]
        named += [("site", name) for name in account.sites]
        named += [("policy", each.name) for each in account.policies]
        named += [("resource", each.name) for each in account.resources]
        for kind, name in named:
            key = {"user": "principal"}.get(kind, kind)
            subject = Subject(
                kind=kind,
                name=name,
                id=self.account.id(key, name),
                addresses=self.account.packed_addresses(name) if kind == "resource" else (),
            )
            for introduced in self._introduced:
                introduced(self.world.now, subject)

    def _crashed(self, report: CrashReport) -> None:
        if len(self.crashes) < MAX_CRASHES_KEPT:
            self.crashes.append(report)


_SHORT: Final = {
    "endpoint_independent": "EI",
    "address_dependent": "AD",
    "address_and_port_dependent": "APD",
}


def nat_label(nat: schema.NatBehaviour) -> str:
    """A NAT in short: mapping/filtering, as in RFC 4787."""
    return f"{_SHORT[nat.mapping]}/{_SHORT[nat.filtering]}"


def _nowhere(client: str, packet: bytes) -> None:
    """Nobody wants answers yet."""
