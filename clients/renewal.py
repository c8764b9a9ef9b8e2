"""When a connection is to make way for a new one, so that no preshared key serves above a day.

A gateway has one connection with a client, and what the older one carried ends with it: TCP flows
are reset. So a connection that is 23 h old (a little more, at random) waits for a moment in which
nobody would notice, and is replaced without one only just before it is 24 h old. A core: time and
randomness are passed in.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from runtime.randomness import Randomness

_MINUTE_NS = 60 * 10**9
CHECK_INTERVAL_NS = _MINUTE_NS


@attrs.frozen(kw_only=True)
class RenewalTimes:
    """Ages of a connection: from `idle_from_ns` on it is replaced when it is idle, from
    `always_from_ns` on in any case. Each begins up to its spread later, at random; the end of the
    second spread leaves five minutes, with an attempt in each, before the connection is a day old.
    """

    idle_from_ns: int = 23 * 60 * _MINUTE_NS
    idle_spread_ns: int = 30 * _MINUTE_NS
    always_from_ns: int = (24 * 60 - 10) * _MINUTE_NS
    always_spread_ns: int = 5 * _MINUTE_NS


A_DAY = RenewalTimes()


@attrs.define
class Renewal:
    """Of one connection. `begun`: a new one was asked for, and this one is not counted on."""

    always_from_ns: int
    check_at_ns: int
    begun: bool = False

    @classmethod
    def of_connection(cls, opened_ns: int, times: RenewalTimes, randomness: Randomness) -> Renewal:
        """The plan for a connection that is opened now."""
        always = times.always_from_ns + randomness.integer(times.always_spread_ns)
        idle = times.idle_from_ns + randomness.integer(times.idle_spread_ns)
        return cls(opened_ns + always, opened_ns + idle)

    def is_due(self, now: int, *, can_ask: bool, is_idle: Callable[[], bool]) -> bool:
        """Whether to ask for a new connection now; at most once a minute."""
        if now < self.check_at_ns:
            return False
        self.check_at_ns = now + CHECK_INTERVAL_NS
        if not can_ask or (now < self.always_from_ns and not is_idle()):
            if now < self.always_from_ns:
                self.check_at_ns = min(self.check_at_ns, self.always_from_ns)
            return False
        self.begun = True
        return True
