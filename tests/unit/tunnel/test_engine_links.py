"""Engines whose network lets no UDP through to their relay, or none for a while."""

from __future__ import annotations

import pytest

from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.net.address import Address
from simulations.net.nat import SYMMETRIC
from tests.unit.tunnel.network import (
    CONNECTION,
    RELAY,
    SECOND_RELAY,
    Connected,
    Conversation,
    Host,
    Network,
    PathLost,
    connect,
    pair_of_hosts,
    relay_server,
)
from tunnel.ice.gathering import LEAVE_NS
from tunnel.ice.links import ASK_INTERVAL_NS, DOORS, LINGER_NS, VERDICT_NS, LinkTransport
from tunnel.ice.pair import SUSPECT_AFTER_NS

HOTEL = "203.0.113.7"  # the client's NAT


def pair(network: Network, *doors: LinkTransport) -> tuple[Host, Host]:
    client, gateway = pair_of_hosts(network, SYMMETRIC, SYMMETRIC)
    for host in (client, gateway):
        host.engine.set_relays([relay_server(doors=doors)], network.now)
        host.flush()
    return client, gateway


def block_udp_of_the_client(network: Network) -> None:
    network.blocked = lambda source, destination, _data: HOTEL in (source.host, destination.host)


def opened(network: Network, host: Host) -> list[str]:
    return [what for _, name, what in network.link_log if name == host.name]


def talks(network: Network, client: Host, gateway: Host) -> bool:
    """Whether packets pass both ways, and all of them."""
    conversation = Conversation(client, gateway)
    network.run(2 * NS_PER_S)
    conversation.stop()
    network.run(NS_PER_S)
    return conversation.delivered()[-40:] == list(range(conversation.sent))[-40:]


def test_where_udp_reaches_the_relay_no_link_is_opened() -> None:
    network = Network()
    client, gateway = pair(network, *DOORS)
    connect(client, gateway)
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))
    network.run(60 * NS_PER_S)
    assert network.link_log == []


@pytest.mark.parametrize("closed", [(), ("quic",), ("quic", "tls")])
def test_where_udp_is_blocked_the_first_open_door_carries_the_tunnel(
    closed: tuple[str, ...],
) -> None:
    network = Network()
    client, gateway = pair(network, *DOORS)
    block_udp_of_the_client(network)
    network.closed_doors.update(closed)
    connect(client, gateway)
    began = network.now
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))
    assert network.now - began < 3 * NS_PER_S
    assert client.path_kind() == "relayed"
    assert talks(network, client, gateway)
    assert opened(network, gateway) == []
    assert [w for w in opened(network, client) if w != "close"] == [*closed, DOORS[len(closed)]]


def test_a_slow_door_is_overtaken_and_called_off() -> None:
    network = Network()
    network.weather.latency_ns = 150 * NS_PER_MS  # 600 ms to open one
    client, gateway = pair(network, *DOORS)
    block_udp_of_the_client(network)
    connect(client, gateway)
    assert network.run(20 * NS_PER_S, lambda: client.happened(Connected))
    assert opened(network, client) == ["quic", "tls", "close"]


def test_traffic_goes_back_to_udp_without_loss_and_the_link_is_closed() -> None:
    network = Network()
    client, gateway = pair(network, *DOORS)
    block_udp_of_the_client(network)
    connect(client, gateway)
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))
    conversation = Conversation(client, gateway)
    network.run(5 * NS_PER_S)
    network.blocked = lambda _s, _d, _data: False
    network.run(30 * NS_PER_S + LINGER_NS)
    conversation.stop()
    network.run(NS_PER_S)
    assert conversation.delivered() == list(range(conversation.sent))
    assert opened(network, client) == ["quic", "close"]
    assert client.path_kind() == "relayed"
    network.trace.clear()
    assert talks(network, client, gateway)
    assert any(RELAY.host in (source.host, to.host) for _, source, to, _ in network.trace)


def test_udp_that_is_blocked_in_the_middle_is_replaced_by_a_link() -> None:
    network = Network()
    client, gateway = pair(network, *DOORS)
    connect(client, gateway)
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))
    conversation = Conversation(client, gateway)
    network.run(3 * NS_PER_S)
    block_udp_of_the_client(network)
    blocked = len(conversation.delivered())
    began = network.now
    assert network.run(30 * NS_PER_S, lambda: len(conversation.delivered()) > blocked + 20)
    assert network.now - began < 8 * NS_PER_S


