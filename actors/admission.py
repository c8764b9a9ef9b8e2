"""Admission: one actor for each connection, from the challenge to the hand-over or the refusal.

Whoever joins has to show a token that the portal knows and a device key's signature over this very
challenge. What is wrong is answered by one `Disconnect` (with whether and when to dial again) and
one line in the log; neither says anything of the token but its id.
"""

from __future__ import annotations

import hmac
from typing import Protocol
from uuid import UUID

import attrs
import structlog

from actors.attaching import NO_WAY_NS
from actors.attachment import AgentKind, Channel, OwnedChannel
from actors.enrolment import refusal, sent_on, token_refusal, version_refusal
from actors.logs import SessionLog
from actors.messages import CLERK, Closed, End, EnrolDevice, LogRows, Moved, Received
from actors.model import Client, Gateway, Token
from actors.owner import MAX_SOFTWARE
from actors.services import Services
from actors.store.interface import StoreError
from channel.credentials import InvalidToken, decode_token, join_statement, verify_join
from channel.messages import Challenge, Disconnect, IpText, Join, RefusalCode, RelayJoin
from runtime.actor import Actor, ActorError, ActorRef, CallError, Timer, handles
from runtime.cluster.keyed import NoWay
from runtime.randomness import uuid7

ENROL_DEADLINE_NS = 10 * 10**9

_log = structlog.get_logger("holloway.admission")


class Houses(Protocol):
    """Where the actors of joined agents live (see `actors.tree`)."""

    def house_client(
        self, channel: Channel, device: Client, token_id: UUID, join: Join, remote: IpText
    ) -> ActorRef: ...

    def house_gateway(
        self, channel: Channel, device: Gateway, token_id: UUID, join: Join, remote: IpText
    ) -> ActorRef: ...

    def house_relay(self, channel: Channel, token_id: UUID, join: RelayJoin) -> ActorRef: ...


@attrs.frozen
class _TooLate:
    """Nobody joined in time."""


class _Refused(Exception):
    """Carries the `Disconnect` out of the steps of a join."""

    def __init__(self, disconnect: Disconnect) -> None:
        super().__init__(disconnect.reason)
        self.disconnect = disconnect


