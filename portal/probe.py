"""The proof that a relay answers where it says: a STUN Binding exchange with each address, over
the transport that it names; over TLS and QUIC with a certificate of which the relay told the pin.

Another transport is another row of `_PROOFS`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from channel.binding import MAX_RESPONSE_BYTES, BindingProbe
from channel.messages import SocketAddress
from channel.relay_doors import (
    QUIC_ALPN,
    STREAM_ALPN,
    UntrustedRelay,
    accepts,
    quic_client_limits,
)
from runtime.net.address import Address
from runtime.net.connection import ConnectionClosed
from runtime.net.quic import connect_quic
from runtime.net.tcp import connect_tcp
from runtime.net.tls import TlsFailed, judging_client, shake_hands
from runtime.net.udp import UdpSocket
from runtime.randomness import Randomness

ATTEMPTS: Final = 4
ATTEMPT_S: Final = 0.5
CONNECTION_S: Final = 4.0
"""For all of a proof over a connection: TCP sends a lost SYN again after a second."""

_HEADER_BYTES: Final = 20
_LOST: Final = (trio.BrokenResourceError, trio.ClosedResourceError)

Pins = tuple[str, ...]


async def prove_address(address: SocketAddress, pins: Pins, randomness: Randomness) -> bool:
    """Whether something answers STUN at this address: over UDP up to ATTEMPTS requests, ATTEMPT_S
    apart; over TCP, TLS and QUIC within CONNECTION_S, TLS and QUIC with one of the `pins` (SHA-256
    of the SubjectPublicKeyInfo, in hexadecimal). Raises nothing.
    """
    proof = _PROOFS.get(address.transport)
    if proof is None:
        return False
    target = Address(str(address.address), address.port)
    try:
        return await proof(target, pins, BindingProbe(randomness))
    except (OSError, TlsFailed, UntrustedRelay, ConnectionClosed, *_LOST):
        return False


async def _prove_udp(target: Address, pins: Pins, probe: BindingProbe) -> bool:
    any_host = "::" if ":" in target.host else "0.0.0.0"  # noqa: S104  # an ephemeral port of ours
    with UdpSocket.bind(Address(any_host, 0)) as socket:
        for _ in range(ATTEMPTS):
            socket.send(probe.request, target)
            with trio.move_on_after(ATTEMPT_S):
                if await _is_answered(socket, probe, target):
                    return True
    return False


async def _prove_tcp(target: Address, pins: Pins, probe: BindingProbe) -> bool:
    with trio.move_on_after(CONNECTION_S):
        async with await connect_tcp(target) as stream:
            await stream.send_all(probe.request)
            return await _is_answered_by(stream.receive_some, probe)
    return False


async def _prove_tls(target: Address, pins: Pins, probe: BindingProbe) -> bool:
    with trio.move_on_after(CONNECTION_S):
        async with await connect_tcp(target) as tcp:
            stream = judging_client(tcp, server_name=None, verify=accepts(pins), alpn=STREAM_ALPN)
            await shake_hands(stream)
            await stream.send_all(probe.request)
            return await _is_answered_by(stream.receive_some, probe)
    return False


async def _prove_quic(target: Address, pins: Pins, probe: BindingProbe) -> bool:
    with trio.move_on_after(CONNECTION_S):
        async with connect_quic(
            target,
            server_name=target.host,
            alpn=QUIC_ALPN,
            verify=accepts(pins),
            limits=quic_client_limits(),
        ) as connection:
            await connection.send_all(probe.request)
            return await _is_answered_by(connection.receive, probe)
    return False


_PROOFS: Final[dict[str, Callable[[Address, Pins, BindingProbe], Awaitable[bool]]]] = {
    "udp": _prove_udp,
    "tcp": _prove_tcp,
    "tls": _prove_tls,
    "quic": _prove_quic,
}


async def _is_answered_by(
    receive: Callable[[], Awaitable[bytes | bytearray]], probe: BindingProbe
) -> bool:
    """Whether the first message on a new connection is the answer."""
    answer = b""
    size = _HEADER_BYTES
    while len(answer) < size <= MAX_RESPONSE_BYTES:
        piece = await receive()
        if not piece:
            return False
        answer += piece
        if len(answer) >= _HEADER_BYTES:
            size = _HEADER_BYTES + int.from_bytes(answer[2:4], "big")
    return probe.answer(answer) is not None


async def _is_answered(socket: UdpSocket, probe: BindingProbe, target: Address) -> bool:
    while True:
        await socket.wait_readable()
        for datagram, sender in socket.receive_batch():
            if sender == target and probe.answer(datagram) is not None:
                return True
