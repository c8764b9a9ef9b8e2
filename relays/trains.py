"""Trains: runs of datagrams of one size that the kernel gives and takes as one (udp(7): UDP_GRO,
UDP_SEGMENT). All but the last have the same size, the last may be shorter.

The functions here turn a whole train of one client and channel into trains for the peer, and one
of a peer into ChannelData for the client, where each of its datagrams would have been passed on.
They decide nothing else: for any other train the answer is None, and the core handles it datagram
by datagram. They change nothing but say what there is to count.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

import attrs

from relays.allocations import Allocation, Channel, Permission

MAX_SEGMENTS: Final = 64
"""What every kernel with UDP_SEGMENT takes (UDP_MAX_SEGMENTS; newer ones take 128)."""
MAX_TRAIN_BYTES: Final = 65_507
"""The largest UDP payload over IPv4: the length of a train is written into one IP header."""

TrainTransmit = tuple[int, Sequence[bytes | memoryview], int, int, tuple[str, int]]
"""Socket number, pieces whose concatenation is the train, bytes of each datagram in it, how many
datagrams, destination."""

_HEADER_BYTES: Final = 4
_HEADER: Final = Struct("!HH")


@attrs.frozen
class Passed:
    """What becomes of a train: what to send, and the bytes of data in it."""

    transmits: list[TrainTransmit]
    datagrams: int
    data_bytes: int
    permission: Permission


def from_client(
    allocation: Allocation, data: memoryview, segment_bytes: int, now: int
) -> Passed | None:
    """A train of ChannelData, all of one channel and one length (the last may be shorter), to a
    peer that has answered."""
    size = len(data)
    count = -(-size // segment_bytes)
    if segment_bytes <= _HEADER_BYTES or not 1 < count <= MAX_SEGMENTS:
        return None
    last_at = (count - 1) * segment_bytes
    if size - last_at <= _HEADER_BYTES:
        return None
    number, length = _HEADER.unpack_from(data)
    last_number, last_length = _HEADER.unpack_from(data, last_at)
    if not (
        0 < last_length <= length <= segment_bytes - _HEADER_BYTES
        and last_length <= size - last_at - _HEADER_BYTES
        and last_number == number
        and _have_one_header(data[:last_at], segment_bytes)
    ):
        return None
    channel = allocation.channel_by_number.get(number)
    if channel is None or not _is_open(channel, now) or not channel.permission.answered:
        return None
    first = _HEADER_BYTES
    pieces: list[bytes | memoryview]
    pieces = [data[at : at + length] for at in range(first, last_at, segment_bytes)]
    pieces.append(data[last_at + first : last_at + first + last_length])
    transmit = (channel.permission.relayed.socket, pieces, length, count, channel.peer)
    return Passed([transmit], count, (count - 1) * length + last_length, channel.permission)


def from_peer(
    allocation: Allocation, data: memoryview, segment_bytes: int, peer: tuple[str, int], now: int
) -> Passed | None:
    """A train of a peer to the client, under a channel number. It grows by the headers, so that it
    may become two."""
    channel = allocation.channel_by_peer.get(peer)
    size = len(data)
    if channel is None or not 0 < segment_bytes < size or not _is_open(channel, now):
        return None
    # For each IP address an allocation has one permission, the one that its channels hold.
    if allocation.permission_by_host.get(peer[0]) is not channel.permission:
        return None
    grown = segment_bytes + _HEADER_BYTES
    each = min(MAX_SEGMENTS, MAX_TRAIN_BYTES // grown)
    if each < 2:
        return None
    header = _HEADER.pack(channel.number, segment_bytes)
    transmits: list[TrainTransmit] = []
    for begin in range(0, size, each * segment_bytes):
        end = min(size, begin + each * segment_bytes)
        whole, rest = divmod(end - begin, segment_bytes)
        rest_at = end - rest
        pieces: list[bytes | memoryview] = [b""]
        pieces += [data[at : at + segment_bytes] for at in range(begin, rest_at, segment_bytes)]
        if rest:
            last = _HEADER.pack(channel.number, rest)
            joined = b"".join((header.join(pieces), last, data[rest_at:end]))
        else:
            joined = header.join(pieces)
        count = whole + (rest > 0)
        transmits.append((allocation.listener, [joined], grown, count, allocation.client))
    return Passed(transmits, -(-size // segment_bytes), size, channel.permission)


def _is_open(channel: Channel, now: int) -> bool:
    permission = channel.permission
    return channel.expires_ns > now and permission.expires_ns > now and not permission.is_own


def _have_one_header(data: memoryview, segment_bytes: int) -> bool:
    """Whether every segment begins with the same four bytes: each of the four is compared over
    all segments at once."""
    count = len(data) // segment_bytes
    return all(
        data[at::segment_bytes].tobytes() == bytes((data[at],)) * count
        for at in range(_HEADER_BYTES)
    )
