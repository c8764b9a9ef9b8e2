"""Two engines, NATs and the real TURN server core: which path is found, and what it carries."""

from __future__ import annotations

import pytest

from runtime.clock import NS_PER_S
from simulations.nat import PORT_RESTRICTED, SYMMETRIC, NatBehaviour
from tests.unit.tunnel.network import Network, connect, ip_packet, pair_of_hosts
from tunnel.engine import Connected

FULL_CONE = NatBehaviour(filtering="endpoint_independent")
RESTRICTED_CONE = NatBehaviour(filtering="address_dependent")
UNPRESERVED = NatBehaviour(preserves_port=False)
ADDRESS_DEPENDENT = NatBehaviour(mapping="address_dependent", preserves_port=False)


@pytest.mark.parametrize(
    ("client_nat", "gateway_nat", "kind"),
    [
        (None, None, "direct"),
        (None, SYMMETRIC, "direct"),
        (SYMMETRIC, None, "direct"),
        (PORT_RESTRICTED, PORT_RESTRICTED, "direct"),
        (UNPRESERVED, UNPRESERVED, "direct"),
        (RESTRICTED_CONE, PORT_RESTRICTED, "direct"),
        (SYMMETRIC, RESTRICTED_CONE, "direct"),
        (FULL_CONE, SYMMETRIC, "direct"),
        (ADDRESS_DEPENDENT, RESTRICTED_CONE, "direct"),
        (PORT_RESTRICTED, SYMMETRIC, "relayed"),
        (SYMMETRIC, PORT_RESTRICTED, "relayed"),
        (SYMMETRIC, SYMMETRIC, "relayed"),
    ],
)
def test_the_nats_decide_whether_the_path_is_direct(
    client_nat: NatBehaviour | None, gateway_nat: NatBehaviour | None, kind: str
) -> None:
    network = Network()
    client, gateway = pair_of_hosts(network, client_nat, gateway_nat)
    connect(client, gateway)
    client.send(ip_packet(1))
    assert network.run(10 * NS_PER_S, lambda: bool(gateway.packets))
    gateway.send(ip_packet(2))
    assert network.run(10 * NS_PER_S, lambda: bool(client.packets))
    assert network.run(10 * NS_PER_S, lambda: client.path_kind() == gateway.path_kind() == kind)
    assert client.happened(Connected)
    assert gateway.happened(Connected)
    assert [packet for _, packet in gateway.packets] == [ip_packet(1)]
    assert [packet for _, packet in client.packets] == [ip_packet(2)]
