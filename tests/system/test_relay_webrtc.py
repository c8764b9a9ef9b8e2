"""The relay as a process before what others build on: pion's client of TURN (Go), and WebRTC by
werift (JavaScript), whose peers may use relayed addresses alone. Over UDP, TCP and TLS."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.system.relay_lab import (
    CLIENT,
    FOREIGN,
    MESSAGES,
    PEER,
    RELAY,
    ROOT,
    Network,
    echoing_peer,
    installed,
    metrics,
    relay_network,
    relay_process,
    wait_until,
)

pytestmark = pytest.mark.system

PORT_BY_TRANSPORT = {"udp": 3478, "tcp": 3478, "tls": 5349}
WERIFT = ROOT / "tests/system/foreign/werift/peers.cjs"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with relay_network() as network, relay_process(network), echoing_peer(network):
        yield network


@pytest.mark.parametrize("transport", ["udp", "tcp", "tls"])
def test_pions_client_of_turn_is_echoed_without_loss(network: Network, transport: str) -> None:
    before, messages = metrics(network), MESSAGES or 50
    argv = [
        str(installed("pion")), transport, f"{RELAY}:{PORT_BY_TRANSPORT[transport]}",
        f"{PEER}:3480", str(network.authority), str(messages),
    ]  # fmt: skip
    told = json.loads(
        network.client.run("env", "PASSWORD=opensesame", *argv, timeout_s=60 + MESSAGES)
    )
    assert told["echoed"] == messages
    assert told["relayed"].startswith(f"{RELAY}:")
    assert told["mapped"] == told["local"]
    assert told["local"].startswith(f"{CLIENT}:")
    wait_until(lambda: metrics(network)["allocations"] == 0, "pion gave its allocation back")
    assert passed_by(network, before) == {transport: 2 * messages}
    assert metrics(network)["dropped_packets_total"] == before["dropped_packets_total"]


def test_peers_of_webrtc_talk_through_two_allocations_by_each_transport(network: Network) -> None:
    before = metrics(network)
    urls = {
        f"turn:{RELAY}:3478?transport=udp": "udp",
        f"turn:{RELAY}:3478?transport=tcp": "tcp",
        f"turns:{RELAY}:5349?transport=tcp": "tls",
    }
    environment = {
        "PASSWORD": "opensesame",
        "NODE_PATH": str(installed("node/node_modules")),
        "NODE_EXTRA_CA_CERTS": str(network.authority),
    }
    process = network.client.spawn(
        ["node", str(WERIFT), *urls],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=FOREIGN,
    )
    with process:
        assert process.stdout is not None
        told = [json.loads(process.stdout.readline()) for _ in urls]
        for transport in urls.values():
            standing = metrics(network)[f'transport_allocations{{transport="{transport}"}}']
            assert standing == 2, transport
        process.communicate(timeout=30)
    assert {each["url"] for each in told} == set(urls)
    for each in told:
        assert each["echoed"] == 20
        assert set(each["candidates"]) == {f"relay {RELAY}"}
    assert set(passed_by(network, before)) == {"udp", "tcp", "tls"}
    wait_until(lambda: of_streams(network) == 0, "allocations end with their connections")


def of_streams(network: Network) -> float:
    """Allocations of clients over TCP and TLS. (werift never gives one back: those over UDP end
    with their lifetime.)"""
    now = metrics(network)
    return sum(now[f'transport_allocations{{transport="{each}"}}'] for each in ("tcp", "tls"))


def passed_by(network: Network, before: dict[str, float]) -> dict[str, float]:
    """How many packets were relayed since `before`, by the transport of the client."""
    now = metrics(network)
    names = {each: f'transport_packets_total{{transport="{each}"}}' for each in PORT_BY_TRANSPORT}
    grown = {transport: now[name] - before[name] for transport, name in names.items()}
    return {transport: packets for transport, packets in grown.items() if packets}
