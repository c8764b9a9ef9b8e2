"""A relay's side of the control channel, as a core.

The relay joins with its addresses and a stamp secret that it made at its start. The portal checks
the addresses by STUN, answers `RelayInit` with the relay's id, and from then on stamps user names
and passwords for agents from that secret, so that relay and portal need not talk about any single
agent. The relay reports its load: every 30 s, and within a second when it changed much. When the
channel is lost the relay goes on serving who has credentials, and joins again.

    agent = RelayAgent(…)                    # a channel.dialer.ChannelAgent
    agent.load_changed(server.allocations, server.load, now)
    agent.handle_timeout(now)                # at agent.poll_timeout()
    for message in agent.drain_messages(): dialer.send(message)
    for event in agent.drain_events(): …     # Joined, DrainRequested, UserRevoked
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

import attrs

from channel.frames import Frame
from channel.messages import (
    Challenge,
    Drain,
    Load,
    RelayInit,
    RelayJoin,
    RevokeUser,
    SocketAddress,
)
from runtime.secret import Secret

NS: Final = 10**9
REPORT_INTERVAL_NS: Final = 30 * NS
REPORT_PAUSE_NS: Final = NS
CHANGE_WORTH_TELLING: Final = 0.05


@attrs.frozen(kw_only=True)
class Joined:
    """The portal took us in. The id is the same again for the same token and name."""

    relay_id: UUID


@attrs.frozen(kw_only=True)
class DrainRequested:
    """No new allocation is wanted; agents are being moved."""


@attrs.frozen(kw_only=True)
class UserRevoked:
    """A user's allocations are to end, and for so long it gets no other."""

    user: str
    for_ns: int


AgentEvent = Joined | DrainRequested | UserRevoked


class RelayAgent:
    """See the head of this file. `incarnation` is the Unix time of the start in nanoseconds: it
    has to be higher than that of any start before; each join of this process adds one."""

    def __init__(
        self,
        *,
        token: Secret,
        addresses: Sequence[SocketAddress],
        stamp_secret: bytes,
        name: str,
        region: str,
        failure_domain: str = "",
        software: str,
        incarnation: int,
        certificate_pins: Sequence[str] = (),
    ) -> None:
        self.relay_id: UUID | None = None
        self._token = token
        self._addresses = tuple(addresses)
        self._stamp_secret = stamp_secret
        self._name = name
        self._region = region
        self._failure_domain = failure_domain
        self._software = software
        self._incarnation = incarnation
        self._certificate_pins = self._told_pins = tuple(certificate_pins)
        self._is_joined = False
        self._allocations = 0
        self._load = 0.0
        self._reported_load = 0.0
        self._reported_at_ns = 0
        self._messages: list[Load] = []
        self._events: list[AgentEvent] = []
        self._ignored = 0

    # --- what the dialer calls -----------------------------------------------------------------

    def join(self, challenge: Challenge, now: int) -> RelayJoin:
        """The first frame on a new connection."""
        self._incarnation += 1
        self._is_joined = False
        self._told_pins = self._certificate_pins
        return RelayJoin(
            software=self._software,
            token=self._token.reveal_text(),
            addresses=self._addresses,
            stamp_secret=self._stamp_secret,
            name=self._name,
            region=self._region,
            failure_domain=self._failure_domain,
            incarnation=self._incarnation,
            load=self._load,
            certificate_pins=self._certificate_pins,
        )

    def receive(self, frame: Frame, now: int) -> None:
        message = frame.message
        if isinstance(message, RelayInit):
            self.relay_id = message.relay_id
            self._is_joined = True
            self._report(now)
            self._events.append(Joined(relay_id=message.relay_id))
        elif isinstance(message, Drain):
            self._events.append(DrainRequested())
        elif isinstance(message, RevokeUser):
            revoked = UserRevoked(user=message.user, for_ns=message.expires_in_ns)
            self._events.append(revoked)
        else:
            self._ignored += 1

    def channel_lost(self, now: int) -> None:
        self._is_joined = False
        self._messages.clear()

    # --- what the owner calls ------------------------------------------------------------------

    def load_changed(self, allocations: int, load: float, now: int) -> None:
        """Tell how many allocations there are, and how full the relay is (0.0 to 1.0)."""
        self._allocations, self._load = allocations, load

    def certificates_changed(self, pins: Sequence[str]) -> None:
        """Tell the pins of the certificates that are shown from now on."""
        self._certificate_pins = tuple(pins)

    @property
    def is_outdated(self) -> bool:
        """Whether the relay has to join anew, since the portal knows other pins of it."""
        return self._is_joined and self._told_pins != self._certificate_pins

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due; None while there is no channel."""
        if not self._is_joined:
            return None
        changed = abs(self._load - self._reported_load) >= CHANGE_WORTH_TELLING
        return self._reported_at_ns + (REPORT_PAUSE_NS if changed else REPORT_INTERVAL_NS)

    def handle_timeout(self, now: int) -> None:
        due = self.poll_timeout()
        if due is not None and due <= now:
            self._report(now)

    def drain_messages(self) -> list[Load]:
        drained, self._messages = self._messages, []
        return drained

    def drain_events(self) -> list[AgentEvent]:
        drained, self._events = self._events, []
        return drained

    def _report(self, now: int) -> None:
        self._reported_load, self._reported_at_ns = self._load, now
        self._messages.append(Load(allocations=self._allocations, load=self._load))
