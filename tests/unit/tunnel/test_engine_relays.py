"""Engines that have two relays, one of which dies, drains or comes back."""

from __future__ import annotations

import pytest

from runtime.clock import NS_PER_MS, NS_PER_S
from simulations.net.nat import SYMMETRIC
from tests.unit.tunnel.network import (
    CONNECTION,
    SECOND_RELAY,
    Connected,
    Conversation,
    Host,
    Network,
    PathLost,
    RelayHost,
    connect,
    pair_of_hosts,
    relay_server,
)
from tunnel.ice.agent import UNNEEDED_AFTER_NS

SERVERS = [relay_server(), relay_server(SECOND_RELAY)]


def connected(network: Network) -> tuple[Host, Host]:
    """A client and a gateway that can meet only at a relay, and have done so for long."""
    client, gateway = pair_of_hosts(network, SYMMETRIC, SYMMETRIC)
    network.relay(SECOND_RELAY)
    for host in (client, gateway):
        host.engine.set_relays(SERVERS, network.now)
        host.flush()
    connect(client, gateway)
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))
    network.run(3 * UNNEEDED_AFTER_NS)
    return client, gateway


def relay_in_use(network: Network, client: Host) -> RelayHost:
    path = client.engine.path(CONNECTION)
    assert path is not None
    assert path.relay is not None
    return network.relay_at(path.relay)


@pytest.mark.parametrize("seed", range(5))
def test_the_death_of_the_relay_of_an_old_path_costs_less_than_a_second(seed: int) -> None:
    network = Network(seed)
    client, gateway = connected(network)
    conversation = Conversation(client, gateway)
    network.run(5 * NS_PER_S)
    used = relay_in_use(network, client)
    used.alive = False
    began = network.now
    before = len(conversation.delivered()), len(conversation.answered())
    assert network.run(
        10 * NS_PER_S,
        lambda: (
            len(conversation.delivered()) > before[0] + 5
            and len(conversation.answered()) > before[1] + 5
        ),
    )
    assert network.now - began < 1300 * NS_PER_MS
    assert relay_in_use(network, client) is not used
    assert not client.happened(PathLost)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lead_ms", [-200, -20, 0, 20, 200])
def test_a_relay_that_drains_is_left_without_the_loss_of_a_packet(seed: int, lead_ms: int) -> None:
    """The portal tells the ends at different times: `lead_ms` before or after each other."""
    network = Network(seed)
    client, gateway = connected(network)
    conversation = Conversation(client, gateway, interval_ns=5 * NS_PER_MS)
    network.run(5 * NS_PER_S)
    used = relay_in_use(network, client)
    left = [server for server in SERVERS if str(server.addresses[0].address) != used.address.host]

    def leave(host: Host) -> None:
        host.engine.set_relays(left, network.now)
        host.flush()

    network.at(max(0, -lead_ms) * NS_PER_MS, lambda: leave(client))
    network.at(max(0, lead_ms) * NS_PER_MS, lambda: leave(gateway))
    network.run(30 * NS_PER_S)
    conversation.stop()
    network.run(NS_PER_S)
    assert conversation.delivered() == list(range(conversation.sent))
    answers = conversation.answered()
    assert answers == list(range(answers[0], answers[0] + len(answers)))
    assert used.server.allocations == 0
    assert relay_in_use(network, client) is not used


def test_a_relay_that_comes_back_stands_by_again() -> None:
    network = Network()
    client, gateway = connected(network)
    used = relay_in_use(network, client)
    used.alive = False
    conversation = Conversation(client, gateway)
    network.run(60 * NS_PER_S)
    used.restart()
    used.alive = True
    network.run(2 * 60 * NS_PER_S)
    assert client.engine.statistics().gathering["allocations"] == 2
    relay_in_use(network, client).alive = False
    before = len(conversation.delivered())
    network.run(2 * NS_PER_S)
    assert len(conversation.delivered()) > before + 10
