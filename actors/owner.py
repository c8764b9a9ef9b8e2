"""What sessions, gateway actors and relay actors share: each owns one channel of one agent."""

from __future__ import annotations

from collections import Counter
from uuid import UUID

import attrs
import structlog

from actors.attachment import Channel
from actors.enrolment import refusal
from actors.messages import (
    DIRECTORY,
    OWNERS,
    RELAYS,
    AssignRelays,
    AttachClient,
    AttachGateway,
    Closed,
    End,
    RelaysChanged,
)
from actors.services import Services
from channel.messages import Disconnect, RefusalCode, Relays, RelayServer
from runtime.actor import Actor, ActorError, ActorRef, CallError, handles

ATTACH_DEADLINE_NS = 10 * 10**9
MAX_ATTACH_ATTEMPTS = 6
REATTACH_NS = 50 * 10**6
"""The first pause before an account actor that ended is looked for again; it doubles."""

_log = structlog.get_logger("holloway.channel")


@attrs.frozen
class RenewRelays:
    """The TURN credentials of the agent have to be made anew."""


class ChannelOwner(Actor):
    """Ends with its channel, and its channel with it, whichever comes first."""

    def __init__(self, services: Services, channel: Channel, kind: str) -> None:
        self._services = services
        self._channel = channel
        self._kind = kind
        self._epoch: int | None = None
        self._relay_ids: tuple[UUID, ...] = ()
        self._goodbye: Disconnect | None = refusal("unavailable", "the portal lost its place")
        self._counts: Counter[str] = Counter()

    def started(self) -> None:
        self.subscribe(OWNERS)

    def terminated(self, reason: str) -> None:
        goodbye = refusal("shutting_down") if reason == "shutdown" else self._goodbye
        self._channel.close(goodbye)
        _log.info("agent_left", kind=self._kind, reason=reason, code=goodbye and goodbye.reason)

    @handles(Closed)
    def _on_closed(self, message: Closed) -> None:
        self._goodbye = None
        self.stop()

    @handles(End)
    def _on_end(self, message: End) -> None:
        self.part(message.disconnect)

    def part(self, disconnect: Disconnect) -> None:
        """Say this as the last thing."""
        self._goodbye = disconnect
        self.stop()

    def refuse(self, reason: RefusalCode, detail: str = "") -> None:
        self.part(refusal(reason, detail, randomness=self._services.randomness))

    def say(self, message: object, *, ref: int | None = None) -> None:
        """Send to the agent, under the epoch of the account's owner."""
        self._channel.send(message, ref=ref, epoch=self._epoch)


class AgentOwner(ChannelOwner):
    """The owner of a client's or gateway's channel: it follows its account's actor, whichever
    incarnation of it lives, and keeps the agent in relays."""

    def __init__(self, services: Services, channel: Channel, kind: str, account_id: UUID) -> None:
        super().__init__(services, channel, kind)
        self._account_id = account_id
        self._account: ActorRef | None = None
        self._number: int | None = None

    async def attach(self, ask: AttachClient | AttachGateway) -> object:
        """The account actor's truth for this agent, or None if the channel has to be closed."""
        pause_ns = REATTACH_NS
        for _ in range(MAX_ATTACH_ATTEMPTS):
            try:
                account = self._services.account(self._account_id)
                answer = await self.call(account, ask, ATTACH_DEADLINE_NS)
            except ActorError:
                await self.sleep(pause_ns + self._services.randomness.integer(pause_ns))
                pause_ns *= 2
                continue
            if isinstance(answer, Disconnect):
                self.part(answer)
                return None
            self._account = account
            self.monitor(account)
            return answer
        self.refuse("unavailable")
        return None

    def to_account(self, message: object) -> None:
        if self._account is not None:
            self.cast(self._account, message)

    # --- relays ------------------------------------------------------------------------------

    async def assigned_relays(self) -> tuple[RelayServer, ...]:
        """Relays for this agent, with credentials of its own; those in use stay if they can."""
        directory = self.context.registry.whereis(DIRECTORY)
        if directory is None:
            return ()
        try:
            servers: tuple[RelayServer, ...] = await self.call(
                directory, AssignRelays(self._relay_ids)
            )
        except CallError:
            return ()
        return servers

    async def first_relays(self) -> tuple[RelayServer, ...]:
        self.subscribe(RELAYS)
        servers = await self.assigned_relays()
        self._relay_ids = tuple(each.id for each in servers)
        self.send_after(self._services.limits.relay_renewal_ns, RenewRelays())
        return servers

    @handles(RelaysChanged)
    async def _on_relays_changed(self, message: RelaysChanged) -> None:
        await self._tell_relays(only_new=True)

    @handles(RenewRelays)
    async def _on_renew_relays(self, message: RenewRelays) -> None:
        self.send_after(self._services.limits.relay_renewal_ns, message)
        await self._tell_relays(only_new=False)

    async def _tell_relays(self, *, only_new: bool) -> None:
        servers = await self.assigned_relays()
        now_ids = tuple(each.id for each in servers)
        added = tuple(each for each in servers if not only_new or each.id not in self._relay_ids)
        removed = tuple(id for id in self._relay_ids if id not in now_ids)
        self._relay_ids = now_ids
        if added or removed:
            self.say(Relays(added=added, removed=removed))
