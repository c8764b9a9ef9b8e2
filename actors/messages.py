"""What the actors of the control plane say to each other.

What an agent said arrives at the actor that owns its channel as `Received`, `Moved` and `Closed`
(see `actors.attachment`). What is to be told to an agent is cast to that actor as the message of
`channel.messages` itself; `End` makes it the last. Everything else stands here, by who is asked.

(The file has more lines than others: it is the one list of what actors say, as `channel.messages`
is of what agents say, and holds nothing but declarations.)
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, Literal
from uuid import UUID

import attrs

from actors.logs import Log, Seen
from actors.model import Client, Fact, Gateway, Relay, Token
from actors.policy.explain import Explanation
from channel.frames import Frame
from channel.messages import (
    Ack,
    AuthorizationDenied,
    Authorize,
    Candidates,
    Disconnect,
    Held,
    IceParameters,
    Interface,
    IpText,
    LiveAuthorization,
    NameSettings,
    RelayServer,
    ReportedFlow,
    RequestAuthorization,
    Resource,
)
from runtime.actor import ActorRef
from runtime.cluster.envelopes import Enclosed
from runtime.secret import Secret

# --- from a channel to the actor that owns it ---------------------------------------------------


@attrs.frozen
class Received:
    """A frame of the agent."""

    frame: Frame


@attrs.frozen
class Moved:
    """The validated path of the channel is now from this address."""

    remote: IpText


@attrs.frozen
class Heard:
    """The agent gave a sign of life after a probe."""


@attrs.frozen
class Closed:
    """The channel is gone; nothing can be sent any more."""

    reason: str


@attrs.frozen
class End:
    """Say this to the agent as the last thing, and end, `after_ns` from now."""

    disconnect: Disconnect
    after_ns: int = 0


# --- the account actor is asked by admission -----------------------------------------------------


@attrs.frozen(kw_only=True)
class EnrolDevice:
    """A device proved that it holds this key and this token. Find it, or make its row.

    Answered by the `Client` or `Gateway`, or by the `Disconnect` that refuses it.
    """

    token: Token
    device_key: bytes
    name: str
    remote: IpText


# --- the account actor is asked by the owners of channels, and commands them ---------------------


@attrs.frozen
class FromOwner:
    """What the owner of an account says to the owner of a channel, under its epoch. An epoch lower
    than one that was heard before is of a former owner, and what it says does not count."""

    epoch: int
    enclosed: Enclosed


class Stale(Exception):
    """A former owner of the account has spoken."""


@attrs.frozen(kw_only=True)
class AttachClient:
    """A client's connection stands (or stood when the account actor was started anew).

    `number` is None for a new connection, which then gets the highest. `held` is what the agent
    has; what is live and not in it ends, unless it is the answer to a request that is under way:
    `asking` are the resources of those. `connections` are those that the session knows whole.
    Answered by `ClientTruth` or `Disconnect`.
    """

    client_id: UUID
    token_id: UUID
    tunnel_key: bytes
    incarnation: int
    remote: IpText
    held: tuple[Held, ...]
    number: int | None = None
    connections: tuple[KnownConnection, ...] = ()
    asking: frozenset[UUID] = frozenset()
    owner: ActorRef | None = None
    """The owner of the channel, if it is not the caller."""
    version: int = 1
    """Of the protocol, as agreed at the join."""


@attrs.frozen(kw_only=True)
class AttachGateway:
    """The same for a gateway. Answered by `GatewayTruth`, `Disconnect` or `Occupied`.

    `replaces` is the owner of an older connection of this gateway, which failed a probe.
    """

    gateway_id: UUID
    token_id: UUID
    tunnel_key: bytes
    incarnation: int
    remote: IpText
    held: tuple[Held, ...]
    number: int | None = None
    replaces: ActorRef | None = None
    owner: ActorRef | None = None
    version: int = 1


@attrs.frozen
class Occupied:
    """An older connection of this gateway stands, by this owner. Only if it fails a probe may the
    newer one take its place."""

    owner: ActorRef


@attrs.frozen
class Probe:
    """To the owner of a gateway's channel: answered by None as soon as the gateway is heard."""


