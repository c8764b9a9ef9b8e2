"""The processes of the kernel twin: the real `holloway` of every host of a scenario.

A host is a namespace with at most one process: a portal node, relay, gateway, client, or an echo.
All nodes of the portal share a state directory and one database, which is nobody's child but ours.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from ipaddress import ip_address
from typing import Any, Final, Literal

import attrs
import msgspec

from runtime.control import ControlUnavailable, ask_control
from runtime.net.address import Address
from simulations.hosts.relay_links import DOOR_PORT
from simulations.installation import (
    API_PORT,
    CHANNEL_PORT,
    HOLLOWAY,
    ROOT,
    Api,
    Component,
    InstallationError,
    wait_until,
)
from simulations.kernel.account import NO_ANSWER, KernelAccount
from simulations.kernel.database import LabDatabase
from simulations.kernel.hostile import Plan
from simulations.kernel.lab import Lab
from simulations.kernel.obstacles import agents_of
from simulations.kernel.topology import Topology, ip_of
from simulations.scenario.schema import Client, Gateway, Portal, Relay, Scenario
from tunnel.shell.process import CONTROL_SOCKET

Kind = Literal["portal", "relay", "gateway", "client", "service"]
AgentKind = Literal["relay", "gateway", "client"]
ECHO_PORT: Final = 7_007
RELAY_PORT: Final = 3_478
ENGINE_PORT: Final = 51_820
LINK_PORT: Final = 7_400
READY_S: Final = 120.0
STATUS_NS: Final = 2 * 10**9
FRESH_S: Final = 0.5
"""How old the portal's word on who is online may be."""
HOSTILE: Final = "simulations.kernel.hostile"
DOMAIN: Final = "portal.example"
_ECHO: Final = f"""
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
s.bind(("", {ECHO_PORT}))
while True:
    data, source = s.recvfrom(2048)
    s.sendto(data, source)
"""


@attrs.define(eq=False)
class Part:
    """A host of the file and its process. `waiting`: it ends, and is to be started then."""

    name: str
    kind: Kind
    component: Component
    starts: bool = True
    hostile: str = ""
    is_paused: bool = False

    @property
    def is_up(self) -> bool:
        return self.component.alive()


