"""What becomes of a hint that the peer is gone: a core.

Where the peer's port is closed, its machine answers with an ICMP error. Anybody may forge one, so
it proves nothing: the connection asks the peer itself, several times, and ends only when no packet
of the peer's, which none but the peer can seal, comes for all that.
"""

from __future__ import annotations

import math
from typing import Final, Literal

PROBES: Final = 8
"""So many are sent: at a loss of one in five on each way all of them fail once in 3,500 times."""
PATIENCE_S: Final = 1.0
"""They are spread over this time, or over more where a round trip is long."""
_PROBE_TIMEOUTS: Final = 3


class Suspicion:
    """Tell it of hints and of the peer's packets, and do what `handle_timeout` says.

    Times are seconds on one monotonic clock. Hints cost little, however many come: one suspicion
    is open at a time, and probes keep their distance from one suspicion to the next.
    """

    def __init__(self) -> None:
        self._left = PROBES
        self._interval = 0.0
        self._due = math.inf
        self._last_probe = -math.inf

    @property
    def open(self) -> bool:
        """Whether a hint was given, and the peer not heard since."""
        return self._due < math.inf

    def hint(self, now: float, probe_timeout: float) -> None:
        """Something says that the peer is gone. `probe_timeout` (seconds) is how long an answer
        may take (PTO, RFC 9002, section 6.2.1)."""
        if self.open:
            return
        self._left = PROBES
        self._interval = max(PATIENCE_S, _PROBE_TIMEOUTS * probe_timeout) / PROBES
        self._due = max(now, self._last_probe + self._interval)

    def heard(self) -> None:
        """A packet of the peer has come, and was authentic."""
        self._due = math.inf

    def poll_timeout(self) -> float:
        """When `handle_timeout` is due; infinity when nothing is suspected."""
        return self._due

    def handle_timeout(self, now: float) -> Literal["probe", "gone"] | None:
        """What to do: send a probe now, give the connection up, or nothing yet. Probes are counted,
        so that a process that slept through their time still sends them all."""
        if now < self._due:
            return None
        if self._left == 0:
            self._due = math.inf
            return "gone"
        self._left -= 1
        self._last_probe = now
        self._due = now + self._interval
        return "probe"
