"""The shell around `tunnel.ice.links`: connections to relays, opened and closed as it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Final

import trio

from relays.transports.dial import RelayConnection, RelayUnreached, connect_relay
from runtime.clock import Clock
from runtime.guard import Guard
from runtime.net.tcp import has_address
from runtime.service import get_logger
from tunnel.engine import Engine, OpenLink

_LINK: Final = itemgetter(0)

log = get_logger("links")


class LinkKeeper:
    """Moves messages between an engine and its relays' connections. `flush` is called after
    whatever came; `mark` is the SO_MARK of the sockets."""

    def __init__(
        self, engine: Engine, clock: Clock, *, mark: int | None, flush: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._mark = mark
        self._flush = flush
        self._scope_by_link: dict[int, trio.CancelScope] = {}
        self._connection_by_link: dict[int, RelayConnection] = {}
        self._guard = Guard("links")
        self.dropped_messages = 0

    def move(self, nursery: trio.Nursery) -> None:
        """Send what the engine has for its links, and do with them what it says."""
        for link, group in groupby(self._engine.drain_link_messages(), key=_LINK):
            connection = self._connection_by_link.get(link)
            messages = [message for _, message in group]
            if connection is None:
                self.dropped_messages += len(messages)
            else:
                self.dropped_messages += connection.send(messages)
        for command in self._engine.drain_link_commands():
            if isinstance(command, OpenLink):
                scope = self._scope_by_link[command.link] = trio.CancelScope()
                nursery.start_soon(self._keep, command, scope)
            elif command.link in self._scope_by_link:
                self._scope_by_link[command.link].cancel()

    def leave_lost_addresses(self) -> None:
        """This machine has lost an address: end the connections that are bound to it."""
        for link, connection in self._connection_by_link.items():
            if connection.local_host is not None and not has_address(connection.local_host):
                self._scope_by_link[link].cancel()

    async def _keep(self, command: OpenLink, scope: trio.CancelScope) -> None:
        link = command.link
        told = {"transport": command.transport, "address": str(command.address)}
        try:
            with scope:
                async with connect_relay(
                    command.transport, command.address, pins=command.pins, mark=self._mark
                ) as connection:
                    self._connection_by_link[link] = connection
                    log.info("relay_link_opened", **told)
                    self._tell(self._engine.link_opened, link)
                    while True:
                        self._hear(link, await connection.receive())
        except (RelayUnreached, OSError) as error:
            log.info("relay_link_closed", **told, reason=str(error))
        finally:
            del self._scope_by_link[link]
            self._connection_by_link.pop(link, None)
            self._tell(self._engine.link_closed, link)

    def _hear(self, link: int, messages: Sequence[bytes]) -> None:
        with self._guard:
            self._engine.receive_from_link(link, messages, self._clock.monotonic_ns())
            self._flush()

    def _tell(self, what: Callable[[int, int], None], link: int) -> None:
        with self._guard:
            what(link, self._clock.monotonic_ns())
            self._flush()
