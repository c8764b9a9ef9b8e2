"""What a client holds (leases of resources, on connections to gateways), and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import attrs

from clients.renewal import Renewal


@attrs.define(kw_only=True)
class Lease:
    """An authorisation that the client holds, and when it was last of use."""

    authorization_id: UUID
    resource_id: UUID
    connection: Connection
    asked_ns: int
    delivered_ns: int | None = None
    used_ns: int


@attrs.define(kw_only=True, eq=False)
class Connection:
    """A tunnel to one gateway, with all the leases that it carries."""

    id: UUID
    gateway_id: UUID
    gateway_name: str
    opened_ns: int
    renewal: Renewal
    connected_ns: int | None = None
    lost: bool = False
    lease_ids: set[UUID] = attrs.field(factory=set)
    bytes_in: int = 0
    bytes_out: int = 0


@attrs.define(kw_only=True)
class ClientStatistics:
    """Packets since the start. `refused_inbound` answered nothing, or came by the wrong gateway."""

    malformed: int = 0
    foreign_source: int = 0
    unrouted: int = 0
    sent: int = 0
    delivered: int = 0
    prohibited: int = 0
    reset_flows: int = 0
    refused_inbound: int = 0


@attrs.frozen(kw_only=True)
class HeldLease:
    """A lease as `status` shows it."""

    lease: Lease
    resource_name: str
    expires_in_ns: int


def peer_status(
    connection: Connection, path: dict[str, object] | None, held: Sequence[HeldLease]
) -> dict[str, object]:
    """The entry of one gateway in `status`. `path` is the one in use, None without any."""
    connected_ns = connection.connected_ns
    deliveries = [
        each.lease.delivered_ns - each.lease.asked_ns
        for each in held
        if each.lease.delivered_ns is not None
    ]
    return {
        "name": connection.gateway_name,
        "id": str(connection.gateway_id),
        "connection_id": str(connection.id),
        "path": path,
        "lost": connection.lost,
        "bytes_in": connection.bytes_in,
        "bytes_out": connection.bytes_out,
        "connected_after_ns": (
            None if connected_ns is None else connected_ns - connection.opened_ns
        ),
        "first_delivery_ns": min(deliveries, default=None),
        "resources": [
            {
                "id": str(each.lease.resource_id),
                "name": each.resource_name,
                "authorization_id": str(each.lease.authorization_id),
                "expires_in_ns": each.expires_in_ns,
            }
            for each in held
        ],
    }
