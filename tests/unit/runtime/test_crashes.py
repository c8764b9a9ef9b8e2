"""What becomes of a crash: a line in the log and a count, and no secret in either."""

from __future__ import annotations

from typing import Any

import attrs
from prometheus_client import CollectorRegistry, generate_latest

from runtime.actor import Actor, handles
from runtime.clock import VirtualClock
from runtime.crashes import CrashJournal
from runtime.randomness import SeededRandomness
from runtime.scheduler import Scheduler
from runtime.supervisor import ChildSpec, Supervisor
from runtime.testing import HeapHost


@attrs.frozen
class SignIn:
    user: str
    password: str = attrs.field(repr=False)


class Door(Actor):
    @handles(SignIn)
    def sign_in(self, message: SignIn) -> None:
        raise ValueError(message.password)


class Lines:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def error(self, event: str, **values: object) -> None:
        self.lines.append((event, values))

    def warning(self, event: str, **values: object) -> None:
        self.lines.append((event, values))


def test_a_crash_is_logged_and_counted_without_content():
    registry, lines, clock = CollectorRegistry(), Lines(), VirtualClock()
    scheduler = Scheduler(
        clock=clock,
        randomness=SeededRandomness(1, "actors"),
        report=CrashJournal(lines, registry),
    )
    host = HeapHost(scheduler, clock)
    scheduler.spawn(Supervisor([ChildSpec(id="door", factory=Door, name="door")]))
    host.run_until_idle()
    for _ in range(2):
        ref = scheduler.registry.whereis("door")
        assert ref is not None
        host.cast(ref, SignIn("somebody", "hunter2"))
        host.run_until_idle()
    ref = scheduler.registry.whereis("door")
    assert ref is not None
    host.cast(ref, "hunter2")
    host.run_until_idle()
    assert [event for event, _ in lines.lines] == ["actor_crashed"] * 2 + ["message_dropped"]
    _, values = lines.lines[1]
    assert values["last_messages"] == ["SignIn(user)"]
    assert (values["kind"], values["reason"]) == ("Door", "crashed: ValueError")
    assert values["restarts"] == 1
    assert "hunter2" not in repr(lines.lines)
    assert "somebody" not in repr(lines.lines)
    assert scheduler.statistics().restarted == 2
    shown = generate_latest(registry).decode()
    assert 'actor_crashes_total{actor="Door"} 2.0' in shown
    assert 'actor_unhandled_messages_total{actor="Door"} 1.0' in shown
