"""The proof that a relay answers where it says: a STUN Binding exchange with each address, over
the transport that it names; over TLS with a certificate of which the relay told the pin.

Another transport is another row of `_PROOFS`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio
from cryptography.x509 import Certificate

from channel.binding import MAX_RESPONSE_BYTES, BindingProbe
from channel.credentials import pin_of
from channel.messages import SocketAddress
from runtime.net.address import Address
from runtime.net.tcp import connect_tcp
from runtime.net.tls import TlsFailed, TlsStream, judging_client, shake_hands
from runtime.net.udp import UdpSocket
from runtime.randomness import Randomness

ATTEMPTS: Final = 4
ATTEMPT_S: Final = 0.5
CONNECTION_S: Final = 4.0
"""For all of a proof over a connection: TCP sends a lost SYN again after a second."""
ALPN: Final = "stun.turn"

_HEADER_BYTES: Final = 20
_LOST: Final = (trio.BrokenResourceError, trio.ClosedResourceError)

Pins = tuple[str, ...]


class _Untrusted(Exception):
    """The certificate has none of the pins."""


async def prove_address(address: SocketAddress, pins: Pins, randomness: Randomness) -> bool:
    """Whether something answers STUN at this address: over UDP up to ATTEMPTS requests, ATTEMPT_S
    apart; over TCP and TLS within CONNECTION_S, TLS with one of the `pins` (SHA-256 of the
    SubjectPublicKeyInfo, in hexadecimal). What cannot be asked is not proved. Raises nothing.
    """
    proof = _PROOFS.get(address.transport)
    if proof is None:
        return False
    target = Address(str(address.address), address.port)
    try:
        return await proof(target, pins, BindingProbe(randomness))
    except (OSError, TlsFailed, _Untrusted, *_LOST):
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
            return await _answers_on(stream, probe)
    return False


async def _prove_tls(target: Address, pins: Pins, probe: BindingProbe) -> bool:
    def verify(chain: Sequence[Certificate]) -> None:
        if not chain or pin_of(chain[0]).hex() not in pins:
            raise _Untrusted

    with trio.move_on_after(CONNECTION_S):
        async with await connect_tcp(target) as tcp:
            stream = judging_client(tcp, server_name=None, verify=verify, alpn=ALPN)
            await shake_hands(stream)
            return await _answers_on(stream, probe)
    return False


_PROOFS: Final[dict[str, Callable[[Address, Pins, BindingProbe], Awaitable[bool]]]] = {
    "udp": _prove_udp,
    "tcp": _prove_tcp,
    "tls": _prove_tls,
}


async def _answers_on(stream: trio.SocketStream | TlsStream, probe: BindingProbe) -> bool:
    """Whether the first message on a new connection is the answer."""
    await stream.send_all(probe.request)
    answer = b""
    size = _HEADER_BYTES
    while len(answer) < size <= MAX_RESPONSE_BYTES:
        piece = await stream.receive_some(size - len(answer))
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
