"""Whatever a portal says, in any order: no agent raises, and what it holds stays consistent."""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from channel.messages import (
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRenewed,
    AuthorizationRevoked,
    Authorize,
    Candidate,
    Candidates,
    IceCredentials,
    IceParameters,
    IpText,
    Peer,
    Relays,
    RelayServer,
    ResourceRemoved,
    ResourceUpdated,
    ResourceUpserted,
    Revoke,
    SocketAddress,
)
from clients.agent import ClientAgent
from gateways.agent import GatewayAgent
from tests.unit.clients.stage import (
    CLIENT,
    CLIENT_IPV4,
    CLIENT_IPV6,
    SECOND,
    SYN,
    WEB,
    Stage,
    answer,
    tcp,
    udp,
)
from tunnel.preshared import KemKey
from tunnel.wireguard.noise import public_key_of

KEM_KEY = KemKey(bytes(64)).public_bytes()
ADDRESSES = ("10.0.0.0/24", "10.0.0.0/8", "0.0.0.0/0", "fd00::/8", "127.0.0.1/32", "nonsense")


class Chatter:
    """A portal that says anything, about a few ids."""

    def __init__(self, seed: int, stage: Stage) -> None:
        self.chance = random.Random(seed)
        self.stage = stage

    def id(self, kind: int) -> UUID:
        known: list[UUID] = []
        if kind == 1:
            known = list(self.stage.authorizations)
        elif kind == 2:
            known = self.stage.client.engine.connection_ids
        elif kind == 3:
            known = [WEB.id]
        return self.chance.choice([*known, *(UUID(int=kind * 1_000 + n) for n in range(3))])

    def to_client(self) -> Any:
        pick = self.chance.choice
        return pick(
            [
                lambda: ResourceUpserted(resource=self.resource()),
                lambda: ResourceRemoved(resource_id=self.id(3)),
                lambda: self.relays(),
                lambda: AuthorizationCreated(
                    authorization_id=self.id(1),
                    connection_id=self.id(2),
                    resource_id=self.id(3),
                    gateway=self.peer(),
                    ice=self.ice(),
                    kem_ciphertext=pick([None, bytes(1088), b"short"]),
                    expires_in_ns=self.duration(),
                ),
                lambda: AuthorizationDenied(resource_id=self.id(3), reason="forbidden"),
                lambda: AuthorizationRenewed(
                    authorization_id=self.id(1), expires_in_ns=self.duration()
                ),
                lambda: AuthorizationRevoked(authorization_id=self.id(1), resource_id=self.id(3)),
                lambda: self.candidates(),
            ]
        )()

    def to_gateway(self) -> Any:
        pick = self.chance.choice
        return pick(
            [
                lambda: Authorize(
                    authorization_id=self.id(1),
                    connection_id=self.id(2),
                    client=self.peer(),
                    resource=self.resource(),
                    ice=self.ice(),
                    kem_public_key=pick([None, KEM_KEY, b"\xff" * 1184]),
                    expires_in_ns=self.duration(),
                ),
                lambda: AuthorizationRenewed(
                    authorization_id=self.id(1), expires_in_ns=self.duration()
                ),
                lambda: Revoke(authorization_id=self.id(1)),
                lambda: ResourceUpdated(resource=self.resource()),
                lambda: self.relays(),
                lambda: self.candidates(),
            ]
        )()

    def duration(self) -> int:
        return self.chance.choice([0, SECOND, 60 * SECOND, 3_600 * SECOND])

    def resource(self) -> Any:
        return attrs.evolve(WEB, id=self.id(3), address=self.chance.choice(ADDRESSES))

    def ice(self) -> IceParameters:
        def credentials() -> IceCredentials:
            letter = self.chance.choice("abc")
            return IceCredentials(fragment=letter * 8, password=letter * 32)

        return IceParameters(client=credentials(), gateway=credentials())

    def peer(self) -> Peer:
        stage, pick = self.stage, self.chance.choice
        keys = [
            stage.client.engine.public_key,
            stage.gateways[0].engine.public_key,
            public_key_of(bytes([7]) * 32),
            bytes(32),
        ]
        return Peer(
            id=pick([CLIENT, self.id(4)]), public_key=pick(keys), ipv4=CLIENT_IPV4, ipv6=CLIENT_IPV6
        )

    def relays(self) -> Relays:
        relay = RelayServer(
            id=self.id(5),
            addresses=(SocketAddress(address=IpText("203.0.113.9"), port=3478),),
            username="1:user",
            password="secret",
            expires_in_ns=self.duration(),
        )
        return Relays(added=self.chance.choice([(), (relay,)]), removed=(self.id(5),))

    def candidates(self) -> Candidates:
        candidate = Candidate(
            kind="host",
            address=IpText(self.chance.choice(["198.51.100.1", "127.0.0.1", "fe80::1"])),
            port=self.chance.choice([80, 2_222]),
            priority=1,
            foundation="f",
        )
        return Candidates(
            connection_id=self.id(2),
            generation=self.chance.randrange(3),
            add=self.chance.choice([(), (candidate,)]),
            remove=self.chance.choice([(), (candidate,)]),
        )


def check_client(client: ClientAgent) -> None:
    connections = client._connections
    assert sorted(connections) == sorted(client.engine.connection_ids)
    for lease in client._lease_by_resource.values():
        assert client._lease_by_id[lease.authorization_id] is lease
    for authorization_id, lease in client._lease_by_id.items():
        assert client._lease_by_resource[lease.resource_id] is lease
        assert connections[lease.connection.id] is lease.connection
        assert authorization_id in lease.connection.lease_ids
        assert client._expiries.get(authorization_id) is not None
    for connection in connections.values():
        assert connection.lease_ids
        assert connection.lease_ids <= set(client._lease_by_id)


def check_gateway(gateway: GatewayAgent) -> None:
    connections = gateway._connections
    assert sorted(connections) == sorted(gateway.engine.connection_ids)
    for grant_id, grant in gateway._grants.items():
        assert grant_id in connections[grant.connection_id].grant_ids
        assert gateway._leases.get(grant_id) is not None
    for connection in connections.values():
        assert connection.grant_ids
        granted = {gateway._grants[grant_id].resource.id for grant_id in connection.grant_ids}
        assert granted == set(connection.filter.resource_ids())


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_no_order_of_messages_confuses_an_agent(seed: int) -> None:
    stage = Stage()
    chatter = Chatter(seed, stage)
    chance = chatter.chance
    client, gateway = stage.client, stage.gateways[0]
    for _ in range(80):
        step = chance.randrange(10)
        if step < 3:
            stage.tell(client, chatter.to_client(), chance.choice([None, 3]))
        elif step < 6:
            stage.tell(gateway, chatter.to_gateway(), chance.choice([None, 3]))
        elif step == 6 and chance.random() < 0.3:
            if chance.random() < 0.5:
                client.channel_lost(stage.now)
                stage.tell(client, stage.client_init())
            else:
                gateway.channel_lost(stage.now)
                stage.tell(gateway, stage.gateway_init(0))
        elif step == 7:
            client.receive_packets([udp(), tcp(SYN), udp(destination="10.9.9.9")], stage.now)
            gateway.receive_packets([answer(), b"garbage"], stage.now)
        elif step == 8:
            client.join(stage.challenge(), stage.now)
            client.status(stage.now)
            gateway.status(stage.now)
        stage.advance(chance.choice([0, 0.1, 2]))
        check_client(client)
        check_gateway(gateway)
