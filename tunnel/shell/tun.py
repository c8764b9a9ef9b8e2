"""The TUN device: IP packets between the kernel and an agent (Linux, /dev/net/tun).

One packet a system call; reading and writing never wait, so that one wake-up of the event loop
moves a batch. The device lives in the network namespace of the process and goes with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

import attrs
import trio

from tunnel.shell.commands import run_command, run_command_now

MAX_PACKET_BYTES = 65_535
MAX_NAME_BYTES = 15
QUEUE_PACKETS = 1_000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_REQUEST = struct.Struct("16sH22x")


class TunError(Exception):
    """The device could not be made; the message says why and what is needed."""


@attrs.frozen(kw_only=True)
class TunStatistics:
    """Packets since the device was made. `dropped_packets` the kernel did not take."""

    read_packets: int
    read_bytes: int
    written_packets: int
    written_bytes: int
    dropped_packets: int


class TunDevice:
    """A TUN device that is up. Made by `create`; `close` removes it from the system.

    Only one task at a time may wait in `wait_readable`.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self.name = name
        self._read_packets = 0
        self._read_bytes = 0
        self._written_packets = 0
        self._written_bytes = 0
        self._dropped = 0

    @classmethod
    def create(cls, name: str = "hlw%d", mtu: int = 1280) -> TunDevice:
        """Make a device and bring it up. `%d` in the name lets the kernel choose a number.

        Needs CAP_NET_ADMIN and no running event loop. Raises TunError.
        """
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise TunError(f"the name of an interface has 1 to {MAX_NAME_BYTES} bytes: {name!r}")
        try:
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise TunError(
                f"/dev/net/tun cannot be opened ({error.strerror}): run as root or with "
                "CAP_NET_ADMIN, and load the tun module"
            ) from error
        try:
            request = _REQUEST.pack(name.encode(), _IFF_TUN | _IFF_NO_PI)
            answer = fcntl.ioctl(descriptor, _TUNSETIFF, request)
            actual = _REQUEST.unpack(answer)[0].rstrip(b"\0").decode()
            device = cls(descriptor, actual)
            device._bring_up(mtu)
        except OSError as error:
            os.close(descriptor)
            raise TunError(f"the TUN device {name!r} cannot be made: {error.strerror}") from error
        except BaseException:
            os.close(descriptor)
            raise
        return device

    async def configure(self, ipv4: IPv4Address, ipv6: IPv6Address, mtu: int) -> None:
        """Give the device exactly these two addresses (/32 and /128) and this MTU.

        The IPv6 address is left out where the machine has IPv6 switched off. Raises CommandFailed.
        """
        lines = [
            f"addr flush dev {self.name} scope global",
            f"link set dev {self.name} mtu {mtu}",
            f"addr replace {ipv4}/32 dev {self.name}",
        ]
        if self.has_ipv6:
            lines.append(f"addr replace {ipv6}/128 dev {self.name} nodad")
        await run_command(["ip", "-batch", "-"], given="\n".join(lines) + "\n")

    @property
    def has_ipv6(self) -> bool:
        """Whether the kernel carries IPv6 on this device."""
        try:
            with open(f"/proc/sys/net/ipv6/conf/{self.name}/disable_ipv6") as file:
                return file.read().strip() == "0"
        except OSError:
            return False

    async def wait_readable(self) -> None:
        """Return when the kernel has a packet. Safe to cancel.

        Raises trio.ClosedResourceError when the device is or gets closed.
        """
        if self._descriptor < 0:
            raise trio.ClosedResourceError
        await trio.lowlevel.wait_readable(self._descriptor)

    def read_batch(self, limit: int = 64) -> list[bytes]:
        """What the kernel has, up to `limit` packets; an empty list when it has none."""
        packets: list[bytes] = []
        descriptor = self._descriptor
        while len(packets) < limit and descriptor >= 0:
            try:
                packet = os.read(descriptor, MAX_PACKET_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in (errno.EBADFD, errno.EIO):  # the interface was removed or is down
                    break
                raise
            packets.append(packet)
            self._read_bytes += len(packet)
        self._read_packets += len(packets)
        return packets

    def write_batch(self, packets: Iterable[bytes]) -> int:
        """Hand packets to the kernel; how many it took. The others are dropped and counted."""
        taken = 0
        for packet in packets:
            try:
                self._written_bytes += os.write(self._descriptor, packet)
                taken += 1
            except OSError:
                self._dropped += 1
        self._written_packets += taken
        return taken

    def close(self) -> None:
        """Remove the device; wakes a task in `wait_readable`. Closing twice is harmless."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(RuntimeError):  # outside of an event loop nobody waits
            trio.lowlevel.notify_closing(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def statistics(self) -> TunStatistics:
        return TunStatistics(
            read_packets=self._read_packets,
            read_bytes=self._read_bytes,
            written_packets=self._written_packets,
            written_bytes=self._written_bytes,
            dropped_packets=self._dropped,
        )

    def __enter__(self) -> TunDevice:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _bring_up(self, mtu: int) -> None:
        # Without this the kernel would put a link-local address and its chatter on the device.
        _write_sysctl(f"net/ipv6/conf/{self.name}/addr_gen_mode", "1")
        link = f"link set dev {self.name} mtu {mtu} txqueuelen {QUEUE_PACKETS} up"
        run_command_now(["ip", *link.split()])


def _write_sysctl(key: str, value: str) -> None:
    with contextlib.suppress(OSError), open(f"/proc/sys/{key}", "w") as file:
        file.write(value)