@attrs.frozen(kw_only=True)
class KnownConnection:
    """A connection as a session knows it, to be kept over a crash of the account actor."""

    id: UUID
    gateway_id: UUID
    gateway_key: bytes
    ice: IceParameters


@attrs.frozen(kw_only=True)
class ClientTruth:
    epoch: int
    number: int
    interface: Interface
    resources: dict[UUID, Resource]
    authorizations: tuple[LiveAuthorization, ...]
    auth_provider_id: UUID | None = None
    """Of the session's sign-in."""
    names: NameSettings | None = None
    """None: the account's owner is of a version that does not say it."""


@attrs.frozen(kw_only=True)
class GatewayTruth:
    """`resources` are those of the live authorisations, as they are now."""

    epoch: int
    number: int
    interface: Interface
    authorizations: tuple[LiveAuthorization, ...]
    resources: tuple[Resource, ...]


@attrs.frozen
class Attached:
    """From an `Attaching` to the owner of the channel: the truth of an agent at `remote`."""

    account: ActorRef
    remote: IpText
    truth: ClientTruth | GatewayTruth


@attrs.frozen
class NotAttached:
    """From an `Attaching` to the owner of the channel: part with the agent so."""

    disconnect: Disconnect


@attrs.frozen(kw_only=True)
class DecideAccess:
    """A client asks for a resource. Answered by `Grant` or `AuthorizationDenied`.

    `tried` are gateways that did not take this very request. With `fresh` the connection that
    exists to the gateway is not used, since the gateway does not know it.
    """

    client_id: UUID
    number: int
    request: RequestAuthorization
    tried: frozenset[UUID] = frozenset()
    fresh: bool = False


@attrs.frozen(kw_only=True)
class Grant:
    """The access is decided and written; this gateway has to be asked to take it."""

    epoch: int
    authorization_id: UUID
    gateway_id: UUID
    gateway: ActorRef
    authorize: Authorize
    known: KnownConnection

    @property
    def is_new_connection(self) -> bool:
        return self.authorize.kem_public_key is not None


@attrs.frozen(kw_only=True)
class Acknowledge:
    """The gateway took it. Answered by True once the client is told, by False if the access has
    ended meanwhile."""

    client_id: UUID
    grant: Grant
    ack: Ack


@attrs.frozen(kw_only=True)
class GiveUp:
    """The gateway did not take it: end the authorisation."""

    grant: Grant
    reason: str
    silent: bool
    """Whether the gateway said nothing at all."""


@attrs.frozen(kw_only=True)
class AgentMoved:
    """The validated path of its channel is now from this address."""

    kind: Literal["client", "gateway"]
    id: UUID
    number: int
    remote: IpText


@attrs.frozen(kw_only=True)
class PostureReported:
    """What a client's device says of itself now, by name."""

    client_id: UUID
    number: int
    facts: tuple[Fact, ...]


@attrs.frozen(kw_only=True)
class GatewayLoad:
    """Live connections, as the gateway counts them."""

    gateway_id: UUID
    number: int
    connections: int


@attrs.frozen(kw_only=True)
class CandidatesFrom:
    """To be relayed to the other end of the connection, if the sender is one of its ends."""

    sender: Literal["client", "gateway"]
    sender_id: UUID
    number: int
    candidates: Candidates


@attrs.frozen(kw_only=True)
class FlowsFrom:
    """What an agent counted."""

    sender: Literal["client", "gateway"]
    sender_id: UUID
    number: int
    flows: tuple[ReportedFlow, ...]


@attrs.frozen
class ViewChanged:
    """To a session: what its client is to see besides, or as another, and what no more."""

    upserted: tuple[Resource, ...]
    removed: tuple[UUID, ...]


