"""Where crash reports go: the log and the metrics.

    scheduler = Scheduler(..., report=CrashJournal(get_logger("actors"), registry))

A report holds no content of messages, states or exceptions (see `runtime.inspection`), and labels
of metrics are class names, so there is a bounded number of them.
"""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter

from runtime.inspection import CrashReport, Report


class Log(Protocol):
    """The part of a structlog logger that is needed."""

    def error(self, event: str, **values: object) -> object: ...

    def warning(self, event: str, **values: object) -> object: ...


class CrashJournal:
    """Takes the reports of a scheduler (it is its `report`). Metrics: `actor_crashes_total` by
    class of actor, `actor_unhandled_messages_total` by class of actor; `prefix` goes before both
    names."""

    def __init__(self, log: Log, registry: CollectorRegistry, *, prefix: str = "") -> None:
        self._log = log
        self._crashes = Counter(
            f"{prefix}actor_crashes", "Actors that failed, by class", ("actor",), registry=registry
        )
        self._unhandled = Counter(
            f"{prefix}actor_unhandled_messages",
            "Messages dropped for want of a handler, by class of actor",
            ("actor",),
            registry=registry,
        )

    def __call__(self, report: Report) -> None:
        if not isinstance(report, CrashReport):
            self._unhandled.labels(report.actor).inc()
            self._log.warning("message_dropped", actor=report.label, message=report.message)
            return
        self._crashes.labels(report.actor).inc()
        self._log.error(
            "actor_crashed",
            actor=report.label,
            kind=report.actor,
            ref=repr(report.ref),
            reason=report.reason,
            frames=list(report.frames),
            last_messages=list(report.last_messages),
            restarts=report.restarts,
            age_s=round(report.age_ns / 1e9, 3),
            mailbox_depth=report.mailbox_depth,
        )