class Admission(Actor):
    """See the module. `attachment` is handed over together with the channel."""

    def __init__(
        self,
        services: Services,
        houses: Houses,
        channel: Channel,
        attachment: OwnedChannel,
        challenge: Challenge,
    ) -> None:
        self._services = services
        self._houses = houses
        self._channel = channel
        self._attachment = attachment
        self._challenge = challenge
        self._remote = channel.remote
        self._is_over = False
        self._timer: Timer | None = None
        self._proven: tuple[Join, Token] | None = None

    def started(self) -> None:
        self._timer = self.send_after(self._services.limits.join_deadline_ns, _TooLate())

    def terminated(self, reason: str) -> None:
        if not self._is_over:
            code: RefusalCode = "shutting_down" if reason == "shutdown" else "unavailable"
            self._channel.close(refusal(code, randomness=self._services.randomness))

    @handles(Received)
    async def _on_received(self, message: Received) -> None:
        if self._is_over:
            return
        join = message.frame.message
        token_id: UUID | None = None
        try:
            if not isinstance(join, Join | RelayJoin):
                raise self._refused("protocol_error", "a join comes first")
            refused = version_refusal(join.versions, self._services.spoken)
            if refused is not None:
                raise _Refused(refused)
            token = await self._known_token(join)
            token_id = token.id
            if isinstance(join, RelayJoin):
                self._hand_over("relay", self._houses.house_relay(self._channel, token.id, join))
                return
            self._check_signature(join, token)
            device = await self._enrol(join, token)
            self._admit(device, token, join)
        except _Refused as error:
            self._refuse(error.disconnect, token_id)
        except (ActorError, StoreError) as error:
            self._refuse(self._refused("unavailable").disconnect, token_id, type(error).__name__)

    @handles(Moved)
    def _on_moved(self, message: Moved) -> None:
        self._remote = message.remote

    @handles(Closed)
    def _on_closed(self, message: Closed) -> None:
        self._is_over = True
        self.stop()

    @handles(End)
    def _on_end(self, message: End) -> None:
        self._refuse(message.disconnect, None)

    @handles(_TooLate)
    def _on_too_late(self, message: _TooLate) -> None:
        if not self._is_over:
            self._refuse(refusal("protocol_error", "no join in time"), None)

    # --- the steps of a join -------------------------------------------------------------------

    async def _known_token(self, join: Join | RelayJoin) -> Token:
        """The token's row, if the text proves knowledge of its secret."""
        wanted = "relay" if isinstance(join, RelayJoin) else join.kind
        try:
            shown = decode_token(join.token)
        except InvalidToken:
            raise self._refused("invalid_token") from None
        token: Token | None = await self.perform(self._services.store.find_token, shown.id)
        known_hash = bytes(32) if token is None else token.hash
        is_proven = hmac.compare_digest(shown.hash, known_hash)
        if token is None or not is_proven or token.kind != shown.kind or token.kind != wanted:
            raise self._refused("invalid_token")
        if isinstance(join, Join):
            self._proven = (join, token)
        refused = token_refusal(token, self._remote, self.context.utc_now())
        if refused is not None:
            raise _Refused(refused)
        return token

    def _check_signature(self, join: Join, token: Token) -> None:
        challenge = self._challenge
        statement = join_statement(challenge.nonce, challenge.portal, token.id, join.tunnel_key)
        if not verify_join(join.device_key, join.signature, statement):
            raise self._refused("invalid_signature")

    async def _enrol(self, join: Join, token: Token) -> Client | Gateway:
        if token.account_id is None:
            raise self._refused("invalid_token")
        ask = EnrolDevice(
            token=token, device_key=join.device_key, name=join.name, remote=self._remote
        )
        try:
            answer = await self._services.accounts.call(
                self, token.account_id, ask, ENROL_DEADLINE_NS, no_way_ns=NO_WAY_NS
            )
        except NoWay as error:
            door = self._services.door_of(error.node, self.context.now())
            if door is None:
                raise self._refused("unavailable") from None
            raise _Refused(sent_on(door, self._services.randomness)) from None
        except CallError:
            raise self._refused("unavailable") from None
        if isinstance(answer, Disconnect):
            raise _Refused(answer)
        if isinstance(answer, Gateway) and not answer.approved:
            raise self._refused("awaiting_approval")
        assert isinstance(answer, Client | Gateway)
        return answer

    def _admit(self, device: Client | Gateway, token: Token, join: Join) -> None:
        if isinstance(device, Client):
            house = self._houses.house_client
            self._hand_over("client", house(self._channel, device, token.id, join, self._remote))
            return
        gate = self._houses.house_gateway
        self._hand_over("gateway", gate(self._channel, device, token.id, join, self._remote))

    def _hand_over(self, kind: AgentKind, owner: ActorRef) -> None:
        self._is_over = True
        _log.info("agent_joined", kind=kind, remote=str(self._remote))
        self._attachment.own(owner)
        self._channel.joined(kind)
        self.stop()

    # --- refusing ------------------------------------------------------------------------------

    def _refused(self, reason: RefusalCode, detail: str = "") -> _Refused:
        return _Refused(refusal(reason, detail, randomness=self._services.randomness))

    def _refuse(self, disconnect: Disconnect, token_id: UUID | None, cause: str = "") -> None:
        self._is_over = True
        _log.warning(
            "join_refused",
            code=disconnect.reason,
            detail=disconnect.detail,
            remote=str(self._remote),
            token=None if token_id is None else str(token_id),
            cause=cause or None,
        )
        self._log_refusal(disconnect)
        self._channel.close(disconnect)
        self.stop()

    def _log_refusal(self, disconnect: Disconnect) -> None:
        """For the account to read; only of who has shown its token."""
        clerk = self.context.registry.whereis(CLERK)
        if self._proven is None or clerk is None:
            return
        join, token = self._proven
        if token.account_id is None:
            return
        row = SessionLog(
            id=uuid7(self._services.clock, self._services.randomness),
            account_id=token.account_id,
            at=self.context.utc_now(),
            agent=join.kind,
            event="refused",
            principal_id=token.principal_id,
            token_id=token.id,
            auth_provider_id=token.auth_provider_id,
            remote_ip=self._remote,
            version=join.software[:MAX_SOFTWARE],
            reason=disconnect.reason,
        )
        self.cast(clerk, LogRows((row,)))
