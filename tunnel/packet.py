"""IP packets as a tunnel sees them: headers, flows, checksums, and the two answers "no".

`parse` reads IPv4 (RFC 791) and IPv6 (RFC 8200) with its extension headers down to the transport
ports; it answers None for anything that is not a well-formed packet and never raises. The builders
make an ICMP or ICMPv6 "communication administratively prohibited" (RFC 792, RFC 1812 section
5.2.7.1, RFC 4443 section 3.1) and a TCP reset (RFC 9293 section 3.10.7.1).

`Header` is a NamedTuple and not an attrs class, since one is made for every packet.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ICMP = 1
TCP = 6
UDP = 17
ICMPV6 = 58
PROTOCOL_NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPV6: "icmp"}

IPV4_HEADER_BYTES = 20
IPV6_HEADER_BYTES = 40
MAX_EXTENSION_HEADERS = 8
# How much of the refused packet an error quotes: whole ICMP packets of 576 and 1280 bytes.
MAX_IPV4_QUOTE_BYTES = 576 - IPV4_HEADER_BYTES - 8
MAX_IPV6_QUOTE_BYTES = 1280 - IPV6_HEADER_BYTES - 8

TCP_FIN, TCP_SYN, TCP_RST, TCP_ACK = 1, 2, 4, 16
_ECHO = {ICMP: (8, 0), ICMPV6: (128, 129)}
_ICMP_ERRORS = frozenset((3, 4, 5, 11, 12))
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION_OPTIONS = 0, 43, 44, 60
_HOP_LIMIT = 64


class Header(NamedTuple):
    """What is read of one packet. Addresses are packed (4 or 16 bytes).

    Ports are those of TCP and UDP; an ICMP echo has its identifier on the side of whoever asks
    (`source_port` of a request, `destination_port` of a reply) and 0 on the other. They are 0
    where there are none, also in fragments after the first. `offset` is where the transport
    header begins. `fragment` is the identification of a fragmented packet, else None.
    """

    source: bytes
    destination: bytes
    protocol: int
    source_port: int
    destination_port: int
    offset: int
    length: int
    fragment: int | None
    first_fragment: bool
    icmp_type: int | None

    @property
    def is_icmp_error(self) -> bool:
        """Whether this is an ICMP message that quotes another packet."""
        if self.icmp_type is None:
            return False
        if self.protocol == ICMP:
            return self.icmp_type in _ICMP_ERRORS
        return self.icmp_type < 128

    @property
    def is_echo_request(self) -> bool:
        return self.icmp_type is not None and self.icmp_type == _ECHO[self.protocol][0]

    @property
    def is_echo_reply(self) -> bool:
        return self.icmp_type is not None and self.icmp_type == _ECHO[self.protocol][1]


def packet_length(data: bytes) -> int | None:
    """The length that an IP header gives, if `data` holds that much; None if it is no IP packet."""
    if len(data) < IPV4_HEADER_BYTES:
        return None
    version = data[0] >> 4
    if version == 4:
        length = (data[2] << 8) | data[3]
        minimum = IPV4_HEADER_BYTES
    elif version == 6:
        length = IPV6_HEADER_BYTES + ((data[4] << 8) | data[5])
        minimum = IPV6_HEADER_BYTES
    else:
        return None
    return length if minimum <= length <= len(data) else None


def parse(packet: bytes) -> Header | None:
    """Read the headers of one packet; None if it is malformed or cut short."""
    length = packet_length(packet)
    if length is None:
        return None
    if packet[0] >> 4 == 4:
        return _parse_ipv4(packet, length)
    return _parse_ipv6(packet, length)


def runs(packets: Iterable[bytes]) -> Iterator[tuple[Header | None, list[bytes]]]:
    """Neighbours that belong to one flow and tell nothing new about it, in order, with the header
    of the last of them; None with a single packet that is malformed.

    All packets of a run are whole and well-formed, unfragmented, and share addresses, protocol and
    ports; those of TCP all carry ACK, and neither SYN, FIN nor RST. So whatever is decided from
    these, and from nothing else of a packet, holds for each of them.
    """
    run: list[bytes] = []
    size, mask, label, minimum = 0, 0, -1, 0
    for packet in packets:
        if int.from_bytes(packet[:size], "big") & mask == label:
            length = packet_length(packet)
            if length is not None and length >= minimum:
                run.append(packet)
                continue
        if run:
            yield parse(run[-1]), run
        run = [packet]
        size, mask, minimum = _shape(packet)
        label = int.from_bytes(packet[:size], "big") & mask if size else -1
    if run:
        yield parse(run[-1]), run


def quoted(packet: bytes, header: Header) -> Header | None:
    """The header of the packet that an ICMP error quotes (often cut short); None without one."""
    if not header.is_icmp_error:
        return None
    quote = packet[header.offset + 8 : header.length]
    if len(quote) < IPV4_HEADER_BYTES:
        return None
    if quote[0] >> 4 == 4 and header.protocol == ICMP:
        return _parse_ipv4(quote, len(quote))
    if quote[0] >> 4 == 6 and header.protocol == ICMPV6 and len(quote) >= IPV6_HEADER_BYTES:
        return _parse_ipv6(quote, len(quote))
    return None


def tcp_flags(packet: bytes, header: Header) -> int:
    """The flag byte of a TCP packet; 0 where it is missing."""
    at = header.offset + 13
    return packet[at] if header.protocol == TCP and at < header.length else 0


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of `data`."""
    if len(data) % 2:
        data += b"\0"
    total = int.from_bytes(data, "big")
    # 65536 is 1 modulo 65535, so the one's complement sum is a remainder.
    remainder = total % 0xFFFF
    if remainder == 0 and total:
        remainder = 0xFFFF
    return remainder ^ 0xFFFF


