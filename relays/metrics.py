"""What a relay shows at /metrics. Read when somebody asks; nothing is counted twice.

The core and the sockets of UDP count all; listeners whose clients have connections count theirs
(`relays.transports.statistics`). What is left was UDP's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

import attrs
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from relays.transports.statistics import PRESENT, TransportStatistics
from relays.transports.tls import CertificateSource

_ERRORS: Final = "errors_"
_PASSED: Final = "fast_path_passed_"


class Measured(Protocol):
    """A relay of one process or several."""

    data_path: str
    certificates: CertificateSource | None

    def statistics(self) -> dict[str, int]:
        """Of all transports together."""

    def transports(self) -> dict[str, TransportStatistics]:
        """Of those whose clients have connections."""


@attrs.frozen(eq=False)
class RelayMetrics(Collector):
    """See the head of this file."""

    relay: Measured

    def collect(self) -> Iterator[Metric]:
        totals, certificates = self.relay.statistics(), self.relay.certificates
        passed = CounterMetricFamily(
            "holloway_relay_fast_path_passed_packets",
            "packets that the fast path left to the kernel",
            labels=["reason"],
        )
        for name, value in totals.items():
            described = name.replace("_", " ")
            if name.startswith(_ERRORS):
                continue
            if name.startswith(_PASSED):
                passed.add_metric([name.removeprefix(_PASSED)], value)
            elif name in PRESENT:
                yield GaugeMetricFamily(f"holloway_relay_{name}", described, value=value)
            else:
                yield CounterMetricFamily(f"holloway_relay_{name}", described, value=value)
        yield passed
        by_name = self.relay.transports()
        yield from _of_all_transports(totals, by_name)
        yield from _of_connections(by_name)
        path = GaugeMetricFamily(
            "holloway_relay_data_path", "1 for how data is moved", labels=["mode"]
        )
        path.add_metric([self.relay.data_path], 1)
        yield path
        if certificates is not None:
            yield GaugeMetricFamily(
                "holloway_relay_certificate_expires_seconds",
                "Unix time at which the certificate for TLS and QUIC ends",
                value=certificates.current.expires_at.timestamp(),
            )
            yield CounterMetricFamily(
                "holloway_relay_certificates_refused",
                "new certificates that could not be used",
                value=certificates.refused,
            )


def _of_all_transports(
    totals: dict[str, int], by_name: dict[str, TransportStatistics]
) -> Iterator[Metric]:
    errors = CounterMetricFamily(
        "holloway_relay_errors", "error responses", labels=["code", "transport"]
    )
    for name, total in totals.items():
        if name.startswith(_ERRORS):
            code = name.removeprefix(_ERRORS)
            others = {each: one.errors[int(code)] for each, one in by_name.items()}
            for each, count in {"udp": total - sum(others.values()), **others}.items():
                if count > 0:
                    errors.add_metric([code, each], count)
    yield errors
    allocations = GaugeMetricFamily(
        "holloway_relay_transport_allocations", "allocations", labels=["transport"]
    )
    packets = CounterMetricFamily(
        "holloway_relay_transport_packets", "data passed on, both ways", labels=["transport"]
    )
    carried = CounterMetricFamily(
        "holloway_relay_transport_bytes", "data passed on, both ways", labels=["transport"]
    )
    rest = TransportStatistics(
        allocations=totals.get("allocations", 0) - sum(one.allocations for one in by_name.values()),
        packets=totals.get("relayed_packets", 0) - sum(one.packets for one in by_name.values()),
        bytes=totals.get("relayed_bytes", 0) - sum(one.bytes for one in by_name.values()),
    )
    for name, one in {"udp": rest, **by_name}.items():
        allocations.add_metric([name], one.allocations)
        packets.add_metric([name], max(0, one.packets))
        carried.add_metric([name], max(0, one.bytes))
    yield from (allocations, packets, carried)


def _of_connections(by_name: dict[str, TransportStatistics]) -> Iterator[Metric]:
    standing = GaugeMetricFamily(
        "holloway_relay_connections", "connections of clients", labels=["transport"]
    )
    accepted = CounterMetricFamily(
        "holloway_relay_connections_accepted", "connections taken", labels=["transport"]
    )
    failed = CounterMetricFamily(
        "holloway_relay_handshake_failures", "handshakes that failed", labels=["transport"]
    )
    dropped = CounterMetricFamily(
        "holloway_relay_connections_dropped_packets",
        "data for clients that read too slowly",
        labels=["transport"],
    )
    refused = CounterMetricFamily(
        "holloway_relay_connections_refused", "newcomers refused", labels=["transport", "reason"]
    )
    ended = CounterMetricFamily(
        "holloway_relay_connections_ended", "connections ended", labels=["transport", "reason"]
    )
    for name, one in by_name.items():
        standing.add_metric([name], one.connections)
        accepted.add_metric([name], one.accepted)
        failed.add_metric([name], one.handshake_failures)
        dropped.add_metric([name], one.dropped)
        for reason, count in one.refused.items():
            refused.add_metric([name, reason], count)
        for reason, count in one.ended.items():
            ended.add_metric([name, reason], count)
    yield from (standing, accepted, failed, dropped, refused, ended)
