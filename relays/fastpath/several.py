"""Several fast paths at once: the kernel's, say, and a compiled one for what it leaves over."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from relays.allocations import Allocation
from relays.fastpath import FastPath


@attrs.frozen
class SeveralFastPaths:
    """Tells each of `paths` what it is told, in their order."""

    paths: Sequence[FastPath]

    def channels_changed(self, allocation: Allocation, now: int, host: str | None = None) -> None:
        for path in self.paths:
            path.channels_changed(allocation, now, host)

    def allocation_ended(self, allocation: Allocation) -> None:
        for path in self.paths:
            path.allocation_ended(allocation)

    def handle_timeout(self, now: int) -> None:
        for path in self.paths:
            path.handle_timeout(now)

    def relayed(self) -> tuple[int, int]:
        each = [path.relayed() for path in self.paths]
        return sum(packets for packets, _ in each), sum(size for _, size in each)

    def statistics(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for path in self.paths:
            found |= path.statistics()
        return found
