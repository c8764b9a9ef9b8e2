"""Packets inside of the tunnels: UDP datagrams of applications, as IPv4 or IPv6 packets.

Every question carries the number of its pair and its own, so that an answer says what it answers.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import Final

APP_PORT: Final = 40_000
ECHO_PORT: Final = 7
_MARK: Final = b"holloway"
LEAST_BYTES: Final = 16
_IPV4: Final = struct.Struct("!BBHHHBBH4s4s")
_UDP: Final = struct.Struct("!HHHH")
_NUMBERS: Final = struct.Struct("!II")


def packed(address: str) -> bytes:
    """The 4 or 16 bytes of an address."""
    return ip_address(address).packed


def udp_packet(source: bytes, destination: bytes, ports: tuple[int, int], data: bytes) -> bytes:
    """A UDP datagram as an IP packet (RFC 791, RFC 8200, RFC 768). Addresses are packed."""
    length = 8 + len(data)
    if len(source) == 4:
        header = _IPV4.pack(0x45, 0, 20 + length, 1, 0, 64, 17, 0, source, destination)
        total = int.from_bytes(header, "big") % 0xFFFF
        header = header[:10] + (total ^ 0xFFFF).to_bytes(2, "big") + header[12:]
        return header + _UDP.pack(*ports, length, 0) + data
    header = b"\x60\0\0\0" + length.to_bytes(2, "big") + b"\x11\x40" + source + destination
    body = _UDP.pack(*ports, length, 0) + data
    pseudo = source + destination + struct.pack("!II", length, 17)
    total = int.from_bytes(pseudo + body + b"\0" * (len(body) % 2), "big") % 0xFFFF
    check = (total ^ 0xFFFF) or 0xFFFF
    return header + body[:6] + check.to_bytes(2, "big") + body[8:]


def ends_of(packet: bytes) -> tuple[bytes, bytes, int, int, int] | None:
    """(source, destination, source port, destination port, where the data begins) of a UDP
    datagram; None for any other packet."""
    if packet[:1] and packet[0] >> 4 == 4 and len(packet) >= 28 and packet[9] == 17:
        at = 20
        source, destination = packet[12:16], packet[16:20]
    elif packet[:1] and packet[0] >> 4 == 6 and len(packet) >= 48 and packet[6] == 17:
        at = 40
        source, destination = packet[8:24], packet[24:40]
    else:
        return None
    ports = int.from_bytes(packet[at : at + 4], "big")
    return source, destination, ports >> 16, ports & 0xFFFF, at + 8


def question(pair: int, number: int, size: int) -> bytes:
    """The data of a question, `size` bytes (LEAST_BYTES at least): words that can be looked for."""
    head = _MARK + _NUMBERS.pack(pair, number)
    if size <= LEAST_BYTES:
        return head
    words = b"pair %d asks for the %dth time; " % (pair, number)
    wanted = size - LEAST_BYTES
    return head + (words * (wanted // len(words) + 1))[:wanted]


def numbers_of(data: bytes) -> tuple[int, int] | None:
    """(pair, number) of a question or its answer."""
    if len(data) < LEAST_BYTES or data[:8] != _MARK:
        return None
    pair, number = _NUMBERS.unpack_from(data, 8)
    return pair, number
