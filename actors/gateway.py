"""The gateway actor: one connected gateway. It owns the gateway's channel and decides nothing.

It sends `Authorize` for whoever calls and answers the call when the acknowledgement comes, passes
on what the account actor says, and lets through what the gateway says of its own authorisations.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from uuid import UUID

from actors.attachment import Channel
from actors.messages import (
    AttachGateway,
    GatewayLoad,
    GatewayTruth,
    Received,
)
from actors.model import Gateway
from actors.owner import AgentOwner
from actors.services import Services
from channel.messages import (
    Ack,
    AuthorizationRenewed,
    Authorize,
    Candidates,
    FlowReport,
    GatewayInit,
    Heartbeat,
    Held,
    Interface,
    IpText,
    Join,
    MoreHeld,
    ResourceUpdated,
    Revoke,
    Stats,
)
from runtime.actor import LATER, Caller, handles

MAX_PENDING = 10_000
"""Acknowledgements that are waited for; the oldest is forgotten above it."""
MAX_REVOKED_EARLY = 10_000
"""Revocations that are remembered in case their `Authorize` is still on its way to here."""


class GatewayActor(AgentOwner):
    """See the module. `remote` is the validated path at the join."""

    candidates_factor = 10

    def __init__(
        self,
        services: Services,
        channel: Channel,
        *,
        device: Gateway,
        token_id: UUID,
        join: Join,
        remote: IpText,
    ) -> None:
        super().__init__(
            services, channel, device=device, token_id=token_id, join=join, remote=remote
        )
        self._connection_by_authorization: dict[UUID, UUID] = {}
        self._carried: Counter[UUID] = Counter()  # authorisations per connection
        self._pending: OrderedDict[int, tuple[UUID, Caller]] = OrderedDict()
        self._revoked_early: OrderedDict[UUID, None] = OrderedDict()
        self._next_ref = 1
        self._interface: Interface | None = None

    # --- the account's actor -------------------------------------------------------------------

    def _question(self, held: tuple[Held, ...]) -> AttachGateway:
        return AttachGateway(
            gateway_id=self._device.id,
            token_id=self._token_id,
            tunnel_key=self._tunnel_key,
            incarnation=self._incarnation,
            remote=self._remote,
            held=held,
            number=self._number,
            version=self._version,
        )

    async def _introduce(self, truth: GatewayTruth) -> None:
        self._interface = truth.interface
        for each in truth.authorizations:
            self._note(each.authorization_id, each.connection_id)
        self.say(
            GatewayInit(
                account_id=self._account_id,
                gateway_id=self._device.id,
                interface=truth.interface,
                relays=await self.first_relays(),
                authorizations=truth.authorizations,
            )
        )
        self._say_resources(truth)

    def _correct(self, truth: GatewayTruth) -> None:
        """Tell the gateway in which points the truth differs from what it was told."""
        if truth.interface != self._interface:
            self.refuse("unavailable", "the account has other ranges")
            return
        lives = {each.authorization_id for each in truth.authorizations}
        for id in [id for id in self._connection_by_authorization if id not in lives]:
            self._on_revoke(Revoke(authorization_id=id, reason="ended"))
        self._say_renewed(truth.authorizations)
        self._say_resources(truth)

    def _say_resources(self, truth: GatewayTruth) -> None:
        for resource in truth.resources:
            self.say(ResourceUpdated(resource=resource))

    def is_amid(self) -> bool:
        return any(caller.waiting for _, caller in self._pending.values())

    def _held_now(self) -> tuple[Held, ...]:
        return tuple(
            Held(authorization_id=id, connection_id=connection_id)
            for id, connection_id in self._connection_by_authorization.items()
        )

    # --- what the gateway says -----------------------------------------------------------------

    @handles(Received)
    def _on_received(self, message: Received) -> None:
        said = message.frame.message
        match said:
            case Ack():
                self._acknowledge(message.frame.ref, said)
            case Candidates():
                if said.connection_id in self._carried:
                    self.pass_on(said)
                else:
                    self._counts["candidates_dropped"] += 1
            case Stats():
                if self._number is not None:
                    self.to_account(
                        GatewayLoad(
                            gateway_id=self._device.id,
                            number=self._number,
                            connections=said.connections,
                        )
                    )
            case MoreHeld():
                self.take_held(said)
            case FlowReport():
                self.pass_on_flows(said)
            case Heartbeat():
                pass  # answered by the channel itself
            case _:
                self.refuse("protocol_error", "not in place after the join")

    def _acknowledge(self, ref: int | None, ack: Ack) -> None:
        waiting = None if ref is None else self._pending.get(ref)
        if ref is None or waiting is None or waiting[0] != ack.authorization_id:
            self._counts["unknown_acks"] += 1
            return
        del self._pending[ref]
        if ack.refusal:
            self._forget(ack.authorization_id)
        self.reply(waiting[1], ack)

    # --- what the gateway is told --------------------------------------------------------------

    @handles(Authorize)
    def _on_authorize(self, message: Authorize) -> object:
        caller = self._asker
        id = message.authorization_id
        if caller is None:
            return None
        if id in self._revoked_early:
            del self._revoked_early[id]
            return Ack(authorization_id=id, refusal="limits_exceeded")
        ref, self._next_ref = self._next_ref, self._next_ref + 1
        self._pending[ref] = (id, caller)
        if len(self._pending) > MAX_PENDING:
            self._pending.popitem(last=False)
        self._note(id, message.connection_id)
        self.say(message, ref=ref)
        return LATER

    @handles(Revoke)
    def _on_revoke(self, message: Revoke) -> None:
        if self._forget(message.authorization_id):
            self.say(message)
            return
        self._revoked_early[message.authorization_id] = None
        if len(self._revoked_early) > MAX_REVOKED_EARLY:
            self._revoked_early.popitem(last=False)

    @handles(AuthorizationRenewed)
    def _on_renewed(self, message: AuthorizationRenewed) -> None:
        if message.authorization_id in self._connection_by_authorization:
            self.say(message)

    @handles(ResourceUpdated)
    def _on_resource_updated(self, message: ResourceUpdated) -> None:
        self.say(message)

    @handles(Candidates)
    def _on_candidates(self, message: Candidates) -> None:
        if message.connection_id in self._carried:
            self.say(message)

    # --- helpers -------------------------------------------------------------------------------

    def _note(self, authorization_id: UUID, connection_id: UUID) -> None:
        self._connection_by_authorization[authorization_id] = connection_id
        self._carried[connection_id] += 1

    def _forget(self, authorization_id: UUID) -> bool:
        connection_id = self._connection_by_authorization.pop(authorization_id, None)
        if connection_id is None:
            return False
        self._carried[connection_id] -= 1
        if not self._carried[connection_id]:
            del self._carried[connection_id]
        return True
