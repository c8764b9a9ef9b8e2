"""The kernel twin of a scenario: the same file on namespaces, with the real processes.

The portal with its PostgreSQL, relays, gateways and clients are started as an operator would start
them, the account is made through the API, and each client then sends datagrams to each resource,
until one is echoed. What came of each pair goes into the same `Result` as that of a run in virtual
time, with the oracle's word beside it.

This is the thin path: no faults, no checks, no populations, one portal; `obstacles` says what of a
scenario stands in the way, and nothing is left out in silence.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from simulations.installation import (
    API_PORT,
    CHANNEL_PORT,
    HOLLOWAY,
    PORTAL,
    ROOT,
    Api,
    Component,
    wait_until,
)
from simulations.kernel import topology
from simulations.kernel.lab import Lab, LabError, missing_requirements
from simulations.kernel.links import impaired
from simulations.kernel.punch import Place
from simulations.kernel.topology import Topology
from simulations.oracle import judge
from simulations.result import Outcome, Pair, Result
from simulations.scenario.schema import Client, Gateway, Relay, Resource, Scenario, Service

REQUIRED_PROGRAMS: Final = {"iptables-nft": "iptables", "tc": "iproute2"}
ECHO_PORT: Final = 7_007
RELAY_PORT: Final = 3_478
EVERY_S: Final = 0.2
PATIENCE_S: Final = 20.0
"""How long a pair that may is asked before it counts as failed."""
REFUSED_S: Final = 3.0
"""How long a pair that may not is asked."""
SETTLE_S: Final = 8.0
"""How long after its first answer a pair may still move from the relay to a direct path."""
_ECHO: Final = f"""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", {ECHO_PORT}))
while True:
    data, source = s.recvfrom(2048)
    s.sendto(data, source)
