"""The compiled drain: what `_drain.c` does, behind the seam of fast paths.

It is optional. Where the extension was not built (no compiler, no headers of Python) or is of
another version, `load` gives None and `relays.transports.udp` reads its sockets in Python; the
outcome is the same, at about twice the time per packet.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Final

from relays.allocations import Allocation, Channel
from runtime.randomness import Randomness

VERSION: Final = 1
"""Of `_drain.c`: an extension that was built from other sources is not used."""

Unknown = tuple[int, bytes, tuple[str, int], int]
"""Socket number, data, source, and the bytes of each datagram in it (0: it is one)."""

_extension: ModuleType | None
try:
    from relays.fastpath import _drain

    _extension = _drain
except ImportError:
    _extension = None


class CompiledDrain:
    """Sockets and routes of one `relays.transports.udp.UdpSockets`; a `FastPath` for the core.

    A channel of a client at a UDP listener has two routes, from the first word of its peer on, and
    until the first end of channel, permission and allocation. They end by themselves.
    """

    def __init__(self, extension: ModuleType, seed: int) -> None:
        self._drain = extension.Drain(seed)
        self._descriptor_by_number: dict[int, int] = {}

    # --- what the sockets' owner calls -----------------------------------------------------------

    def watch(self, descriptor: int, number: int, *, is_listener: bool) -> None:
        self._descriptor_by_number[number] = descriptor
        self._drain.watch(descriptor, number, is_listener)

    def forget(self, number: int) -> None:
        """To be called before the socket is closed."""
        descriptor = self._descriptor_by_number.pop(number, None)
        if descriptor is not None:
            self._drain.forget(descriptor)

    def turn(self, epoll: int, now: int) -> tuple[int, list[Unknown], list[int]]:
        """Read what is readable, within bounds: how many sockets that were, what the core has to
        handle, and the numbers of sockets that have an error to tell."""
        turn: tuple[int, list[Unknown], list[int]] = self._drain.turn(epoll, now)
        return turn

    def datagrams(self) -> dict[str, int]:
        """Counts of what was received and sent, as `UdpSockets.statistics` names them."""
        counts: dict[str, int] = self._drain.datagrams()
        return counts

    # --- what the core calls ---------------------------------------------------------------------

    def channels_changed(self, allocation: Allocation, now: int, host: str | None = None) -> None:
        for channel in allocation.channel_by_number.values():
            if host is None or channel.peer[0] == host:
                permission = channel.permission
                expires_ns = min(
                    permission.relayed.expires_ns, channel.expires_ns, permission.expires_ns
                )
                if permission.answered and not permission.is_own and expires_ns > now:
                    self._each(self._drain.put, allocation, channel, expires_ns)

    def allocation_ended(self, allocation: Allocation) -> None:
        for channel in allocation.channel_by_number.values():
            self._each(self._drain.drop, allocation, channel, 0)

    def handle_timeout(self, now: int) -> None:
        """What has ended is dropped when room is needed."""

    def relayed(self) -> tuple[int, int]:
        counts: tuple[int, int] = self._drain.relayed()
        return counts

    def statistics(self) -> dict[str, int]:
        return {"drain_routes": self._drain.routes()}

    def _each(
        self,
        act: Callable[..., object],
        allocation: Allocation,
        channel: Channel,
        expires_ns: int,
    ) -> None:
        """Put or drop both routes of a channel, if its sockets are watched here."""
        listener = self._descriptor_by_number.get(allocation.listener)
        socket = self._descriptor_by_number.get(channel.permission.relayed.socket)
        if listener is not None and socket is not None:
            client, peer = allocation.client, channel.peer
            act(listener, client, channel.number, socket, peer, expires_ns)


def load(randomness: Randomness, extension: ModuleType | None = _extension) -> CompiledDrain | None:
    """The compiled drain, None where it was not built. The seed keeps clients from choosing
    addresses that fall together in its table."""
    if extension is None or getattr(extension, "VERSION", 0) != VERSION:
        return None
    return CompiledDrain(extension, int.from_bytes(randomness.bytes(8), "big"))
