"""A whole installation whose portal cannot be reached by UDP: real processes in namespaces, and a
firewall before the portal that drops every datagram to it and says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from simulations.installation import CHANNEL_PORT, GATEWAYS, Installation, wait_until
from simulations.kernel.lab import Host, Lab

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]
AGENTS = ("laptop", *GATEWAYS)


def block(it: Installation) -> None:
    it.portal_host.nft(
        "table inet blocked {\n chain input {\n  type filter hook input priority 0;\n"
        f"  udp dport {CHANNEL_PORT} drop;\n }}\n}}\n"
    )


def unblock(it: Installation) -> None:
    it.portal_host.run("nft", "delete", "table", "inet", "blocked")


def device_of(host: Host) -> str:
    return host.run("ip", "-o", "route", "show", "default").split(" dev ")[1].split()[0]


def transports(it: Installation) -> set[str]:
    """What the agents that are connected to the portal are connected by."""
    channels = [it.status(name).get("channel", {}) for name in AGENTS]
    return {each["transport"] if each.get("connected") else "none" for each in channels}


def websockets_at_the_portal(it: Installation) -> int:
    with it.portal_host.connect(("127.0.0.1", 9470)) as plain:
        connection = HTTPConnection("127.0.0.1", 9470)
        connection.sock = plain
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    (count,) = [
        line.split()[1] for line in lines if line.startswith("holloway_websocket_connections ")
    ]
    return int(float(count))


@pytest.fixture(scope="module")
def it() -> Iterator[Installation]:
    with Lab() as lab:
        installation = Installation(lab)
        block(installation)
        try:
            installation.start_everything(large_file_bytes=1 << 20, timeout_s=90)
            yield installation
        except BaseException:
            for log in sorted(installation.directory.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
            raise


def test_every_agent_joins_by_websocket_and_an_access_comes_about(it: Installation) -> None:
    assert transports(it) == {"websocket"}
    assert websockets_at_the_portal(it) == len(AGENTS) + 1  # and the relay
    assert not it.fetch_page(timeout_s=5)
    it.allow()
    wait_until(it.fetch_page, what="the page arrives", timeout_s=60)
    # It takes UDP to the gateway, which nobody blocks.
    assert [peer["path"]["kind"] for peer in it.status()["peers"]] == ["direct"]


def test_a_gateway_that_was_killed_comes_back(it: Installation) -> None:
    gateway = it.components[GATEWAYS[0]]
    gateway.kill()
    wait_until(
        lambda: websockets_at_the_portal(it) == len(AGENTS), what="its end is noticed by the portal"
    )
    gateway.start()
    wait_until(lambda: transports(it) == {"websocket"}, what="all are there again", timeout_s=60)
    wait_until(it.fetch_page, what="the page arrives", timeout_s=60)


def test_a_laptop_that_changes_its_network_has_another_connection_at_once(
    it: Installation,
) -> None:
    """TCP cannot follow it, and would not say so for long."""
    before = it.status()["channel"]
    device = device_of(it.laptop)
    it.laptop.run("sysctl", "-qw", "net.ipv4.conf.all.promote_secondaries=1")
    it.laptop.ip(
        f"addr add 192.168.1.77/24 dev {device}",
        f"route replace default via 192.168.1.1 dev {device} src 192.168.1.77",
        f"addr del 192.168.1.10/24 dev {device}",
    )

    def moved() -> bool:
        channel = it.status()["channel"]
        return channel["connected"] and channel["connections"] == before["connections"] + 1

    wait_until(moved, what="the laptop is connected from its other address", timeout_s=30)
    after = it.status()["channel"]
    # Neither a probe nor a heartbeat had to fail for it, and nothing was waited for.
    assert (after["dials"], after["last_error"]) == (before["dials"], before["last_error"])
    assert after["transport"] == "websocket"
    wait_until(it.fetch_page, what="the page arrives", timeout_s=60)


def test_once_udp_passes_all_go_on_over_quic_and_nothing_is_lost(it: Installation) -> None:
    connections = it.status()["channel"]["connections"]
    unblock(it)
    # A change of the network is a reason to look at once.
    for host in (it.laptop, *it.gateway_hosts.values()):
        host.ip(f"addr add 10.99.0.1/32 dev {device_of(host)}")
    wait_until(lambda: transports(it) == {"quic"}, what="all are on QUIC", timeout_s=240)
    assert it.fetch_page()
    channel = it.status()["channel"]
    assert channel["moves"] == 1
    assert channel["connections"] == connections + 1
    gateways = it.admin.call("GET", "/v1/gateways")["items"]
    assert sum(gateway["online"] for gateway in gateways) == len(GATEWAYS)


def test_udp_that_is_blocked_later_is_noticed_and_a_node_that_restarts_is_found(
    it: Installation,
) -> None:
    block(it)
    wait_until(lambda: transports(it) == {"websocket"}, what="all are on WebSocket", timeout_s=120)
    portal = it.components["portal"]
    portal.kill()
    assert it.fetch_page()  # tunnels live on
    portal.start()
    it.wait_for_portal()
    it.wait_until_online(90)
    wait_until(lambda: transports(it) == {"websocket"}, what="all are back", timeout_s=60)
    assert it.fetch_page()
