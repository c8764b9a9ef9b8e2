"""One candidate pair of a continuous ICE agent: its states, and when it is checked next.

                 answered                     doubted
    PROBING ----------------> CONSENTED <-----------------> SUSPECTED
     ^ ^  |                    |  |  ^       answered           |
     | |  | exhausted  unneeded|  |  | answered                 |
     | |  +-----> DORMANT <----+  |  +---- DORMANT              |
     | |            |             | expired                     | expired
     | +------------+             |                             |
     |   awakened                 |                             |
     +----------------------------+-----------------------------+

Only CONSENTED and SUSPECTED pairs carry data. Unlike in RFC 8445 no pair ever fails for good: a
dormant one is awakened by a check of the peer, by new candidates or by the loss of the path.

Every transmission of a check is a transaction of its own, so that an answer tells the round trip
exactly; the intervals below stand for RFC 8445's retransmission timeout (section 14.3), from a
shorter start than its 500 ms: a hole is punched by packets that meet, and that takes two round
trips with a good chance only if there are several packets in each.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import attrs

from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.net.address import Address
from tunnel.ice.candidates import Base, Kind

PROBE_INTERVALS_NS: Final = tuple(
    ms * NS_PER_MS for ms in (100, 100, 200, 200, 400, 400, 800, 800, 1600, 1600)
)
PROBE_SLOW_NS: Final = 2 * NS_PER_S
SUSPECT_INTERVALS_NS: Final = tuple(ms * NS_PER_MS for ms in (100, 150, 150, 200, 200))
SUSPECT_AFTER_NS: Final = 500 * NS_PER_MS
DISTRUST_AFTER_NS: Final = 350 * NS_PER_MS
PROBE_OTHERS_AFTER_NS: Final = 100 * NS_PER_MS
"""Longer than the round trip of most paths, and soon enough for others to be known by
`DISTRUST_AFTER_NS`."""
VERDICT_AFTER_NS: Final = 900 * NS_PER_MS
SLOWEST_ROUND_TRIP_NS: Final = 400 * NS_PER_MS
DORMANT_INTERVAL_NS: Final = 15 * NS_PER_S
CONSENT_INTERVAL_NS: Final = NS_PER_S
CONSENT_IDLE_INTERVAL_NS: Final = 15 * NS_PER_S
CONSENT_IDLE_JITTER_NS: Final = 5 * NS_PER_S
CONSENT_REPEATS_NS: Final = tuple(ms * NS_PER_MS for ms in (500, 1000, 2000))
CONSENT_LIFETIME_NS: Final = 30 * NS_PER_S
TWICE_RELAYED_AFTER_NS: Final = 400 * NS_PER_MS
"""A pair of two relayed addresses is checked so long after the path was lost or the agent began,
and not at all where another works by then: it is needed only between hosts that may send to nothing
but their own relays, costs six datagrams for each check, and is never the better way."""


class PairState(Enum):
    """Not asked to an end yet, answering, silent of late, or let go until it is wanted again."""

    PROBING = "probing"
    CONSENTED = "consented"
    SUSPECTED = "suspected"
    DORMANT = "dormant"


class Happening(Enum):
    """What takes a pair from one state to another: its answers, its silence, or a decision."""

    ANSWERED = "answered"
    DOUBTED = "doubted"
    EXPIRED = "expired"
    EXHAUSTED = "exhausted"
    UNNEEDED = "unneeded"
    AWAKENED = "awakened"


TRANSITIONS: Final[dict[tuple[PairState, Happening], PairState]] = {
    (PairState.PROBING, Happening.ANSWERED): PairState.CONSENTED,
    (PairState.PROBING, Happening.EXHAUSTED): PairState.DORMANT,
    (PairState.PROBING, Happening.AWAKENED): PairState.PROBING,
    (PairState.CONSENTED, Happening.ANSWERED): PairState.CONSENTED,
    (PairState.CONSENTED, Happening.DOUBTED): PairState.SUSPECTED,
    (PairState.CONSENTED, Happening.EXPIRED): PairState.PROBING,
    (PairState.CONSENTED, Happening.UNNEEDED): PairState.DORMANT,
    (PairState.SUSPECTED, Happening.ANSWERED): PairState.CONSENTED,
    (PairState.SUSPECTED, Happening.EXPIRED): PairState.PROBING,
    (PairState.DORMANT, Happening.ANSWERED): PairState.CONSENTED,
    (PairState.DORMANT, Happening.AWAKENED): PairState.PROBING,
}

USABLE: Final = (PairState.CONSENTED, PairState.SUSPECTED)


def diagram() -> str:
    """`TRANSITIONS` as a Mermaid state diagram, which docs/connectivity.md shows."""
    steps = (
        f"    {before.value} --> {after.value}: {happening.value}"
        for (before, happening), after in TRANSITIONS.items()
    )
    first = PairState.PROBING
    return "\n".join(("stateDiagram-v2", f"    [*] --> {first.value}", *steps))


@attrs.define(kw_only=True, eq=False)
class Remote:
    """A remote candidate. `gone`: the peer has withdrawn it, and it is kept while it works."""

    address: Address
    kind: Kind
    priority: int
    signalled: bool
    gone: bool = False


@attrs.define(kw_only=True, eq=False)
class Pair:
    """A base of ours and a remote candidate. Instants are nanoseconds; None: not set.

    `due` is when the next check goes out, `attempt` counts checks since the last change of state
    or answer, `proven_at` is when the pair became usable, `doubted_at` when it was suspected.
    `unanswered_since` is when the first data went out after something was last heard on the pair.
    """

    base: Base
    remote: Remote
    priority: int
    state: PairState = PairState.PROBING
    due: int | None
    attempt: int = 0
    triggered: bool = False
    proven_at: int = 0
    consent_until: int = 0
    doubted_at: int = 0
    verdict_at: int = 0
    unanswered_since: int | None = None
    sent_at: int | None = None
    rtt_ns: int | None = None
    mapped: Address | None = None

    @property
    def usable(self) -> bool:
        return self.state in USABLE

    @property
    def _round_trip_ns(self) -> int:
        """What an answer is given time for. One that once came very late (its way was broken, or
        whoever relays it holds it back) must not keep a dead pair alive for seconds."""
        return min(self.rtt_ns or 0, SLOWEST_ROUND_TRIP_NS)

    @property
    def relayed(self) -> bool:
        return self.base.server is not None or self.remote.kind == "relay"

    @property
    def relay_hosts(self) -> frozenset[str]:
        """The relays without which it does not work, by the IP addresses at which they relay."""
        base, remote = self.base, self.remote
        ours = () if base.server is None else (base.address.host,)
        theirs = (remote.address.host,) if remote.kind == "relay" else ()
        return frozenset((*ours, *theirs))

    @property
    def twice_relayed(self) -> bool:
        """Whether each side would use a relay of its own."""
        return self.base.server is not None and self.remote.kind == "relay"

    def happen(self, happening: Happening, now: int, *, since: int | None = None) -> None:
        """Go to the next state, with its first check due at once. `since`: when doubts began, if
        not now. Raises KeyError if there is no such state (a defect of the caller)."""
        self.state = TRANSITIONS[self.state, happening]
        self.attempt = 0
        self.due = now
        if self.state is PairState.SUSPECTED:
            self.doubted_at = now if since is None else since
            self.verdict_at = self.doubted_at + max(VERDICT_AFTER_NS, 3 * self._round_trip_ns)
        elif self.state is PairState.PROBING:
            self.unanswered_since = None
            self.rtt_ns = None

    def distrusted(self, now: int) -> bool:
        """Whether several probes went unanswered: a pair that answers is preferred to it."""
        if self.state is not PairState.SUSPECTED:
            return False
        return now - self.doubted_at >= max(DISTRUST_AFTER_NS, 2 * self._round_trip_ns)

    @property
    def suspect_at(self) -> int | None:
        """When silence becomes suspicious: 500 ms after data that was not answered, or two round
        trips where that is longer."""
        if self.unanswered_since is None or self.state is not PairState.CONSENTED:
            return None
        return self.unanswered_since + max(SUSPECT_AFTER_NS, 2 * self._round_trip_ns)

    @property
    def expires_at(self) -> int | None:
        """When the pair is no longer usable unless a check is answered before."""
        if self.state is PairState.SUSPECTED:
            return min(self.verdict_at, self.consent_until)
        return self.consent_until if self.state is PairState.CONSENTED else None
