"""What a client holds: leases of resources, on connections to gateways."""

from __future__ import annotations

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
