"""What sessions, gateway actors and relay actors share: each owns one channel of one agent."""

from __future__ import annotations

from collections import Counter
from uuid import UUID

import structlog

from actors.attachment import Channel
from actors.enrolment import refusal
from actors.messages import DRAINING, OWNERS, Closed, End, FromOwner, Stale
from actors.services import Services
from channel.messages import MAX_DOORS, Disconnect, DoorAddress, Portals, RefusalCode
from runtime.actor import Actor, ActorRef, Caller, Raise, handles
from runtime.cluster.tenure import ROSTER, RosterChanged

LINGER_NS = 1 * 10**9
"""So long an agent that is sent to another door may wait for what is under way."""
LINGER_CHECK_NS = 10 * 10**6

_log = structlog.get_logger("holloway.channel")


class ChannelOwner(Actor):
    """Ends with its channel, and its channel with it, whichever comes first."""

    def __init__(self, services: Services, channel: Channel, kind: str) -> None:
        self._services = services
        self._channel = channel
        self._kind = kind
        self._epoch: int | None = None
        self._asker: Caller | None = None
        self._relay_by_id: dict[UUID, ActorRef] = {}
        self._told_doors: tuple[DoorAddress, ...] | None = None  # None: before the init
        self._goodbye: Disconnect | None = refusal("unavailable", "the portal lost its place")
        self._lingers_until_ns: int | None = None
        self._counts: Counter[str] = Counter()

    def started(self) -> None:
        self.subscribe(OWNERS)
        self.subscribe(ROSTER)

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
        if message.after_ns:
            self.send_after(message.after_ns, End(message.disconnect))
        elif message.disconnect.reason == DRAINING and self._lingers():
            self.send_after(LINGER_CHECK_NS, message)
        else:
            self.part(message.disconnect)

    def _lingers(self) -> bool:
        """Whether to carry through what is under way, before the agent is sent to another door."""
        now_ns = self.context.now()
        if self._lingers_until_ns is None:
            self._lingers_until_ns = now_ns + LINGER_NS
        return self.is_amid() and now_ns < self._lingers_until_ns

    def is_amid(self) -> bool:
        """Whether somebody waits for an answer that travels over this channel."""
        return False

    def part(self, disconnect: Disconnect) -> None:
        """Say this as the last thing. Who watches us learns by the reason of our end whether the
        agent will be back at once."""
        self._goodbye = disconnect
        self.stop(DRAINING if disconnect.reason == DRAINING else "normal")

    def refuse(self, reason: RefusalCode, detail: str = "") -> None:
        self.part(refusal(reason, detail, randomness=self._services.randomness))

    @handles(FromOwner)
    def _on_from_owner(self, message: FromOwner) -> object:
        return self.obey(message, self.context.caller)

    def obey(self, message: FromOwner, asker: Caller | None) -> object:
        """What the account's owner says is handled as if it had come by itself, unless a later
        owner was heard before. `asker` waits for the answer."""
        self._asker = asker
        if self._epoch is not None and message.epoch < self._epoch:
            self._counts["stale"] += 1
            return Raise(Stale())
        said = message.enclosed.message
        handler = self._plain_handlers.get(type(said))
        return None if handler is None else handler(self, said)

    def say(self, message: object, *, ref: int | None = None) -> None:
        """Send to the agent, under the epoch of the account's owner."""
        self._channel.send(message, ref=ref, epoch=self._epoch)

    # --- the portal's doors ----------------------------------------------------------------------

    def begin_doors(self) -> None:
        """The init was said: from now on the agent is told the portal's doors."""
        if self._told_doors is None:
            self._told_doors = ()
            self._tell_doors()

    @handles(RosterChanged)
    def _on_roster_changed(self, message: RosterChanged) -> None:
        if self._told_doors is not None:
            self._tell_doors()

    def _tell_doors(self) -> None:
        """They are of the node, not of the account: no epoch. A node that knows of none, or lost
        sight of the others, leaves the agent what it has."""
        doors = self._services.doors()[:MAX_DOORS]
        if doors and doors != self._told_doors:
            self._told_doors = doors
            self._channel.send(Portals(addresses=doors))