def prohibited(packet: bytes) -> bytes | None:
    """An ICMP "administratively prohibited" to the sender of `packet`, from its destination.

    None where RFC 1122 section 3.2.2 forbids an answer: to ICMP errors, fragments after the
    first, and to or from addresses that are not of one host.
    """
    header = parse(packet)
    if header is None or not _answerable(header):
        return None
    if len(header.source) == 4:
        quote = packet[: min(header.length, MAX_IPV4_QUOTE_BYTES)]
        body = struct.pack(">BBHI", 3, 13, 0, 0) + quote
        body = _with_checksum(body, 2, b"")
        return _ipv4(header.destination, header.source, ICMP, body)
    quote = packet[: min(header.length, MAX_IPV6_QUOTE_BYTES)]
    body = struct.pack(">BBHI", 1, 1, 0, 0) + quote
    pseudo = _pseudo_header(header.destination, header.source, ICMPV6, len(body))
    return _ipv6(header.destination, header.source, ICMPV6, _with_checksum(body, 2, pseudo))


def reset(packet: bytes) -> bytes | None:
    """A TCP reset to the sender of `packet`, as its destination would send it.

    None if it is no TCP packet, or is a reset itself.
    """
    header = parse(packet)
    if (
        header is None
        or header.protocol != TCP
        or not header.first_fragment
        or header.offset + 20 > header.length
    ):
        return None
    sequence, acknowledgement = struct.unpack_from(">II", packet, header.offset + 4)
    flags = tcp_flags(packet, header)
    if flags & TCP_RST:
        return None
    data_bytes = header.length - header.offset - 4 * (packet[header.offset + 12] >> 4)
    consumed = max(0, data_bytes) + bool(flags & TCP_SYN) + bool(flags & TCP_FIN)
    if flags & TCP_ACK:
        numbers, answer_flags = (acknowledgement, 0), TCP_RST
    else:
        numbers, answer_flags = (0, (sequence + consumed) & 0xFFFFFFFF), TCP_RST | TCP_ACK
    segment = struct.pack(
        ">HHIIBBHHH",
        header.destination_port,
        header.source_port,
        *numbers,
        5 << 4,
        answer_flags,
        0,
        0,
        0,
    )
    pseudo = _pseudo_header(header.destination, header.source, TCP, len(segment))
    segment = _with_checksum(segment, 16, pseudo)
    build = _ipv4 if len(header.source) == 4 else _ipv6
    return build(header.destination, header.source, TCP, segment)


# --- reading -----------------------------------------------------------------------------------


def _parse_ipv4(packet: bytes, length: int) -> Header | None:
    offset = (packet[0] & 0x0F) * 4
    if offset < IPV4_HEADER_BYTES or offset > length:
        return None
    flags = (packet[6] << 8) | packet[7]
    position = flags & 0x1FFF
    fragment = (packet[4] << 8) | packet[5] if flags & 0x3FFF else None
    return _transport(
        packet,
        source=packet[12:16],
        destination=packet[16:20],
        protocol=packet[9],
        offset=offset,
        length=length,
        fragment=fragment,
        first=position == 0,
    )


def _parse_ipv6(packet: bytes, length: int) -> Header | None:
    protocol = packet[6]
    offset = IPV6_HEADER_BYTES
    fragment: int | None = None
    first = True
    for _ in range(MAX_EXTENSION_HEADERS):
        if protocol not in (_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION_OPTIONS):
            break
        if offset + 8 > length:
            return None
        if protocol == _FRAGMENT:
            position = ((packet[offset + 2] << 8) | packet[offset + 3]) >> 3
            more = packet[offset + 3] & 1
            if position or more:
                fragment = int.from_bytes(packet[offset + 4 : offset + 8], "big")
            first = position == 0
            size = 8
        else:
            size = 8 * (packet[offset + 1] + 1)
        protocol = packet[offset]
        offset += size
        if not first:
            break
    else:
        return None
    if offset > length:
        return None
    return _transport(
        packet,
        source=packet[8:24],
        destination=packet[24:40],
        protocol=protocol,
        offset=offset,
        length=length,
        fragment=fragment,
        first=first,
    )


