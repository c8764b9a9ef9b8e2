"""Bodies of nodes, for the tests of clusters."""

from __future__ import annotations

import os

import trio

from runtime.hosting.interface import NodeHandle


async def plain(node: NodeHandle) -> None:
    """Answers questions, and every TCP connection with its name and process."""
    asked = 0

    def count() -> int:
        nonlocal asked
        asked += 1
        return asked

    def fail() -> None:
        raise LookupError("no such\nthing")

    crash = trio.Event()

    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(f"{node.name} {os.getpid()}".encode())
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, greet, listeners)
        node.started({
            "status": lambda: {"name": node.name, "pid": os.getpid(), "port": port},
            "settings": lambda: dict(node.settings),
            "count": count,
            "fail": fail,
            "unspeakable": lambda: object(),
            "crash": crash.set,
        })  # fmt: skip

        async def crash_when_told() -> None:
            await crash.wait()
            raise RuntimeError("told to crash")

        nursery.start_soon(crash_when_told)
        await node.drain_requested.wait()
        await trio.sleep(float(node.settings.get("drain_s", 0)))
        if node.settings.get("drain") == "fail":
            raise OSError("could not let go")
        nursery.cancel_scope.cancel()


async def broken(node: NodeHandle) -> None:
    """Cannot start."""
    raise ValueError(f"{node.name} has no database")


async def mute(node: NodeHandle) -> None:
    """Never says that it is up."""
    await trio.sleep_forever()


async def hasty(node: NodeHandle) -> None:
    """Returns though nobody asked it to."""
    node.started()
