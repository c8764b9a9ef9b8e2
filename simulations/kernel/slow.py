"""A way to a server on a Unix socket that can be made slow: each answer comes so much later.

    python -m simulations.kernel.slow LISTEN TARGET

Whole round trips are delayed, not single questions: what is sent in one go is answered in one go.
A line "ready" is printed once it listens. Each line on standard input is a delay in microseconds,
for all that comes from the server from then on; the process ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Final

import trio

READ_BYTES: Final = 1 << 16
MAX_WAITING: Final = 1_024
"""Chunks of answers that wait on one connection; the server waits for more."""
BACKLOG: Final = 256


class SlowWay:
    """Carries connections from a socket to a server. `delay_s` may be set at any time."""

    def __init__(self, target: Path) -> None:
        self._target = str(target)
        self.delay_s = 0.0

    async def carry(self, near: trio.SocketStream) -> None:
        """One connection, until one of its ends is gone."""
        async with near:
            with contextlib.suppress(OSError):
                far = await trio.open_unix_socket(self._target)
                async with far, trio.open_nursery() as nursery:
                    answers, waiting = trio.open_memory_channel[tuple[float, bytes]](MAX_WAITING)
                    nursery.start_soon(self._ask, near, far, nursery.cancel_scope)
                    nursery.start_soon(self._take, far, answers)
                    await self._answer(near, waiting)
                    nursery.cancel_scope.cancel()

    @staticmethod
    async def _ask(
        near: trio.SocketStream, far: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await near.receive_some(READ_BYTES):
                await far.send_all(data)
        scope.cancel()  # nobody is there for answers

    async def _take(
        self, far: trio.SocketStream, answers: trio.MemorySendChannel[tuple[float, bytes]]
    ) -> None:
        async with answers:
            with contextlib.suppress(trio.BrokenResourceError):
                while data := await far.receive_some(READ_BYTES):
                    await answers.send((trio.current_time() + self.delay_s, data))

    @staticmethod
    async def _answer(
        near: trio.SocketStream, waiting: trio.MemoryReceiveChannel[tuple[float, bytes]]
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async for due, data in waiting:
                await trio.sleep_until(due)
                await near.send_all(data)


async def main(*ends: str) -> None:
    listen, target = ends
    way = SlowWay(Path(target))
    door = trio.socket.socket(trio.socket.AF_UNIX)
    await door.bind(listen)
    os.chmod(listen, 0o600)
    door.listen(BACKLOG)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            trio.serve_listeners, way.carry, [trio.SocketListener(door)]
        )  # fmt: skip
        print("ready", flush=True)  # noqa: T201, whoever started it waits for this line
        async for line in trio.wrap_file(sys.stdin):
            way.delay_s = int(line) / 1e6
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