def _transport(
    packet: bytes,
    *,
    source: bytes,
    destination: bytes,
    protocol: int,
    offset: int,
    length: int,
    fragment: int | None,
    first: bool,
) -> Header | None:
    source_port = destination_port = 0
    icmp_type: int | None = None
    if not first:
        pass
    elif protocol in (TCP, UDP):
        if offset + 8 > length:
            return None
        source_port = (packet[offset] << 8) | packet[offset + 1]
        destination_port = (packet[offset + 2] << 8) | packet[offset + 3]
    elif protocol in (ICMP, ICMPV6):
        if offset + 8 > length:
            return None
        icmp_type = packet[offset]
        request, reply = _ECHO[protocol]
        identifier = (packet[offset + 4] << 8) | packet[offset + 5]
        if icmp_type == request:
            source_port = identifier
        elif icmp_type == reply:
            destination_port = identifier
    return Header(
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        offset,
        length,
        fragment,
        first,
        icmp_type,
    )


def _mask(size: int, **fields: int) -> int:
    """Of the first `size` bytes, those named `at_N` or `from_N_to_M` under their values."""
    bits = bytearray(size)
    for name, value in fields.items():
        first, _, last = name.removeprefix("at_").removeprefix("from_").partition("_to_")
        for at in range(int(first), int(last or first) + 1):
            bits[at] = value
    return int.from_bytes(bits, "big")


# What the packets of a run share: how many bytes are looked at, and the bits of them that count
# (version and header length, fragment, protocol, addresses and ports, flags of TCP).
_RUN_FLAGS = TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK
_RUN_IPV4 = {"at_0": 0xFF, "at_6": 0x3F, "at_7": 0xFF, "at_9": 0xFF, "from_12_to_23": 0xFF}
_RUN_IPV6 = {"at_0": 0xF0, "at_6": 0xFF, "from_8_to_43": 0xFF}
_RUN_SHAPES = {
    (4, TCP): (40, _mask(40, **_RUN_IPV4, at_33=_RUN_FLAGS), 40),
    (4, UDP): (28, _mask(28, **_RUN_IPV4), 28),
    (6, TCP): (60, _mask(60, **_RUN_IPV6, at_53=_RUN_FLAGS), 60),
    (6, UDP): (48, _mask(48, **_RUN_IPV6), 48),
}
_NO_RUN = (0, 0, 0)


def _shape(packet: bytes) -> tuple[int, int, int]:
    """Bytes, mask and least length of the run that this packet begins; zeros if it is alone."""
    length = packet_length(packet)
    if length is None:
        return _NO_RUN
    version = packet[0] >> 4
    protocol = packet[9] if version == 4 else packet[6]
    shape = _RUN_SHAPES.get((version, protocol), _NO_RUN)
    if length < shape[2]:
        return _NO_RUN
    if version == 4 and (packet[0] != 0x45 or packet[6] & 0x3F or packet[7]):
        return _NO_RUN
    if protocol == TCP and packet[shape[0] - 7] & _RUN_FLAGS != TCP_ACK:
        return _NO_RUN
    return shape


# --- building ----------------------------------------------------------------------------------


def _answerable(header: Header) -> bool:
    if not header.first_fragment or header.is_icmp_error:
        return False
    if len(header.source) == 4:
        ends = (header.source[0], header.destination[0])
        return all(0 < first < 224 and first != 127 for first in ends)
    return all(
        address[0] != 0xFF and any(address[:15]) for address in (header.source, header.destination)
    )


def _with_checksum(body: bytes, at: int, pseudo: bytes) -> bytes:
    return body[:at] + checksum(pseudo + body).to_bytes(2, "big") + body[at + 2 :]


def _pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    if len(source) == 4:
        return source + destination + struct.pack(">BBH", 0, protocol, length)
    return source + destination + struct.pack(">II", length, protocol)


def _ipv4(source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    length = IPV4_HEADER_BYTES + len(payload)
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, length, 0, 0, _HOP_LIMIT, protocol, 0, source, destination
    )
    return _with_checksum(header, 10, b"") + payload


def _ipv6(source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    header = struct.pack(
        ">IHBB16s16s", 6 << 28, len(payload), protocol, _HOP_LIMIT, source, destination
    )
    return header + payload