def test_a_link_that_breaks_is_opened_again_by_another_door() -> None:
    network = Network()
    client, gateway = pair(network, *DOORS)
    block_udp_of_the_client(network)
    connect(client, gateway)
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))
    network.close_door("quic")
    network.run(5 * NS_PER_S)
    assert talks(network, client, gateway)
    assert opened(network, client) == ["quic", "quic", "tls"]


def test_no_door_is_tried_again_with_back_off_and_the_first_that_opens_serves() -> None:
    network = Network()
    client, gateway = pair(network, *DOORS)
    block_udp_of_the_client(network)
    network.closed_doors.update(DOORS)
    connect(client, gateway)
    network.run(20 * NS_PER_S)
    assert not client.happened(Connected)
    assert opened(network, client) == [*DOORS, *DOORS, *DOORS]
    network.closed_doors.clear()
    connect(client, gateway)
    assert network.run(40 * NS_PER_S, lambda: client.happened(Connected))


def test_the_last_connection_ends_the_link() -> None:
    network = Network()
    client, gateway = pair(network, *DOORS)
    block_udp_of_the_client(network)
    connect(client, gateway)
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))
    for connection_id in client.engine.connection_ids:
        client.engine.close(connection_id, network.now)
    client.flush()
    network.run(61 * NS_PER_S)
    assert opened(network, client) == ["quic", "close"]
    assert network.relay_host.server.allocations <= 1, "the gateway's"


def test_a_relay_without_udp_is_reached_at_once() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network, SYMMETRIC, SYMMETRIC)
    server = relay_server(doors=("tls",))
    only_tls = type(server)(
        id=server.id,
        addresses=server.addresses[1:],
        username=server.username,
        password=server.password,
        expires_in_ns=server.expires_in_ns,
        certificate_pins=server.certificate_pins,
    )
    client.engine.set_relays([only_tls], network.now)
    client.flush()
    connect(client, gateway)
    assert opened(network, client) == ["tls"]
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))


def test_without_a_pin_only_tcp_is_a_door() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network, SYMMETRIC, SYMMETRIC)
    server = relay_server(doors=DOORS)
    unpinned = type(server)(
        id=server.id,
        addresses=server.addresses,
        username=server.username,
        password=server.password,
        expires_in_ns=server.expires_in_ns,
    )
    client.engine.set_relays([unpinned], network.now)
    block_udp_of_the_client(network)
    connect(client, gateway)
    network.run(3 * NS_PER_S)
    assert opened(network, client) == ["tcp"]


def on_a_link(network: Network, *doors: LinkTransport) -> tuple[Host, Host]:
    """The client is connected by a link, of which nothing is left in the log."""
    client, gateway = pair(network, *doors)
    block_udp_of_the_client(network)
    connect(client, gateway)
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))
    network.run(2 * NS_PER_S)
    network.link_log.clear()
    return client, gateway


def test_a_link_that_swallows_everything_is_replaced_within_the_trust_in_any_path() -> None:
    network = Network()
    client, gateway = on_a_link(network, "tls")
    conversation = Conversation(client, gateway)
    network.run(3 * NS_PER_S)
    network.silence_links(client)
    began, before = network.now, len(conversation.delivered())
    assert network.run(10 * NS_PER_S, lambda: len(conversation.delivered()) > before + 5)
    assert network.now - began < 3 * NS_PER_S
    assert not client.happened(PathLost), "it is no fault of the gateway"
    (opened_at, _, what), closed = network.link_log
    assert what == "tls"
    assert opened_at - began <= SUSPECT_AFTER_NS + VERDICT_NS + 100 * NS_PER_MS
    assert closed[2] == "close"
    conversation.stop()
    assert talks(network, client, gateway)


def test_a_laptop_that_changes_its_network_opens_its_link_anew() -> None:
    network = Network()
    client, gateway = on_a_link(network, "tls")
    client.move(Address("192.168.2.9", 41_000), network.nat("203.0.113.7", SYMMETRIC))
    client.engine.path_suspect(network.now)
    client.flush()
    network.run(VERDICT_NS + NS_PER_S)
    assert client.path_kind() == "relayed"
    assert opened(network, client) == ["tls", "close"]
    assert talks(network, client, gateway)


def test_a_link_that_answers_in_doubt_is_kept() -> None:
    network = Network()
    client, gateway = on_a_link(network, "tls")
    for _ in range(5):
        client.engine.path_suspect(network.now)
        client.flush()
        network.run(3 * NS_PER_S)
    assert opened(network, client) == []
    gateway.alive = False  # whose silence is not the link's
    conversation = Conversation(client, gateway)
    network.run(10 * NS_PER_S)
    conversation.stop()
    assert opened(network, client) == []


