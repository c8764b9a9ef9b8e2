"""The seam between the relay's core and a faster way for data, which some machines have.

The core tells of channels, and a `FastPath` may then carry their data without it. What the core
decides stays decided: a channel goes the fast way only while it would go the slow way too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from relays.allocations import Allocation


class FastPath(Protocol):
    """Whoever carries data for the core. Nothing is raised. Times: nanoseconds, the core's."""

    def channels_changed(self, allocation: Allocation, now: int, host: str | None = None) -> None:
        """Channels of `allocation` (those to the IP address `host`, or all of them) were bound, or
        they, their permissions or the allocation last longer or less long, or the peer answered."""

    def allocation_ended(self, allocation: Allocation) -> None:
        """It ends now. When this returns, nothing more of it goes the fast way."""

    def handle_timeout(self, now: int) -> None:
        """Forget what has ended; call it now and then."""

    def relayed(self) -> tuple[int, int]:
        """Packets, and bytes of data in them, that were carried so far."""

    def statistics(self) -> dict[str, int]:
        """Counts beyond these for the metrics."""


class NoFastPath:
    """All data goes through the core."""

    def channels_changed(self, allocation: Allocation, now: int, host: str | None = None) -> None:
        return

    def allocation_ended(self, allocation: Allocation) -> None:
        return

    def handle_timeout(self, now: int) -> None:
        return

    def relayed(self) -> tuple[int, int]:
        return 0, 0

    def statistics(self) -> dict[str, int]:
        return {}
