"""What every connection of the control channel is, whatever carries it: bytes in order, both ways.

`runtime.net.quic` has one kind, `runtime.net.websocket` the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, Self

from runtime.net.address import Address

_MAX_REASON_CHARACTERS: Final = 200


class ConnectionClosed(Exception):
    """The connection is over. `code` is the peer's or our own (0 and above) or one of the kind of
    connection (below 0); `reason` is printable and short."""

    def __init__(self, code: int, reason: str) -> None:
        printable = "".join(c if c.isprintable() else "?" for c in reason[:_MAX_REASON_CHARACTERS])
        super().__init__(f"{printable or 'closed'} (code {code})")
        self.code = code
        self.reason = printable

    def anew(self) -> Self:
        """Its like, to be raised: what was raised holds, by its traceback, all that was near."""
        return type(self)(self.code, self.reason)


class Connection(Protocol):
    """One connection. Only one task at a time may receive. The two callbacks may be set at any
    time, and must not block."""

    on_migrated: Callable[[Address], None] | None
    """Called with the peer's new address, once that is validated."""

    on_pong: Callable[[], None] | None
    """Called when the peer answered a `ping`."""

    @property
    def remote(self) -> Address:
        """The peer's address, validated."""

    @property
    def closed(self) -> ConnectionClosed | None:
        """Why the connection is over, None while it is not."""

    def send(self, data: bytes) -> bool:
        """Queue bytes; never waits. False, and nothing is taken, when too much is under way or the
        connection is over."""

    async def receive(self) -> bytes:
        """What has come, at least one byte; b"" once the peer has ended its half in good order.
        Raises ConnectionClosed. Safe to cancel."""

    def ping(self) -> None:
        """Ask the peer's end for a sign of life, however much is under way."""

    def keepalive(self) -> None:
        """Send what draws an error where the peer's process is gone, if such a thing is needed."""

    def close(self, code: int = 0, reason: str = "", *, linger_ns: int = 0) -> None:
        """End the connection. For this side it is over at once; with `linger_ns` the peer still
        gets everything that was sent, for at most that long. Closing twice is harmless."""