def test_a_link_that_speaks_again_before_another_opens_is_kept() -> None:
    network = Network()
    client, gateway = on_a_link(network, *DOORS)
    network.closed_doors.update(DOORS)  # to newcomers
    network.silence_links(client)
    client.engine.path_suspect(network.now)
    client.flush()
    network.run(VERDICT_NS + NS_PER_S)
    assert opened(network, client)[:3] == [*DOORS]
    network.restore_links()
    assert talks(network, client, gateway)
    network.link_log.clear()
    network.closed_doors.clear()
    network.run(60 * NS_PER_S)
    assert opened(network, client) == []


def test_a_link_that_stands_by_is_asked_now_and_then_and_replaced_when_it_is_silent() -> None:
    network = Network()
    client, gateway = on_a_link(network, "tls")
    network.run(60 * NS_PER_S)
    assert opened(network, client) == []
    network.silence_links(client)
    network.run(ASK_INTERVAL_NS + VERDICT_NS + NS_PER_S)
    assert opened(network, client) == ["tls", "close"]
    assert talks(network, client, gateway)


def test_a_silent_link_that_breaks_while_others_are_tried_makes_no_second_race() -> None:
    network = Network()
    client, gateway = on_a_link(network, *DOORS)
    network.silence_links(client)
    client.engine.path_suspect(network.now)
    client.flush()
    assert network.run(5 * NS_PER_S, lambda: bool(network.link_log))
    network.close_door("quic")
    assert network.run(5 * NS_PER_S, lambda: client.path_kind() == "relayed")
    assert talks(network, client, gateway)
    assert [w for w in opened(network, client) if w != "close"] == ["quic", "tls"]


def test_each_of_two_relays_has_its_link_and_the_death_of_one_moves_the_tunnel() -> None:
    network = Network()
    client, gateway = pair_of_hosts(network, SYMMETRIC, SYMMETRIC)
    first, second = network.relay_host, network.relay(SECOND_RELAY)
    servers = [relay_server(doors=("tls",)), relay_server(SECOND_RELAY, doors=("tls",))]
    for host in (client, gateway):
        host.engine.set_relays(servers, network.now)
        host.flush()
    block_udp_of_the_client(network)
    connect(client, gateway)
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))
    network.run(60 * NS_PER_S)
    assert opened(network, client) == ["tls", "tls"]
    path = client.engine.path(CONNECTION)
    assert path is not None
    assert path.relay is not None
    used = first if path.relay.host == RELAY.host else second
    conversation = Conversation(client, gateway)
    network.run(3 * NS_PER_S)
    used.alive = False
    began, before = network.now, len(conversation.delivered())
    network.break_links_to(used)
    assert network.run(10 * NS_PER_S, lambda: len(conversation.delivered()) > before + 5)
    assert network.now - began < 1500 * NS_PER_MS
    assert not client.happened(PathLost)


@pytest.mark.parametrize("lead_ms", [-100, 0, 100])
def test_a_relay_that_drains_is_left_by_link_without_the_loss_of_a_packet(lead_ms: int) -> None:
    network = Network()
    client, gateway = pair_of_hosts(network, SYMMETRIC, SYMMETRIC)
    network.relay(SECOND_RELAY)
    servers = [relay_server(doors=("tls",)), relay_server(SECOND_RELAY, doors=("tls",))]
    for host in (client, gateway):
        host.engine.set_relays(servers, network.now)
        host.flush()
    block_udp_of_the_client(network)
    connect(client, gateway)
    assert network.run(10 * NS_PER_S, lambda: client.happened(Connected))
    network.run(60 * NS_PER_S)
    path = client.engine.path(CONNECTION)
    assert path is not None
    assert path.relay is not None
    used = network.relay_at(path.relay)
    left = [each for each in servers if str(each.addresses[0].address) != used.address.host]
    conversation = Conversation(client, gateway, interval_ns=5 * NS_PER_MS)
    network.run(3 * NS_PER_S)

    def leave(host: Host) -> None:
        host.engine.set_relays(left, network.now)
        host.flush()

    network.at(max(0, -lead_ms) * NS_PER_MS, lambda: leave(client))
    network.at(max(0, lead_ms) * NS_PER_MS, lambda: leave(gateway))
    network.run(LEAVE_NS + 5 * NS_PER_S)
    conversation.stop()
    network.run(NS_PER_S)
    assert conversation.delivered() == list(range(conversation.sent))
    assert used.server.allocations == 0
    assert opened(network, client) == ["tls", "tls", "close"]
