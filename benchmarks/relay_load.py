"""The generator of `benchmarks.relay`: compiled at the run, given sockets and messages, and read.

`relay_generator.c` says what it does. Thin flows leave by one packet socket, whole frames with the
flows in turn, since that costs least and no two packets of a flow stand in a row; checksums are
left to the device, as ordinary sockets leave them. Trains leave by UDP_SEGMENT of a UDP socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import attrs

SOURCE: Final = Path(__file__).with_name("relay_generator.c")
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
LARGEST_TRAIN_BYTES: Final = 64_000
LARGEST_TRAIN_SEGMENTS: Final = 64
ROOM_BYTES: Final = 4 * 1024 * 1024

_SOL_PACKET: Final = 263
_PACKET_VNET_HDR: Final = 15
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_ETHERNET_BYTES: Final = 14
_IP_BYTES: Final = 20
_UDP_CHECKSUM_OFFSET: Final = 6


class GeneratorError(Exception):
    """The generator could not be compiled, or failed; the message says why."""


@attrs.frozen(kw_only=True)
class Carried:
    """What one run of the load found. Rates are of the measured time, loss of the whole run."""

    per_s: float
    sent_per_s: float
    loss: float
    window_full: float
    cpu_us: float | None
    """Of the watched threads, user and system, for each packet that arrived."""
    busy_us: float
    """Of all processors, whatever for, for each packet that arrived."""
    own_us: float
    """Of the generator itself, for each packet that arrived (in a full load it never sleeps)."""
    used_us: float
    """Of relay, generator and the kernel's threads for deferred network work together."""
    core_share: float | None
    """Of one core, by the watched threads: well under 1 in a full load, others were in the way."""


@attrs.frozen(kw_only=True)
class Ends:
    """One direction: messages that leave by `sending`, each `packets` packets, and where they
    arrive, each `arriving_bytes` long."""

    sending: socket.socket
    messages: Sequence[bytes]
    packets: int
    receiving: Sequence[socket.socket]
    arriving_bytes: int


