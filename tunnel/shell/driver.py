"""The trio shell around an agent and its engine: sockets, TUN device, timer, network changes.

Every wake-up is one of four: datagrams on a socket, packets on the TUN device, a timer, frames of
the portal. Each hands its batch to the core and then calls `flush`, which moves whatever the core
has: datagrams to sockets, packets to the TUN device, messages to the portal, events to the task
that acts on the system. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import attrs
import trio

from runtime.clock import Clock
from runtime.guard import Guard
from runtime.net.address import Address
from runtime.net.udp import UdpSocket
from runtime.service import get_logger
from tunnel.agent import Outgoing
from tunnel.engine import Engine
from tunnel.shell.commands import CommandFailed
from tunnel.shell.links import LinkKeeper
from tunnel.shell.network import Interface, NetworkMonitor, usable_addresses
from tunnel.shell.tun import TunDevice

# At most so many packets are moved before timers and other tasks get their turn: about 2 ms. A
# turn of the event loop costs as much as some ten packets.
SOCKET_BATCH = 256
TUN_BATCH = 256
# Timers are looked at this often at least: the event loop's clock stands still in a suspend.
MAX_SLEEP_NS = 5 * 10**9
PAUSE_AFTER_FAILURE_S = 1.0
NS_PER_S = 10**9
_WAY = itemgetter(0, 1)  # local and remote address of a Transmit

log = get_logger("driver")


class DrivenAgent(Protocol):
    """What the driver moves: `ClientAgent` and `GatewayAgent` are such agents."""

    engine: Engine

    def receive_packets(self, packets: Iterable[bytes], now: int) -> None: ...
    def pump(self, now: int) -> object: ...
    def poll_timeout(self) -> int | None: ...
    def handle_timeout(self, now: int) -> None: ...
    def finish(self, now: int) -> None: ...
    def unsent(self, outgoing: Outgoing, now: int) -> None: ...
    def drain_messages(self) -> list[Outgoing]: ...
    def drain_packets(self) -> list[bytes]: ...
    def drain_events(self) -> list[Any]: ...


class Sender(Protocol):
    """The way to the portal: a `channel.dialer.Dialer`."""

    def send(self, message: object, *, ref: int | None = None) -> bool: ...
    def poke(self) -> None: ...


@attrs.frozen(kw_only=True)
class DriverStatistics:
    """Present sockets, and counts since the start."""

    sockets: tuple[str, ...]
    sent_datagrams: int
    received_datagrams: int
    dropped_datagrams: int
    unsent_messages: int
    failed_events: int
    failed_inputs: int
    network_changes: int


class EngineDriver:
    """Runs one agent until cancelled. Set `sender` before `run`.

    `mark` is the SO_MARK of the engine's sockets (None: no mark); `port` is tried first for each
    of them (0: any). `perform` carries out an event of the agent on the system; events run one
    after the other, and one that fails is logged and reported by `on_failure`.
    """

    def __init__(
        self,
        agent: DrivenAgent,
        *,
        tun: TunDevice,
        clock: Clock,
        mark: int | None,
        port: int,
        perform: Callable[[Any], Awaitable[None]],
        on_failure: Callable[[str], None],
    ) -> None:
        self.sender: Sender | None = None
        self._agent = agent
        self._engine = agent.engine
        self._tun = tun
        self._clock = clock
        self._mark = mark
        self._port = port
        self._perform = perform
        self._on_failure = on_failure
        self._sockets: dict[Address, UdpSocket] = {}
        self._interfaces: dict[Interface, Address] = {}
        self._timer_scope = trio.CancelScope()
        self._timer_at = 0
        self._events: list[Any] = []
        self._events_came = trio.Event()
        self._sent = self._received = self._dropped = 0
        self._unsent_messages = self._failed_events = self._network_changes = 0
        self._guard = Guard("driver")
        self._links = LinkKeeper(self._engine, clock, mark=mark, flush=self.flush)
        self._link_nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Drive until cancelled; the sockets are closed then. Raises OSError, CommandFailed when
        the machine's addresses cannot be read at the start."""
        monitor = NetworkMonitor()
        try:
            async with trio.open_nursery() as nursery:
                self._link_nursery = nursery
                await self._follow_addresses(nursery)
                nursery.start_soon(self._watch_network, monitor, nursery)
                nursery.start_soon(self._read_tun)
                nursery.start_soon(self._run_timers)
                nursery.start_soon(self._perform_events)
        finally:
            self._link_nursery = None
            monitor.close()
            # Relays get their allocations back now, and need not wait until they expire.
            self._engine.end(self._clock.monotonic_ns())
            self._transmit()
            for opened in self._sockets.values():
                opened.close()

    def flush(self) -> None:
        """Move everything that the core has to where it belongs. Never waits."""
        agent = self._agent
        agent.pump(self._clock.monotonic_ns())
        self._transmit()
        packets = agent.drain_packets()
        if packets:
            self._tun.write_batch(packets)
        for outgoing in agent.drain_messages():
            if self.sender is None or not self.sender.send(outgoing.message, ref=outgoing.ref):
                self._unsent_messages += 1
                agent.unsent(outgoing, self._clock.monotonic_ns())
        events = agent.drain_events()
        if events:
            self._events += events
            self._events_came.set()
        self._reschedule()

    def finish(self) -> None:
        """Let the agent say its last."""
        self._agent.finish(self._clock.monotonic_ns())
        self.flush()

    def statistics(self) -> DriverStatistics:
        return DriverStatistics(
            sockets=tuple(str(local) for local in self._sockets),
            sent_datagrams=self._sent,
            received_datagrams=self._received,
            dropped_datagrams=self._dropped,
            unsent_messages=self._unsent_messages,
            failed_events=self._failed_events,
            failed_inputs=self._guard.failures,
            network_changes=self._network_changes,
        )

    # --- tasks -----------------------------------------------------------------------------------

    async def _read_socket(self, opened: UdpSocket) -> None:
        local = opened.local_address
        try:
            while True:
                await opened.wait_readable()
                batch = opened.receive_batch(SOCKET_BATCH)
                self._received += len(batch)
                with self._guard:
                    self._engine.receive_datagrams(local, batch, self._clock.monotonic_ns())
                    self.flush()
        except trio.ClosedResourceError:
            return

    async def _read_tun(self) -> None:
        while True:
            await self._tun.wait_readable()
            packets = self._tun.read_batch(TUN_BATCH)
            if not packets:
                await trio.sleep(0.1)  # the interface is down, or gone
                continue
            with self._guard:
                self._agent.receive_packets(packets, self._clock.monotonic_ns())
                self.flush()

    async def _run_timers(self) -> None:
        while True:
            now = self._clock.monotonic_ns()
            self._timer_at = self._next_timeout(now)
            with trio.move_on_after((self._timer_at - now) / NS_PER_S) as self._timer_scope:
                await trio.sleep_forever()
            now = self._clock.monotonic_ns()
            failures = self._guard.failures
            with self._guard:
                self._engine.handle_timeout(now)
            with self._guard:  # leases end, whatever became of the engine's timer
                self._agent.handle_timeout(now)
                self.flush()
            if self._guard.failures != failures:
                await trio.sleep(PAUSE_AFTER_FAILURE_S)

    async def _perform_events(self) -> None:
        while True:
            await self._events_came.wait()
            self._events_came = trio.Event()
            events, self._events = self._events, []
            for event in events:
                try:
                    await self._perform(event)
                except (CommandFailed, OSError) as error:
                    self._failed_events += 1
                    log.error("event_failed", event_kind=type(event).__name__, error=str(error))
                    self._on_failure(str(error))

    async def _watch_network(self, monitor: NetworkMonitor, nursery: trio.Nursery) -> None:
        while True:
            await monitor.wait_for_change()
            try:
                changed = await self._follow_addresses(nursery)
            except CommandFailed as error:
                log.warning("addresses_unknown", error=str(error))
                continue
            if not changed:
                continue
            self._network_changes += 1
            self._engine.path_suspect(self._clock.monotonic_ns())
            self.flush()
            if self.sender is not None:
                self.sender.poke()

    # --- helpers ---------------------------------------------------------------------------------

    def _transmit(self) -> None:
        sockets = self._sockets
        for (local, remote), group in groupby(self._engine.drain_transmits(), key=_WAY):
            train = [data for _, _, data in group]
            opened = sockets.get(local)
            taken = 0 if opened is None else opened.send_batch(train, remote)
            self._sent += taken
            self._dropped += len(train) - taken
        if self._link_nursery is not None:
            self._links.move(self._link_nursery)

    async def _follow_addresses(self, nursery: trio.Nursery) -> bool:
        """One socket for each address that the machine has now; whether anything changed."""
        wanted = await usable_addresses(without=(self._tun.name,))
        now = self._clock.monotonic_ns()
        gone = [interface for interface in self._interfaces if interface not in wanted]
        for interface in gone:
            local = self._interfaces.pop(interface)
            self._sockets.pop(local).close()
            self._engine.remove_socket(local, now)
            log.info("socket_closed", address=str(local))
        if gone:
            self._links.leave_lost_addresses()
        added = False
        for interface in wanted:
            if interface in self._interfaces:
                continue
            opened = self._bind(str(interface.ip))
            if opened is None:
                continue
            added = True
            self._interfaces[interface] = opened.local_address
            self._sockets[opened.local_address] = opened
            nursery.start_soon(self._read_socket, opened)
            self._engine.add_socket(opened.local_address, now, network=str(interface.network))
            log.info("socket_opened", address=str(opened.local_address))
        self.flush()
        return added or bool(gone)

    def _bind(self, host: str) -> UdpSocket | None:
        for port in dict.fromkeys((self._port, 0)):
            try:
                return UdpSocket.bind(Address(host, port), mark=self._mark, trains=True)
            except OSError as error:
                log.warning("bind_failed", host=host, port=port, error=str(error))
        return None

    def _next_timeout(self, now: int) -> int:
        latest = now + MAX_SLEEP_NS
        due = (self._engine.poll_timeout(), self._agent.poll_timeout())
        return max(now, min((at for at in due if at is not None and at < latest), default=latest))

    def _reschedule(self) -> None:
        """Wake the timer earlier; a wake-up that proves too early does no harm."""
        now = self._clock.monotonic_ns()
        at = self._next_timeout(now)
        if at < self._timer_at:
            self._timer_at = at
            self._timer_scope.deadline = trio.current_time() + (at - now) / NS_PER_S
