"""Which door of the portal an agent tries next: a core.

A portal of several nodes has several doors, each a `host:port`. An agent begins with the one of its
token, learns the others from the portal, and goes through them in rounds: in one round every door
is tried once, in an order of chance, so that the agents of a node that died spread over all others.
A round that is over is followed by a pause (the dialer's back-off), so no fault of the portal, nor
anything that a node says, makes an agent dial for ever without one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from channel.messages import MAX_DOORS, Disconnect
from runtime.clock import NS_PER_S
from runtime.randomness import Randomness

AVOID_NS: Final = 60 * NS_PER_S
"""So long a door that sent us away is tried after all others."""
STEADY_NS: Final = 10 * NS_PER_S
"""A connection that stood for so long begins a new round with its end."""
TOKEN_DOOR_WITHIN: Final = 8
"""The token's door is among so many first ones of a round, however many were learned."""

_ELSEWHERE: Final = ("draining", "shutting_down")
"""With these reasons a node sends an agent to the others."""
_UNABLE: Final = ("unavailable", "limits_exceeded")
"""With these it says that it cannot serve now; another may."""


class Doors:
    """Ask `next` for a door, and tell what became of it by `ended`, or by exactly one of `failed`,
    `sent_away`, `sent_on` and `left`, after `entered` where the portal took us in. Times are
    monotonic nanoseconds.

    When `round_is_over`, pause before the next call of `next`, which begins another round.
    """

    def __init__(self, token_door: str, randomness: Randomness) -> None:
        self._token_door = token_door
        self._randomness = randomness
        self._learned: tuple[str, ...] = ()
        self._current = token_door
        self._preferred: str | None = None
        self._sent_on_to: str | None = None
        self._was_sent_on = False  # in this round
        self._entered_at: int | None = None
        self._tried: set[str] = set()
        self._avoided_until: dict[str, int] = {}

    @property
    def known(self) -> tuple[str, ...]:
        """All doors, that of the token first; at most 1 + MAX_DOORS."""
        return (self._token_door, *self._learned)

    @property
    def current(self) -> str:
        """The door that was tried last."""
        return self._current

    @property
    def round_is_over(self) -> bool:
        """Every door was tried, or as many as there may be: pause."""
        if len(self._tried) > MAX_DOORS:
            return True
        return self._sent_on_to is None and self._tried.issuperset(self.known)

    def next(self, now: int) -> str:
        """The door to try now: the one that we were sent on to; or were at, unless it failed or
        sent us away; then the others at random; at last those that sent us away within `AVOID_NS`.
        """
        if self.round_is_over:
            self._begin_round(set())
        self._current = self._choose(now)
        if self._current == self._sent_on_to:
            self._sent_on_to = None
        self._tried.add(self._current)
        return self._current

    def entered(self, now: int) -> None:
        """The portal took us in."""
        self._entered_at = now
        self._preferred = self._current
        self._avoided_until.pop(self._current, None)

    def failed(self, now: int) -> None:
        """It could not be reached, was lost, or cannot serve us now."""
        self._preferred = None
        self._end(now)

    def sent_away(self, now: int) -> None:
        """It asked us to go to another, and wants to be left alone for a while."""
        self._preferred = None
        self._avoided_until[self._current] = now + AVOID_NS
        self._end(now)

    def sent_on(self, door: str, now: int) -> bool:
        """It said that this door can serve us, which need not be a known one. Whether that is the
        next one: not if it was tried in this round, or if this is the second such word in it."""
        self.sent_away(now)
        if self._was_sent_on or door in self._tried:
            return False
        self._sent_on_to, self._was_sent_on = door, True
        return True

    def left(self, now: int) -> None:
        """It ended the connection for a reason that is ours: any door would do the same, so the
        round is over, and the next one begins here."""
        self._preferred = self._current
        self._end(now)
        self._sent_on_to = None
        self._tried.update(self.known)

    def ended(self, outcome: Disconnect | str, now: int) -> int | None:
        """How an attempt or a stay at the current door ended: the portal's last word, or a text
        where there was none. How long to wait because the portal said so, or None."""
        if isinstance(outcome, str):
            self.failed(now)
            return None
        if outcome.door is not None:
            return None if self.sent_on(outcome.door, now) else outcome.retry_after_ns
        if outcome.reason in _ELSEWHERE:
            self.sent_away(now)
            # What the node asks for is for those who come back to it.
            return outcome.retry_after_ns if self.round_is_over else None
        if outcome.reason in _UNABLE:
            self.failed(now)
        else:
            self.left(now)
        return outcome.retry_after_ns

    def learned(self, addresses: Iterable[str]) -> None:
        """These are all doors there are, besides the token's; of more than MAX_DOORS the first."""
        others = (each for each in dict.fromkeys(addresses) if each != self._token_door)
        self._learned = tuple(others)[:MAX_DOORS]
        known = set(self.known)
        self._avoided_until = {
            door: until for door, until in self._avoided_until.items() if door in known
        }

    # --- helpers -------------------------------------------------------------------------------

    def _end(self, now: int) -> None:
        if self._entered_at is not None and now - self._entered_at >= STEADY_NS:
            self._begin_round({self._current})
        self._entered_at = None

    def _begin_round(self, tried: set[str]) -> None:
        self._tried = tried
        self._sent_on_to, self._was_sent_on = None, False

    def _choose(self, now: int) -> str:
        untried = [door for door in self.known if door not in self._tried]
        if self._preferred in untried and self._preferred is not None:
            return self._preferred
        if self._token_door in untried and len(self._tried) >= TOKEN_DOOR_WITHIN - 1:
            return self._token_door
        if self._sent_on_to is not None:
            return self._sent_on_to
        welcome = [door for door in untried if self._avoided_until.get(door, now) <= now]
        if welcome:
            return welcome[self._randomness.integer(len(welcome))]
        return min(untried, key=lambda door: self._avoided_until[door])
