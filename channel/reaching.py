"""How an agent reaches an address of its portal: over QUIC, or WebSocket where UDP is blocked.

Either proves the portal by the pin, the chain and the name before it sends anything (see
`channel.credentials.verify_portal`). The two are raced, by the rule of `channel.transports.Race`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import attrs
import trio
from cryptography.x509 import Certificate

from channel.agent_session import DialerOptions
from channel.credentials import UntrustedPortal, verify_portal
from channel.transports import ALPN, PATH, SUBPROTOCOL, Race, TransportName
from runtime.clock import NS_PER_S, Clock
from runtime.net.address import Address, split_host_port
from runtime.net.connection import Connection, ConnectionClosed
from runtime.net.quic import connect_quic
from runtime.net.quic_probe import quic_answers
from runtime.net.tcp import route_to
from runtime.net.websocket import connect_websocket


class Unreached(Exception):
    """An address could not be reached by any transport; the text says why, for each."""


@attrs.frozen(kw_only=True)
class Reach:
    """How to come to one portal (`host:port`, of the token) with this CA's pin; whatever address is
    dialled. `mark` is the SO_MARK of sockets, `source` the address to dial from, if not any."""

    portal: str
    pin: bytes = attrs.field(repr=False)
    clock: Clock
    options: DialerOptions
    mark: int | None
    source: str | None

    def network(self, address: Address) -> str:
        """The address of this machine towards the portal. Raises OSError without a route."""
        return self.source or route_to(address, self.mark)

    async def quic_answers(self, address: Address) -> bool:
        """Whether it seems that QUIC would reach the portal there."""
        try:
            return await quic_answers(address, mark=self.mark, source=self.source)
        except OSError:
            return False

    def quic(self, address: Address) -> AbstractAsyncContextManager[Connection]:
        """See `connect_quic`; raises UntrustedPortal too."""
        return connect_quic(
            address,
            server_name=self._host,
            alpn=ALPN,
            verify=self._verify,
            limits=self.options.quic,
            mark=self.mark,
            source=self.source,
        )

    def websocket(self, address: Address) -> AbstractAsyncContextManager[Connection]:
        """See `connect_websocket`; raises UntrustedPortal too."""
        return connect_websocket(
            address,
            server_name=self._host,
            host=self.portal,
            path=PATH,
            subprotocol=SUBPROTOCOL,
            verify=self._verify,
            limits=self.options.websocket,
            mark=self.mark,
            source=self.source,
        )

    @asynccontextmanager
    async def either(
        self, address: Address, websocket_after_ns: int
    ) -> AsyncIterator[tuple[TransportName, Connection]]:
        """The connection that was first; within the block it stands, after it it is closed.
        Raises Unreached. What the block raises is not wrapped in a group."""
        race = _Race(
            Race(websocket_after_ns, self.clock.monotonic_ns()),
            self.clock,
            {"quic": lambda: self.quic(address), "websocket": lambda: self.websocket(address)},
        )
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(race.run, nursery)
            try:
                await race.decided.wait()
                if race.winner is None:
                    raise Unreached("; ".join(race.rule.problems))
                yield race.winner
            except Exception as error:
                failure = error
            finally:
                race.over.set()
        if failure is not None:
            raise failure

    @property
    def _host(self) -> str:
        return split_host_port(self.portal)[0]

    def _verify(self, chain: Sequence[Certificate]) -> None:
        verify_portal(chain, pin=self.pin, host=self._host, at=self.clock.utc_now())


class _Race:
    """Carries out a race. The winner's connection stands until `over`."""

    def __init__(
        self,
        rule: Race,
        clock: Clock,
        connecting: Mapping[TransportName, Callable[[], AbstractAsyncContextManager[Connection]]],
    ) -> None:
        self.rule = rule
        self.winner: tuple[TransportName, Connection] | None = None
        self.decided = trio.Event()
        self.over = trio.Event()
        self._clock = clock
        self._connecting = connecting
        self._scopes = {name: trio.CancelScope() for name in connecting}
        self._news = trio.Event()

    async def run(self, nursery: trio.Nursery) -> None:
        """Have each begin when it is to, until it is decided."""
        while not self.rule.is_over:
            self._news = trio.Event()
            now = self._clock.monotonic_ns()
            for name in self.rule.begin(now):
                nursery.start_soon(self._compete, name)
            due = self.rule.poll_timeout()
            with trio.CancelScope() as waiting:
                if due is not None:
                    waiting.deadline = trio.current_time() + max(0, due - now) / NS_PER_S
                await self._news.wait()
        self.decided.set()

    async def _compete(self, name: TransportName) -> None:
        with self._scopes[name]:
            try:
                async with self._connecting[name]() as connection:
                    if self.rule.opened(name):
                        self._won(name, connection)
                        await self.over.wait()
            except (UntrustedPortal, ConnectionClosed) as error:
                self._failed(name, str(error))
            except OSError as error:
                self._failed(name, error.strerror or str(error))

    def _won(self, name: TransportName, connection: Connection) -> None:
        self.winner = name, connection
        for other, scope in self._scopes.items():
            if other != name:
                scope.cancel()
        self._news.set()

    def _failed(self, name: TransportName, why: str) -> None:
        self.rule.failed(name, why, self._clock.monotonic_ns())
        self._news.set()
