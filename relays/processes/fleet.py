"""Several processes as one relay: what the parent knows of its workers, and tells them.

A core. For the rest of the parent (channel to the portal, signals, metrics) a `Fleet` stands where
a relay of one process has its `relays.server.Server`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final
from uuid import UUID

import attrs

from relays.authentication import Credentials, StampedCredentials
from relays.processes.messages import DrainNow, RelayKnown, Report, Revoke, ToWorker
from relays.processes.siblings import port_slices
from relays.settings import RelaySettings
from relays.transports.statistics import PRESENT, TransportStatistics

LEAST_QUOTA: Final = 8
"""A user's or source's clients fall unevenly on the processes, so that a process gives to each at
least so many allocations, where the whole relay gives as many."""


def share_of(settings: RelaySettings, ports: tuple[int, int], count: int) -> RelaySettings:
    """The settings of one of `count` processes: its ports, and its part of what is given in all."""

    def part(limit: int, least: int = 1) -> int:
        return max(-(-limit // count), min(limit, least))

    return attrs.evolve(
        settings,
        processes=1,
        observability="",
        relayed_ports=f"{ports[0]}-{ports[1]}",
        max_allocations=part(settings.max_allocations),
        max_allocations_per_user=part(settings.max_allocations_per_user, LEAST_QUOTA),
        max_allocations_per_source=part(settings.max_allocations_per_source, LEAST_QUOTA),
        unauthenticated_per_second=part(settings.unauthenticated_per_second),
        max_connections=part(settings.max_connections),
        max_connections_per_prefix=part(settings.max_connections_per_prefix, LEAST_QUOTA),
        connections_per_second=part(settings.connections_per_second),
    )


class Fleet:
    """See the head of this file. `tell` sends a message to all workers that run."""

    def __init__(
        self,
        *,
        settings: RelaySettings,
        ports: tuple[int, int],
        count: int,
        credentials: Credentials,
    ) -> None:
        self.slices = port_slices(*ports, count)
        self.count = count
        self.draining = False
        self.restarts = 0
        self.credentials = credentials
        self.tell: Callable[[ToWorker], None] = lambda message: None
        self._max_allocations = settings.max_allocations
        self._report_by_index: dict[int, Report] = {}
        self._ended: Counter[str] = Counter()
        self._ended_by_transport: dict[str, TransportStatistics] = {}

    # --- what the supervisor calls ---------------------------------------------------------------

    def reported(self, index: int, report: Report) -> None:
        self._report_by_index[index] = report

    def ended(self, index: int) -> None:
        """A process ended; what it counted stays counted."""
        report = self._report_by_index.pop(index, None)
        if report is not None:
            for name, value in report.statistics.items():
                if name not in PRESENT:
                    self._ended[name] += value
            for name, told in report.transports.items():
                total = self._ended_by_transport.setdefault(name, TransportStatistics())
                total.add(TransportStatistics.of(told).without_present())

    @property
    def serving(self) -> int:
        """How many processes serve."""
        return len(self._report_by_index)

    # --- as `relays.server.Server` ---------------------------------------------------------------

    def add_listener(self, listener: int) -> None:
        """The workers know theirs."""

    def synchronise(self, now: int, unix_s: int) -> None:
        """Each worker looks at the clock itself."""

    @property
    def allocations(self) -> int:
        return sum(report.allocations for report in self._report_by_index.values())

    @property
    def load(self) -> float:
        """0.0 (empty) to 1.0 (no allocation left)."""
        return min(1.0, self.allocations / max(1, self._max_allocations))

    def drain(self) -> None:
        self.draining = True
        self.tell(DrainNow())

    def revoke_user(self, user: str) -> int:
        """All processes end what this user has. How many that is they do not say."""
        credentials = self.credentials
        if isinstance(credentials, StampedCredentials):
            until_unix_s = credentials.revoked_until.get(user, 0)
            self.tell(Revoke(user=user, until_unix_s=until_unix_s))
        return 0

    def relay_known(self, relay_id: UUID) -> None:
        self.tell(RelayKnown(relay_id=relay_id))

    def statistics(self) -> dict[str, int]:
        """Sums over all processes, those that ended included."""
        total = Counter(self._ended)
        for report in self._report_by_index.values():
            total.update(report.statistics)
        return dict(total)

    def transports(self) -> dict[str, TransportStatistics]:
        """The same of those whose clients have connections."""
        totals: dict[str, TransportStatistics] = {}
        told = [report.transports for report in self._report_by_index.values()]
        for each in (
            self._ended_by_transport,
            *({name: TransportStatistics.of(one) for name, one in by.items()} for by in told),
        ):
            for name, one in each.items():
                totals.setdefault(name, TransportStatistics()).add(one)
        return totals
