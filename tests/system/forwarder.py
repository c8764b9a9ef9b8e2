"""Things between two ends of TCP that can be told to fail. They are in a process of their own, so
that what passes does not wait for the tests that tell them:

    python -m tests.system.forwarder      # on its standard input: open PORT TARGET, hold PORT,
                                          # part PORT PID, ...

It ends with its standard input.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import trio

READ_BYTES: Final = 65_536
LOOK_S: Final = 0.05


class Forwarder:
    """Listens at `port` of 127.0.0.1 for as long as something listens at `target` there: where
    nothing does, connections are refused here too, as they would be without us.

    While `hold` is in force no byte passes and nobody is told, as with a cable that is pulled;
    `part` does that to the connections of one process alone."""

    def __init__(self, port: int, target: int) -> None:
        self.port: Final = port
        self._target = target
        self._open = trio.Event()
        self._open.set()
        self._parted: dict[int, trio.Event] = {}
        self._refusing = trio.Event()
        self._serving: trio.CancelScope | None = None

    def hold(self) -> None:
        self._open = trio.Event()

    def part(self, pid: int) -> None:
        """Hold what this process has dialled, or will dial, on this machine."""
        self._parted[pid] = trio.Event()

    def release(self) -> None:
        self._open.set()
        self._refusing.set()
        for event in self._parted.values():
            event.set()
        self._parted.clear()

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
        dialler = Dialler(near.socket.getpeername()[1])
        async with near:
            await self._passing(dialler)
            try:
                far = await self._connect()
            except OSError:
                self._stop_serving()
                return
            async with far, trio.open_nursery() as nursery:

                async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        while data := await source.receive_some(READ_BYTES):
                            await self._passing(dialler)
                            await sink.send_all(data)
                    await self._passing(dialler)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(pump, near, far)
                nursery.start_soon(pump, far, near)
        await self._look()

    async def _passing(self, dialler: Dialler) -> None:
        """Wait until what is said on its connection may pass."""
        await self._open.wait()
        for pid, event in list(self._parted.items()):
            if dialler.is_of(pid):
                await event.wait()

    async def _look(self) -> None:
        """A connection has ended: if its target is gone, be gone too."""
        try:
            await (await self._connect()).aclose()
        except OSError:
            self._stop_serving()

    def _stop_serving(self) -> None:
        if self._serving is not None:
            self._serving.cancel()


class Dialler:
    """Who has dialled a connection from this port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_of: dict[int, bool] = {}

    def is_of(self, pid: int) -> bool:
        """Whether the process has an IPv4 TCP socket with the port (by proc(5)), or had one when
        this was asked first. False of a process that is gone."""
        if pid not in self._is_of:
            self._is_of[pid] = self._finds(Path(f"/proc/{pid}"))
        return self._is_of[pid]

    def _finds(self, process: Path) -> bool:
        sockets = set()
        with suppress(OSError):
            for line in (process / "net" / "tcp").read_text().splitlines()[1:]:
                _, local, *rest = line.split()
                if int(local.partition(":")[2], 16) == self._port:
                    sockets.add(f"socket:[{rest[7]}]")
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.readlink(link) in sockets:
                        return True
        return False


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

    def part(self, port: int, pid: int) -> None:
        self._say(f"part {port} {pid}")

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
            what, *numbers = line.split()
            port, *more = map(int, numbers)
            if what == "open":
                forwarder = forwarders[port] = Forwarder(port, *more)
                nursery.start_soon(forwarder.run)
            else:
                getattr(forwarders[port], what)(*more)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