class Parts:
    """All processes of one scenario. Raises InstallationError where one does not start."""

    def __init__(self, lab: Lab, scenario: Scenario, topology: Topology, seed: int) -> None:
        self._lab = lab
        self._seed = seed
        self._scenario = scenario
        self._topology = topology
        self._state = lab.directory / "portal"
        self._online: tuple[float, set[str]] = (0.0, set())
        self.database = LabDatabase(
            lab.directory / "database",
            topology.core,
            may_be_slow=any(fault.slow for fault in scenario.faults),
        )
        self.parts: dict[str, Part] = {}
        self.account: KernelAccount
        portals = scenario.portals or (Portal(name="portal"),)
        self._nodes = [portal.name for portal in portals]
        for portal in portals:
            topology.host(portal.name, portal.network)
        for written in agents_of(scenario):
            topology.host(written.name, written.network)
        for service in scenario.services:
            topology.host(service.name, service.network, service.address)
            self._add(service.name, "service", [sys.executable, "-c", _ECHO], {})
        self._doors = {name: self._door(name) for name in self._nodes}
        if topology.has_ipv6:
            self._name_doors()
        for portal in portals:
            self._add_portal(portal)

    # --- starting --------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything that starts at once, until the portals are ready and all agents run."""
        for part in list(self.parts.values()):
            if part.kind == "service":
                part.component.start()
        self.database.start()
        first, *further = (each for each in self._of("portal") if each.starts)
        self._start_node(first)
        for node in further:
            self._start_node(node)
        token = (self._state / "operator-token").read_text().strip()
        services = {
            each.name: self._topology.address_of(each.name) for each in self._scenario.services
        }
        addresses = {each.name: services[each.service] for each in self._scenario.account.resources}
        self.account = KernelAccount(
            self._scenario, self._lab.directory, addresses, self.api, token
        )
        self.account.make()
        for written in agents_of(self._scenario):
            self._add_agent(written)
            if written.starts:
                self.parts[written.name].component.start()

    def _start_node(self, node: Part) -> None:
        node.component.start()
        wait_until(
            lambda: self._is_ready(node), what=f"{node.name} is ready", timeout_s=READY_S
        )  # fmt: skip

    def _door(self, node: str) -> str:
        """By which agents reach a node: its address, or a name where it has several."""
        if not self._topology.has_ipv6:
            return self._topology.address_of(node)
        return f"{_label(node)}.{DOMAIN}"

    def _name_doors(self) -> None:
        addresses = {self._doors[each]: self._topology.addresses_of(each) for each in self._nodes}
        for name in self._nodes + [each.name for each in agents_of(self._scenario)]:
            self._topology.place(name).host.name_hosts(addresses)

    def _add_portal(self, portal: Portal) -> None:
        own = self._topology.address_of(portal.name)
        door = self._doors[portal.name]
        listen = "[::]" if self._topology.has_ipv6 else own
        env = {
            "HOLLOWAY_PORTAL_NODE": _label(portal.name),
            "HOLLOWAY_PORTAL_LISTEN": f"{listen}:{CHANNEL_PORT}",
            "HOLLOWAY_PORTAL_API_LISTEN": f"{listen}:{API_PORT}",
            "HOLLOWAY_PORTAL_ADDRESS": f"{self._doors[self._nodes[0]]}:{CHANNEL_PORT}",
            "HOLLOWAY_PORTAL_NODE_ADDRESS": f"{door}:{CHANNEL_PORT}",
            "HOLLOWAY_PORTAL_DATABASE_URL_FILE": str(self.database.url_file),
        }
        if len(self._nodes) > 1:
            env["HOLLOWAY_PORTAL_LINK_LISTEN"] = f"{own}:{LINK_PORT}"
        argv = [*HOLLOWAY, "portal", "--state-dir", str(self._state), "--names", own]
        self._add(portal.name, "portal", argv, env, starts=portal.starts)

    def _add_agent(self, written: Relay | Gateway | Client) -> None:
        name = written.name
        folder = ["--name", name, "--state-dir", str(self._lab.directory / name)]
        match written:
            case Relay():
                kind, token = "RELAY", "relay"
                argv = ["relay", "--name", name]
                for address in self._topology.addresses_of(name):
                    argv += ["--listen", str(Address(address, RELAY_PORT))]
                    for door in ("--listen-tls", "--listen-quic"):
                        argv += [door, str(Address(address, DOOR_PORT))]
                if written.region:
                    argv += ["--region", written.region]
                self._agent(written, "relay", argv, kind, token)
            case Gateway():
                token = f"site-{written.site}"
                argv = ["gateway", *folder]
                if port := self._engine_port(written):
                    argv += ["--port", str(port)]
                self._agent(written, "gateway", argv, "GATEWAY", token)
            case Client():
                token = f"user-{written.user}"
                self._agent(written, "client", ["up", *folder], "UP", token)

    def _agent(
        self,
        written: Relay | Gateway | Client,
        kind: AgentKind,
        argv: list[str],
        variable: str,
        token: str,
    ) -> None:
        env = {f"HOLLOWAY_{variable}_TOKEN_FILE": str(self.account.token_file(token))}
        argv = [*HOLLOWAY, *argv]
        if written.hostile:
            argv = [sys.executable, "-m", HOSTILE, self._mischief(written, kind)]
        self._add(written.name, kind, argv, env, starts=written.starts, hostile=written.hostile)

    def _mischief(self, written: Relay | Gateway | Client, kind: AgentKind) -> str:
        """What a hostile process is told, as JSON."""
        topology, scenario = self._topology, self._scenario
        agents: list[Relay | Gateway] = [*scenario.gateways, *scenario.relays]
        targets = [
            Address(address, RELAY_PORT if isinstance(each, Relay) else self._engine_port(each))
            for each in agents
            for address in dict.fromkeys(
                (*topology.addresses_of(each.name), topology.outside_ipv4(each.name))
            )
        ]
        plan = Plan(
            kind=kind,
            habit=written.hostile,
            name=written.name,
            seed=self._seed,
            state_dir=str(self._lab.directory / written.name),
            port=self._engine_port(written) if isinstance(written, Gateway) else 0,
            listen=tuple(
                str(Address(address, RELAY_PORT))
                for address in topology.addresses_of(written.name)
                if isinstance(written, Relay)
            ),
            region=written.region if isinstance(written, Relay) else "",
            targets=tuple(map(str, targets)),
            resources=tuple(
                ip_address(topology.address_of(each.service)).packed
                for each in scenario.account.resources
            ),
        )
        return msgspec.json.encode(plan).decode()

    def _engine_port(self, gateway: Gateway) -> int:
        """That of a gateway, for who scans it: each has its own, since two may stand behind one
        NAT; 0 where nobody lies, so that it chooses."""
        if not any(each.hostile for each in agents_of(self._scenario)):
            return 0
        return ENGINE_PORT + self._scenario.gateways.index(gateway)

    def _add(
        self,
        name: str,
        kind: Kind,
        argv: list[str],
        env: dict[str, str],
        *,
        starts: bool = True,
        hostile: str = "",
    ) -> None:
        component = Component(
            name=name,
            host=self._topology.place(name).host,
            argv=argv,
            env={"PYTHONPATH": str(ROOT), **env},
            log=self._lab.directory / f"{name}.log",
        )
        self.parts[name] = Part(name, kind, component, starts, hostile)

    def _is_ready(self, node: Part) -> bool:
        if not node.is_up:
            raise InstallationError(f"{node.name} ended at its start:\n{node.component.tail()}")
        with contextlib.suppress(*NO_ANSWER):
            if (self._state / "operator-token").exists():
                return self._api_of(node.name, "").try_call("GET", "/readyz")[0] == 200
        return False

    # --- acting ----------------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """Start a host's process; nothing if it runs."""
        part = self.parts[name]
        if not part.is_up:
            part.is_paused = False
            part.component.start()

    def crash(self, name: str) -> None:
        """Kill it."""
        part = self.parts[name]
        if part.is_up:
            part.component.kill()

    def stop(self, name: str) -> None:
        """Ask it to end in good order; it takes its time."""
        part = self.parts[name]
        if part.is_up:
            part.component.signal(signal.SIGTERM)

    def pause(self, name: str, *, paused: bool) -> None:
        """Let it stand still, or go on."""
        part = self.parts[name]
        if part.is_up and part.is_paused != paused:
            part.is_paused = paused
            part.component.signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def end(self) -> None:
        """All of them, and the database."""
        for part in self.parts.values():
            if part.is_up:
                part.component.kill()
        self.database.stop()

    # --- looking ---------------------------------------------------------------------------------

    def addresses(self, kind: Kind) -> list[str]:
        """All of all hosts of a kind."""
        return [
            address for part in self._of(kind) for address in self._topology.addresses_of(part.name)
        ]

    def is_online(self, name: str) -> bool:
        """Whether it runs, and whom it belongs to knows it."""
        part = self.parts[name]
        if not part.is_up or part.is_paused:
            return False
        if part.kind == "service":
            return True
        if part.kind == "portal":
            with contextlib.suppress(*NO_ANSWER):
                return self._api_of(name, "").try_call("GET", "/readyz")[0] == 200
            return False
        asked_at, known = self._online
        if time.monotonic() - asked_at > FRESH_S:
            known = self.account.online()
            self._online = time.monotonic(), known
        return name in known

    def all_online(self) -> bool:
        """Whether everything that starts at once is, but for who lies."""
        return all(
            self.is_online(name)
            for name, part in self.parts.items()
            if part.starts and not part.hostile
        )

    def status(self, name: str) -> dict[str, Any]:
        """What an agent says of itself; nothing if it does not answer."""
        part = self.parts[name]
        if not part.is_up or part.is_paused:
            return {}
        socket = self._lab.directory / name / CONTROL_SOCKET
        with contextlib.suppress(ControlUnavailable, PermissionError):
            return ask_control(socket, {"command": "status"}, timeout_ns=STATUS_NS)
        return {}

    def api(self, token: str) -> Api:
        """The API of a node that runs. Raises InstallationError if none does."""
        for part in self._of("portal"):
            if part.is_up and not part.is_paused:
                return self._api_of(part.name, token)
        raise InstallationError("no portal runs")

    def _api_of(self, node: str, token: str) -> Api:
        place = self._topology.place(node)
        return Api(place.host, self._state / "ca.pem", token, address=ip_of(place))

    def _of(self, kind: Kind) -> list[Part]:
        return [part for part in self.parts.values() if part.kind == kind]


def _label(name: str) -> str:
    """A name of the file as one of hosts."""
    return name.replace("_", "-")
