"""Whether a QUIC server can be reached by UDP, for the price of a datagram: a core, and its shell.

A datagram of a version that nobody speaks is answered by whoever speaks QUIC with those that he
does (Version Negotiation, RFC 9000, section 6.1), without a key, a state or a signature on either
side. The versions that look like 0x?a?a?a?a are reserved for this (section 15). The answer repeats
the connection ids of the question, which are random, so only who saw the question can give it; it
proves nothing else, so it is a reason to dial and no more.
"""

from __future__ import annotations

import os
from typing import Final

import trio

from runtime.net.address import Address
from runtime.net.udp import UdpSocket

PROBE_BYTES: Final = 1200
TRIES: Final = 3
INTERVAL_S: Final = 0.7
"""A datagram may be lost: so often it is sent, and so long an answer has each time."""

_CID_BYTES: Final = 8
_RESERVED_VERSION: Final = bytes.fromhex("1a2a3a4a")
_LONG_HEADER: Final = b"\xc0"
_NEGOTIATION: Final = bytes(4)


def probe_datagram(destination_cid: bytes, source_cid: bytes) -> bytes:
    """The question. Both ids have 8 bytes, and are random."""
    ids = b"".join(bytes([len(each)]) + each for each in (destination_cid, source_cid))
    return (_LONG_HEADER + _RESERVED_VERSION + ids).ljust(PROBE_BYTES, b"\0")


def is_answer(data: bytes, destination_cid: bytes, source_cid: bytes) -> bool:
    """Whether a datagram answers the question with these ids."""
    ids = b"".join(bytes([len(each)]) + each for each in (source_cid, destination_cid))
    start = _NEGOTIATION + ids
    return len(data) > len(start) and data[0] & 0x80 != 0 and data[1:].startswith(start)


async def quic_answers(
    remote: Address, *, mark: int | None = None, source: str | None = None
) -> bool:
    """Whether who is there speaks QUIC with us, at this moment. Takes TRIES * INTERVAL_S at most.
    Raises OSError when no socket can be had."""
    destination_cid, source_cid = os.urandom(_CID_BYTES), os.urandom(_CID_BYTES)
    question = probe_datagram(destination_cid, source_cid)
    any_host = "::" if ":" in remote.host else "0.0.0.0"  # noqa: S104  # the kernel chooses
    with UdpSocket.bind(Address(source or any_host, 0), mark=mark, dont_fragment=True) as udp:
        for _ in range(TRIES):
            udp.send(question, remote)
            with trio.move_on_after(INTERVAL_S):
                while True:
                    await udp.wait_readable()
                    for data, sender in udp.receive_batch():
                        if sender == remote and is_answer(data, destination_cid, source_cid):
                            return True
    return False
