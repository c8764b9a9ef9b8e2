"""The gateway's agent: takes authorisations from the portal and forwards what they allow.

One connection per client, one `ClientFilter` per connection, one grant per authorisation. A grant
ends when its lease runs out by this machine's own clock, when the portal revokes it, or when a
rejoin does not name it; its flows are dropped in the same step, and the shell is told to forget
the kernel's translations (`FlushTranslations`). A core: see `tunnel.agent`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from typing import Literal
from uuid import UUID

import attrs

from channel.messages import (
    Ack,
    AuthorizationRenewed,
    Authorize,
    Candidates,
    GatewayInit,
    Held,
    Peer,
    Relays,
    Resource,
    ResourceUpdated,
    Revoke,
    Stats,
)
from gateways.filters import ClientFilter, Verdict
from runtime.clock import earliest
from runtime.randomness import Randomness
from tunnel.agent import SECOND_NS, AgentIdentity, TunnelAgent, own_addresses
from tunnel.deadlines import Deadlines
from tunnel.engine import Connected, ConnectionParameters, Engine, Failed, PathChanged, PathLost
from tunnel.flows import Ending, Flow, FlowTable
from tunnel.packet import Header, parse, prohibited, reset, runs
from tunnel.preshared import KemError, encapsulate, preshared_key
from tunnel.resources import Network, is_forbidden, networks_of, within

MAX_CONNECTIONS = 10_000
MAX_GRANTS = 50_000
STATS_INTERVAL_NS = 30 * SECOND_NS
# The least time between two reports of flows. The portal takes 50 of a gateway in a second.
FLOW_INTERVAL_NS = SECOND_NS // 10
# ICMP errors and resets that a client's refused packets get, at most this often each.
MAX_ANSWERS_PER_SECOND = 100

Refusal = Literal["", "ceiling", "limits_exceeded", "unknown_connection", "unsupported"]


@attrs.frozen(kw_only=True)
class FlushTranslations:
    """The kernel has to forget the flows from this client to these networks (None: to all)."""

    client: IPv4Address | IPv6Address
    network: Network | None


@attrs.define(kw_only=True)
class _Connection:
    id: UUID
    client: Peer
    filter: ClientFilter
    grant_ids: set[UUID] = attrs.field(factory=set)
    authorization_by_resource: dict[UUID, UUID] = attrs.field(factory=dict)
    """The newest grant of each resource: it answers for the flows."""
    bytes_in: int = 0
    bytes_out: int = 0
    opened_ns: int
    first_delivered_ns: int | None = None
    answers: int = 0
    answers_second: int = 0


@attrs.frozen(kw_only=True)
class _Grant:
    id: UUID
    connection_id: UUID
    resource: Resource


@attrs.define(kw_only=True)
class GatewayStatistics:
    """Packets since the start. `spoofed`: from an address that is not the sender's;
    `unsolicited`: towards a client, answering nothing that it sent."""

    malformed: int = 0
    forwarded: int = 0
    returned: int = 0
    prohibited: int = 0
    reset: int = 0
    dropped: int = 0
    unsolicited: int = 0


class GatewayAgent(TunnelAgent):
    """See the head of this file. `ceiling`: networks outside of which nothing is ever granted,
    whatever the portal says; empty: everything may be."""

    def __init__(
        self,
        identity: AgentIdentity,
        engine: Engine,
        *,
        randomness: Randomness,
        now: int,
        ceiling: Iterable[Network] = (),
    ) -> None:
        super().__init__(
            identity,
            engine,
            randomness=randomness,
            now=now,
            flow_interval_ns=FLOW_INTERVAL_NS,
        )
        self._ceiling = tuple(ceiling)
        self._connections: dict[UUID, _Connection] = {}
        self._connection_by_address: dict[bytes, _Connection] = {}
        self._connection_by_client: dict[UUID, _Connection] = {}
        self._connection_by_key: dict[bytes, _Connection] = {}
        self._grants: dict[UUID, _Grant] = {}
        self._leases: Deadlines[UUID] = Deadlines()
        self._stats_at = now + STATS_INTERVAL_NS
        self.counts = GatewayStatistics()
        self.bytes_in = 0
        self.bytes_out = 0

    # --- packets ---------------------------------------------------------------------------------

    def receive_packets(self, packets: Iterable[bytes], now: int) -> None:
        """Packets that the kernel routed to the TUN device: answers for clients."""
        for header, run in runs(packets):
            if header is None:
                self.counts.malformed += 1
                continue
            connection = self._connection_by_address.get(header.destination)
            flow = None
            if connection is not None:
                flow = connection.filter.to_client(run[-1], header, now)
            if connection is None or flow is None:
                self.counts.unsolicited += len(run)
                continue
            self.counts.returned += len(run)
            flow.count_received(len(run), self._to_tunnel(connection, run, now))

    def _tunnelled(
        self, connection_id: UUID, header: Header | None, run: Sequence[bytes], now: int
    ) -> None:
        connection = self._connections.get(connection_id)
        if connection is None or header is None:
            self.counts.malformed += len(run)
            return
        flow = connection.filter.continues(run[-1], header, now) if len(run) > 1 else None
        if flow is not None:
            flow.count_sent(len(run), self._forward(connection, run, now))
            return
        for packet in run:
            self._judge(connection, packet, now)

    def _forward(self, connection: _Connection, run: Sequence[bytes], now: int) -> int:
        """To the TUN; answers the number of bytes."""
        self.counts.forwarded += len(run)
        run_bytes = sum(map(len, run))
        connection.bytes_in += run_bytes
        self.bytes_in += run_bytes
        if connection.first_delivered_ns is None:
            connection.first_delivered_ns = now
        self._packets += run
        return run_bytes

    def _judge(self, connection: _Connection, packet: bytes, now: int) -> None:
        header = parse(packet)
        if header is None:
            self.counts.malformed += 1
            return
        verdict = connection.filter.from_client(packet, header, now)
        if verdict is Verdict.FORWARD:
            self._forward(connection, (packet,), now)
            return
        if verdict is Verdict.DROP or not self._may_answer(connection, now):
            self.counts.dropped += 1
            return
        if verdict is Verdict.RESET:
            self.counts.reset += 1
            answer = reset(packet)
        else:
            self.counts.prohibited += 1
            answer = prohibited(packet)
        if answer is not None:
            self._to_tunnel(connection, (answer,), now)

    def _to_tunnel(self, connection: _Connection, packets: Sequence[bytes], now: int) -> int:
        """To the client; answers the number of bytes."""
        packets_bytes = sum(map(len, packets))
        connection.bytes_out += packets_bytes
        self.bytes_out += packets_bytes
        self.engine.send_packets(connection.id, packets, now)
        return packets_bytes

    @staticmethod
    def _may_answer(connection: _Connection, now: int) -> bool:
        second = now // SECOND_NS
        if second != connection.answers_second:
            connection.answers_second, connection.answers = second, 0
        connection.answers += 1
        return connection.answers <= MAX_ANSWERS_PER_SECOND

    # --- time ------------------------------------------------------------------------------------

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due."""
        return earliest(
            self._leases.next(),
            self._stats_at,
            self._flows_timeout(),
            self._unnamed_relays.next(),
        )

    def handle_timeout(self, now: int) -> None:
        """End leases that ran out; report the load, and flows."""
        for grant_id in self._leases.take_due(now):
            self._end(grant_id, now)
        if now >= self._stats_at:
            self._stats_at = now + STATS_INTERVAL_NS
            self._send(
                Stats(
                    connections=len(self._connections),
                    bytes_in=self.bytes_in,
                    bytes_out=self.bytes_out,
                )
            )
        self._tell_flows(now)
        self._drop_unnamed_relays(now)

    # --- flows -----------------------------------------------------------------------------------

    def _flow_tables(self) -> Iterable[FlowTable]:
        return [connection.filter.flow_table for connection in self._connections.values()]

    def _part_of(self, connection_id: UUID, flow: Flow, ending: Ending, now: int) -> None:
        """A client's flow has something to tell."""
        connection = self._connections.get(connection_id)
        authorization_id = None
        if connection is not None and isinstance(flow.tag, UUID):
            authorization_id = connection.authorization_by_resource.get(flow.tag)
        self.reports.add(flow, authorization_id, ending, now)

    # --- the portal ------------------------------------------------------------------------------

    def held(self) -> tuple[Held, ...]:
        return tuple(
            Held(authorization_id=grant.id, connection_id=grant.connection_id)
            for grant in self._grants.values()
        )

    def _received(self, message: object, ref: int | None, now: int) -> None:
        match message:
            case GatewayInit():
                self._init(message, now)
            case Authorize():
                self._authorize(message, ref, now)
            case AuthorizationRenewed():
                if message.authorization_id in self._grants:
                    self._leases.set(message.authorization_id, now + message.expires_in_ns)
            case Revoke():
                self._end(message.authorization_id, now)
            case ResourceUpdated():
                self._update(message.resource, now)
            case Relays():
                self._change_relays(message, now)
            case Candidates():
                if message.connection_id in self._connections:
                    self.engine.add_candidates(message, now)

    def _init(self, init: GatewayInit, now: int) -> None:
        if self.interface is not None and init.interface != self.interface:
            # Another account's ranges, or another address: nothing that stands fits any more.
            for grant_id in list(self._grants):
                self._end(grant_id, now)
        live = {lease.authorization_id: lease for lease in init.authorizations}
        for grant_id in list(self._grants):
            lease = live.get(grant_id)
            if lease is None:
                self._end(grant_id, now)
            else:
                self._leases.set(grant_id, now + lease.expires_in_ns)
        self._begin(
            account_id=init.account_id,
            own_id=init.gateway_id,
            interface=init.interface,
            relays=init.relays,
            now=now,
        )

    def _authorize(self, message: Authorize, ref: int | None, now: int) -> None:
        self._forget_namesake(message, now)
        ciphertext: bytes | None = None
        refusal = self._objection(message)
        if not refusal and message.connection_id not in self._connections:
            ciphertext = self._connect(message, now)
            if ciphertext is None:
                refusal = "unknown_connection"
        if not refusal:
            self._grant(message, now)
        ack = Ack(
            authorization_id=message.authorization_id, kem_ciphertext=ciphertext, refusal=refusal
        )
        self._send(ack, ref)

    def _forget_namesake(self, message: Authorize, now: int) -> None:
        """An authorisation told again is the same; told of something else, it replaces itself."""
        older = self._grants.get(message.authorization_id)
        if older is None:
            return
        if (older.connection_id, older.resource.id) != (message.connection_id, message.resource.id):
            self._end(older.id, now)

    def _objection(self, message: Authorize) -> Refusal:
        networks = networks_of(message.resource)
        if not networks or any(
            is_forbidden(network, self._tunnel_ranges()) for network in networks
        ):
            return "unsupported"
        if self._ceiling and not all(within(network, self._ceiling) for network in networks):
            return "ceiling"
        if len(self._grants) >= MAX_GRANTS:
            return "limits_exceeded"
        connection = self._connections.get(message.connection_id)
        if connection is None:
            if message.kem_public_key is None:
                return "unknown_connection"
            if len(self._connections) >= MAX_CONNECTIONS:
                return "limits_exceeded"
        elif connection.client.public_key != message.client.public_key:
            return "unknown_connection"
        return ""

    def _tunnel_ranges(self) -> tuple[Network, ...]:
        if self.interface is None:
            return ()
        return (self.interface.range_ipv4, self.interface.range_ipv6)

    def _connect(self, message: Authorize, now: int) -> bytes | None:
        """Begin a connection; answers the ciphertext, or None for keys that are unfit."""
        if self.account_id is None or self.own_id is None or message.kem_public_key is None:
            return None
        try:
            secret, ciphertext = encapsulate(message.kem_public_key)
        except KemError:
            return None
        self._replace_connections_of(message.client, now)
        parameters = ConnectionParameters(
            connection_id=message.connection_id,
            peer_public_key=message.client.public_key,
            preshared_key=preshared_key(
                secret,
                account=self.account_id,
                connection=message.connection_id,
                client=message.client.id,
                gateway=self.own_id,
                client_tunnel_key=message.client.public_key,
                gateway_tunnel_key=self.engine.public_key,
                kem_public_key=message.kem_public_key,
                ciphertext=ciphertext,
            ),
            local_ice=message.ice.gateway,
            remote_ice=message.ice.client,
            controlling=False,
        )
        try:
            self.engine.open(parameters, now)
        except ValueError:
            return None
        sources = own_addresses(message.client.ipv4, message.client.ipv6)
        connection = _Connection(
            id=message.connection_id,
            client=message.client,
            filter=ClientFilter(
                sources, self._tunnel_ranges(), partial(self._part_of, message.connection_id)
            ),
            opened_ns=now,
        )
        self._connections[connection.id] = connection
        self._connection_by_client[message.client.id] = connection
        self._connection_by_key[message.client.public_key] = connection
        for address in sources:
            self._connection_by_address[address] = connection
        return ciphertext

    def _replace_connections_of(self, client: Peer, now: int) -> None:
        """A client has one connection here: a new one ends the older, with all that it carried."""
        found = [
            self._connection_by_client.get(client.id),
            self._connection_by_key.get(client.public_key),
            self._connection_by_address.get(client.ipv4.packed),
            self._connection_by_address.get(client.ipv6.packed),
        ]
        older = {connection.id: connection for connection in found if connection is not None}
        for connection in older.values():
            self._disconnect(connection, now)

    def _grant(self, message: Authorize, now: int) -> None:
        connection = self._connections[message.connection_id]
        grant = _Grant(
            id=message.authorization_id,
            connection_id=connection.id,
            resource=message.resource,
        )
        self._grants[grant.id] = grant
        connection.grant_ids.add(grant.id)
        self._answer_for(connection, grant, now)
        connection.filter.grant(message.resource, now)
        self._leases.set(grant.id, now + message.expires_in_ns)

    @staticmethod
    def _answer_for(connection: _Connection, grant: _Grant, now: int) -> None:
        """What flows carry to the grant's resource from now on, they carry by this grant."""
        resource_id = grant.resource.id
        if connection.authorization_by_resource.get(resource_id) != grant.id:
            connection.filter.flow_table.cut(resource_id, now)
            connection.authorization_by_resource[resource_id] = grant.id

    def _update(self, resource: Resource, now: int) -> None:
        for grant in [grant for grant in self._grants.values() if grant.resource.id == resource.id]:
            changed = attrs.evolve(grant.resource, name=resource.name, filters=resource.filters)
            self._grants[grant.id] = attrs.evolve(grant, resource=changed)
            self._connections[grant.connection_id].filter.update(changed, now)

    def _end(self, grant_id: UUID, now: int) -> None:
        """The end of one authorisation: its flows are dropped, here and in the kernel."""
        grant = self._grants.pop(grant_id, None)
        self._leases.cancel(grant_id)
        if grant is None:
            return
        connection = self._connections[grant.connection_id]
        connection.grant_ids.discard(grant_id)
        held = [self._grants[other] for other in connection.grant_ids]
        others = [other for other in held if other.resource.id == grant.resource.id]
        if not others:
            for network in connection.filter.withdraw(grant.resource.id, now):
                self._flush(connection.client, network)
            connection.authorization_by_resource.pop(grant.resource.id, None)
        elif connection.authorization_by_resource.get(grant.resource.id) == grant_id:
            self._answer_for(connection, others[-1], now)
        if not connection.grant_ids:
            self._disconnect(connection, now)

    def _disconnect(self, connection: _Connection, now: int) -> None:
        connection.filter.end_flows("lost", now)
        for grant_id in connection.grant_ids:
            del self._grants[grant_id]
            self._leases.cancel(grant_id)
        if connection.grant_ids:
            for own in (connection.client.ipv4, connection.client.ipv6):
                self._events.append(FlushTranslations(client=own, network=None))
        connection.grant_ids.clear()
        self._connections.pop(connection.id, None)
        self._connection_by_client.pop(connection.client.id, None)
        self._connection_by_key.pop(connection.client.public_key, None)
        for address in own_addresses(connection.client.ipv4, connection.client.ipv6):
            if self._connection_by_address.get(address) is connection:
                del self._connection_by_address[address]
        self._close(connection.id, now)

    def _flush(self, client: Peer, network: Network) -> None:
        address = client.ipv4 if network.version == 4 else client.ipv6
        self._events.append(FlushTranslations(client=address, network=network))

    # --- the engine ------------------------------------------------------------------------------

    def _path_event(self, event: Connected | PathChanged | PathLost | Failed, now: int) -> None:
        if not isinstance(event, Failed):
            return
        connection = self._connections.get(event.connection_id)
        if connection is not None:
            self._disconnect(connection, now)

    # --- status ----------------------------------------------------------------------------------

    def status(self, now: int) -> dict[str, object]:
        """What `holloway status` shows: one entry per client."""
        return {
            "kind": "gateway",
            "name": self._identity.name,
            "connected_to_portal": self.joined,
            "id": None if self.own_id is None else str(self.own_id),
            "peers": [self._peer_status(peer, now) for peer in self._connections.values()],
            "counts": attrs.asdict(self.counts),
        }

    def metrics(self) -> dict[str, int]:
        """Counts since the start."""
        counts = {f"packets_{name}": value for name, value in attrs.asdict(self.counts).items()}
        forwarded = {"bytes_in": self.bytes_in, "bytes_out": self.bytes_out}
        return counts | forwarded | self._flow_metrics()

    def sizes(self) -> dict[str, int]:
        """Present sizes."""
        flows = sum(connection.filter.flows() for connection in self._connections.values())
        return {
            "connections": len(self._connections),
            "authorizations": len(self._grants),
            "flows": flows,
            "flows_unreported": len(self.reports),
        }

    def _peer_status(self, connection: _Connection, now: int) -> dict[str, object]:
        return {
            "name": connection.client.name,
            "id": str(connection.client.id),
            "connection_id": str(connection.id),
            "addresses": [str(connection.client.ipv4), str(connection.client.ipv6)],
            "path": self._path_status(connection.id),
            "bytes_in": connection.bytes_in,
            "bytes_out": connection.bytes_out,
            "flows": connection.filter.flows(),
            "spoofed_packets": connection.filter.spoofed,
            "first_delivery_ns": (
                None
                if connection.first_delivered_ns is None
                else connection.first_delivered_ns - connection.opened_ns
            ),
            "resources": [
                {
                    "id": str(grant.resource.id),
                    "name": grant.resource.name,
                    "address": grant.resource.address,
                    "authorization_id": str(grant.id),
                    "expires_in_ns": max(0, (self._leases.get(grant.id) or now) - now),
                }
                for grant in (self._grants[grant_id] for grant_id in connection.grant_ids)
            ],
        }
