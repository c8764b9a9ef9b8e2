"""Clients and gateways that have everything of an agent but tunnels: a real channel, by the real
`Dialer`, and a book of what they hold. Hundreds of them fit into one process.

A gateway acknowledges whatever it is asked to authorise. A client asks for a resource and gets the
portal's answer; as the real one does, it asks at the next door for what was not answered at the
last. Both say at each join what they hold, as agents do, and note what was cut.
"""

from __future__ import annotations

from typing import Final, Literal
from uuid import UUID

import attrs
import trio

from channel.credentials import decode_token, device_key_of, join_statement, sign_join
from channel.dialer import Dialer
from channel.frames import Frame
from channel.messages import (
    TO_CLIENT,
    TO_GATEWAY,
    Ack,
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRevoked,
    Authorize,
    Challenge,
    ClientInit,
    GatewayInit,
    Held,
    Join,
    RelayJoin,
    RequestAuthorization,
    Revoke,
)
from clients.requests import ANSWER_WITHIN_NS
from runtime.clock import SystemClock
from runtime.randomness import SystemRandomness

ANSWER_S: Final = ANSWER_WITHIN_NS / 10**9
"""How long a client waits for the answer, at whatever door."""
KEM_PUBLIC_KEY: Final = bytes(1184)
KEM_CIPHERTEXT: Final = bytes(1088)

Answer = AuthorizationCreated | AuthorizationDenied | None
"""None: nobody answered in time."""


class _LightAgent:
    """What both kinds have in common."""

    kind: Literal["client", "gateway"]
    events: dict[str, type]

    def __init__(self, token: str, name: str, *, source: str | None = None) -> None:
        decoded = decode_token(token)
        randomness = SystemRandomness()
        self.name = name
        self.held: dict[UUID, UUID] = {}
        """The connection of each authorisation that lives, as far as this agent was told."""
        self.cut: dict[UUID, str] = {}
        """Authorisations that the portal ended, and why."""
        self.joins = 0
        self.losses = 0
        """Channels that were lost."""
        self._token = token
        self._token_id = decoded.id
        self._seed = randomness.bytes(32)
        self._tunnel_key = randomness.bytes(32)
        self._outbox: list[tuple[object, int | None]] = []
        self._portal, self._pin = decoded.portal, decoded.pin
        self._source = source
        self.dialer = self._new_dialer()

    def forget_doors(self) -> None:
        """As after a start of the agent's process; its dialer must not run."""
        self.dialer = self._new_dialer()

    def _new_dialer(self) -> Dialer:
        return Dialer(
            portal=self._portal,
            pin=self._pin,
            events=self.events,
            agent=self,
            clock=SystemClock(),
            randomness=SystemRandomness(),
            source=self._source,
            on_frame=self._flush,
        )

    @property
    def door(self) -> str | None:
        """The door of the node where this agent is; None while it is nowhere."""
        return self.dialer.statistics().door if self.dialer.connected else None

    def join(self, challenge: Challenge, now: int) -> Join | RelayJoin:
        statement = join_statement(
            challenge.nonce, challenge.portal, self._token_id, self._tunnel_key
        )
        return Join(
            kind=self.kind,
            token=self._token,
            device_key=device_key_of(self._seed),
            signature=sign_join(self._seed, statement),
            tunnel_key=self._tunnel_key,
            name=self.name,
            incarnation=now,
            held=tuple(
                Held(authorization_id=id, connection_id=connection_id)
                for id, connection_id in self.held.items()
            ),
        )

    def receive(self, frame: Frame, now: int) -> None:
        message = frame.message
        match message:
            case ClientInit() | GatewayInit():
                self.joins += 1
                lives = {each.authorization_id for each in message.authorizations}
                for id in self.held.keys() - lives:
                    self._end(id, "absent from the init")
                self.came_in()
            case Authorize():
                self.held[message.authorization_id] = message.connection_id
                ciphertext = None if message.kem_public_key is None else KEM_CIPHERTEXT
                ack = Ack(authorization_id=message.authorization_id, kem_ciphertext=ciphertext)
                self._outbox.append((ack, frame.ref))
            case AuthorizationCreated():
                self.held[message.authorization_id] = message.connection_id
                self.answered(message.resource_id, message)
            case AuthorizationDenied():
                self.answered(message.resource_id, message)
            case Revoke() | AuthorizationRevoked():
                self._end(message.authorization_id, message.reason)
            case _:
                pass

    def answered(self, resource_id: UUID, answer: Answer) -> None:
        """The portal has answered a request."""

    def came_in(self) -> None:
        """A door has taken this agent in."""

    def channel_lost(self, now: int) -> None:
        self.losses += 1
        self._outbox.clear()

    def _end(self, id: UUID, reason: str) -> None:
        if self.held.pop(id, None) is not None:
            self.cut[id] = reason

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        for message, ref in outbox:
            self.dialer.send(message, ref=ref)


class LightGateway(_LightAgent):
    kind = "gateway"
    events = TO_GATEWAY


@attrs.define
class _Waiting:
    """`event`: there is an answer, or another door at which to ask."""

    event: trio.Event = attrs.field(factory=trio.Event)
    answer: Answer = None


class LightClient(_LightAgent):
    kind = "client"
    events = TO_CLIENT

    def __init__(self, token: str, name: str, *, source: str | None = None) -> None:
        super().__init__(token, name, source=source)
        self.granted: dict[UUID, None] = {}
        """Ids of all authorisations that were ever granted."""
        self.gateway_id: UUID | None = None
        self._waiting: dict[UUID, _Waiting] = {}
        self._asking = trio.Lock()

    async def ask(self, resource_id: UUID) -> Answer:
        """Ask for access anew, whatever is held, at each door until there is an answer."""
        async with self._asking:
            waiting = self._waiting[resource_id] = _Waiting()
            connected = () if self.gateway_id is None else (self.gateway_id,)
            request = RequestAuthorization(
                resource_id=resource_id,
                kem_public_key=KEM_PUBLIC_KEY,
                connected_gateway_ids=connected,
            )
            try:
                with trio.move_on_after(ANSWER_S):
                    while waiting.answer is None:
                        waiting.event = trio.Event()
                        self.dialer.send(request)
                        await waiting.event.wait()
                return waiting.answer
            finally:
                del self._waiting[resource_id]

    def answered(self, resource_id: UUID, answer: Answer) -> None:
        if isinstance(answer, AuthorizationCreated):
            self.granted[answer.authorization_id] = None
            self.gateway_id = answer.gateway.id
        waiting = self._waiting.get(resource_id)
        if waiting is not None:
            waiting.answer = answer
            waiting.event.set()

    def came_in(self) -> None:
        for waiting in self._waiting.values():
            waiting.event.set()
