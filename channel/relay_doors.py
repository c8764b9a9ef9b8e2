"""What everybody has to know who connects to a relay: its protocols' names, and how it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Final

from cryptography.x509 import Certificate

from channel.credentials import pin_of
from runtime.net.quic import QuicLimits

STREAM_ALPN: Final = "stun.turn"
"""Over TLS (RFC 7443)."""
QUIC_ALPN: Final = "holloway-turn"
"""Over QUIC (docs/turn-over-quic.md)."""
QUIC_DATAGRAM_BYTES: Final = 1_400
"""Of a UDP datagram: a full packet of a tunnel (1,316 bytes as ChannelData) goes into one. A path
that does not carry it lets no handshake through."""
QUIC_IDLE_TIMEOUT_NS: Final = 30 * 10**9


class QuicCode(IntEnum):
    """Why either end closed a connection over QUIC (docs/turn-over-quic.md)."""

    NO_ERROR = 0
    FRAMING_ERROR = 1
    IDLE = 2
    SLOW = 3
    SUPERSEDED = 4


class UntrustedRelay(Exception):
    """It shows a certificate with another key than the portal told."""


def accepts(pins: Iterable[str]) -> Callable[[Sequence[Certificate]], None]:
    """A judge of certificate chains who raises UntrustedRelay unless the first key is one of `pins`
    (SHA-256 of the SubjectPublicKeyInfo, in hexadecimal)."""
    known = frozenset(pins)

    def judge(chain: Sequence[Certificate]) -> None:
        if not chain or pin_of(chain[0]).hex() not in known:
            raise UntrustedRelay("the relay has another key than the portal told")

    return judge


def quic_client_limits() -> QuicLimits:
    """Of a connection to a relay."""
    return QuicLimits(
        datagram_bytes=QUIC_DATAGRAM_BYTES,
        carries_datagrams=True,
        client_opens=True,
        idle_timeout_ns=QUIC_IDLE_TIMEOUT_NS,
    )
