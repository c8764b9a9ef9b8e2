"""A portal that loses its database, and then all its nodes, as a tunnel sees it.

    laptop ── home NAT ── core ── office NAT ── gateway-1, and a host with four echoes
                            │
                two nodes of a portal, relay, PostgreSQL

The nodes reach PostgreSQL on loopback, each at an address of its own, so nftables can take it away
from one of them alone. Both agents are attached to the first node, and their account lives there.
All the time a numbered datagram goes to the first echo ten times a second, through the tunnel, and
comes back. Nothing is judged by how long it takes, but by which datagrams came back, by what the
agents hold and by what the database has. The other echoes have not been asked for yet. The last of
them is forbidden: to say so needs no database, so only the lease keeps a node from it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final
from uuid import UUID

import pytest

from portal.answers import control_socket
from runtime.cluster.placement import PlacedNode, Placement
from runtime.control import ask_control
from simulations.installation import PORTAL, Api, Installation, wait_until
from simulations.kernel.lab import Host, Lab
from tests.system.postgres_support import PASSWORD, ForeignServer, foreign_server, own_directory
from tests.system.test_faults import show_logs

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

PATIENCE_S: Final = 90.0
"""A deadline for what must happen at all; nothing is judged by it."""
ECHOES: Final = ("10.20.0.81", "10.20.0.82", "10.20.0.83", "10.20.0.84")
FORBIDDEN: Final = 4
"""The number of the echo that nobody may reach from where the laptop is."""
ECHO_PORT: Final = 7
PERIOD_S: Final = 0.1
"""Between two datagrams of the stream."""
MAX_LOST: Final = 5
"""Datagrams of an outage that may be lost. One that is cut off for as long as the shortest outage
lasts, a lease of 3 s, loses 30."""
GATEWAY: Final = "gateway-1"
DATABASES: Final = ("127.0.0.1", "127.0.0.2")
"""At which each of the two nodes reaches PostgreSQL."""
PORTS: Final = (443, 444)


class Traffic:
    """The echoes, and who talks to them from the laptop: a thread of this process, with sockets of
    the two namespaces."""

    def __init__(self, laptop: Host, web: Host) -> None:
        with web.entered():
            echoes = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in ECHOES]
        with laptop.entered():
            self._ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for echo, address in zip(echoes, ECHOES, strict=True):
            echo.bind((address, ECHO_PORT))
        self._ours.bind(("0.0.0.0", 0))
        self._echoes = {echo: echo.getsockname()[0] for echo in echoes}
        self.heard_by: Counter[str] = Counter()
        """Datagrams that each echo got."""
        self.sent = 0
        """Datagrams of the stream: they are numbered up to here."""
        self.returned: set[int] = set()
        """The numbers of those that came back."""
        self._streams = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic")

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for each in (self._ours, *self._echoes):
            each.close()

    def stream(self) -> None:
        """Begin with the numbered datagrams."""
        self._streams.set()

    def knock(self, address: str) -> None:
        """One datagram without a number."""
        with contextlib.suppress(OSError):
            self._ours.sendto(b"", (address, ECHO_PORT))

    def passes(self, count: int = 20) -> None:
        """Wait until of the datagrams that are sent from now on so many have come back."""
        begin = self.sent
        wait_until(
            lambda: len([each for each in tuple(self.returned) if each > begin]) >= count,
            what=f"{count} datagrams passed through the tunnel",
            timeout_s=PATIENCE_S,
        )

    def lost_since(self, number: int) -> list[int]:
        """What was sent after this one, up to now, and never came back."""
        end = self.sent
        self.passes()  # so that what is on its way has time to arrive
        return sorted(set(range(number + 1, end + 1)) - self.returned)

    def _run(self) -> None:
        send_at = time.monotonic()
        while not self._ended.is_set():
            wait_s = max(0.0, send_at - time.monotonic())
            for each in select.select([self._ours, *self._echoes], [], [], wait_s)[0]:
                with contextlib.suppress(OSError):
                    self._receive(each)
            if time.monotonic() >= send_at:
                send_at = time.monotonic() + PERIOD_S
                if self._streams.is_set():
                    self.sent += 1
                    with contextlib.suppress(OSError):
                        number = self.sent.to_bytes(8, "big")
                        self._ours.sendto(number, (ECHOES[0], ECHO_PORT))

    def _receive(self, receiver: socket.socket) -> None:
        data, source = receiver.recvfrom(2_048)
        if receiver is not self._ours:
            self.heard_by[self._echoes[receiver]] += 1
            receiver.sendto(data, source)
        elif data:
            self.returned.add(int.from_bytes(data, "big"))


class World(Installation):
    """The installation of the module's text. The nodes share a state directory, as those of
    `holloway portal --nodes` do, but nobody starts them again."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.web.ip(*(f"addr add {address}/24 dev eth0" for address in ECHOES))
        self.nodes: list[str] = []
        self.readers: list[Api] = []
        self.server: ForeignServer

    def start(self) -> None:
        """Everything, until the client holds an authorisation for the first echo's resource."""
        self._start_node("portal-1")
        self.operator = self.readers[0]
        self.make_account()
        self._start_node(self._name_of_a_node_without_the_account())
        self.start_relay()
        self.start_gateway(GATEWAY)
        self.start_client()
        for number, address in enumerate(ECHOES, 1):
            filters = [{"protocol": "udp", "port_start": ECHO_PORT, "port_end": ECHO_PORT}]
            resource = self.make(
                f"echo-{number}",
                "resources",
                {
                    "name": f"Echo {number}",
                    "kind": "cidr",
                    "address": f"{address}/32",
                    "site_ids": [self.ids["site"]],
                    "filters": filters,
                },
            )
            policy: dict[str, object] = {"group_id": self.ids["group"], "resource_id": resource}
            if number == FORBIDDEN:
                policy["conditions"] = {
                    "remote_ip": {"operator": "is_in", "values": [f"{PORTAL}/32"]}
                }
            self.admin.call("POST", "/v1/policies", policy)
        self.wait_until(self.both_are_connected, "both agents are connected")

    def _name_of_a_node_without_the_account(self) -> str:
        """Beside it the account's place is `portal-1`."""
        key = UUID(self.ids["account"]).bytes
        for number in range(2, 1_000):
            placement = Placement(PlacedNode(name=f"portal-{each}") for each in (1, number))
            if placement.owner(key) == "portal-1":
                return f"portal-{number}"
        raise AssertionError("no name")

    def _start_node(self, name: str) -> None:
        index = len(self.nodes)
        self.nodes.append(name)
        state = self.directory / "portal"
        url = self.directory / f"{name}.url"
        url.touch(mode=0o600)
        url.write_text(
            f"postgresql://holloway_login:{PASSWORD.replace(' ', '%20')}"
            f"@{DATABASES[index]}:{self.server.port}/holloway?application_name={name}"
        )
        self._start_holloway(
            name,
            self.portal_host,
            ["portal", "--state-dir", str(state)],
            {
                "HOLLOWAY_PORTAL_NODE": name,
                "HOLLOWAY_PORTAL_LISTEN": f"{PORTAL}:{PORTS[index]}",
                "HOLLOWAY_PORTAL_API_LISTEN": f"{PORTAL}:{PORTS[index]}",
                "HOLLOWAY_PORTAL_ADDRESS": f"{PORTAL}:{PORTS[0]}",
                "HOLLOWAY_PORTAL_LINK_LISTEN": f"127.0.0.1:{7_400 + index}",
                "HOLLOWAY_PORTAL_DATABASE_URL_FILE": str(url),
                "HOLLOWAY_PORTAL_OBSERVABILITY": "",
            },
        )
        token = state / "operator-token"
        self.wait_until(lambda: token.exists() and (state / "ca.pem").exists(), "a first start")
        self.readers.append(
            Api(self.portal_host, state / "ca.pem", token.read_text().strip(), port=PORTS[index])
        )
        self.wait_until(lambda: self.is_ready(index), f"{name} is ready")

    # --- what is looked at -----------------------------------------------------------------------

    def wait_until(self, holds: Callable[[], object], what: str) -> None:
        wait_until(holds, what=what, timeout_s=PATIENCE_S)

    def is_ready(self, index: int) -> bool:
        """Whether a node says that it can serve."""
        component = self.components[self.nodes[index]]
        assert component.alive(), component.tail()
        with contextlib.suppress(OSError):
            return self.readers[index].try_call("GET", "/readyz")[0] == 200
        return False

    def query(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """What the database says, whoever can reach it. Every row is visible."""
        with self.server.connect("holloway") as connection:
            connection.execute("SET search_path = holloway")
            return connection.execute(sql, parameters).fetchall()

    def living(self) -> set[str]:
        """The nodes whose lease stands, by the clock that counts. Its own ends earlier."""
        rows = self.query("SELECT name FROM node WHERE lease_until > clock_timestamp()")
        return {name for (name,) in rows}

    def owner(self) -> str:
        """Who has the account's lease."""
        ((owner,),) = self.query(
            "SELECT owner FROM lease WHERE account_id = %s", self.ids["account"]
        )
        return str(owner)

    def attached(self, index: int) -> tuple[int, int]:
        """How many clients and gateways a node serves, as it says itself."""
        path = control_socket(self.directory / "portal", self.nodes[index])
        nodes = ask_control(path, {"command": "cluster"})["nodes"]
        (status,) = (each["status"] for each in nodes if each["name"] == self.nodes[index])
        return status["clients"], status["gateways"]

    def both_are_connected(self) -> bool:
        """Whether both agents have a channel to the portal, and have joined."""
        return all(self.status(name).get("connected_to_portal") for name in ("laptop", GATEWAY))

    def held(self, name: str) -> set[tuple[str, str]]:
        """The authorisations that an agent holds, each with its resource."""
        return {
            (resource["authorization_id"], resource["id"])
            for peer in self.status(name)["peers"]
            for resource in peer["resources"]
        }

    def authorizations(self) -> set[tuple[str, str]]:
        """Those that the database has and that have not ended, in the same form."""
        rows = self.query('SELECT id, resource_id FROM "authorization" WHERE ended_at IS NULL')
        return {(str(id), str(resource_id)) for id, resource_id in rows}

    def decided(self) -> int:
        """How many authorisations were ever written."""
        ((count,),) = self.query('SELECT count(*) FROM "authorization"')
        return int(count)

    def denial(self, number: int) -> str | None:
        """Why the client was refused an echo's resource."""
        wanted = self.ids[f"echo-{number}"]
        for denial in self.status()["denials"]:
            if denial["resource_id"] == wanted:
                return str(denial["reason"])
        return None

    # --- what happens ----------------------------------------------------------------------------

    def cut_off(self, *indexes: int) -> None:
        """Nodes whose packets to the database are lost from now on; nobody else's."""
        rules = "\n".join(
            f"ip daddr {DATABASES[index]} tcp dport {self.server.port} drop" for index in indexes
        )
        self.portal_host.nft(
            f"""
table ip outage
delete table ip outage
table ip outage {{
  chain out {{
    type filter hook output priority filter;
    {rules}
  }}
}}
"""
        )
        gone = {self.nodes[index] for index in indexes}
        self.wait_until(lambda: not gone & self.living(), f"the leases of {gone} end")


@pytest.fixture(scope="module")
def traffic_and_world() -> Iterator[tuple[Traffic, World]]:
    with Lab() as lab, own_directory("outage") as directory:
        world = World(lab)
        server = foreign_server(directory, host=world.portal_host, addresses=",".join(DATABASES))
        with server as world.server, Traffic(world.laptop, world.web) as traffic:
            world.server.administer(
                f"CREATE ROLE holloway_login LOGIN CREATEROLE PASSWORD '{PASSWORD}'"
            )
            world.server.administer(
                "CREATE DATABASE holloway OWNER holloway_login ENCODING 'UTF8' TEMPLATE template0"
            )
            try:
                world.start()
                traffic.stream()
                traffic.passes()
                yield traffic, world
            except BaseException:
                show_logs(world)
                raise


def refused(traffic: Traffic, world: World, number: int, but_not: str = "") -> str:
    """Ask for an echo's resource until it is refused, for another reason than `but_not`."""

    def answer() -> str | None:
        traffic.knock(ECHOES[number - 1])
        reason = world.denial(number)
        return None if reason == but_not else reason

    reason = wait_until(answer, what="the client is refused", timeout_s=PATIENCE_S, every_s=0.5)
    return str(reason)


def granted(traffic: Traffic, world: World, number: int) -> None:
    """Ask for an echo's resource until a datagram has arrived there."""
    address = ECHOES[number - 1]

    def arrived() -> int:
        traffic.knock(address)
        return traffic.heard_by[address]

    wait_until(arrived, what=f"{address} is reached", timeout_s=PATIENCE_S, every_s=0.5)


def test_without_the_database_nothing_is_decided_and_the_tunnel_lives_on(
    traffic_and_world: tuple[Traffic, World],
) -> None:
    traffic, world = traffic_and_world
    assert world.attached(0) == (1, 1)
    assert world.owner() == "portal-1"
    before = world.held("laptop")
    assert len(before) == world.decided() == 1
    assert before == world.held(GATEWAY) == world.authorizations()
    begin = traffic.sent

    world.cut_off(0)  # the owner of the account, to which both agents are attached
    assert world.living() == {world.nodes[1]}
    traffic.knock(ECHOES[1])  # the answer takes a while
    traffic.knock(ECHOES[FORBIDDEN - 1])
    traffic.passes()
    assert refused(traffic, world, 2) == "unavailable"
    assert refused(traffic, world, FORBIDDEN) == "unavailable"
    assert world.is_ready(1), "the other node has the database"
    traffic.passes()

    world.cut_off(0, 1)
    assert world.living() == set()
    traffic.knock(ECHOES[2])
    for api in world.readers:
        status, answer = api.try_call("POST", "/v1/groups", {"name": "Too late"})
        assert (status, answer["code"]) == (503, "unavailable")
    assert refused(traffic, world, 3) == "unavailable"
    traffic.passes()
    assert world.decided() == 1
    assert set(traffic.heard_by) == {ECHOES[0]}
    assert world.held("laptop") == world.held(GATEWAY) == before
    assert world.attached(0) == (1, 1), "nobody was sent away"

    world.cut_off()
    world.wait_until(lambda: world.living() == set(world.nodes), "both nodes live again")
    granted(traffic, world, 2)
    assert refused(traffic, world, FORBIDDEN, but_not="unavailable") == "forbidden"
    lost = traffic.lost_since(begin)
    print(f"\ndatabase away: {len(lost)} of {traffic.sent - begin} datagrams lost")
    assert len(lost) <= MAX_LOST
    assert before < world.held("laptop")
    assert world.held("laptop") == world.held(GATEWAY) == world.authorizations()


def test_the_whole_portal_is_killed_and_comes_back_and_the_tunnel_lives_on(
    traffic_and_world: tuple[Traffic, World],
) -> None:
    traffic, world = traffic_and_world
    before = world.held("laptop")
    assert before == world.held(GATEWAY) == world.authorizations()
    begin, decided = traffic.sent, world.decided()

    for name in world.nodes:
        world.components[name].kill()
    world.wait_until(lambda: not world.living(), "the leases of all nodes end")
    world.wait_until(
        lambda: not any(world.status(each)["connected_to_portal"] for each in ("laptop", GATEWAY)),
        "both agents see that the portal is away",
    )
    traffic.passes()
    assert world.held("laptop") == world.held(GATEWAY) == before

    for name in world.nodes:
        world.components[name].start()
    world.wait_until(lambda: world.is_ready(0) and world.is_ready(1), "both nodes are back")
    world.wait_until(world.both_are_connected, "both agents are back")
    traffic.passes()
    assert world.held("laptop") == world.held(GATEWAY) == world.authorizations() == before
    assert world.decided() == decided
    granted(traffic, world, 3)
    assert not traffic.heard_by[ECHOES[FORBIDDEN - 1]]
    lost = traffic.lost_since(begin)
    print(f"\nportal killed: {len(lost)} of {traffic.sent - begin} datagrams lost")
    assert len(lost) <= MAX_LOST
    assert before < world.held("laptop")
