"""The client's agent: asks for what packets want, opens tunnels, moves away from dead gateways.

How a resource is reached, from its first packet on:

    packet for a resource without a lease -> buffered; `RequestAuthorization`, with a KEM key
    AuthorizationCreated -> a lease on a connection (a new one, or one that stands); packets leave
    AuthorizationDenied  -> the packets are answered as prohibited; remembered for two seconds
    PathLost or Failed   -> what is in use is asked for again at once, without that gateway
    revoked or expired   -> nothing more passes; TCP flows are reset, so that nobody waits
    a connection of 23 h -> asked for anew with a fresh KEM key, as soon as it is idle (`renewal`)

What the device says of itself (`survey`, which must not block) is told after each join, and
whenever it is found to be another.

Inbound packets pass only as answers to flows of this device, and only from the gateway that holds
the lease for that resource. While the portal is away leases live on to their end. A core: see
`tunnel.agent`.

(The file has more lines than others: what the portal says, what tunnels report and what packets
want meet in one table of resources and connections, which has one owner.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from uuid import UUID

import attrs

from channel.messages import (
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRenewed,
    AuthorizationRevoked,
    Candidates,
    ClientInit,
    ConfigChanged,
    Held,
    Interface,
    NameSettings,
    Posture,
    Relays,
    ReportedFact,
    RequestAuthorization,
    Resource,
    ResourceRemoved,
    ResourceUpserted,
)
from clients.leases import ClientStatistics, Connection, HeldLease, Lease, peer_status
from clients.renewal import A_DAY, Renewal, RenewalTimes
from clients.requests import Denial, Requests
from clients.resources import ResourceTable
from runtime.clock import earliest
from runtime.randomness import Randomness
from tunnel.agent import (
    SECOND_NS,
    AgentIdentity,
    InterfaceChanged,
    TunnelAgent,
    own_addresses,
)
from tunnel.deadlines import Deadlines
from tunnel.engine import (
    Connected,
    ConnectionParameters,
    Engine,
    Failed,
    Path,
    PathChanged,
    PathLost,
)
from tunnel.flows import Ending, Flow, FlowTable, opens_flow
from tunnel.packet import TCP, TCP_RST, Header, parse, prohibited, reset, runs, tcp_flags
from tunnel.preshared import KemError, KemKey, preshared_key
from tunnel.resources import Network

MAX_FLOWS = 65_536
MAX_EARLY_CONNECTIONS = 32
MAX_EARLY_CANDIDATES = 4
EARLY_CANDIDATES_NS = 15 * SECOND_NS
# A gateway that failed is named to the portal for this long.
GATEWAY_FAILED_NS = 60 * SECOND_NS
# A resource with traffic within this time is moved at once when its path is lost.
IN_USE_NS = 60 * SECOND_NS
# So often the device is looked at while it is connected.
SURVEY_INTERVAL_NS = 600 * SECOND_NS
# The least time between two reports of flows. The portal takes 5 of a client in a second.
FLOW_INTERVAL_NS = SECOND_NS // 2

Survey = Callable[[], tuple[ReportedFact, ...]]


@attrs.frozen(kw_only=True)
class RoutesChanged:
    """These networks, and no others, are to be routed into the TUN device."""

    networks: frozenset[Network]


class ClientAgent(TunnelAgent):
    """See the head of this file."""

    def __init__(
        self,
        identity: AgentIdentity,
        engine: Engine,
        *,
        randomness: Randomness,
        now: int,
        renewal_times: RenewalTimes = A_DAY,
        survey: Survey | None = None,
    ) -> None:
        super().__init__(
            identity,
            engine,
            randomness=randomness,
            now=now,
            flow_interval_ns=FLOW_INTERVAL_NS,
        )
        self.names: NameSettings | None = None
        """Kept for whoever resolves names on this device; nothing here does yet."""
        self._addresses: frozenset[bytes] = frozenset()
        self._resources = ResourceTable()
        self._routes: frozenset[Network] = frozenset()
        self._connections: dict[UUID, Connection] = {}
        self._lease_by_id: dict[UUID, Lease] = {}
        self._lease_by_resource: dict[UUID, Lease] = {}
        self._expiries: Deadlines[UUID] = Deadlines()
        self._flows = FlowTable(MAX_FLOWS, keep_packets=True, on_part=self._part_of)
        self._requests = Requests(now)
        self._failed_until: dict[UUID, int] = {}
        self._early: dict[UUID, tuple[int, list[Candidates]]] = {}
        self._renewal_times = renewal_times
        self._survey = survey
        self._survey_at = now
        self._reported: tuple[ReportedFact, ...] = ()
        self.counts = ClientStatistics()

    # --- packets of this device ------------------------------------------------------------------

    def receive_packets(self, packets: Iterable[bytes], now: int) -> None:
        """Packets that the kernel routed to the TUN device."""
        for header, run in runs(packets):
            if header is None:
                self.counts.malformed += 1
            elif header.source not in self._addresses:
                self.counts.foreign_source += len(run)
            elif not self._outbound_run(header, run, now):
                for packet in run:
                    own = header if packet is run[-1] else parse(packet)
                    if own is not None:
                        self._outbound(packet, own, now)
        self._ask(now)

    def _outbound_run(self, header: Header, run: Sequence[bytes], now: int) -> bool:
        """Whether a run of several packets was sent, by a lease that stands."""
        flow = self._flows.outbound(run[-1], header, now) if len(run) > 1 else None
        if flow is None or not isinstance(flow.tag, UUID):
            return False
        lease = self._lease_by_resource.get(flow.tag)
        if lease is None or lease.connection.lost:
            return False
        self._transmit(lease, flow, run, now)
        return True

    def _outbound(self, packet: bytes, header: Header, now: int) -> None:
        flow = self._flows.outbound(packet, header, now)
        if flow is not None and isinstance(flow.tag, UUID):
            self._send_or_ask(flow.tag, flow, packet, now)
            return
        if header.is_icmp_error or not header.first_fragment:
            self.counts.unrouted += 1
            return
        resource_id = self._resources.permitting(header)
        if resource_id is None:
            self._prohibit(packet)
            return
        if opens_flow(packet, header):
            flow = self._flows.open(packet, header, resource_id, now)
            if flow is not None:
                self._send_or_ask(resource_id, flow, packet, now)
        elif header.protocol == TCP and not tcp_flags(packet, header) & TCP_RST:
            self._inject(reset(packet))  # a flow of an earlier time; better told than left to hang

    def _send_or_ask(self, resource_id: UUID, flow: Flow, packet: bytes, now: int) -> None:
        lease = self._lease_by_resource.get(resource_id)
        if lease is not None and not lease.connection.lost:
            self._transmit(lease, flow, (packet,), now)
            return
        if self._requests.denied(resource_id, now):
            self._prohibit(packet)
            return
        self._requests.want(resource_id, packet, now)

    def _transmit(self, lease: Lease, flow: Flow, packets: Sequence[bytes], now: int) -> None:
        packets_bytes = sum(map(len, packets))
        flow.count_sent(len(packets), packets_bytes)
        self.counts.sent += len(packets)
        lease.used_ns = now
        lease.connection.bytes_out += packets_bytes
        self.engine.send_packets(lease.connection.id, packets, now)

    def _transmit_waiting(self, lease: Lease, packets: Iterable[bytes], now: int) -> None:
        """What waited leaves; but not what is of a flow that was dropped meanwhile."""
        for packet in packets:
            header = parse(packet)
            flow = None if header is None else self._flows.find(packet, header, now)
            if flow is not None and flow.tag == lease.resource_id:
                self._transmit(lease, flow, (packet,), now)

    def _prohibit(self, packet: bytes) -> None:
        self.counts.prohibited += 1
        self._inject(prohibited(packet))

    def _inject(self, packet: bytes | None) -> None:
        if packet is not None:
            self._packets.append(packet)

    # --- packets of gateways ---------------------------------------------------------------------

    def _tunnelled(
        self, connection_id: UUID, header: Header | None, run: Sequence[bytes], now: int
    ) -> None:
        connection = self._connections.get(connection_id)
        if connection is None or header is None:
            self.counts.malformed += len(run)
            return
        flow = self._flows.inbound(run[-1], header, now)
        lease = None
        if flow is not None and isinstance(flow.tag, UUID):
            lease = self._lease_by_resource.get(flow.tag)
        if flow is None or lease is None or lease.connection is not connection:
            self.counts.refused_inbound += len(run)
            return
        run_bytes = sum(map(len, run))
        flow.count_received(len(run), run_bytes)
        self.counts.delivered += len(run)
        connection.bytes_in += run_bytes
        lease.used_ns = now
        if lease.delivered_ns is None:
            lease.delivered_ns = now
        self._packets += run

    # --- asking ----------------------------------------------------------------------------------

    def _ask(self, now: int) -> None:
        if not self.joined:
            return
        for resource_id in self._requests.due(now):
            if resource_id not in self._resources:
                self._requests.forget(resource_id)
                continue
            key = self._requests.key_of(resource_id) or KemKey.generate(self._randomness)
            self._requests.asked(resource_id, key, now)
            self._send(
                RequestAuthorization(
                    resource_id=resource_id,
                    kem_public_key=key.public_bytes(),
                    connected_gateway_ids=self._connected_gateways()[:64],
                    failed_gateway_ids=self._failed_gateways(now)[:64],
                )
            )

    def _connected_gateways(self) -> tuple[UUID, ...]:
        return tuple(
            connection.gateway_id
            for connection in self._connections.values()
            if not connection.lost and not connection.renewal.begun
        )

    def _failed_gateways(self, now: int) -> tuple[UUID, ...]:
        for gateway_id in [key for key, until in self._failed_until.items() if until <= now]:
            del self._failed_until[gateway_id]
        return tuple(self._failed_until)

    # --- time ------------------------------------------------------------------------------------

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due."""
        return earliest(
            self._expiries.next(),
            self._requests.poll_timeout(self.joined),
            self._flows_timeout(),
            self._unnamed_relays.next(),
            self._survey_at if self._survey is not None and self.joined else None,
            *[each.renewal.check_at_ns for each in self._connections.values()],
        )

    def handle_timeout(self, now: int) -> None:
        """End leases that ran out, ask again where no answer came."""
        for authorization_id in self._expiries.take_due(now):
            self._end(authorization_id, now)
        for packet in self._requests.take_stale(now):
            self._prohibit(packet)
        for connection in self._connections.values():
            if now >= connection.renewal.check_at_ns:
                self._renew(connection, now)
        if now >= self._survey_at:
            self._report(now)
        self._tell_flows(now)
        self._drop_unnamed_relays(now)
        self._ask(now)

    def _flow_tables(self) -> Iterable[FlowTable]:
        return (self._flows,)

    def _part_of(self, flow: Flow, ending: Ending, now: int) -> None:
        lease = self._lease_by_resource.get(flow.tag) if isinstance(flow.tag, UUID) else None
        self.reports.add(flow, None if lease is None else lease.authorization_id, ending, now)

    def _report(self, now: int, *, anyway: bool = False) -> None:
        """Tell the portal what this device says of itself, if that is another than before."""
        if self._survey is None or not self.joined:
            return
        self._survey_at = now + SURVEY_INTERVAL_NS
        facts = self._survey()
        if (anyway or facts != self._reported) and self._send(Posture(facts=facts)):
            self._reported = facts

    def _renew(self, connection: Connection, now: int) -> None:
        """Ask for a connection in place of one that is old: by what is in use, or was last."""
        leases = [self._lease_by_id[lease_id] for lease_id in connection.lease_ids]
        in_use = [lease for lease in leases if now - lease.used_ns <= IN_USE_NS]

        def is_idle() -> bool:
            tags = {lease.resource_id for lease in leases}
            return not in_use and not any(
                flow.is_tcp and flow.tag in tags and flow.expires_ns > now for flow in self._flows
            )

        if connection.renewal.is_due(now, can_ask=self.joined, is_idle=is_idle):
            last = sorted(leases, key=lambda lease: lease.used_ns)[-1:]
            for lease in in_use or last:
                self._requests.want(lease.resource_id, None, now)

    # --- the portal ------------------------------------------------------------------------------

    def held(self) -> tuple[Held, ...]:
        return tuple(
            Held(authorization_id=lease.authorization_id, connection_id=lease.connection.id)
            for lease in self._lease_by_id.values()
        )

    def channel_lost(self, now: int) -> None:
        super().channel_lost(now)
        self._requests.channel_lost(now)

    def _received(self, message: object, ref: int | None, now: int) -> None:
        match message:
            case ClientInit():
                self._init(message, now)
            case ConfigChanged():
                self._change_interface(message.interface, now)
                self.names = message.names
            case ResourceUpserted():
                self._upsert(message.resource, now)
                self._publish_routes()
            case ResourceRemoved():
                self._remove(message.resource_id, now)
                self._publish_routes()
            case AuthorizationCreated():
                self._created(message, now)
            case AuthorizationDenied():
                self._denied(message, now)
            case AuthorizationRenewed():
                if message.authorization_id in self._lease_by_id:
                    self._expiries.set(message.authorization_id, now + message.expires_in_ns)
            case AuthorizationRevoked():
                self._end(message.authorization_id, now)
            case Relays():
                self._change_relays(message, now)
            case Candidates():
                self._candidates(message, now)
        self._ask(now)

    def _init(self, init: ClientInit, now: int) -> None:
        self._leave_interface(init.interface, now)
        self.names = init.names
        live = {lease.authorization_id: lease for lease in init.authorizations}
        for authorization_id in list(self._lease_by_id):
            if authorization_id in live:
                self._expiries.set(authorization_id, now + live[authorization_id].expires_in_ns)
            else:
                self._end(authorization_id, now)
        named = {resource.id for resource in init.resources}
        for known in self._resources.all():
            if known.id not in named:
                self._remove(known.id, now)
        for resource in init.resources:
            self._upsert(resource, now)
        self._begin(
            account_id=init.account_id,
            own_id=init.client_id,
            interface=init.interface,
            relays=init.relays,
            now=now,
        )
        self._publish_routes()
        self._report(now, anyway=True)

    def _change_interface(self, interface: Interface, now: int) -> None:
        """The account's ranges are others, as after a join with another interface."""
        self._leave_interface(interface, now)
        if interface != self.interface:
            self.interface = interface
            self._events.append(InterfaceChanged(interface=interface))

    def _leave_interface(self, interface: Interface, now: int) -> None:
        """What was granted at another address, or in other ranges, does not fit any more."""
        if self.interface is not None and interface != self.interface:
            for authorization_id in list(self._lease_by_id):
                self._end(authorization_id, now)
        self._addresses = own_addresses(interface.ipv4, interface.ipv6)

    def _created(self, message: AuthorizationCreated, now: int) -> None:
        request = self._requests.answered(message.resource_id)
        told_before = self._lease_by_id.get(message.authorization_id)
        if told_before is not None and told_before.resource_id != message.resource_id:
            self._end(told_before.authorization_id, now)
        connection = self._connections.get(message.connection_id)
        if connection is None:
            key = None if request is None else request.key
            connection = None if key is None else self._connect(message, key, now)
            if connection is None:
                # Nothing was asked (any more), or the answer does not fit: no tunnel can be made.
                if request is not None:
                    self._requests.retry(request, now)
                return
        connection.gateway_name = message.gateway.name
        moved_from = self._lease_by_resource.get(message.resource_id)
        lease = Lease(
            authorization_id=message.authorization_id,
            resource_id=message.resource_id,
            connection=connection,
            asked_ns=now if request is None else request.wanted_ns,
            used_ns=now,
        )
        if moved_from is not None:
            if moved_from.connection is not connection:
                waiting = () if request is None else tuple(request.packets)
                self._drop_flows(message.resource_id, waiting, "lost", now, only_tcp=True)
            self._flows.cut(message.resource_id, now)
            self._detach(moved_from, now, keep=connection)
        self._lease_by_resource[message.resource_id] = lease
        self._lease_by_id[lease.authorization_id] = lease
        connection.lease_ids.add(lease.authorization_id)
        self._expiries.set(lease.authorization_id, now + message.expires_in_ns)
        self._transmit_waiting(lease, () if request is None else request.packets, now)

    def _connect(self, message: AuthorizationCreated, key: KemKey, now: int) -> Connection | None:
        if message.kem_ciphertext is None or self.account_id is None or self.own_id is None:
            return None
        gateway = message.gateway
        try:
            secret = key.decapsulate(message.kem_ciphertext)
        except KemError:
            return None
        self._leave_older(gateway.id, now)
        parameters = ConnectionParameters(
            connection_id=message.connection_id,
            peer_public_key=gateway.public_key,
            preshared_key=preshared_key(
                secret,
                account=self.account_id,
                connection=message.connection_id,
                client=self.own_id,
                gateway=gateway.id,
                client_tunnel_key=self.engine.public_key,
                gateway_tunnel_key=gateway.public_key,
                kem_public_key=key.public_bytes(),
                ciphertext=message.kem_ciphertext,
            ),
            local_ice=message.ice.client,
            remote_ice=message.ice.gateway,
            controlling=True,
        )
        try:
            self.engine.open(parameters, now)
        except ValueError:
            return None
        connection = Connection(
            id=message.connection_id,
            gateway_id=gateway.id,
            gateway_name=gateway.name,
            opened_ns=now,
            renewal=Renewal.of_connection(now, self._renewal_times, self._randomness),
        )
        self._connections[connection.id] = connection
        _, early = self._early.pop(connection.id, (0, []))
        for candidates in early:
            self.engine.add_candidates(candidates, now)
        return connection

    def _leave_older(self, gateway_id: UUID, now: int) -> None:
        """The gateway began a new connection, so the older one to it has ended there."""
        for connection in list(self._connections.values()):
            if connection.gateway_id == gateway_id:
                self._disconnect(connection, now)

    def _denied(self, message: AuthorizationDenied, now: int) -> None:
        denial = Denial(
            reason=message.reason,
            violated=message.violated,
            at_ns=now,
            retry_after_ns=message.retry_after_ns,
        )
        for packet in self._requests.deny(message.resource_id, denial, now):
            self._prohibit(packet)

    def _candidates(self, message: Candidates, now: int) -> None:
        if message.connection_id in self._connections:
            self.engine.add_candidates(message, now)
            return
        # The gateway's candidates may overtake the answer that names the connection.
        for connection_id in [key for key, (until, _) in self._early.items() if until <= now]:
            del self._early[connection_id]
        if len(self._early) >= MAX_EARLY_CONNECTIONS:
            return
        _, early = self._early.setdefault(message.connection_id, (now + EARLY_CANDIDATES_NS, []))
        if len(early) < MAX_EARLY_CANDIDATES:
            early.append(message)

    # --- resources -------------------------------------------------------------------------------

    def _upsert(self, resource: Resource, now: int) -> None:
        allowed = self._resources.upsert(resource)
        if allowed is not None:
            self._flows.remove(
                lambda flow: (
                    flow.tag == resource.id and not allowed.allows(flow.key[0], flow.key[4])
                ),
                "revoked",
                now,
            )

    def _remove(self, resource_id: UUID, now: int) -> None:
        if not self._resources.remove(resource_id):
            return
        self._requests.forget(resource_id)
        lease = self._lease_by_resource.get(resource_id)
        if lease is not None:
            self._end(lease.authorization_id, now)
        self._flows.remove(lambda flow: flow.tag == resource_id, "revoked", now)

    def _publish_routes(self) -> None:
        routes = self._resources.networks()
        if routes != self._routes:
            self._routes = routes
            self._events.append(RoutesChanged(networks=routes))

    # --- ends ------------------------------------------------------------------------------------

    def _end(self, authorization_id: UUID, now: int, ending: Ending = "revoked") -> None:
        """The end of one lease: nothing passes any more, and TCP is told."""
        lease = self._lease_by_id.get(authorization_id)
        if lease is None:
            return
        if self._lease_by_resource.get(lease.resource_id) is lease:
            waiting = self._requests.waiting_packets(lease.resource_id)
            self._drop_flows(lease.resource_id, waiting, ending, now)
            self._flows.cut(lease.resource_id, now)
            del self._lease_by_resource[lease.resource_id]
        self._detach(lease, now)

    def _detach(self, lease: Lease, now: int, *, keep: Connection | None = None) -> None:
        self._lease_by_id.pop(lease.authorization_id, None)
        self._expiries.cancel(lease.authorization_id)
        connection = lease.connection
        connection.lease_ids.discard(lease.authorization_id)
        if not connection.lease_ids and connection is not keep:
            self._disconnect(connection, now)

    def _disconnect(self, connection: Connection, now: int) -> None:
        self._connections.pop(connection.id, None)
        self._close(connection.id, now)
        for authorization_id in list(connection.lease_ids):
            self._end(authorization_id, now, "lost")

    def _drop_flows(
        self,
        resource_id: UUID,
        waiting: Iterable[bytes],
        ending: Ending,
        now: int,
        *,
        only_tcp: bool = False,
    ) -> None:
        """Drop the flows of a resource, but not those whose first packet waits; reset TCP."""
        beginning = set()
        for packet in waiting:
            header = parse(packet)
            if header is not None and opens_flow(packet, header):
                beginning.add((header.protocol, header.source_port, header.destination_port))

        def doomed(flow: Flow) -> bool:
            ports = (flow.key[0], flow.key[2], flow.key[4])
            of_kind = flow.is_tcp or not only_tcp
            return flow.tag == resource_id and of_kind and ports not in beginning

        for flow in self._flows.remove(doomed, ending, now):
            if flow.is_tcp:
                self.counts.reset_flows += 1
                self._inject(reset(_complete(flow.last_packet)))

    # --- the engine ------------------------------------------------------------------------------

    def _path_event(self, event: Connected | PathChanged | PathLost | Failed, now: int) -> None:
        connection = self._connections.get(event.connection_id)
        if connection is None:
            return
        if isinstance(event, PathLost | Failed):
            self._failed_until[connection.gateway_id] = now + GATEWAY_FAILED_NS
            connection.lost = True
            self._want_again(connection, now)
            if isinstance(event, Failed):
                self._disconnect(connection, now)
        else:
            connection.lost = False
            if connection.connected_ns is None:
                connection.connected_ns = now
            self._failed_until.pop(connection.gateway_id, None)
            self._resume(connection, now)
        self._ask(now)

    def _want_again(self, connection: Connection, now: int) -> None:
        for authorization_id in connection.lease_ids:
            lease = self._lease_by_id[authorization_id]
            if now - lease.used_ns <= IN_USE_NS:
                self._requests.want(lease.resource_id, None, now)

    def _resume(self, connection: Connection, now: int) -> None:
        """The path is back before another gateway was found."""
        for authorization_id in connection.lease_ids:
            lease = self._lease_by_id[authorization_id]
            self._transmit_waiting(lease, self._requests.take_packets(lease.resource_id), now)

    # --- status ----------------------------------------------------------------------------------

    def way_to(self, resource_id: UUID) -> tuple[UUID, Path | None] | None:
        """By which gateway a resource is reached, and on what path if there is one now; None while
        it is not authorised."""
        lease = self._lease_by_resource.get(resource_id)
        if lease is None:
            return None
        return lease.connection.gateway_id, self.engine.path(lease.connection.id)

    def is_denied(self, resource_id: UUID) -> bool:
        """Whether the last word of the portal on a resource was a refusal by policy."""
        if resource_id in self._lease_by_resource:
            return False
        return resource_id not in self._resources or self._requests.was_denied(resource_id)

    def status(self, now: int) -> dict[str, object]:
        """What `holloway status` shows: one entry per gateway, and what was denied."""
        interface = self.interface
        return {
            "kind": "client",
            "name": self._identity.name,
            "connected_to_portal": self.joined,
            "id": None if self.own_id is None else str(self.own_id),
            "addresses": [] if interface is None else [str(interface.ipv4), str(interface.ipv6)],
            "peers": [self._peer_status(peer, now) for peer in self._connections.values()],
            "resources": [
                {"id": str(resource.id), "name": resource.name, "address": resource.address}
                for resource in self._resources.all()
            ],
            "denials": [
                {
                    "resource_id": str(resource_id),
                    "resource": self._resources.name_of(resource_id),
                    "reason": denial.reason,
                    "violated": list(denial.violated),
                    "age_ns": now - denial.at_ns,
                }
                for resource_id, denial in self._requests.denials()
            ],
            "waiting": [
                self._resources.name_of(resource_id) for resource_id in self._requests.waiting()
            ],
            "flows": len(self._flows),
            "counts": attrs.asdict(self.counts),
        }

    def metrics(self) -> dict[str, int]:
        """Counts since the start."""
        counts = {f"packets_{name}": value for name, value in attrs.asdict(self.counts).items()}
        return counts | self._flow_metrics()

    def sizes(self) -> dict[str, int]:
        """Present sizes."""
        return {
            "connections": len(self._connections),
            "authorizations": len(self._lease_by_id),
            "flows": len(self._flows),
            "flows_unreported": len(self.reports),
        }

    def _peer_status(self, connection: Connection, now: int) -> dict[str, object]:
        held = [
            HeldLease(
                lease=lease,
                resource_name=self._resources.name_of(lease.resource_id),
                expires_in_ns=max(0, (self._expiries.get(lease.authorization_id) or now) - now),
            )
            for lease in (self._lease_by_id[lease_id] for lease_id in connection.lease_ids)
        ]
        return peer_status(connection, self._path_status(connection.id), held)


def _complete(headers: bytes) -> bytes:
    """Headers that were cut off their packet, with a length that fits what is left."""
    if not headers:
        return headers
    if headers[0] >> 4 == 4:
        return headers[:2] + len(headers).to_bytes(2, "big") + headers[4:]
    return headers[:4] + (len(headers) - 40).to_bytes(2, "big") + headers[6:]
