"""What the XDP program must do with a frame, written again in Python from its description and not
from its text: checksums, say, are summed over the whole packet here and corrected there.

Also the ways to run the program itself on a frame (BPF_PROG_TEST_RUN) and to make frames.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from struct import Struct, pack, unpack_from
from typing import Final

import attrs

from relays.fastpath.elf import ProgramObject, parse_object
from relays.fastpath.loader import bpf
from relays.fastpath.xdp import OBJECT, SAMPLE_INTERVAL_NS

PROGRAM: Final[ProgramObject] = parse_object(Path(OBJECT).read_bytes())
LOOPBACK: Final = 1
PASS, TX, REDIRECT = 2, 3, 4

_TEST_RUN: Final = Struct("=IIIIQQIIIIQQ")
_PROG_TEST_RUN: Final = 10
_MAX_FRAME: Final = 65_536


@attrs.frozen
class Way:
    """Where the kernel sends packets for an address. `target_mac` is empty while it does not know
    the neighbour."""

    device: int
    source_mac: bytes
    target_mac: bytes
    mtu: int = 1500


@attrs.frozen
class Outcome:
    """`counted` is what was counted: a direction, or a reason to pass."""

    verdict: int
    counted: str
    frame: bytes
    data_bytes: int = 0


@attrs.frozen(kw_only=True)
class Flow:
    """The value of an entry, readable."""

    expires_ns: int
    sampled_ns: int
    source: bytes
    target: bytes
    source_port: int
    target_port: int
    channel: int
    family: int

    @classmethod
    def read(cls, value: bytes) -> Flow:
        expires_ns, sampled_ns = unpack_from("<QQ", value)
        source, target, source_port, target_port, channel = unpack_from("!16s16sHHH", value, 16)
        [family] = unpack_from("<H", value, 54)
        size = 4 if family == 2 else 16
        assert not any(source[size:])
        assert not any(target[size:])
        return cls(
            expires_ns=expires_ns,
            sampled_ns=sampled_ns,
            source=source[:size],
            target=target[:size],
            source_port=source_port,
            target_port=target_port,
            channel=channel,
            family=family,
        )


def key_of(
    family: int, source: bytes, target: bytes, source_port: int, target_port: int, channel: int
) -> bytes:
    ports = pack("!HHH", source_port, target_port, channel)
    return source.ljust(16, b"\0") + target.ljust(16, b"\0") + ports + pack("<H", family)


@attrs.define(kw_only=True)
class Model:
    """The program with all that it asks: entries, the kernel's routes (by address), the devices
    that carry it, the device that a frame comes from, the time."""

    flows: Mapping[bytes, bytes]
    ways: Callable[[bytes], Way | None]
    devices: set[int]
    ingress: int = LOOPBACK
    now: int = 0

    def judge(self, frame: bytes) -> Outcome:
        try:
            return self._judge(frame)
        except _Passed as passed:
            return Outcome(PASS, passed.args[0], frame)

    def _judge(self, frame: bytes) -> Outcome:
        need(len(frame) >= 14, "irregular")
        need(not frame[0] & 1, "not_udp")
        kind = frame[12:14]
        if kind == b"\x08\x00":
            head = _read_ipv4(frame[14:])
        else:
            need(kind == b"\x86\xdd", "not_udp")
            head = _read_ipv6(frame[14:])
        udp = head.rest
        need(len(udp) >= 8, "irregular")
        source_port, target_port, length, checksum = unpack_from("!HHHH", udp)
        need(length == len(udp), "irregular")
        data = udp[8:]
        channel, found = self._find(head, source_port, target_port, data)
        need(found is not None, "no_entry")
        assert found is not None
        flow = Flow.read(found)
        need(self.now < flow.expires_ns, "expired")
        if channel:
            need(len(data) - 4 == int.from_bytes(data[2:4], "big"), "irregular")
            data = data[4:]
        pseudo = head.source + head.target + pack("!HH", length, 17)
        need(checksum not in (0, _folded(_sum(pseudo))), "checksum")
        need(head.hop_limit > 1, "hop_limit")
        payload = (pack("!HH", flow.channel, len(data)) if flow.channel else b"") + data
        frame_bytes = 14 + (20 if flow.family == 2 else 40) + 8 + len(payload)
        need(frame_bytes >= 60, "too_short")
        need(frame_bytes - 14 <= 65_535, "too_large")
        way = self.ways(flow.target)
        need(way is not None, "no_route")
        assert way is not None
        need(frame_bytes - 14 <= way.mtu, "too_large")
        need(bool(way.target_mac), "no_route")
        need(way.device == self.ingress or way.device in self.devices, "other_device")
        need(0 <= self.now - flow.sampled_ns < SAMPLE_INTERVAL_NS, "sampled")
        wrong_by = _sum(pseudo + udp) % 0xFFFF
        out = _written(head, flow, payload, wrong_by)
        kind = b"\x08\x00" if flow.family == 2 else b"\x86\xdd"
        return Outcome(
            TX if way.device == self.ingress else REDIRECT,
            "to_peer" if channel else "to_client",
            way.target_mac + way.source_mac + kind + out,
            len(data),
        )

    def _find(
        self, head: _Head, source_port: int, target_port: int, data: bytes
    ) -> tuple[int, bytes | None]:
        if len(data) >= 4 and 0x40 <= data[0] <= 0x7F:
            channel = int.from_bytes(data[:2], "big")
            found = self.flows.get(
                key_of(head.family, head.source, head.target, source_port, target_port, channel)
            )
            if found is not None:
                return channel, found
        key = key_of(head.family, head.source, head.target, source_port, target_port, 0)
        return 0, self.flows.get(key)


class _Passed(Exception):
    """It goes to the kernel; the argument is why."""


def need(holds: bool, reason: str) -> None:
    if not holds:
        raise _Passed(reason)


@attrs.frozen(kw_only=True)
class _Head:
    family: int
    source: bytes
    target: bytes
    traffic_class: int
    hop_limit: int
    identification: int
    dont_fragment: bool
    rest: bytes


def _read_ipv4(packet: bytes) -> _Head:
    need(len(packet) >= 20 and packet[0] >> 4 == 4 and packet[0] & 15 >= 5, "irregular")
    need(packet[9] == 17, "not_udp")
    need(packet[0] & 15 == 5, "options")
    fragment = int.from_bytes(packet[6:8], "big")
    need(fragment in (0, 0x4000), "fragment")
    need(int.from_bytes(packet[2:4], "big") == len(packet), "irregular")
    need(_sum(packet[:20]) % 0xFFFF == 0, "irregular")
    return _Head(
        family=2,
        source=packet[12:16],
        target=packet[16:20],
        traffic_class=packet[1],
        hop_limit=packet[8],
        identification=int.from_bytes(packet[4:6], "big"),
        dont_fragment=fragment == 0x4000,
        rest=packet[20:],
    )


def _read_ipv6(packet: bytes) -> _Head:
    need(len(packet) >= 40 and packet[0] >> 4 == 6, "irregular")
    need(packet[6] != 44, "fragment")
    need(packet[6] not in (0, 43, 60), "options")
    need(packet[6] == 17, "not_udp")
    need(int.from_bytes(packet[4:6], "big") == len(packet) - 40, "irregular")
    return _Head(
        family=10,
        source=packet[8:24],
        target=packet[24:40],
        traffic_class=int.from_bytes(packet[:2], "big") >> 4 & 0xFF,
        hop_limit=packet[7],
        identification=0,
        dont_fragment=True,
        rest=packet[40:],
    )


def _written(head: _Head, flow: Flow, payload: bytes, wrong_by: int) -> bytes:
    """The new packet, whose UDP checksum is as wrong as the old one was."""
    length = 8 + len(payload)
    ports = pack("!HHH", flow.source_port, flow.target_port, length)
    pseudo = flow.source + flow.target + pack("!HH", length, 17)
    checksum = (wrong_by - _sum(pseudo + ports + b"\0\0" + payload)) % 0xFFFF or 0xFFFF
    udp = ports + pack("!H", checksum) + payload
    if flow.family == 10:
        first = 6 << 28 | head.traffic_class << 20
        ip = pack("!IHBB", first, length, 17, head.hop_limit - 1) + flow.source + flow.target
        return ip + udp
    ip = ipv4_header(
        flow.source,
        flow.target,
        20 + length,
        tos=head.traffic_class,
        ttl=head.hop_limit - 1,
        identification=head.identification,
        fragment=0x4000 if head.dont_fragment else 0,
    )
    return ip + udp


# --- frames -----------------------------------------------------------------------------------


def frame_of(
    source: tuple[str, int],
    target: tuple[str, int],
    data: bytes,
    *,
    tos: int = 0,
    ttl: int = 64,
    fragment: int = 0x4000,
    macs: bytes = b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02",
) -> bytes:
    """An Ethernet frame with a UDP datagram, correct in everything."""
    from_host, to_host = ip_address(source[0]).packed, ip_address(target[0]).packed
    length = 8 + len(data)
    ports = pack("!HHH", source[1], target[1], length)
    total = _sum(from_host + to_host + pack("!HH", length, 17) + ports + b"\0\0" + data)
    udp = ports + pack("!H", (-total) % 0xFFFF or 0xFFFF) + data
    if len(from_host) == 4:
        ip = ipv4_header(
            from_host, to_host, 20 + length, tos=tos, ttl=ttl, identification=7, fragment=fragment
        )
        return macs + b"\x08\x00" + ip + udp
    first = 6 << 28 | tos << 20 | 0xABCDE
    return macs + b"\x86\xdd" + pack("!IHBB", first, length, 17, ttl) + from_host + to_host + udp


def ipv4_header(
    source: bytes,
    target: bytes,
    total: int,
    *,
    tos: int,
    ttl: int,
    identification: int,
    fragment: int,
) -> bytes:
    head = pack("!BBHHHBB", 0x45, tos, total, identification, fragment, ttl, 17)
    checksum = 0xFFFF - _folded(_sum(head + source + target))
    return head + checksum.to_bytes(2, "big") + source + target


def with_checksum_of_header(frame: bytes) -> bytes:
    """An IPv4 frame whose header checksum is right again after the header was changed."""
    size = 4 * (frame[14] & 15)
    header = frame[14:24] + b"\0\0" + frame[26 : 14 + size]
    checksum = 0xFFFF - _folded(_sum(header))
    return frame[:24] + checksum.to_bytes(2, "big") + frame[26:]


def datagram_of(frame: bytes) -> tuple[tuple[bytes, int], tuple[bytes, int], bytes, bool]:
    """Source, target, data of a frame, and whether its checksum is right."""
    if frame[12:14] == b"\x08\x00":
        source, target, udp = frame[26:30], frame[30:34], frame[34:]
    else:
        source, target, udp = frame[22:38], frame[38:54], frame[54:]
    from_port, to_port, length, _ = unpack_from("!HHHH", udp)
    total = _sum(source + target + pack("!HH", length, 17) + udp)
    return (source, from_port), (target, to_port), udp[8:], total % 0xFFFF == 0


def _sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    return sum(unpack_from(f"!{len(data) // 2}H", data))


def _folded(total: int) -> int:
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


# --- the program itself ---------------------------------------------------------------------------


def run_once(program: int, frame: bytes, ingress: int | None = None) -> tuple[int, bytes]:
    """What the kernel's program makes of a frame: verdict and frame (BPF_PROG_TEST_RUN)."""
    given = ctypes.create_string_buffer(frame, len(frame))
    taken = ctypes.create_string_buffer(_MAX_FRAME)
    context = pack("=6I", 0, len(frame), 0, ingress or 0, 0, 0)
    given_context = ctypes.create_string_buffer(context, len(context))
    fields = [program, 0, len(frame), len(taken)]
    fields += [ctypes.addressof(given), ctypes.addressof(taken), 1, 0]
    fields += [0, 0, 0, 0] if ingress is None else [len(context), 0]
    fields += [] if ingress is None else [ctypes.addressof(given_context), 0]
    raw = _TEST_RUN.pack(*fields)
    attributes = ctypes.create_string_buffer(raw, len(raw))
    bpf(_PROG_TEST_RUN, attributes)
    after = _TEST_RUN.unpack(attributes.raw)
    return after[1], taken.raw[: after[3]]