# --- the account actor is asked by everybody else ------------------------------------------------


@attrs.frozen
class Wake:
    """The account changed, or may have, before `at_ns` of the node's clock; None: look in any
    case."""

    at_ns: int | None = None


@attrs.frozen
class RegionsChanged:
    """To every account's actor of this node, on REGIONS: another region database is in use."""


@attrs.frozen(kw_only=True)
class Explain:
    """Would this access be allowed, and why? By a client, or by any device of a principal.

    Answered by `ExplainAnswer`. Without `remote_ip` that of the client's session is taken;
    without `at` the present instant.
    """

    client_id: UUID | None = None
    principal_id: UUID | None = None
    resource_id: UUID
    remote_ip: IpText | None = None
    at: datetime | None = None


@attrs.frozen(kw_only=True)
class ExplainAnswer:
    """The trace, and which gateways of the resource's site are online."""

    explanation: Explanation
    online_gateway_ids: tuple[UUID, ...]


@attrs.frozen
class ListPresence:
    """Who is connected to this account. Answered by `Presence`."""


@attrs.frozen(kw_only=True)
class OnlineClient:
    client_id: UUID
    remote: IpText
    number: int
    since: datetime
    tunnel_key: bytes


@attrs.frozen(kw_only=True)
class OnlineGateway:
    gateway_id: UUID
    remote: IpText
    number: int
    since: datetime
    tunnel_key: bytes
    connections: int


@attrs.frozen(kw_only=True)
class Presence:
    clients: tuple[OnlineClient, ...]
    gateways: tuple[OnlineGateway, ...]


@attrs.frozen(kw_only=True)
class PresenceChanged:
    """Broadcast on PRESENCE by the account actor: an agent came (by the connection with this
    number), or that connection went. A hint, for whoever shows it; `ListPresence` has the truth."""

    account_id: UUID
    kind: Literal["client", "gateway"]
    id: UUID
    number: int
    online: bool
    remote: IpText


@attrs.frozen
class AskExposure:
    """How late does a revocation take effect on what is live now? Answered by an `Exposures`; of
    resources to which nobody has access nothing is said. (What the policies allow to an access of
    this instant is `actors.policy.exposure`, which needs no actor.)"""

    resource_ids: tuple[UUID, ...]


@attrs.frozen(kw_only=True)
class AwayGateway:
    """A gateway that is not connected, and cannot be told to end what it carries: authorisations
    of one resource, the last of which ends by itself after `longest_ns`."""

    gateway_id: UUID
    authorizations: int
    longest_ns: int


@attrs.frozen(kw_only=True)
class ResourceExposure:
    """Of the authorisations of a resource that are live now, `connected` end at once with a
    revocation, those of `away` (by id of the gateway) at the end of their leases."""

    resource_id: UUID
    connected: int
    away: tuple[AwayGateway, ...]


@attrs.frozen
class Exposures:
    resources: tuple[ResourceExposure, ...]


@attrs.frozen
class ListLive:
    """Ids of the authorisations that are live now. Answered by a frozenset."""


@attrs.frozen
class AccountStatisticsRequest:
    """Answered by `AccountStatistics`."""


@attrs.frozen(kw_only=True)
class AccountStatistics:
    """Counts now, and since this incarnation of the account actor started."""

    epoch: int
    change_number: int
    clients: int
    gateways: int
    live_authorizations: int
    connections: int
    granted: int
    denied: int
    renewed: int
    ended: int
    given_up: int
    candidates_relayed: int
    candidates_refused: int


# --- the clerk -----------------------------------------------------------------------------------


@attrs.frozen
class LogRows:
    """Rows to be written some time soon."""

    rows: tuple[Log, ...]


@attrs.frozen(kw_only=True)
class DeviceSeen:
    """A device is, or was just now, connected by this token."""

    account_id: UUID
    token_id: UUID
    seen: Seen


@attrs.frozen
class ClerkStatisticsRequest:
    """Answered by `ClerkStatistics`."""


