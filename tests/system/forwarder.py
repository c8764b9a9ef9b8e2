"""Things between two ends of TCP that can be told to fail. They are in a process of their own, so
that what passes does not wait for the tests that tell them:

    python -m tests.system.forwarder      # on its standard input: open PORT TARGET, hold PORT, ...

It ends with its standard input.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from typing import Final, Literal

import trio

READ_BYTES: Final = 65_536
LOOK_S: Final = 0.05


class Forwarder:
    """Listens at `port` of 127.0.0.1 for as long as something listens at `target` there: where
    nothing does, connections are refused here too, as they would be without us.

    While `hold` is in force no byte passes and nobody is told, as with a cable that is pulled."""

    def __init__(self, port: int, target: int) -> None:
        self.port: Final = port
        self._target = target
        self._open = trio.Event()
        self._open.set()
        self._refusing = trio.Event()
        self._serving: trio.CancelScope | None = None

    def hold(self) -> None:
        self._open = trio.Event()

    def release(self) -> None:
        self._open.set()
        self._refusing.set()

    def refuse(self) -> None:
        """End all connections and refuse others until `release`."""
        self._open = trio.Event()
        self._refusing = trio.Event()
        if self._serving is not None:
            self._serving.cancel()

    async def run(self) -> None:
        """Until cancelled."""
        self._refusing.set()
        while True:
            await self._refusing.wait()
            with suppress(OSError):
                await (await self._connect()).aclose()
                with trio.CancelScope() as self._serving:
                    await trio.serve_tcp(self._carry, self.port, host="127.0.0.1")
            await trio.sleep(LOOK_S)

    async def _connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self._target)

    async def _carry(self, near: trio.SocketStream) -> None:
        async with near:
            await self._open.wait()
            try:
                far = await self._connect()
            except OSError:
                self._stop_serving()
                return
            async with far, trio.open_nursery() as nursery:

                async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        while data := await source.receive_some(READ_BYTES):
                            await self._open.wait()
                            await sink.send_all(data)
                    await self._open.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(pump, near, far)
                nursery.start_soon(pump, far, near)
        await self._look()

    async def _look(self) -> None:
        """A connection has ended: if its target is gone, be gone too."""
        try:
            await (await self._connect()).aclose()
        except OSError:
            self._stop_serving()

    def _stop_serving(self) -> None:
        if self._serving is not None:
            self._serving.cancel()


class Forwarders:
    """The forwarders of one process, from outside. Use it as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, text=True
        )

    def open(self, port: int, target: int) -> None:
        self._say(f"open {port} {target}")

    def tell(self, what: Literal["hold", "release", "refuse"], *ports: int) -> None:
        for port in ports:
            self._say(f"{what} {port}")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> Forwarders:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


async def main() -> None:
    forwarders: dict[int, Forwarder] = {}
    async with trio.open_nursery() as nursery:
        async for line in trio.wrap_file(sys.stdin):
            what, port, *target = line.split()
            if what == "open":
                forwarder = forwarders[int(port)] = Forwarder(int(port), int(target[0]))
                nursery.start_soon(forwarder.run)
            else:
                getattr(forwarders[int(port)], what)()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