"""


def obstacles(scenario: Scenario) -> list[str]:
    """Why this scenario cannot run on the kernel (yet), a sentence each; empty if it can."""
    found = topology.obstacles(scenario)
    if len(scenario.portals) > 1:
        found.append("several portals")
    for what in ("faults", "checks", "populations", "traffic"):
        if getattr(scenario, what):
            found.append(f"{what} are not carried out on the kernel yet")
    if scenario.chaos is not None:
        found.append("chaos is not carried out on the kernel yet")
    agents: tuple[Relay | Gateway | Client, ...] = (
        *scenario.relays,
        *scenario.gateways,
        *scenario.clients,
    )
    for each in agents:
        if each.hostile or not each.starts:
            found.append(f"{each.name}: hostile hosts, and ones that start later")
    for policy in scenario.account.policies:
        if policy.lease or policy.expires_in or policy.disabled:
            found.append(f"policy {policy.name}: leases, expiries and disabled ones")
    for resource in scenario.account.resources:
        if not resource.service:
            found.append(f"resource {resource.name}: only those of a service are asked")
    return found


def run(scenario: Scenario, seed: int) -> Result:
    """Build it, start everything, ask for every pair once, and take it down again.

    Raises LabError for a scenario with `obstacles`, or a machine that lacks something, and
    InstallationError if a part does not start.
    """
    if found := obstacles(scenario) or missing_requirements(REQUIRED_PROGRAMS):
        raise LabError("; ".join(found))
    began = time.monotonic_ns()
    with Lab() as lab, contextlib.ExitStack() as stack:
        twin = _Twin(lab, scenario, stack)
        twin.start()
        pairs = tuple(twin.pairs())
    took_ns = time.monotonic_ns() - began
    return Result(
        scenario=scenario.name,
        seed=seed,
        backend="kernel",
        virtual_ns=took_ns,
        pairs=pairs,
        cost={"wall_s": took_ns / 1e9},
    )


class _Twin:
    def __init__(self, lab: Lab, scenario: Scenario, stack: contextlib.ExitStack) -> None:
        self._lab = lab
        self._scenario = scenario
        self._stack = stack
        self._topology = Topology(lab, scenario, first="portal")
        self._places: dict[str, Place] = {}
        self._ids: dict[str, str] = {}
        self._components: dict[str, Component] = {}
        self._operator: Api
        self._admin: Api

    # --- starting ---

    def start(self) -> None:
        scenario = self._scenario
        placed: tuple[Relay | Gateway | Client, ...] = (
            *scenario.relays,
            *scenario.gateways,
            *scenario.clients,
        )
        for each in placed:
            self._places[each.name] = self._topology.host(each.name, each.network)
        for service in scenario.services:
            self._start_service(service)
        self._start_portal()
        self._make_account()
        for relay in scenario.relays:
            address = f"{_ip(self._places[relay.name])}:{RELAY_PORT}"
            self._agent(relay.name, ["relay", "--listen", address], "RELAY", "relay")
        for gateway in scenario.gateways:
            argv = ["gateway", *self._named(gateway.name)]
            self._agent(gateway.name, argv, "GATEWAY", f"site-{gateway.site}")
        for client in scenario.clients:
            argv = ["up", *self._named(client.name)]
            self._agent(client.name, argv, "UP", f"user-{client.user}")
        self._stack.enter_context(impaired(self._topology.core, self._topology.uplinks))
        wait_until(self._all_online, what="all agents are online", timeout_s=60)

    def _start_service(self, service: Service) -> None:
        place = self._topology.host(service.name, service.network, service.address)
        self._places[service.name] = place
        process = place.host.spawn([sys.executable, "-c", _ECHO])
        self._stack.callback(_end, process)

    def _start_portal(self) -> None:
        place = self._topology.first
        state = self._lab.directory / "portal"
        self._spawn(
            "portal",
            place,
            ["portal", "--state-dir", str(state)],
            {
                "HOLLOWAY_PORTAL_LISTEN": f"{PORTAL}:{CHANNEL_PORT}",
                "HOLLOWAY_PORTAL_API_LISTEN": f"{PORTAL}:{API_PORT}",
                "HOLLOWAY_PORTAL_ADDRESS": f"{PORTAL}:{CHANNEL_PORT}",
            },
        )

        def ready() -> bool:
            with contextlib.suppress(OSError, ValueError):
                if (state / "operator-token").exists():
                    return (
                        Api(place.host, state / "ca.pem", "").try_call("GET", "/readyz")[0] == 200
                    )
            return False

        wait_until(ready, what="the portal is ready", timeout_s=60)
        token = (state / "operator-token").read_text().strip()
        self._operator = Api(place.host, state / "ca.pem", token)

    def _make_account(self) -> None:
        account = self._operator.call("POST", "/v1/accounts", {"name": "Twin", "slug": "twin"})
        self._operator.headers["Holloway-Account"] = account["id"]
        admin = self._operator.call(
            "POST", "/v1/principals", {"name": "Admin", "role": "admin", "kind": "user"}
        )
        token = self._operator.call(
            "POST", "/v1/tokens", {"kind": "api", "name": "Admin's", "principal_id": admin["id"]}
        )
        ca_file = self._lab.directory / "portal" / "ca.pem"
        self._admin = Api(self._topology.first.host, ca_file, token["token"])
        self._token(self._operator, "relay", "relay", {})
        wanted = self._scenario.account
        for site in wanted.sites:
            body = {"site_id": self._make(f"site-{site}", "sites", {"name": site})}
            self._token(self._admin, f"site-{site}", "gateway", body)
        groups = {group for user in wanted.users for group in user.groups}
        groups |= {policy.group for policy in wanted.policies}
        for group in sorted(groups):
            self._make(f"group-{group}", "groups", {"name": group})
        for user in wanted.users:
            body = {"principal_id": self._make(f"user-{user.name}", "principals",
                                               {"name": user.name, "kind": "user"})}  # fmt: skip
            self._token(self._admin, f"user-{user.name}", "client", body)
            for group in user.groups:
                self._make("", "memberships", {"group_id": self._ids[f"group-{group}"], **body})
        for resource in wanted.resources:
            self._make(
                f"resource-{resource.name}",
                "resources",
                {
                    "name": resource.name,
                    "kind": "cidr",
                    "address": f"{_ip(self._places[resource.service])}/32",
                    "site_ids": [self._ids[f"site-{site}"] for site in resource.sites],
                    "filters": list(resource.filters),
                },
            )
        for policy in wanted.policies:
            self._make(
                f"policy-{policy.name}",
                "policies",
                {
                    "group_id": self._ids[f"group-{policy.group}"],
                    "resource_id": self._ids[f"resource-{policy.resource}"],
                },
            )

    def _make(self, name: str, noun: str, body: dict[str, Any]) -> str:
        made: str = self._admin.call("POST", f"/v1/{noun}", body)["id"]
        self._ids[name] = made
        return made

    def _token(self, api: Api, name: str, kind: str, body: dict[str, Any]) -> None:
        made = api.call("POST", "/v1/tokens", {"kind": kind, "name": name, **body})
        path = self._lab.directory / f"token-{name}"
        path.touch(mode=0o600)
        path.write_text(made["token"])

    def _named(self, name: str) -> list[str]:
        return ["--name", name, "--state-dir", str(self._lab.directory / name)]

    def _agent(self, name: str, argv: list[str], kind: str, token: str) -> None:
        path = self._lab.directory / f"token-{token}"
        self._spawn(name, self._places[name], argv, {f"HOLLOWAY_{kind}_TOKEN_FILE": str(path)})

    def _spawn(self, name: str, place: Place, argv: list[str], env: dict[str, str]) -> None:
        component = Component(
            name=name,
            host=place.host,
            argv=[*HOLLOWAY, *argv],
            env={"PYTHONPATH": str(ROOT), **env},
            log=self._lab.directory / f"{name}.log",
        )
        component.start()
        self._components[name] = component

    def _all_online(self) -> bool:
        scenario = self._scenario
        return all(
            sum(entry["online"] for entry in api.call("GET", f"/v1/{noun}")["items"]) >= wanted
            for api, noun, wanted in (
                (self._operator, "relays", len(scenario.relays)),
                (self._admin, "gateways", len(scenario.gateways)),
                (self._admin, "clients", len(scenario.clients)),
            )
        )

    # --- asking ---

    def pairs(self) -> Iterator[Pair]:
        """One after the other, in the order of the file."""
        groups = {user.name: set(user.groups) for user in self._scenario.account.users}
        for client in self._scenario.clients:
            for resource in self._scenario.account.resources:
                allowed = any(
                    policy.resource == resource.name and policy.group in groups[client.user]
                    for policy in self._scenario.account.policies
                )
                yield self._pair(client, resource, allowed=allowed)

    def _pair(self, client: Client, resource: Resource, *, allowed: bool) -> Pair:
        gateways = [each for each in self._scenario.gateways if each.site in resource.sites]
        asked, first_ns, round_trip_ns = self._ask(client, resource, allowed=allowed)
        outcome: Outcome = "failed" if allowed else "denied"
        used = ""
        if first_ns is not None:
            used, outcome = self._path(client, {each.name for each in gateways})
        nats = {name: self._topology.side(name) for name in self._networks(client, gateways)}
        gateway = next((each for each in gateways if each.name == used), gateways[0])
        verdict = judge(
            nats[client.network],
            nats[gateway.network],
            shared_nats=self._topology.shared_nats(client.network, gateway.network),
            same_lan=client.network == gateway.network,
            relay_transports=("udp",) if self._scenario.relays else (),
        )
        return Pair(
            client=client.name,
            resource=resource.name,
            gateway=used,
            client_nat=self._topology.describe(client.network),
            gateway_nat=self._topology.describe(gateway.network),
            expected=verdict.path if allowed else "",
            why=verdict.why if allowed else "",
            outcome=outcome,
            first_answer_ns=first_ns,
            round_trip_ns=round_trip_ns,
            asked=asked,
            answered=int(first_ns is not None) + int(round_trip_ns is not None),
        )

    @staticmethod
    def _networks(client: Client, gateways: list[Gateway]) -> list[str]:
        return [client.network, *(gateway.network for gateway in gateways)]

    def _ask(
        self, client: Client, resource: Resource, *, allowed: bool
    ) -> tuple[int, int | None, int | None]:
        """How many datagrams were sent; after what time the first was answered; a round trip."""
        address = (_ip(self._places[resource.service]), ECHO_PORT)
        with self._places[client.name].host.entered():
            asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with asking:
            began = time.monotonic_ns()
            deadline = time.monotonic() + (PATIENCE_S if allowed else REFUSED_S)
            asked = 0
            while time.monotonic() < deadline:
                asked += 1
                if _answered(asking, address, asked, EVERY_S):
                    first_ns = time.monotonic_ns() - began
                    sent_at = time.monotonic_ns()
                    again = _answered(asking, address, asked + 1, 2.0)
                    return asked + 1, first_ns, time.monotonic_ns() - sent_at if again else None
            return asked, None, None

    def _path(self, client: Client, gateways: set[str]) -> tuple[str, Outcome]:
        """The gateway that carries it and by which kind of path: direct at once, or what it is
        after `SETTLE_S`."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            for peer in self._status(client.name).get("peers", []):
                if peer["name"] in gateways and peer.get("path"):
                    kind = peer["path"]["kind"]
                    if kind == "direct" or time.monotonic() > deadline:
                        return peer["name"], kind
            if time.monotonic() > deadline + PATIENCE_S:
                return "", "failed"
            select.select([], [], [], EVERY_S)

    def _status(self, name: str) -> dict[str, Any]:
        done = subprocess.run(
            ["ip", "netns", "exec", self._places[name].host.name, *HOLLOWAY, "status", "--json",
             "--state-dir", str(self._lab.directory / name)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )  # fmt: skip
        status: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return status


def _answered(asking: socket.socket, address: tuple[str, int], number: int, wait_s: float) -> bool:
    asking.settimeout(wait_s)
    with contextlib.suppress(OSError):
        asking.sendto(b"%d" % number, address)
        return bool(asking.recv(100))
    select.select([], [], [], wait_s)  # no route yet: it is tried again
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ip(place: Place) -> str:
    return place.network.partition("/")[0]