@attrs.frozen(kw_only=True)
class ClerkStatistics:
    """What waits to be written; rows since the start."""

    rows_waiting: int
    devices_waiting: int
    rows_written: int
    rows_lost: int


# --- couriers ------------------------------------------------------------------------------------


@attrs.frozen
class CarryOrder:
    """Call the actor of a gateway with this order (an `Authorize`), for somebody on a node that
    does not reach it."""

    gateway: ActorRef
    order: FromOwner
    deadline_ns: int


# --- the relay directory -------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class RelayOnline:
    """A relay joined; its actor is the caller. Answered by RelayRegistered."""

    relay: Relay
    stamp: Secret
    load: float
    certificate_pins: tuple[str, ...] = ()


@attrs.frozen
class RelayRegistered:
    """The relay is known to this directory, for as long as that lives."""

    directory: ActorRef


@attrs.frozen(kw_only=True)
class RelayLoad:
    relay_id: UUID
    load: float


@attrs.frozen
class AssignRelays:
    """Relays for an agent that now uses these, and speaks from the address `remote`. Answered by a
    tuple of `AssignedRelay`."""

    agent_id: UUID
    current: tuple[UUID, ...] = ()
    remote: IpText | None = None


@attrs.frozen
class RevokeRelayUse:
    """To the directories of all nodes, on REVOCATIONS: an agent lost its right to be connected, so
    no relay serves it either. `is_gone`: for good, its id will not come back."""

    agent_id: UUID
    is_gone: bool


@attrs.frozen
class AssignedRelay:
    """A relay, with credentials for one agent. They serve while `relay` is the relay's actor:
    one that was started anew has another secret, and another actor."""

    server: RelayServer
    relay: ActorRef


@attrs.frozen
class RelaysChanged:
    """Published on `RELAYS`: relays came or went; ask for an assignment."""


@attrs.frozen
class CheckToken:
    """To every relay's actor: its token may have been deleted."""


@attrs.frozen
class ListRelays:
    """Relays that are online. Answered by a tuple of `OnlineRelay`."""


@attrs.frozen(kw_only=True)
class OnlineRelay:
    relay: Relay
    load: float


# --- topics and names ----------------------------------------------------------------------------

PRESENCE = "presence"
"""Topic of `PresenceChanged`, on all nodes."""
RELAYS = "relays"
"""Topic of `RelaysChanged`."""
RELAY_OWNERS = "relay channels"
"""Topic to which the actors of relays listen, for `CheckToken`."""
REGIONS = "regions"
"""Topic to which the actors of accounts listen, for `RegionsChanged`."""
OWNERS = "channels"
"""Topic to which every actor that owns a channel listens, for `End`."""
DRAINING: Final = "draining"
"""The reason with which the owner of a channel ends whose agent goes to another door."""
REVOCATIONS = "relay revocations"
"""Topic of all nodes, of `RevokeRelayUse`."""
CLERK = "clerk"
"""Registered name of each node's `Clerk`."""
COURIERS = "couriers"
"""Registered name of each node's `Couriers`."""
DIRECTORY = "relay directory"
"""Registered name of the relay directory."""


ACCOUNT = "account"
"""The kind of the keyed actors of accounts."""


def account_name(account_id: UUID) -> tuple[str, UUID]:
    """The registered name of an account's actor, on the node where it lives."""
    return (ACCOUNT, account_id)


def attendance_topic(account_id: UUID) -> str:
    """The presence topic of the agents of an account: each is there, on whatever node, by the key
    `kind:id`."""
    return f"account {account_id}"


@attrs.frozen
class IsAnswered:
    """From a request to its session: whether the client was answered. Answered by a bool."""

    request: ActorRef


@attrs.frozen
class Denial:
    """From a request to its session: what to tell the client, or None if access was granted."""

    request: ActorRef
    answer: AuthorizationDenied | None


Device = Client | Gateway