@attrs.frozen
class Generator:
    """The compiled program and the core on which it runs."""

    program: Path
    core: int

    @classmethod
    def compile(cls, folder: Path, core: int) -> Generator:
        """Raises GeneratorError."""
        if shutil.which("gcc") is None:
            raise GeneratorError("gcc is missing: apt-get install gcc libc6-dev")
        program = folder / "relay_generator"
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise GeneratorError(f"gcc: {done.stderr.strip()}")
        return cls(program, core)

    def load(
        self,
        ends: Ends,
        *,
        measure_s: float,
        window: int = 0,
        rate: int = 0,
        batch: int = 32,
        watched: Sequence[int] = (),
    ) -> Carried:
        """Send as fast as `window` packets under way allow, or `rate` packets/s; `watched` are
        processes whose CPU time is told. Raises GeneratorError."""
        receiving = ",".join(str(each.fileno()) for each in ends.receiving)
        found = self._run(
            [
                "load", f"send={ends.sending.fileno()}", f"receive={receiving}",
                f"bytes={ends.arriving_bytes}", f"packets={ends.packets}", f"rate={rate}",
                f"window={window}", f"batch={batch}", f"measure_ms={round(measure_s * 1000)}",
                f"cpu={','.join(_schedstats(watched))}",
                f"kernel={','.join(_schedstats(_softirq_threads()))}",
            ],
            ends.messages,
            [ends.sending, *ends.receiving],
            measure_s,
        )  # fmt: skip
        if found["wrong_size"]:
            raise GeneratorError(f"{found['wrong_size']} packets of a wrong size arrived")
        if not found["received"]:
            raise GeneratorError("no packet arrived")
        seconds, received = found["elapsed_ns"] / 1e9, found["received"]
        busy_s = (os.cpu_count() or 1) * seconds - found["idle_ticks"] / TICKS_PER_S
        return Carried(
            per_s=received / seconds,
            sent_per_s=found["sent"] / seconds,
            loss=found["loss"],
            window_full=found["window_full"],
            cpu_us=found["cpu_ns"] / received / 1000 if watched else None,
            busy_us=busy_s / received * 1e6,
            own_us=found["own_cpu_ns"] / received / 1000,
            used_us=(found["cpu_ns"] + found["own_cpu_ns"] + found["kernel_cpu_ns"])
            / received
            / 1000,
            core_share=found["cpu_ns"] / found["elapsed_ns"] if watched else None,
        )

    def round_trip_us(
        self, client: socket.socket, peer: socket.socket, there: bytes, back: bytes, count: int
    ) -> float:
        """The median from client to peer and back, by connected sockets. Raises GeneratorError."""
        found = self._run(
            ["ping", f"client={client.fileno()}", f"peer={peer.fileno()}", f"count={count}"],
            [there, back],
            [client, peer],
            count * 0.001,
        )
        return float(found["p50_ns"]) / 1000

    def _run(
        self,
        arguments: list[str],
        messages: Sequence[bytes],
        sockets: Sequence[socket.socket],
        seconds: float,
    ) -> dict[str, Any]:
        plan = b"".join(struct.pack("=I", len(each)) + each for each in messages)
        done = subprocess.run(
            ["taskset", "-c", str(self.core), str(self.program), *arguments],
            input=plan,
            capture_output=True,
            pass_fds=[each.fileno() for each in sockets],
            timeout=seconds + 60,
        )
        if done.returncode:
            raise GeneratorError(done.stderr.decode().strip() or f"ended with {done.returncode}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def packet_socket(device: str) -> socket.socket:
    """Sends whole frames by `device`, receives none; make it inside of the device's namespace."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    made.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    made.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, ROOM_BYTES)
    made.bind((device, 0))
    return made


def udp_socket(host: str) -> socket.socket:
    """Bound to a free port of `host`, with room for what a burst brings."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, ROOM_BYTES)
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, ROOM_BYTES)
    made.bind((host, 0))
    made.settimeout(1.0)
    return made


def frame(
    hardware: bytes, source: tuple[str, int], destination: tuple[str, int], data: bytes
) -> bytes:
    """For a packet socket: the virtio header that leaves the UDP checksum to the device, then
    Ethernet (`hardware` is destination and source, 12 bytes), IPv4 (RFC 791) and UDP (RFC 768)."""
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
    udp_bytes = 8 + len(data)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, _IP_BYTES + udp_bytes, 0, 0x4000, 64, 17, 0) + addresses
    ip = ip[:10] + struct.pack("!H", 0xFFFF ^ _ones_sum(ip)) + ip[12:]
    pseudo = _ones_sum(addresses + struct.pack("!HH", 17, udp_bytes))
    udp = struct.pack("!HHHH", source[1], destination[1], udp_bytes, pseudo)
    start = _ETHERNET_BYTES + _IP_BYTES
    offload = struct.pack("=BBHHHH", 1, 0, 0, 0, start, _UDP_CHECKSUM_OFFSET)
    return offload + hardware + b"\x08\x00" + ip + udp + data


def train(packet: bytes) -> tuple[bytes, int]:
    """As many copies of `packet` in a row as one UDP_SEGMENT call takes, and how many."""
    count = min(LARGEST_TRAIN_SEGMENTS, LARGEST_TRAIN_BYTES // len(packet))
    return packet * count, count


def _ones_sum(data: bytes) -> int:
    """The sum of RFC 1071 before it is complemented; of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@cache
def _softirq_threads() -> tuple[int, ...]:
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # a process that has ended
            if path.read_text().startswith("ksoftirqd/"):
                found.append(int(path.parent.name))
    return tuple(found)


def _schedstats(pids: Sequence[int]) -> list[str]:
    """The files that tell how long each thread of these processes has run."""
    return [str(task / "schedstat") for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
