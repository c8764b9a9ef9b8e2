"""`UdpSocket`: datagrams in batches, under trio.

The socket is non-blocking and is read until it is empty: one wake-up of the event loop serves as
many datagrams as have come. Sending never waits. A datagram that the kernel does not take is
dropped and counted, as the network itself would have done; every protocol above repeats what it
needs to arrive.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Final

import attrs
import trio

from runtime.net.address import Address

MAX_DATAGRAM_BYTES: Final = 65_535
DEFAULT_BUFFER_BYTES: Final = 4 * 1024 * 1024

# Linux constants that Python's socket module does not name.
_IP_MTU_DISCOVER: Final = 10
_IPV6_MTU_DISCOVER: Final = 23
_PMTUDISC_PROBE: Final = 3
_SO_RCVBUFFORCE: Final = 33
_SO_SNDBUFFORCE: Final = 32
_SO_ATTACH_FILTER: Final = 26
_SO_MEMINFO: Final = 55
_MEMINFO: Final = struct.Struct("=9I")
_MEMINFO_DROPS: Final = 8
# Classic BPF (the kernel's networking/filter.rst): its instructions, the program's head, and what
# they are made of here. Of a datagram a filter sees the UDP header too.
_INSTRUCTION: Final = struct.Struct("=HBBI")
_PROGRAM: Final = struct.Struct("@HP")
_LOAD_LENGTH: Final = 0x80
_SKIP_UNLESS_AT_LEAST: Final = 0x35
_RETURN: Final = 0x06
_UDP_HEADER_BYTES: Final = 8
# Generic segmentation (udp(7)): the kernel takes, and gives, several datagrams at once.
_UDP_SEGMENT: Final = 103
_UDP_GRO: Final = 104
_SEGMENT_BYTES: Final = struct.Struct("=H")
_GRO_BYTES: Final = struct.Struct("=i")
_GRO_SPACE: Final = socket.CMSG_SPACE(_GRO_BYTES.size)
_MAX_SEGMENTS: Final = 64
# Errors that ICMP reports are queued with the address that they are about (ip(7), ipv6(7)).
_IP_RECVERR: Final = 11
_IPV6_RECVERR: Final = 25
_ERROR: Final = struct.Struct("=IBBBxII")
_ERROR_SPACE: Final = socket.CMSG_SPACE(_ERROR.size + 28)  # and a sockaddr_in6
_FROM_ICMP: Final = (2, 3)
_MAX_TRAIN_BYTES: Final = 65_487  # beside an IP header with options
# After a refused train so many go one by one, before another is tried (a path may change).
_TRAINS_AFTER_REFUSAL: Final = 1_000
# How the kernel writes an IPv4 address on a socket of both families (RFC 4291, 2.5.5.2).
_MAPPED: Final = "::ffff:"


@attrs.frozen(kw_only=True)
class UdpStatistics:
    """Counts since the socket was bound. `dropped_*` datagrams were not sent: the kernel's buffer
    was full, or it refused (no route, too large, not permitted). `dropped_unread` ones came and
    were dropped by the kernel: shorter than `least_bytes`, or its buffer was full (modulo 2^32)."""

    received_datagrams: int
    received_bytes: int
    receive_errors: int
    sent_datagrams: int
    sent_bytes: int
    dropped_full: int
    dropped_refused: int
    dropped_unread: int


class UdpSocket:
    """A bound UDP socket, mostly of one IP family. Made by `bind`, ended by `close`.

    Only one task at a time may wait in `wait_readable`. `close` may be called by any task: a
    waiting one is woken with trio.ClosedResourceError.
    """

    def __init__(
        self, raw: socket.socket, *, trains: bool = False, tell_refusals: bool = False
    ) -> None:
        self._socket = raw
        self._buffer = bytearray(MAX_DATAGRAM_BYTES)
        self._view = memoryview(self._buffer)
        name = raw.getsockname()
        self._local = Address(name[0], name[1])
        self._is_ipv6 = raw.family == socket.AF_INET6
        self._carries_both = self._is_ipv6 and not raw.getsockopt(
            socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
        )
        self._takes_trains = _enable(raw, _UDP_GRO) if trains else False
        self._plain_trains = 0 if trains else -1
        self._tells_refusals = tell_refusals
        self._received_datagrams = 0
        self._received_bytes = 0
        self._receive_errors = 0
        self._sent_datagrams = 0
        self._sent_bytes = 0
        self._dropped_full = 0
        self._dropped_refused = 0

    @classmethod
    def bind(
        cls,
        address: Address,
        *,
        mark: int | None = None,
        reuse_port: bool = False,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        dont_fragment: bool = False,
        dual_stack: bool = False,
        trains: bool = False,
        tell_refusals: bool = False,
        least_bytes: int = 0,
    ) -> UdpSocket:
        """Bind to `address` (port 0: one that is free). Needs no running event loop.

        `mark` is the SO_MARK of every datagram sent (needs CAP_NET_ADMIN). `buffer_bytes` is
        asked for in both directions; without CAP_NET_ADMIN the kernel's maximum may be lower.
        `dont_fragment` refuses what is larger than the path instead of letting it be cut up.
        An IPv6 socket carries IPv6 alone, unless it is bound to `::` with `dual_stack`: then IPv4
        passes too, under its plain addresses. With `trains` runs of datagrams of one size pass
        the kernel as one where it can do that (UDP_SEGMENT, UDP_GRO). With `tell_refusals` the
        kernel keeps the ICMP errors that it gets, and `take_refusals` has to be called after each
        `wait_readable`, which returns again until they are taken. Datagrams shorter than
        `least_bytes` end in the kernel, and wake nobody; one without socket filters (gVisor) lets
        them through. Raises OSError.
        """
        raw = socket.socket(address.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            raw.setblocking(False)
            if address.family == socket.AF_INET6:
                only = not (dual_stack and address.host == "::")
                raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            if mark is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            if reuse_port:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if dont_fragment:
                _forbid_fragments(raw)
            if tell_refusals:
                _keep_errors(raw)
            if least_bytes:
                _drop_shorter(raw, least_bytes)
            _grow(raw, socket.SO_RCVBUF, _SO_RCVBUFFORCE, buffer_bytes)
            _grow(raw, socket.SO_SNDBUF, _SO_SNDBUFFORCE, buffer_bytes)
            raw.bind(address)
            return cls(raw, trains=trains, tell_refusals=tell_refusals)
        except BaseException:
            raw.close()
            raise

    @property
    def local_address(self) -> Address:
        """Where the socket is bound, with its real port. The host may be `0.0.0.0` or `::`."""
        return self._local

    def fileno(self) -> int:
        """The file descriptor, -1 once closed."""
        return self._socket.fileno()

    async def wait_readable(self) -> None:
        """Return when a datagram (or a pending error) is there. Safe to cancel: takes nothing.

        Raises trio.ClosedResourceError when the socket is or gets closed,
        trio.BusyResourceError when another task waits already.
        """
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError
        await trio.lowlevel.wait_readable(self._socket)

    async def wait_writable(self) -> None:
        """Return when the kernel's send buffer has room again. Safe to cancel."""
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError
        await trio.lowlevel.wait_writable(self._socket)

    def receive_batch(self, limit: int = 64) -> list[tuple[bytes, Address]]:
        """What has come, up to `limit` datagrams, in order; an empty list when nothing has.
        With `trains` the last one received may lead beyond `limit`, by 63 at most.

        Never waits and never raises for the sake of one datagram: errors that the kernel reports
        (an unreachable port, say) are counted. The scope id of an IPv6 link-local sender is left
        out: it cannot be answered through this class.
        """
        if self._takes_trains:
            return self._receive_trains(limit)
        batch: list[tuple[bytes, Address]] = []
        receive, view = self._socket.recvfrom_into, self._view
        total = 0
        for _ in range(limit):
            try:
                size, sender = receive(self._buffer)
            except BlockingIOError:
                break
            except OSError as error:
                self._receive_errors += 1
                if error.errno == errno.EBADF:
                    break
                continue
            total += size
            batch.append((bytes(view[:size]), self._sender(sender)))
        self._received_datagrams += len(batch)
        self._received_bytes += total
        return batch

    def take_refusals(self, limit: int = 64) -> list[Address]:
        """Whither datagrams went that came back as "port unreachable", oldest first, of up to
        `limit` errors that have come; nothing without `tell_refusals`. Never waits.

        They prove nothing, since anybody who knows both addresses can forge them. Errors of other
        kinds are left out: a path that has no route now may have one in a second.
        """
        refusals: list[Address] = []
        if not self._tells_refusals:
            return refusals
        for _ in range(limit):
            try:
                _, notes, _, name = self._socket.recvmsg(0, _ERROR_SPACE, socket.MSG_ERRQUEUE)
            except OSError:
                break
            for _, kind, note in notes:
                if kind not in (_IP_RECVERR, _IPV6_RECVERR) or len(note) < _ERROR.size:
                    continue
                code, origin, *_ = _ERROR.unpack_from(note)
                if code == errno.ECONNREFUSED and origin in _FROM_ICMP:
                    refusals.append(self._sender(name))
        return refusals

    def send(self, data: bytes | bytearray | memoryview, address: tuple[str, int]) -> bool:
        """Hand one datagram to the kernel; False, counted, when the kernel does not take it.

        Never waits; the socket being closed counts as a refusal.
        """
        if self._carries_both and ":" not in address[0]:
            address = (_MAPPED + address[0], address[1])
        try:
            self._sent_bytes += self._send_once(data, address)
        except BlockingIOError:
            self._dropped_full += 1
            return False
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                self._dropped_full += 1
            else:
                self._dropped_refused += 1
            return False
        self._sent_datagrams += 1
        return True

    def _send_once(self, data: bytes | bytearray | memoryview, address: tuple[str, int]) -> int:
        try:
            return self._socket.sendto(data, address)
        except BlockingIOError:
            raise
        except OSError:
            # The kernel may have told an error of an earlier datagram, and not sent this one.
            if not self._tells_refusals:
                raise
            return self._socket.sendto(data, address)

    def send_batch(self, datagrams: Sequence[bytes], address: tuple[str, int]) -> int:
        """Hand datagrams for one address to the kernel, in order; how many it took.

        Like `send` for each, but in as few system calls as `trains` allow.
        """
        if self._carries_both and ":" not in address[0]:
            address = (_MAPPED + address[0], address[1])
        taken = 0
        for train in _trains(datagrams):
            if len(train) == 1 or self._plain_trains or not self._send_train(train, address):
                self._plain_trains -= self._plain_trains > 0
                taken += sum(self.send(data, address) for data in train)
            else:
                taken += len(train)
        return taken

    def close(self) -> None:
        """Close; wakes a task in `wait_readable`. Closing twice is harmless."""
        if self._socket.fileno() < 0:
            return
        # Outside of an event loop nobody can be waiting.
        with contextlib.suppress(RuntimeError):
            trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    def statistics(self) -> UdpStatistics:
        return UdpStatistics(
            received_datagrams=self._received_datagrams,
            received_bytes=self._received_bytes,
            receive_errors=self._receive_errors,
            sent_datagrams=self._sent_datagrams,
            sent_bytes=self._sent_bytes,
            dropped_full=self._dropped_full,
            dropped_refused=self._dropped_refused,
            dropped_unread=self._count_unread(),
        )

    def _count_unread(self) -> int:
        """What the kernel dropped; 0 once closed, and where it does not say (before 4.12)."""
        try:
            found = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
            return int(_MEMINFO.unpack(found)[_MEMINFO_DROPS])
        except (OSError, struct.error):
            return 0

    def _sender(self, name: tuple[str, int]) -> Address:
        host = name[0].partition("%")[0] if self._is_ipv6 else name[0]
        if self._carries_both and "." in host:
            host = host.removeprefix(_MAPPED)
        return Address(host, name[1])

    def _receive_trains(self, limit: int) -> list[tuple[bytes, Address]]:
        batch: list[tuple[bytes, Address]] = []
        receive, buffers, view = self._socket.recvmsg_into, [self._buffer], self._view
        errors = total = 0
        while len(batch) < limit and errors < limit:
            try:
                size, notes, _, name = receive(buffers, _GRO_SPACE)
            except BlockingIOError:
                break
            except OSError as error:
                self._receive_errors += 1
                errors += 1
                if error.errno == errno.EBADF:
                    break
                continue
            total += size
            sender = self._sender(name)
            each = _GRO_BYTES.unpack(notes[0][2])[0] if notes else size
            if size <= each:
                batch.append((bytes(view[:size]), sender))
            else:
                data = bytes(view[:size])
                batch += [(data[at : at + each], sender) for at in range(0, size, each)]
        self._received_datagrams += len(batch)
        self._received_bytes += total
        return batch

    def _send_train(self, train: Sequence[bytes], address: tuple[str, int]) -> bool:
        """Whether the kernel took the train. If it did not, its datagrams go one by one, since
        smaller ones may still fit; after any other refusal than for want of room, the next ones
        too."""
        note = (socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT_BYTES.pack(len(train[0])))
        try:
            self._sent_bytes += self._socket.sendmsg(train, [note], 0, address)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS):
                self._plain_trains = _TRAINS_AFTER_REFUSAL
            return False
        self._sent_datagrams += len(train)
        return True

    def __enter__(self) -> UdpSocket:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._socket.fileno() >= 0 else " closed"
        return f"<UdpSocket {self._local}{state}>"


