"""What Linux can do for a relayed address about fragments and ICMP errors (RFC 8656, sections 11.5
and 14).

A datagram to a peer leaves without the DF bit, as one that originates here and may be fragmented on
its way; the kernel's own guess of the path's MTU is not asked, so nobody can lower it by a forged
error (IP_PMTUDISC_OMIT). A single datagram with DF is sent by setting the option for that call: it
is dropped here if it is longer than the path takes as far as the kernel knows, and that counts as
an ICMP error of this machine. IPv6 has no such bit: it is not fragmented here then.

Errors wait in the queue of their socket (IP_RECVERR, ip(7)) and are read by `read_errors`. Whoever
sends on such a socket has to know that the next call after an error may fail in its place.
"""

from __future__ import annotations

import errno
import socket
from struct import Struct
from typing import Final

from relays.turn import IcmpError
from runtime.net.address import Address

# Of linux/in.h, linux/in6.h and linux/errqueue.h; Python's socket module does not have them.
_IP_MTU_DISCOVER: Final = 10
_IP_RECVERR: Final = 11
_IPV6_MTU_DISCOVER: Final = 23
_IPV6_RECVERR: Final = 25
_PMTUDISC_WANT: Final = 1
_PMTUDISC_DO: Final = 2
_PMTUDISC_OMIT: Final = 5
_ORIGIN_LOCAL: Final = 1
_ORIGIN_ICMP: Final = 2
_ORIGIN_ICMP6: Final = 3
_EXTENDED_ERROR: Final = Struct("=IBBBBII")
_ANCILLARY_BYTES: Final = 256

_TOO_BIG_IPV4: Final = (3, 4)
_TOO_BIG_IPV6: Final = (2, 0)


def prepare(opened: socket.socket, *, is_ipv6: bool) -> None:
    """Set the options of a socket for a relayed address."""
    if is_ipv6:
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    else:
        opened.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        opened.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_OMIT)


def send_unfragmented(
    opened: socket.socket, data: bytes | memoryview, destination: tuple[str, int]
) -> None:
    """Send one datagram with DF. Raises OSError; EMSGSIZE where the path is known not to take it,
    which is in the queue of errors as well."""
    level, option, usual = socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_OMIT
    if opened.family == socket.AF_INET6:
        level, option, usual = socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_WANT
    opened.setsockopt(level, option, _PMTUDISC_DO)
    try:
        opened.sendto(data, destination)
    finally:
        opened.setsockopt(level, option, usual)


def read_errors(opened: socket.socket, limit: int) -> list[tuple[Address, IcmpError]]:
    """At most `limit` errors from the queue: whereto the datagram was going, and what is said."""
    found = []
    for _ in range(limit):
        try:
            _, ancillary, _, name = opened.recvmsg(0, _ANCILLARY_BYTES, socket.MSG_ERRQUEUE)
        except OSError:  # empty
            break
        for level, kind, value in ancillary:
            is_error = (level, kind) in (
                (socket.IPPROTO_IP, _IP_RECVERR),
                (socket.IPPROTO_IPV6, _IPV6_RECVERR),
            )
            error = _error_of(value, opened.family) if is_error else None
            if error is not None and name:
                found.append((Address(name[0], name[1]), error))
    return found


def _error_of(value: bytes, family: int) -> IcmpError | None:
    if len(value) < _EXTENDED_ERROR.size:
        return None
    number, origin, kind, code, _, info, _ = _EXTENDED_ERROR.unpack_from(value)
    too_big = _TOO_BIG_IPV6 if family == socket.AF_INET6 else _TOO_BIG_IPV4
    if origin == _ORIGIN_LOCAL and number == errno.EMSGSIZE:
        kind, code = too_big
    elif origin not in (_ORIGIN_ICMP, _ORIGIN_ICMP6):
        return None
    return IcmpError(kind, code, info if (kind, code) == too_big else 0)
