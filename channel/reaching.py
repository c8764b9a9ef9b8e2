"""How an agent reaches an address of its portal: over QUIC, or WebSocket where UDP is blocked.

Either proves the portal by the pin, the chain and the name before it sends anything (see
`channel.credentials.verify_portal`). The two are raced: QUIC begins, WebSocket follows when QUIC
has had its head start, or failed; who is first is taken, and the other called off.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import attrs
import trio
from cryptography.x509 import Certificate

from channel.agent_session import DialerOptions
from channel.credentials import UntrustedPortal, verify_portal
from channel.transports import ALPN, PATH, SUBPROTOCOL, TransportName
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
        race = _Race()
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(race.run, "quic", self.quic(address), 0)
            nursery.start_soon(race.run, "websocket", self.websocket(address), websocket_after_ns)
            try:
                await race.decided.wait()
                if race.winner is None:
                    raise Unreached("; ".join(race.problems))
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
    """Between the two transports. The winner's connection stands until `over`."""

    def __init__(self) -> None:
        self._scopes: dict[TransportName, trio.CancelScope] = {
            "quic": trio.CancelScope(),
            "websocket": trio.CancelScope(),
        }
        self._running = set(self._scopes)
        self._one_failed = trio.Event()
        self.winner: tuple[TransportName, Connection] | None = None
        self.problems: list[str] = []
        self.decided = trio.Event()
        self.over = trio.Event()

    async def run(
        self,
        name: TransportName,
        connecting: AbstractAsyncContextManager[Connection],
        after_ns: int,
    ) -> None:
        """Compete: `after_ns` after the start, or as soon as the other has failed."""
        with self._scopes[name]:
            if after_ns:
                with trio.move_on_after(after_ns / NS_PER_S):
                    await self._one_failed.wait()
            try:
                async with connecting as connection:
                    if self._won(name, connection):
                        await self.over.wait()
            except (UntrustedPortal, ConnectionClosed) as error:
                self.problems.append(f"{name}: {error}")
            except OSError as error:
                self.problems.append(f"{name}: {error.strerror or error}")
            self._running.discard(name)
            self._one_failed.set()
            if not self._running:
                self.decided.set()

    def _won(self, name: TransportName, connection: Connection) -> bool:
        if self.winner is not None:
            return False
        self.winner = name, connection
        self._running.discard(name)
        for loser in self._running:
            self._scopes[loser].cancel()
        self.decided.set()
        return True
