"""Starts the processes of a relay, and starts again what ends.

The parent opens all sockets for clients, one for each process (SO_REUSEPORT: the kernel chooses by
the client's address), and keeps them open: a process that ends changes nothing for the clients of
the others, and its own find the one that takes its place at the same socket, which knows no
allocation of theirs (437), so that they make new ones.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import msgspec
import trio

from relays.authentication import Credentials, StampedCredentials, StaticCredentials
from relays.fastpath.attaching import Attached
from relays.fastpath.drain import load as load_drain
from relays.fastpath.loader import BpfError
from relays.processes.fleet import Fleet, share_of
from relays.processes.link import Link
from relays.processes.messages import (
    Inherited,
    Setup,
    ShownCertificate,
    ToWorker,
    decode_from_worker,
    encode,
)
from relays.serving import attach_if_wanted
from relays.settings import MAX_PROCESSES, Addresses, RelaySettings, SettingsError
from relays.transports.statistics import TransportStatistics
from relays.transports.tls import CertificateSource
from relays.transports.udp import open_listener
from runtime.net.address import Address
from runtime.net.binding import binding
from runtime.randomness import SystemRandomness
from runtime.service import get_logger

FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 30.0
LONG_LIFE_S: Final = 60.0
"""A process that lived so long is started again without much of a pause."""
SILENCE_S: Final = 15.0
"""One that reports nothing for so long is killed: it reports twice a second."""
ENDING_S: Final = 5.0
FIRST_START_S: Final = 30.0
MAX_UNTOLD: Final = 4_096
"""Messages that a worker has not taken; one more, and it is taken for dead."""
POST_BYTES: Final = 4 * 1024 * 1024


class Supervisor:
    """Stands where a relay of one process has its `relays.serving.Serving`."""

    def __init__(
        self,
        settings: RelaySettings,
        addresses: Addresses,
        credentials: Credentials,
        *,
        certificates: CertificateSource | None,
        count: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called when a process begins to serve, or ends. Raises SettingsError."""
        try:
            self.server = Fleet(
                settings=settings,
                ports=(addresses.first_port, addresses.last_port),
                count=count,
                credentials=credentials,
            )
        except ValueError as error:
            raise SettingsError(f"relayed_ports: {error}") from None
        built = settings.compiled_drain and load_drain(SystemRandomness()) is not None
        self.data_path = "compiled" if built else "python"
        self._settings = settings
        self._attached: Attached | None = None
        self._addresses = addresses
        self.certificates = certificates
        self._on_change = on_change
        self._log = get_logger("relay")
        self._listeners: list[tuple[Address, list[socket.socket]]] = []
        self._opened = ExitStack()
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(count)]
        for pair in pairs:
            for one in pair:
                self._opened.enter_context(one)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, POST_BYTES)
        self._inboxes = [inbox for inbox, _ in pairs]
        self._posts = [post for _, post in pairs]
        self._tell_by_index: dict[int, trio.MemorySendChannel[ToWorker]] = {}
        self._scope_by_index: dict[int, trio.CancelScope] = {}
        self._all_serve = trio.Event()
        self.server.tell = self._tell

    def listen(self) -> None:
        """Open a listener for each process at each address. Raises OSError."""
        self._attached = attach_if_wanted(self._settings, self._addresses)
        for address in self._addresses.listen_by_transport["udp"]:
            opened: list[socket.socket] = []
            with binding("listen", f"{address} (UDP)"):
                for _ in range(self.server.count):
                    one = self._opened.enter_context(open_listener(address, reuse_port=True))
                    opened.append(one)
                    name = one.getsockname()
                    address = Address(name[0], name[1])
            self._listeners.append((address, opened))
            self._log.info(
                "listening", address=str(address), transport="udp", processes=self.server.count
            )
        pins = () if self.certificates is None else (self.certificates.current.pin,)
        for transport, addresses in self._addresses.listen_by_transport.items():
            for address in addresses if transport != "udp" else ():
                self._log.info(
                    "listening",
                    address=str(address),
                    transport=transport,
                    processes=self.server.count,
                    **({} if transport == "tcp" else {"pins": pins}),
                )
        self._log.info("data_path", mode=self.data_path)

    def certificate_renewed(self) -> None:
        """`certificates` shows another one."""
        shown = self._shown()
        if shown is not None:
            self._tell(shown)

    async def run(self) -> None:
        """Keep all processes running, until cancelled; then all have ended."""
        async with trio.open_nursery() as nursery:
            for index in range(self.server.count):
                nursery.start_soon(self._keep, index)

    async def wait_serving(self) -> None:
        """Return when all processes serve for the first time; or after a while, if they do not."""
        with trio.move_on_after(FIRST_START_S):
            await self._all_serve.wait()

    def statistics(self) -> dict[str, int]:
        """Sums over the processes."""
        total = Counter(self.server.statistics())
        if self._attached is not None:  # its program counts for all of them
            packets, size = self._attached.path.relayed()
            total.update(self._attached.path.statistics())
            total.update(relayed_packets=packets, relayed_bytes=size)
        return {
            **total,
            "processes": self.server.serving,
            "process_restarts": self.server.restarts,
        }

    def transports(self) -> dict[str, TransportStatistics]:
        """Sums over the processes."""
        return self.server.transports()

    def close(self) -> None:
        if self._attached is not None:
            self._attached.close()
        self._opened.close()

    # --- one process -----------------------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            began = trio.current_time()
            status = await self._run_once(index)
            if trio.current_time() - began >= LONG_LIFE_S:
                pause_s = FIRST_PAUSE_S
            self.server.restarts += 1
            self._log.error("process_ended", process=index, status=status, again_in_s=pause_s)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _run_once(self, index: int) -> int | None:
        """Start a process and serve it until it ends; its status, None if it did not start."""
        ours, theirs = socket.socketpair()
        link = Link(ours)
        with theirs:
            inherited, descriptors = self._inherited(index)
            try:
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-m", "relays.processes.worker", str(theirs.fileno())],
                    pass_fds=(*descriptors, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"HOLLOWAY_RELAY_TOKEN": "", "HOLLOWAY_RELAY_PASSWORD": ""},
                )
            except OSError as error:
                self._log.error("process_not_started", process=index, reason=str(error))
                link.close()
                return None
        self._log.info("process_started", process=index, pid=process.pid)
        try:
            send, receive = trio.open_memory_channel[ToWorker](MAX_UNTOLD)
            send.send_nowait(self._setup(index, inherited))
            self._tell_by_index[index] = send
            async with trio.open_nursery() as nursery:
                self._scope_by_index[index] = nursery.cancel_scope
                nursery.start_soon(self._write, link, receive)
                await self._listen(index, link)
                nursery.cancel_scope.cancel()
        finally:
            self._tell_by_index.pop(index, None)
            self._scope_by_index.pop(index, None)
            self.server.ended(index)
            self._forget_flows(index)
            self._on_change()
            link.close()
            with trio.CancelScope(shield=True):
                await _end(process)
        return process.returncode

    def _inherited(self, index: int) -> tuple[Inherited, list[int]]:
        listeners = [
            (address.host, address.port, opened[index].fileno())
            for address, opened in self._listeners
        ]
        posts = [-1 if at == index else post.fileno() for at, post in enumerate(self._posts)]
        inbox = self._inboxes[index].fileno()
        flows = -1 if self._attached is None else self._attached.flows_descriptor
        inherited = Inherited(listeners=listeners, inbox=inbox, posts=posts, flows=flows)
        others = [one for one in (*posts, flows) if one >= 0]
        return inherited, [*(one for _, _, one in listeners), inbox, *others]

    def _forget_flows(self, index: int) -> None:
        """What an ended process had allowed ends with it."""
        if self._attached is None:
            return
        try:
            self._attached.forget_ports(*self.server.slices[index])
        except BpfError as error:
            self._log.error("fast_path_not_forgotten", process=index, reason=str(error))

    def _setup(self, index: int, inherited: Inherited) -> Setup:
        fleet, credentials = self.server, self.server.credentials
        stamped = credentials if isinstance(credentials, StampedCredentials) else None
        static = credentials if isinstance(credentials, StaticCredentials) else None
        return Setup(
            index=index,
            slices=fleet.slices,
            settings=share_of(self._settings, fleet.slices[index], fleet.count),
            inherited=inherited,
            users=None if static is None else static.reveal_passwords(),
            stamp_secret=b"" if stamped is None else stamped.reveal_stamp_secret(),
            relay_id=None if stamped is None else stamped.relay_id,
            revoked_until={} if stamped is None else stamped.revoked_until,
            draining=fleet.draining,
            certificate=self._shown(),
        )

    def _shown(self) -> ShownCertificate | None:
        if self.certificates is None:
            return None
        current = self.certificates.current
        return ShownCertificate(chain=current.chain, key=current.key.reveal())

    async def _write(self, link: Link, receive: trio.MemoryReceiveChannel[ToWorker]) -> None:
        try:
            async for message in receive:
                await link.send(encode(message))
        except trio.BrokenResourceError:
            return  # the reading side sees that it ended

    async def _listen(self, index: int, link: Link) -> None:
        """Take reports until the process ends, falls silent, or says what is none."""
        lines = link.lines()
        try:
            while True:
                with trio.fail_after(SILENCE_S):
                    line = await anext(lines)
                was_serving = self.server.serving
                self.server.reported(index, decode_from_worker(line))
                if self.server.serving != was_serving:
                    self._on_change()
                if self.server.serving == self.server.count:
                    self._all_serve.set()
        except (StopAsyncIteration, trio.TooSlowError, msgspec.MsgspecError):
            return

    def _tell(self, message: ToWorker) -> None:
        for index, send in list(self._tell_by_index.items()):
            try:
                send.send_nowait(message)
            except trio.WouldBlock:
                self._scope_by_index[index].cancel()


def process_count(settings: RelaySettings) -> int:
    """How many processes are wanted: what is set, or one for each core that we may use."""
    return settings.processes or min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


async def _end(process: trio.Process) -> None:
    """A worker ends when its link does; one that does not is killed."""
    with trio.move_on_after(ENDING_S):
        await process.wait()
        return
    process.kill()
    await process.wait()