def _trains(datagrams: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Neighbours of one size, as long as one send may carry; the last of each may be shorter."""
    begin, end = 0, len(datagrams)
    while begin < end:
        each = len(datagrams[begin])
        fitting = min(_MAX_SEGMENTS, _MAX_TRAIN_BYTES // each) if each else 1
        last = min(end, begin + max(1, fitting))
        at = begin + 1
        while at < last and len(datagrams[at]) == each:
            at += 1
        if at < last and 0 < len(datagrams[at]) < each:
            at += 1
        yield datagrams[begin:at]
        begin = at


def _enable(raw: socket.socket, option: int) -> bool:
    """Switch an option of UDP on; False where the kernel does not know it."""
    try:
        raw.setsockopt(socket.IPPROTO_UDP, option, 1)
    except OSError:
        return False
    return True


def _forbid_fragments(raw: socket.socket) -> None:
    raw.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
    if raw.family == socket.AF_INET6:
        raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)


def _keep_errors(raw: socket.socket) -> None:
    if raw.family == socket.AF_INET6:
        raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    else:
        raw.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)


def _drop_shorter(raw: socket.socket, least_bytes: int) -> None:
    """Have the kernel drop what is shorter, before it wakes anybody."""
    instructions = (
        (_LOAD_LENGTH, 0, 0, 0),
        (_SKIP_UNLESS_AT_LEAST, 0, 1, _UDP_HEADER_BYTES + least_bytes),
        (_RETURN, 0, 0, 0xFFFFFFFF),
        (_RETURN, 0, 0, 0),
    )
    code = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*one) for one in instructions))
    with contextlib.suppress(OSError):
        head = _PROGRAM.pack(len(instructions), ctypes.addressof(code))
        raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, head)


def _grow(raw: socket.socket, option: int, force: int, size: int) -> None:
    try:
        raw.setsockopt(socket.SOL_SOCKET, force, size)
    except PermissionError:
        raw.setsockopt(socket.SOL_SOCKET, option, size)
