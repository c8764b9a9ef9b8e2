"""Where a channel meets the actors: both sides as protocols, and the one that the portal holds.

The portal's listener knows a `Channel` for each connection of an agent; an actor owns it. What
comes in is handed to an `Attachment`, which casts it to the owner: at first an `Admission`, then
the session, gateway or relay actor that it started.
"""

from __future__ import annotations

from typing import Literal, Protocol

from actors.enrolment import refusal
from actors.messages import Closed, Heard, Moved, Received
from channel.frames import Frame
from channel.messages import Disconnect, IpText
from runtime.actor import ActorRef
from runtime.scheduler import Scheduler

AgentKind = Literal["client", "gateway", "relay"]


class Channel(Protocol):
    """One connection of an agent, as `channel.listener` has it. Nothing here waits or raises."""

    @property
    def remote(self) -> IpText:
        """The validated path."""

    def joined(self, kind: AgentKind) -> None:
        """From now on take the frames of this kind of agent."""

    def send(self, message: object, *, ref: int | None = None, epoch: int | None = None) -> None:
        """Queue a message; the queue is bounded, and the channel closes when it is full."""

    def probe(self) -> None:
        """Have the attachment told (`heard`) as soon as the agent gives a sign of life."""

    def close(self, disconnect: Disconnect | None) -> None:
        """Send this last, and close. Again is harmless."""


class Attachment(Protocol):
    """What the listener tells of a connection. All are synchronous; after `closed` comes none."""

    def received(self, frame: Frame) -> None: ...

    def heard(self) -> None: ...

    def migrated(self, remote: IpText) -> None: ...

    def closed(self, reason: str) -> None: ...


class OwnedChannel:
    """The attachment of a channel that an actor owns."""

    def __init__(self, scheduler: Scheduler, channel: Channel) -> None:
        self._scheduler = scheduler
        self._channel = channel
        self._owner: ActorRef | None = None
        self._closed: str | None = None
        self._moved: IpText | None = None

    def own(self, ref: ActorRef) -> None:
        """This actor owns the channel from now on; it learns what happened meanwhile."""
        self._owner = ref
        if self._moved is not None:
            self._scheduler.cast(ref, Moved(self._moved))
        if self._closed is not None:
            self.closed(self._closed)

    def received(self, frame: Frame) -> None:
        if self._owner is None or self._scheduler.cast(self._owner, Received(frame)):
            return
        alive = self._scheduler.is_alive(self._owner)
        self._channel.close(refusal("limits_exceeded" if alive else "unavailable"))

    def heard(self) -> None:
        if self._owner is not None:
            self._scheduler.cast(self._owner, Heard())

    def migrated(self, remote: IpText) -> None:
        self._moved = remote
        if self._owner is not None:
            self._scheduler.cast(self._owner, Moved(remote))

    def closed(self, reason: str) -> None:
        self._closed = reason
        if self._owner is not None and not self._scheduler.cast(self._owner, Closed(reason)):
            self._scheduler.stop(self._owner, "shutdown")  # too much mail to read that it is over
