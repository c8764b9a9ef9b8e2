"""Requests for access, and the connections that carry them: the middle part of the account actor.

An authorisation is written, under the epoch, before a gateway is asked. The account actor never
waits for a gateway: whoever asked does (see `actors.request`), and comes back with the gateway's
acknowledgement, or without it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Literal
from uuid import UUID

import attrs

from actors.attendance import OnlineAgent
from actors.authorizations import MAX_UNWRITTEN, AskAgain, AuthorizationsOfAccount
from actors.choice import Choosable, choose_gateway
from actors.consequences import as_told
from actors.ledger import Connection, Live, new_ice
from actors.messages import (
    Acknowledge,
    CandidatesFrom,
    DecideAccess,
    GiveUp,
    Grant,
    KnownConnection,
    attendance_topic,
)
from actors.model import Authorization
from actors.policy.engine import Allowed, Denied, Request, decide
from actors.services import Services
from actors.store.interface import Unavailable
from channel.messages import (
    AuthorizationCreated,
    AuthorizationDenied,
    Authorize,
    DenialReason,
    Revoke,
)
from runtime.actor import LATER, Caller, CallError, Raise, Timer, handles
from runtime.cluster.keyed import NotEntitled
from runtime.cluster.node import TRACKER
from runtime.presence.crdt import Presence
from runtime.presence.tracker import WhoIsPresent
from runtime.randomness import uuid7

UNAVAILABLE_AFTER_NS = 2 * 10**9
RETURN_NS = 5 * 10**9
"""So long an agent is expected whose node drains, or was lost: it knows other doors, and may be
sent to ours, or come over the link when that is back."""
SUSPECT_NS = 10 * 10**9
"""So long a gateway that left a request without an answer is asked last."""
SETTLING_NS = 5 * 10**9
"""So long after a connection was made its client may not have known of it when it asked."""
SETTLE_NS = 3 * 10**9
"""So long a new owner waits for the agents that are present."""
SETTLE_LEAST_NS = 500 * 10**6
"""So long it waits for any agent, if there are other nodes: presence may not have come through."""
SWEEP_NS = 20 * 10**6
"""So long after an arrival the requests that wait are looked at, all together."""
HELD_CHECK_NS = 500 * 10**6
"""So often they are looked at anyway, since nobody may come."""
MAX_HELD_ASKS = 10_000
"""Requests that wait for agents."""
CLIENT_VERSION = "client_version"
GATEWAY_VERSION = "gateway_version"
"""What a denial names if the version of the protocol that the client, or every gateway of the
resource that is online, has agreed on carries no resource of its kind."""


@attrs.frozen
class _Sweep:
    """Look at the requests that wait for agents."""


class RequestsOfAccount(AuthorizationsOfAccount):
    """The middle part of the account actor: what it is asked about access."""

    def __init__(self, services: Services, account_id: UUID) -> None:
        super().__init__(services, account_id)
        self._expected_until_ns: dict[str, int] = {}
        self._settles_least_by_ns = 0
        self._held_asks: list[tuple[Caller, DecideAccess | Acknowledge]] = []
        self._sweep: Timer | None = None
        self._held_check: Timer | None = None

    # --- requests ----------------------------------------------------------------------------

    @handles(DecideAccess)
    async def _on_decide(self, ask: DecideAccess) -> object:
        caller = self.context.caller
        assert caller is not None
        return await self._decide(ask, caller)

    @handles(AskAgain)
    async def _on_ask_again(self, message: AskAgain) -> None:
        if not message.caller.waiting:
            return
        if isinstance(message.ask, Acknowledge):
            answer = await self._acknowledge(message.ask, message.caller)
        else:
            assert isinstance(message.ask, DecideAccess)
            answer = await self._decide(message.ask, message.caller)
        if answer is not LATER:
            self.reply(message.caller, answer)

    async def _decide(self, ask: DecideAccess, caller: Caller) -> object:
        """A `Grant`, an `AuthorizationDenied`, or LATER: the caller waits for a connection, or for
        agents that are still to come."""
        if not await self.confirm():
            return Raise(NotEntitled())
        online = self._clients.current(ask.client_id, ask.number)
        if online is None:
            if self._expects("client", ask.client_id) and self._hold(ask, caller):
                return LATER
            return self._denial(ask, "unavailable")
        instant = self.context.utc_now()
        resource_id = ask.request.resource_id
        decision = decide(
            self._snapshot,
            Request(
                client_id=online.id,
                resource_id=resource_id,
                remote_ip=online.remote,
                token_id=online.token_id,
            ),
            instant,
        )
        if isinstance(decision, Denied):
            self._counts["denied"] += 1
            return self._denial(ask, decision.reason, decision.violated)
        limit = self._services.limits.authorizations_per_client
        if len(self._ledger.of_client(online.id)) >= limit:
            return self._denial(ask, "limits_exceeded")
        kind = self._snapshot.resources[resource_id].kind
        if kind not in self._services.spoken.carried(online.version):
            return self._denial(ask, "forbidden", (CLIENT_VERSION,))
        gateway = self._choose(ask, online)
        if gateway is None:
            if self._expects_gateway_for(ask):
                return LATER if self._hold(ask, caller) else self._denial(ask, "unavailable")
            if self._has_older_gateway_for(ask):
                return self._denial(ask, "forbidden", (GATEWAY_VERSION,))
            return self._denial(ask, "offline")
        connection = self._connection(online, gateway, ask)
        if connection is not None and connection.pending and connection.opened_for == resource_id:
            # A client asks for a resource once at a time: whoever made this never heard our answer
            # (its node, or the link to it, was lost), asks once more, and must not wait for itself.
            self._drop(connection)
            connection = None
        if connection is not None and connection.pending:
            connection.waiting.append((caller, ask))
            return LATER
        is_new = connection is None
        if connection is None:
            connection = self._new_connection(online, gateway, resource_id)
        try:
            if is_new:
                await self._end_older(connection)
            live = await self._grant(online, gateway, connection, resource_id, decision)
        except Unavailable:
            self._forget_if_pending(connection)
            return self._denial(ask, "unavailable")
        return self._order(live, online, gateway, connection, ask if is_new else None)

    # --- agents that are still to come -----------------------------------------------------------

    async def _expect_agents(self) -> None:
        """We have just taken over. The agents that are connected, to whatever node, come to us now;
        until they have, or SETTLE_NS has passed, nobody is told that they are not there."""
        settled_by_ns = self.context.now() + SETTLE_NS
        if len(self.tenure.rows) > 1:
            self._settles_least_by_ns = self.context.now() + SETTLE_LEAST_NS
        tracker = self.context.registry.whereis(TRACKER)
        if tracker is not None:
            with suppress(CallError):
                topic = attendance_topic(self._account_id)
                present: tuple[Presence, ...] = await self.call(tracker, WhoIsPresent(topic))
                self._expected_until_ns = {each.entry.key: settled_by_ns for each in present}

    def _expect_back(self, online: OnlineAgent) -> None:
        """It has left, and knows where else to go."""
        until_ns = self.context.now() + RETURN_NS
        self._expected_until_ns[f"{online.kind}:{online.id}"] = until_ns

    def _has_arrived(self, online: OnlineAgent) -> None:
        self._expected_until_ns.pop(f"{online.kind}:{online.id}", None)
        if self._held_asks and (self._sweep is None or not self._sweep.pending):
            self._sweep = self.send_after(SWEEP_NS, _Sweep())  # many come at once

    def _expects(self, kind: Literal["client", "gateway"], id: UUID) -> bool:
        now_ns = self.context.now()
        until_ns = self._expected_until_ns.get(f"{kind}:{id}", 0)
        return now_ns < max(until_ns, self._settles_least_by_ns)

    def _expects_gateway_for(self, ask: DecideAccess) -> bool:
        resource = self._snapshot.resources[ask.request.resource_id]
        return any(
            self._expects("gateway", id)
            for id in self._snapshot.gateways_of(resource)
            if id not in ask.tried and self._gateways.get(id) is None
        )

    def _hold(self, ask: DecideAccess | Acknowledge, caller: Caller) -> bool:
        """Keep it until agents have come. False if there are too many to keep."""
        if len(self._held_asks) >= MAX_HELD_ASKS:
            return False
        self._held_asks.append((caller, ask))
        if self._held_check is None or not self._held_check.pending:
            self._held_check = self.send_after(HELD_CHECK_NS, _Sweep())
        return True

    @handles(_Sweep)
    def _on_sweep(self, message: _Sweep) -> None:
        """Decide once more what was held."""
        held, self._held_asks = self._held_asks, []
        for caller, ask in held:
            self.send_after(0, AskAgain(caller, ask))

    # --- gateways and connections --------------------------------------------------------------

    def _choose(self, ask: DecideAccess, client: OnlineAgent) -> OnlineAgent | None:
        """The gateway to ask next. Those whose version of the protocol does not carry such a
        resource are passed over."""
        now_ns = self.context.now()
        regions = self._services.regions
        country = regions.country(client.remote)
        gateways = []
        for online in self._gateways_online_for(ask):
            if not self._is_carried_by(online, ask):
                continue
            choosable = Choosable(
                gateway_id=online.id,
                load=max(online.load, self._connections.count(online.id)),
                suspect=now_ns < online.suspect_until_ns,
                near=country is not None and regions.country(online.remote) == country,
            )
            gateways.append(choosable)
        chosen = choose_gateway(
            gateways,
            connected=ask.request.connected_gateway_ids,
            failed=ask.request.failed_gateway_ids,
            randomness=self._services.randomness,
        )
        return None if chosen is None else self._gateways.get(chosen)

    def _gateways_online_for(self, ask: DecideAccess) -> Iterator[OnlineAgent]:
        """Approved ones of the resource's sites that were not tried yet."""
        resource = self._snapshot.resources[ask.request.resource_id]
        for id in self._snapshot.gateways_of(resource):
            online = self._gateways.get(id)
            if online is None or id in ask.tried or not self._snapshot.gateways[id].approved:
                continue
            yield online

    def _is_carried_by(self, gateway: OnlineAgent, ask: DecideAccess) -> bool:
        kind = self._snapshot.resources[ask.request.resource_id].kind
        return kind in self._services.spoken.carried(gateway.version)

    def _has_older_gateway_for(self, ask: DecideAccess) -> bool:
        """Whether no gateway is left but those of a version that does not carry the resource."""
        older = [not self._is_carried_by(each, ask) for each in self._gateways_online_for(ask)]
        return not ask.tried and bool(older) and all(older)

    def _connection(
        self, client: OnlineAgent, gateway: OnlineAgent, ask: DecideAccess
    ) -> Connection | None:
        """The connection that carries further resources, unless one of its ends is another now,
        the client lost it, or the gateway does not know it."""
        connection = self._connections.between(client.id, gateway.id)
        if connection is None:
            return None
        request = ask.request
        is_recent = self.context.now() < connection.made_ns + SETTLING_NS
        is_lost = gateway.id not in request.connected_gateway_ids and (
            gateway.id in request.failed_gateway_ids or not is_recent
        )
        if connection.stands(client.tunnel_key, gateway.tunnel_key) and (
            connection.pending or not (is_lost or ask.fresh)
        ):
            return connection
        self._drop(connection)
        return None

    async def _end_older(self, connection: Connection) -> None:
        """A gateway has one connection with a client, and gives up the older one as soon as it is
        asked for another, whatever becomes of that; so what the older one carried ends before."""
        for live in self._ledger.of_client(connection.client_id):
            row = live.authorization
            if row.gateway_id == connection.gateway_id and row.connection_id != connection.id:
                await self._end(live, "replaced")

    def _new_connection(
        self, client: OnlineAgent, gateway: OnlineAgent, resource_id: UUID
    ) -> Connection:
        connection = Connection(
            id=uuid7(self._services.clock, self._services.randomness),
            client_id=client.id,
            gateway_id=gateway.id,
            client_key=client.tunnel_key,
            gateway_key=gateway.tunnel_key,
            ice=new_ice(self._services.randomness),
            pending=True,
            opened_for=resource_id,
        )
        self._connections.put(connection)
        return connection

    async def _grant(
        self,
        client: OnlineAgent,
        gateway: OnlineAgent,
        connection: Connection,
        resource_id: UUID,
        decision: Allowed,
    ) -> Live:
        instant = self.context.utc_now()
        row = Authorization(
            id=uuid7(self._services.clock, self._services.randomness),
            account_id=self._account_id,
            policy_id=decision.policy_id,
            client_id=client.id,
            gateway_id=gateway.id,
            resource_id=resource_id,
            token_id=client.token_id,
            connection_id=connection.id,
            remote_ip=client.remote,
            created_at=instant,
            expires_at=max(instant, decision.expires_at),
        )
        if len(self._unwritten) >= MAX_UNWRITTEN:
            raise Unavailable("too much waits for the store")
        try:
            await self._write(row)
        except Unavailable:  # the store may have the row all the same, and nobody will ever hold it
            ended_at = self.context.utc_now()
            self._unwritten[row.id] = attrs.evolve(row, ended_at=ended_at, end_reason="abandoned")
            self._wake_again()
            raise
        self._counts["granted"] += 1
        live = self._ledger.add(
            row, now_ns=self.context.now(), instant=self.context.utc_now(), stage="written"
        )
        self._arm()
        return live

    def _order(
        self,
        live: Live,
        client: OnlineAgent,
        gateway: OnlineAgent,
        connection: Connection,
        opening: DecideAccess | None,
    ) -> Grant:
        row = live.authorization
        authorize = Authorize(
            authorization_id=row.id,
            connection_id=connection.id,
            client=self._peer(client),
            resource=as_told(self._snapshot.resources[row.resource_id]),
            ice=connection.ice,
            kem_public_key=None if opening is None else opening.request.kem_public_key,
            expires_in_ns=live.remaining_ns(self.context.now()),
        )
        known = KnownConnection(
            id=connection.id,
            gateway_id=gateway.id,
            gateway_key=gateway.tunnel_key,
            ice=connection.ice,
        )
        return Grant(
            epoch=self.epoch,
            authorization_id=row.id,
            gateway_id=gateway.id,
            gateway=gateway.ref,
            authorize=authorize,
            known=known,
        )

    @handles(Acknowledge)
    async def _on_acknowledge(self, message: Acknowledge) -> object:
        caller = self.context.caller
        assert caller is not None
        return await self._acknowledge(message, caller)

    async def _acknowledge(self, message: Acknowledge, caller: Caller) -> object:
        """Whether the client is told, or LATER: the caller waits for agents that are still to come.
        To be asked again is harmless: the client is told again."""
        grant = message.grant
        live = self._ledger.get(grant.authorization_id)
        client = self._clients.get(message.client_id)
        gateway = self._gateways.get(grant.gateway_id)
        is_early = (client is None and self._expects("client", message.client_id)) or (
            gateway is None and self._expects("gateway", grant.gateway_id)
        )
        if live is not None and is_early and self._hold(message, caller):
            return LATER
        if live is None or client is None or gateway is None:
            if live is not None:
                await self._end(live, "abandoned")
            self._command(
                grant.gateway, Revoke(authorization_id=grant.authorization_id, reason="ended")
            )
            return False
        row = live.authorization
        self._ledger.acknowledge(live, self.context.now())
        self._forget_other(grant.known, client)
        self._restore(grant.known, client)
        self._arm()
        created = AuthorizationCreated(
            authorization_id=row.id,
            connection_id=row.connection_id,
            resource_id=row.resource_id,
            gateway=self._peer(gateway),
            ice=grant.known.ice,
            kem_ciphertext=message.ack.kem_ciphertext if grant.is_new_connection else None,
            expires_in_ns=live.remaining_ns(self.context.now()),
        )
        self._command(client.ref, created)
        self._settle(row.client_id, row.gateway_id, client)
        for other in self._ledger.of_client(row.client_id):
            if other is not live and other.authorization.resource_id == row.resource_id:
                await self._end(other, "replaced")
        return True

    @handles(GiveUp)
    async def _on_give_up(self, message: GiveUp) -> None:
        grant = message.grant
        gateway = self._gateways.get(grant.gateway_id)
        if gateway is not None and message.silent:
            gateway.suspect_until_ns = self.context.now() + SUSPECT_NS
        self._counts["given_up"] += 1
        live = self._ledger.get(grant.authorization_id)
        if live is not None:
            await self._end(live, message.reason)
        self._arm()

    def _settle(self, client_id: UUID, gateway_id: UUID, client: OnlineAgent) -> None:
        """A pending connection was made: let go what waited for it."""
        connection = self._connections.between(client_id, gateway_id)
        if connection is None:
            return
        if connection.pending:
            connection.pending = False
            connection.made_ns = self.context.now()
        early, connection.early = connection.early, []
        for candidates in early:
            self._command(client.ref, candidates)
        self._ask_again(connection)

    def _forget_if_pending(self, connection: Connection) -> None:
        if connection.pending:
            self._drop(connection)

    def _keep_or_forget(
        self,
        connection: Connection,
        held_ids: Collection[UUID],
        *,
        client_key: bytes | None = None,
        gateway_key: bytes | None = None,
    ) -> None:
        """An agent joined (again): its connection is kept if it still holds it (`held_ids` are of
        connections) with its key."""
        same_client = client_key is None or connection.client_key in (None, client_key)
        same_gateway = gateway_key is None or connection.gateway_key in (None, gateway_key)
        if not (same_client and same_gateway and connection.id in held_ids):
            self._drop(connection)

    def _forget_other(self, known: KnownConnection, client: OnlineAgent) -> None:
        """The ends have just made this connection, and keep no other."""
        connection = self._connections.between(client.id, known.gateway_id)
        if connection is not None and connection.id != known.id and not connection.pending:
            self._drop(connection)

    def _restore(self, known: KnownConnection, client: OnlineAgent) -> None:
        """Take up a connection that a session knows whole, if this actor was started since."""
        connection = self._connections.between(client.id, known.gateway_id)
        if connection is not None and connection.id == known.id:
            connection.ice = known.ice
            connection.client_key, connection.gateway_key = client.tunnel_key, known.gateway_key
        elif connection is None:
            self._connections.put(
                Connection(
                    id=known.id,
                    client_id=client.id,
                    gateway_id=known.gateway_id,
                    client_key=client.tunnel_key,
                    gateway_key=known.gateway_key,
                    ice=known.ice,
                    pending=False,
                    made_ns=self.context.now(),
                )
            )

    def _restore_half(
        self, live: Live, *, client_key: bytes | None = None, gateway_key: bytes | None = None
    ) -> None:
        """One end holds the connection of a live authorisation; when the other says so too, it
        carries further resources. Its ICE credentials were lost with the portal that made them;
        the ends have theirs and do not look at those of a connection that they hold."""
        row = live.authorization
        connection = self._connections.between(row.client_id, row.gateway_id)
        if connection is None:
            connection = Connection(
                id=row.connection_id,
                client_id=row.client_id,
                gateway_id=row.gateway_id,
                client_key=None,
                gateway_key=None,
                ice=new_ice(self._services.randomness),
                pending=False,
                made_ns=self.context.now(),
            )
            self._connections.put(connection)
        if connection.id != row.connection_id:
            return
        connection.client_key = client_key or connection.client_key
        connection.gateway_key = gateway_key or connection.gateway_key

    @handles(CandidatesFrom)
    def _on_candidates(self, message: CandidatesFrom) -> None:
        """To the other end, if a live authorisation of the sender is carried by the connection."""
        senders = self._clients if message.sender == "client" else self._gateways
        candidates = message.candidates
        lives = self._ledger.of_connection(candidates.connection_id)
        row = lives[0].authorization if lives else None
        own = row and (row.client_id if message.sender == "client" else row.gateway_id)
        if (
            row is None
            or own != message.sender_id
            or senders.current(message.sender_id, message.number) is None
        ):
            self._counts["candidates_refused"] += 1
            return
        self._counts["candidates_relayed"] += 1
        if message.sender == "client":
            self._tell(self._gateways, row.gateway_id, candidates)
            return
        connection = self._connections.between(row.client_id, row.gateway_id)
        is_carrier = connection is not None and connection.id == candidates.connection_id
        if connection is not None and is_carrier and connection.hold_early(candidates):
            return
        self._tell(self._clients, row.client_id, candidates)

    def _denial(
        self,
        ask: DecideAccess,
        reason: DenialReason,
        violated: tuple[str, ...] = (),
    ) -> AuthorizationDenied:
        return AuthorizationDenied(
            resource_id=ask.request.resource_id,
            reason=reason,
            violated=violated,
            retry_after_ns=UNAVAILABLE_AFTER_NS if reason == "unavailable" else 0,
        )
