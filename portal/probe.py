"""The proof that a relay answers where it says: a STUN Binding exchange with each address."""

from __future__ import annotations

from typing import Final

import trio

from channel.binding import BindingProbe
from channel.messages import SocketAddress
from runtime.net.address import Address
from runtime.net.udp import UdpSocket
from runtime.randomness import Randomness

ATTEMPTS: Final = 4
ATTEMPT_S: Final = 0.5


async def prove_address(address: SocketAddress, randomness: Randomness) -> bool:
    """Whether something answers STUN at this address; up to ATTEMPTS requests, ATTEMPT_S apart.

    Only UDP can be proved so far: an address of another transport is not. Raises nothing.
    """
    if address.transport != "udp":
        return False
    target = Address(str(address.address), address.port)
    any_host = "::" if ":" in target.host else "0.0.0.0"  # noqa: S104  # an ephemeral port of ours
    probe = BindingProbe(randomness)
    try:
        with UdpSocket.bind(Address(any_host, 0)) as socket:
            for _ in range(ATTEMPTS):
                socket.send(probe.request, target)
                with trio.move_on_after(ATTEMPT_S):
                    if await _is_answered(socket, probe, target):
                        return True
    except OSError:
        return False
    return False


async def _is_answered(socket: UdpSocket, probe: BindingProbe, target: Address) -> bool:
    while True:
        await socket.wait_readable()
        for datagram, sender in socket.receive_batch():
            if sender == target and probe.answer(datagram) is not None:
                return True
