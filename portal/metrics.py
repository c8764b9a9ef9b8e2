"""The portal's metrics. What is counted elsewhere is read when somebody asks for /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

GAUGES = frozenset(
    {
        *("door_connections", "api_open_calls", "api_buffered_bytes"),
        *("api_streams", "api_waiting_rows"),
        *("actors_accounts", "actors_sessions", "actors_gateways"),
        *("actors_relays", "actors_admissions", "channel_channels", "channel_unjoined"),
        *("websocket_connections", "websocket_newcomers"),
        *("database_idle", "database_used", "database_waiting"),
        *("database_left", "storage_full"),
        *("runtime_actors", "runtime_queued", "runtime_timers", "runtime_effects_in_flight"),
        *("node_living", "node_holds_lease", "node_links", "node_calls", "node_watches"),
    }
)
DURATIONS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class CallMetrics:
    """Counts calls of the API by method, path template and status, and times them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "holloway_api_calls",
            "Calls of the JSON API",
            ("method", "path", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "holloway_api_call_seconds",
            "Duration of calls of the JSON API",
            buckets=DURATIONS_S,
            registry=registry,
        )
        self._children: dict[tuple[str, str, int], Any] = {}

    def record(self, method: str, path: str, status: int, duration_ns: int) -> None:
        """One call; `path` is a template, so that there is a bounded number of them."""
        key = (method, path, status)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._calls.labels(method, path, str(status))
        child.inc()
        self._seconds.observe(duration_ns / 1e9)


class StatisticsMetrics(Collector):
    """Shows `statistics()` objects (attrs values or dictionaries of numbers) as metrics
    `holloway_<part>_<name>`."""

    def __init__(self, parts: Mapping[str, Callable[[], Any]]) -> None:
        self._parts = dict(parts)

    def collect(self) -> Iterator[Metric]:
        for part, statistics in self._parts.items():
            found = statistics()
            values = found if isinstance(found, dict) else attrs.asdict(found, recurse=False)
            for name, value in values.items():
                if not isinstance(value, int | float):
                    continue
                metric = f"holloway_{part}_{name}"
                text = f"{part}: {name.replace('_', ' ')}"
                is_gauge = f"{part}_{name}" in GAUGES
                family = GaugeMetricFamily if is_gauge else CounterMetricFamily
                yield family(metric, text, value=value)
