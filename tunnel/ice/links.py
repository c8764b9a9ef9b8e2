"""Which connections to relays an agent holds where UDP does not reach them: a core.

A *link* is a connection to a relay over QUIC, TLS or TCP. A relay needs one while it leaves
Binding requests over UDP unanswered. Then its doors are tried in the order of DOORS: the first at
once, each further one RACE_INTERVAL_NS later unless one has opened meanwhile; who opens first is
kept, and the others are called off. When none opens, all are tried again with back-off. Once the
relay answers over UDP again, and something was allocated there, the link is kept for another
LINGER_NS, in which traffic moves over, and closed.

TCP may keep a connection for many minutes on which nothing passes any more. So a link on which
nothing was heard for ASK_INTERVAL_NS, or that is under suspicion, is asked (`drain_asked`: the
owner sends a Binding request by it). When nothing at all is heard within VERDICT_NS from then on,
its doors are tried as if there were none; the first that opens takes its place, unless the silent
one is heard before.

The owner opens what `drain_commands` asks for and tells what became of it by `opened` and
`closed`, and by `heard` when anything comes by a link; links are known by their numbers, of which
none is used twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple
from uuid import UUID

import attrs

from channel.messages import RelayServer
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.net.address import Address

LinkTransport = Literal["quic", "tls", "tcp"]

DOORS: Final[tuple[LinkTransport, ...]] = ("quic", "tls", "tcp")
RACE_INTERVAL_NS: Final = 400 * NS_PER_MS
LINGER_NS: Final = 15 * NS_PER_S
RETRY_FIRST_NS: Final = 5 * NS_PER_S
RETRY_LAST_NS: Final = 120 * NS_PER_S
ASK_INTERVAL_NS: Final = 20 * NS_PER_S
"""As often as relays are asked over UDP; it also keeps bindings of NATs open."""
VERDICT_NS: Final = 700 * NS_PER_MS
"""A little less than a suspected path is trusted (`tunnel.ice.pair`): so it is known, when that
ends, that the fault is on this side."""
MAX_DOORS: Final = 8
"""Of one relay: the first of each transport and family are enough."""


@attrs.frozen(kw_only=True)
class OpenLink:
    """Connect to `address`. Over QUIC and TLS only a server is accepted that has a key of `pins`
    (SHA-256 of the SubjectPublicKeyInfo, in hexadecimal)."""

    link: int
    transport: LinkTransport
    address: Address
    pins: tuple[str, ...]


@attrs.frozen(kw_only=True)
class CloseLink:
    """Close it, or stop opening it; nothing of it is wanted any more."""

    link: int


LinkCommand = OpenLink | CloseLink


class Door(NamedTuple):
    """Where a relay takes connections."""

    transport: LinkTransport
    address: Address


class Standing(NamedTuple):
    """A link that stands, and the door that it goes to."""

    link: int
    door: Door


@attrs.define(kw_only=True, eq=False)
class _Way:
    """One relay's doors and what is tried there. `next_door` is to be tried at `due`. `heard_at` is
    when anything came by the link that is open, or that began; `verdict_at` when it is too late for
    an answer (None: it is not asked, or it is judged already: `is_silent`)."""

    doors: tuple[Door, ...]
    pins: tuple[str, ...]
    is_needed: bool = False
    opening: dict[int, Door] = attrs.field(factory=dict)
    open: Standing | None = None
    heard_at: int = 0
    verdict_at: int | None = None
    is_silent: bool = False
    next_door: int = 0
    due: int | None = None
    close_at: int | None = None
    failures: int = 0

    @property
    def ask_at(self) -> int | None:
        """When the link is asked for a sign of life."""
        if self.open is None or self.verdict_at is not None or self.is_silent:
            return None
        return self.heard_at + ASK_INTERVAL_NS if self.is_needed else None

    @property
    def is_served(self) -> bool:
        """Whether there is a link of which nobody knows that it is dead."""
        return self.open is not None and not self.is_silent


class RelayLinks:
    """See the head of this file. Times are nanoseconds of one monotonic clock."""

    def __init__(self) -> None:
        self._ways: dict[UUID, _Way] = {}
        self._relay_by_link: dict[int, UUID] = {}
        self._next_link = 1
        self._commands: list[LinkCommand] = []
        self._asked: list[int] = []

    def set_relays(self, servers: Iterable[RelayServer]) -> None:
        """All the relays there are. One whose doors are others begins anew."""
        wanted: dict[UUID, _Way] = {}
        for server in servers:
            fresh = _Way(doors=_doors_of(server), pins=server.certificate_pins)
            known = self._ways.get(server.id)
            if known is not None and (known.doors, known.pins) == (fresh.doors, fresh.pins):
                fresh = known
            if fresh.doors:
                wanted[server.id] = fresh
        for relay, way in self._ways.items():
            if wanted.get(relay) is not way:
                self._close_all(way)
        self._ways = wanted

    def need(self, relay: UUID, now: int) -> None:
        """The relay does not answer over UDP."""
        way = self._ways.get(relay)
        if way is None:
            return
        way.close_at = None
        if not way.is_needed:
            way.is_needed = True
            if not way.is_served and not way.opening and way.due is None:
                self._try_all(relay, way, now)

    def spare(self, relay: UUID, now: int) -> None:
        """The relay serves over UDP (again)."""
        way = self._ways.get(relay)
        if way is None or not way.is_needed:
            return
        way.is_needed = False
        way.due, way.failures = None, 0
        self._call_off(way)
        if way.open is not None:
            way.close_at = now + LINGER_NS

    def rest(self) -> None:
        """No relay is needed."""
        for way in self._ways.values():
            self._close_all(way)

    def suspect(self, now: int) -> None:
        """The network may be another: ask by every link, and do not wait for the end of a
        back-off."""
        for relay, way in self._ways.items():
            if way.is_served:
                self._ask(way, now)
            elif way.is_needed and not way.opening:
                way.failures = 0
                self._try_all(relay, way, now)

    def heard(self, link: int, now: int) -> None:
        """Something came by a link."""
        way = self._way_of(link)
        if way is None or way.open is None or way.open.link != link:
            return
        way.heard_at, way.verdict_at = now, None
        if way.is_silent:
            way.is_silent = False
            way.due, way.failures = None, 0
            self._call_off(way)

    def opened(self, link: int, now: int) -> None:
        """A connection stands. One that comes too late was told to be closed, and is not kept."""
        way = self._way_of(link)
        if way is None or link not in way.opening:
            return
        door = way.opening.pop(link)
        self._call_off(way)
        if way.open is not None:
            self._close(way.open.link)
        way.open = Standing(link, door)
        way.heard_at, way.verdict_at, way.is_silent = now, None, False
        way.due, way.failures = None, 0
        if not way.is_needed:
            way.close_at = now + LINGER_NS

    def closed(self, link: int, now: int) -> None:
        """A connection ended, or could not be opened."""
        relay = self._relay_by_link.pop(link, None)
        way = None if relay is None else self._ways.get(relay)
        if relay is None or way is None:
            return
        if way.open is not None and way.open.link == link:
            was_silent = way.is_silent
            way.open = way.close_at = way.verdict_at = None
            way.is_silent = False
            if way.is_needed and not was_silent:
                self._try_all(relay, way, now)
            return
        way.opening.pop(link, None)
        if not way.is_needed or way.opening:
            return
        if way.next_door < len(way.doors):
            way.due = now
            self._try_what_is_due(relay, way, now)
        else:
            way.next_door, way.due = 0, now + self._back_off(way)

    def is_silent(self, relay: UUID) -> bool:
        """Whether the link that stands to a relay left a question unanswered."""
        way = self._ways.get(relay)
        return way is not None and way.is_silent

    def standing(self, relay: UUID) -> Standing | None:
        """The link that stands to a relay."""
        way = self._ways.get(relay)
        return None if way is None else way.open

    def poll_timeout(self) -> int | None:
        ways = self._ways.values()
        times = (at for w in ways for at in (w.due, w.close_at, w.ask_at, w.verdict_at))
        return min((at for at in times if at is not None), default=None)

    def handle_timeout(self, now: int) -> None:
        """Do what is due."""
        for relay, way in self._ways.items():
            if way.close_at is not None and way.close_at <= now:
                self._close_all(way)
            if way.ask_at is not None and way.ask_at <= now:
                self._ask(way, now)
            if way.verdict_at is not None and way.verdict_at <= now:
                self._judge(relay, way, now)
            self._try_what_is_due(relay, way, now)

    def drain_asked(self) -> list[int]:
        """Links by which the owner is to send something that a relay answers."""
        drained, self._asked = self._asked, []
        return drained

    def drain_commands(self) -> list[LinkCommand]:
        """What the owner is to do, in order."""
        drained, self._commands = self._commands, []
        return drained

    @property
    def count(self) -> int:
        """Links that stand."""
        return sum(way.open is not None for way in self._ways.values())

    # --- helpers -------------------------------------------------------------------------------

    def _ask(self, way: _Way, now: int) -> None:
        if way.open is not None and way.verdict_at is None:
            way.verdict_at = now + VERDICT_NS
            self._asked.append(way.open.link)

    def _judge(self, relay: UUID, way: _Way, now: int) -> None:
        """The link is silent: have another, or none where none is needed."""
        way.verdict_at, way.is_silent = None, True
        if way.is_needed:
            self._try_all(relay, way, now)
        else:
            self._close_all(way)

    def _try_all(self, relay: UUID, way: _Way, now: int) -> None:
        way.next_door, way.due = 0, now
        self._try_what_is_due(relay, way, now)

    def _try_what_is_due(self, relay: UUID, way: _Way, now: int) -> None:
        if way.due is None or way.due > now:
            return
        door = way.doors[way.next_door]
        link, self._next_link = self._next_link, self._next_link + 1
        way.opening[link] = door
        self._relay_by_link[link] = relay
        self._commands.append(
            OpenLink(link=link, transport=door.transport, address=door.address, pins=way.pins)
        )
        way.next_door += 1
        way.due = now + RACE_INTERVAL_NS if way.next_door < len(way.doors) else None

    def _way_of(self, link: int) -> _Way | None:
        relay = self._relay_by_link.get(link)
        return None if relay is None else self._ways.get(relay)

    def _call_off(self, way: _Way) -> None:
        for link in way.opening:
            self._close(link)
        way.opening.clear()

    def _close_all(self, way: _Way) -> None:
        self._call_off(way)
        if way.open is not None:
            self._close(way.open.link)
        way.open = way.due = way.close_at = way.verdict_at = None
        way.is_needed = way.is_silent = False
        way.failures = 0

    def _close(self, link: int) -> None:
        self._relay_by_link.pop(link, None)
        self._commands.append(CloseLink(link=link))

    def _back_off(self, way: _Way) -> int:
        delay_ns = min(RETRY_FIRST_NS << min(way.failures, 16), RETRY_LAST_NS)
        way.failures += 1
        return delay_ns


def _doors_of(server: RelayServer) -> tuple[Door, ...]:
    """In the order in which they are tried: a transport at all its addresses, then the next. QUIC
    and TLS need a pin."""
    return tuple(
        Door(transport, Address(str(place.address), place.port))
        for transport in DOORS
        for place in server.addresses
        if place.transport == transport and (transport == "tcp" or server.certificate_pins)
    )[:MAX_DOORS]
