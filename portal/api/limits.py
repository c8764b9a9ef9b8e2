"""Token buckets, as a core: integer nanoseconds come in, nothing is read from a clock.

Written as the generic cell rate algorithm (ITU-T I.371): for each key one instant is kept, at
which its bucket would be full again. A key that is full needs no entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

MAX_KEYS = 10_000


class TokenBuckets:
    """One bucket for each key: `burst` calls at once, `rate_per_s` in the long run.

    Holds at most `max_keys` buckets; the one that was used longest ago gives way.
    """

    def __init__(self, *, rate_per_s: float, burst: int, max_keys: int = MAX_KEYS) -> None:
        if rate_per_s <= 0 or burst < 1 or max_keys < 1:
            raise ValueError("rate, burst and number of keys must be positive")
        self.burst = burst
        self._interval_ns = round(10**9 / rate_per_s)
        self._tolerance_ns = self._interval_ns * (burst - 1)
        self._max_keys = max_keys
        self._full_at_by_key: OrderedDict[Hashable, int] = OrderedDict()

    def wait_ns(self, key: Hashable, now: int) -> int:
        """How long until this key may `take` one; 0 if at once."""
        return max(0, self._full_at_by_key.get(key, now) - now - self._tolerance_ns)

    def take(self, key: Hashable, now: int) -> int:
        """Take one and return 0; or take nothing and return how long to wait in ns."""
        wait_ns = self.wait_ns(key, now)
        if wait_ns:
            return wait_ns
        full_at = max(now, self._full_at_by_key.get(key, now)) + self._interval_ns
        self._full_at_by_key[key] = full_at
        self._full_at_by_key.move_to_end(key)
        if len(self._full_at_by_key) > self._max_keys:
            self._full_at_by_key.popitem(last=False)
        return 0

    def left(self, key: Hashable, now: int) -> int:
        """How many this key may `take` at this moment."""
        used_ns = max(0, self._full_at_by_key.get(key, now) - now)
        return max(0, self.burst - -(-used_ns // self._interval_ns))

    def full_in_ns(self, key: Hashable, now: int) -> int:
        """How long until this key may take `burst` again; 0 if it may now."""
        return max(0, self._full_at_by_key.get(key, now) - now)

    def __len__(self) -> int:
        return len(self._full_at_by_key)
