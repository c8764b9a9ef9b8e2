"""The driver between an agent and the way to the portal."""

from __future__ import annotations

import socket
from typing import Any

from channel.messages import FlowReport
from runtime.clock import SystemClock
from tests.unit.clients.stage import Stage, answer, udp
from tunnel.shell.driver import EngineDriver
from tunnel.shell.tun import TunDevice


class FullChannel:
    """A way to the portal that takes nothing while `is_full`."""

    def __init__(self) -> None:
        self.is_full = True
        self.taken: list[object] = []

    def send(self, message: object, *, ref: int | None = None) -> bool:
        if not self.is_full:
            self.taken.append(message)
        return not self.is_full

    def poke(self) -> None: ...


async def test_a_report_of_flows_that_the_channel_does_not_take_stays_with_the_agent() -> None:
    stage = Stage()
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.server_answers(answer())
    agent = stage.client

    async def perform(event: Any) -> None: ...

    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with kernel, TunDevice(device.detach(), "hlwtest") as tun:
        driver = EngineDriver(
            agent,
            tun=tun,
            clock=SystemClock(),
            mark=None,
            port=0,
            perform=perform,
            on_failure=lambda detail: None,
        )
        driver.sender = channel = FullChannel()
        driver.finish()
        assert driver.statistics().unsent_messages > 0
        assert agent.sizes()["flows_unreported"] == 1
        channel.is_full = False
        driver.finish()
    [report] = [message for message in channel.taken if isinstance(message, FlowReport)]
    assert [row.ending for row in report.flows] == ["stopped"]
    assert agent.sizes()["flows_unreported"] == 0
