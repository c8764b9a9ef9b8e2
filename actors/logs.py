"""What happened in an account, beside what changed: who connected, what flowed, what was asked.

Log rows are written once and never changed. They are kept for as long as the account's `Retention`
says, in partitions by `at`; nothing refers to them, and what they name may be gone. `id` is a
UUIDv7 of the portal and `at` the portal's instant of writing, never an agent's.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final, Literal
from uuid import UUID

import attrs
from msgspec import Meta

from channel.messages import IpText

_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$(?!\n)"
ShortText = Annotated[str, Meta(max_length=255, pattern=_PRINTABLE)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@attrs.frozen(kw_only=True)
class SessionLog:
    """An agent connected, was refused, or went. A device that was never known has no id; `reason`
    is empty for a connection."""

    id: UUID
    account_id: UUID
    at: datetime
    agent: Literal["client", "gateway"]
    event: Literal["connected", "refused", "disconnected"]
    device_id: UUID | None = None
    principal_id: UUID | None = None
    token_id: UUID
    auth_provider_id: UUID | None = None
    remote_ip: IpText
    version: Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)] = ""
    reason: ShortText = ""


@attrs.frozen(kw_only=True)
class FlowLog:
    """A part of a flow through a tunnel as one side counted it. Each side reports for itself, and
    each packet once.

    `sent` is from the client's side to the resource. `name` is what the client asked for, if the
    resource has names; ICMP has the ports 0. `started_at` and `ended_at` are the reporter's.
    `ending` says why the flow ended: `closed`, `idle`, `revoked`, `lost`, `stopped`; it is empty
    for a flow that went on. `flows` is how many flows ended with this row: 0 for one that went on;
    more than 1 for the sum of several, whose destination and ports are not told (0).
    """

    id: UUID
    account_id: UUID
    at: datetime
    reporter: Literal["client", "gateway"]
    authorization_id: UUID
    client_id: UUID
    gateway_id: UUID
    resource_id: UUID
    principal_id: UUID | None = None
    protocol: Literal["tcp", "udp", "icmp"]
    source: IpText
    source_port: Port = 0
    destination: IpText
    destination_port: Port = 0
    name: Annotated[str, Meta(max_length=253, pattern=_PRINTABLE)] = ""
    started_at: datetime
    ended_at: datetime
    packets_sent: Count = 0
    packets_received: Count = 0
    bytes_sent: Count = 0
    bytes_received: Count = 0
    ending: Annotated[str, Meta(pattern=r"^[a-z_]{0,32}$(?!\n)")] = ""
    flows: Count = 1


@attrs.frozen(kw_only=True)
class RequestLog:
    """One call of the JSON API within the account. `path` has no query, `code` is the problem's;
    no header and no body is kept."""

    id: UUID
    account_id: UUID
    at: datetime
    token_id: UUID | None = None
    principal_id: UUID | None = None
    method: Annotated[str, Meta(pattern=r"^[A-Z]{1,16}$(?!\n)")]
    path: Annotated[str, Meta(min_length=1, max_length=512, pattern=_PRINTABLE)]
    status: Annotated[int, Meta(ge=100, le=599)]
    code: Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)] = ""
    remote_ip: IpText | None = None
    user_agent: ShortText = ""
    duration_us: Count = 0


Log = SessionLog | FlowLog | RequestLog
LogKind = Literal["session", "flow", "request"]
LOG_KINDS: Final[dict[LogKind, type[Log]]] = {
    "session": SessionLog,
    "flow": FlowLog,
    "request": RequestLog,
}
KIND_OF_LOG: Final[dict[type[Log], LogKind]] = {each: kind for kind, each in LOG_KINDS.items()}

LOG_FILTERS: Final[dict[LogKind, tuple[str, ...]]] = {
    "session": ("device_id", "principal_id", "token_id"),
    "flow": ("client_id", "gateway_id", "resource_id", "principal_id"),
    "request": ("token_id", "principal_id"),
}
"""The fields by which logs can be asked for. Each has an index."""

LOG_RETENTION: Final[dict[LogKind, str]] = {
    "session": "sessions_days",
    "flow": "flows_days",
    "request": "requests_days",
}
"""The field of `Retention` that says how long a log is kept."""


@attrs.frozen(kw_only=True)
class Seen:
    """When a device was last connected, by which version, from where. Kept beside the change feed:
    it changes too often to be told of."""

    device_id: UUID
    at: datetime
    version: Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)] = ""
    remote_ip: IpText
