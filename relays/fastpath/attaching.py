"""Brings the XDP program to the network devices of a relay, as well as the machine permits.

In driver mode the device's driver runs it, in generic mode the kernel does a little later; which of
the two is tried out. All devices have the same mode, since packets may go from one to another.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from struct import pack
from typing import Final, Literal

import attrs

from relays.fastpath.elf import InvalidObject, parse_object
from relays.fastpath.loader import BpfError, BpfMap, LoadedProgram, Mode
from relays.fastpath.xdp import NAMES, OBJECT, XdpFastPath, relayed_port_of
from relays.transports.local import device_by_address, outer_addresses
from relays.turn import FAMILY_IPV4, FAMILY_IPV6
from runtime.net.address import Address

FastPathMode = Literal["auto", "driver", "generic", "off"]

MAX_DEVICES: Final = 64
"""As in relay_xdp.c."""
PROGRAM_NAME: Final = "holloway_relay"

_HINTS: Final = {
    errno.EPERM: "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are needed",
    errno.EACCES: "CAP_PERFMON is needed, or the verifier is older than the program",
    errno.EBUSY: "another program is attached there, perhaps that of another relay",
    errno.EINVAL: "Linux 5.9 or newer is needed",
    errno.ENOSYS: "this kernel or machine has no bpf(2)",
}
_FORWARDING: Final = {
    FAMILY_IPV4: Path("/proc/sys/net/ipv4/conf/lo/forwarding"),
    FAMILY_IPV6: Path("/proc/sys/net/ipv6/conf/lo/forwarding"),
}
_SIOCETHTOOL: Final = 0x8946
_GET_DRIVER_INFORMATION: Final = 3
_DRIVER_INFORMATION_BYTES: Final = 196


class Unavailable(Exception):
    """There is no fast path on this machine; the message says why."""


@attrs.frozen
class Attached:
    """A program that runs. Closing it, or the end of this process, takes it from the devices."""

    path: XdpFastPath
    mode: Mode
    devices: tuple[str, ...]
    program: LoadedProgram
    relayed_hosts: dict[int, str]

    def add_listener(self, number: int, bound: Address) -> None:
        """See the function of this name."""
        add_listener(self.path, self.relayed_hosts, number, bound)

    @property
    def flows_descriptor(self) -> int:
        """For other processes of this relay to inherit: see `shared_fast_path`."""
        return self.program.maps["flows"].descriptor

    def forget_ports(self, first: int, last: int) -> int:
        """Remove the entries of these relayed ports: those of a process that has ended. How many
        there were. Raises BpfError."""
        flows, removed = self.program.maps["flows"], 0
        for key in flows.all_keys():
            values = flows.lookup(key)
            if values and first <= relayed_port_of(key, values[0]) <= last:
                flows.delete(key)
                removed += 1
        return removed

    def close(self) -> None:
        self.program.close()


def add_listener(
    path: XdpFastPath, relayed_hosts: dict[int, str], number: int, bound: Address
) -> None:
    """Tell under which address clients reach a listener. For a wildcard that is sure only where
    this machine has no other one of the family. Raises Unavailable."""
    if is_any(bound.host):
        family = family_of(bound.host)
        host = relayed_hosts[family]
        if outer_addresses(family) != {host}:
            raise Unavailable("this machine has several addresses: listen on each by name")
        bound = Address(host, bound.port)
    path.add_listener(number, bound)


def attach_fast_path(
    wanted: FastPathMode,
    *,
    listen: Iterable[Address],
    relayed_hosts: dict[int, str],
    devices: Iterable[str] = (),
) -> Attached:
    """Attach the program to `devices`, or to those that have the addresses of listeners and
    relayed ports. `relayed_hosts` maps a family to the local address of relayed ports. Raises
    Unavailable."""
    hosts = [*relayed_hosts.values(), *(one.host for one in listen if not is_any(one.host))]
    names = tuple(devices) or _devices_of(hosts)
    if not names or len(names) > MAX_DEVICES:
        raise Unavailable(f"1 to {MAX_DEVICES} devices are needed, not {len(names)}")
    try:
        program = LoadedProgram(parse_object(OBJECT.read_bytes()), PROGRAM_NAME)
    except (BpfError, InvalidObject, OSError) as error:
        raise Unavailable(_said(error)) from None
    try:
        for family in sorted({family_of(host) for host in hosts}):
            _allow_look_ups(family)
        indices = [_index_of(name) for name in names]
        mode = _attach(program, names, indices, _modes(wanted, names))
        for index in indices:
            program.maps["devices"].update(index.to_bytes(4, "little"), b"\1\0\0\0")
    except OSError as error:
        program.close()
        raise Unavailable(_said(error)) from None
    except BaseException:
        program.close()
        raise
    counts = program.maps["counts"]
    path = XdpFastPath(
        flows=program.maps["flows"],
        counts=lambda: read_counts(counts),
        relayed_hosts=relayed_hosts,
    )
    return Attached(path, mode, names, program, relayed_hosts)


def shared_fast_path(flows_descriptor: int, *, relayed_hosts: dict[int, str]) -> XdpFastPath:
    """For one of several processes of a relay: entries in the map of the one that has attached the
    program, which alone counts packets, and calls `forget_ports` when this process has ended. The
    descriptor is kept open. Raises BpfError, InvalidObject, OSError."""
    program = parse_object(OBJECT.read_bytes())
    [definition] = [one for one in program.maps if one.name == "flows"]
    flows = BpfMap(definition, flows_descriptor)
    return XdpFastPath(flows=flows, counts=dict, relayed_hosts=relayed_hosts)


def read_counts(counts: BpfMap) -> dict[str, tuple[int, int]]:
    """Packets and bytes by `NAMES`, of all processors together. Raises BpfError."""
    read = {}
    for number, name in enumerate(NAMES):
        copies = counts.lookup(number.to_bytes(4, "little"))
        packets = sum(int.from_bytes(one[:8], "little") for one in copies)
        read[name] = packets, sum(int.from_bytes(one[8:], "little") for one in copies)
    return read


def _attach(
    program: LoadedProgram, names: tuple[str, ...], indices: list[int], modes: tuple[Mode, ...]
) -> Mode:
    """The first mode that all devices take. Raises Unavailable."""
    refusals = []
    for mode in modes:
        try:
            for name, index in zip(names, indices, strict=True):
                at = name
                program.attach(index, mode)
        except BpfError as error:
            program.detach()
            refusals.append(f"{at}: {_said(error)}")
        else:
            return mode
    raise Unavailable("; ".join(refusals))


def _modes(wanted: FastPathMode, names: tuple[str, ...]) -> tuple[Mode, ...]:
    """A veth takes driver mode always, and loses every packet unless its other end has a program
    too or GRO: so it is used only when asked for by name."""
    if wanted == "driver":
        return ("driver",)
    if wanted == "generic" or any(driver_of(name) == "veth" for name in names):
        return ("generic",)
    return ("driver", "generic")


def _devices_of(hosts: Iterable[str]) -> tuple[str, ...]:
    by_address = device_by_address()
    names: dict[str, None] = {}
    for host in hosts:
        name = by_address.get(host)
        if name is None:
            raise Unavailable(f"no network device has the address {host}")
        if name != "lo":
            names[name] = None
    if not names:
        raise Unavailable("packets of the loopback device are not carried")
    return tuple(names)


def _index_of(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise Unavailable(f"there is no network device {name}") from None


def _allow_look_ups(family: int) -> None:
    """The program asks how a packet of this machine's own would go (bpf_fib_lookup), as if it came
    from the loopback device; the kernel answers only where that device may forward. Others need
    not, and the machine does not become a router by it. Raises Unavailable."""
    setting = _FORWARDING[family]
    try:
        if setting.read_text().strip() == "0":
            setting.write_text("1")
    except OSError as error:
        name = "net." + ".".join(setting.parts[-4:])
        raise Unavailable(f"{name} is to be 1 and cannot be set ({error.strerror})") from None


def driver_of(device: str) -> str:
    """The name of a device's driver, empty if it does not tell."""
    information = ctypes.create_string_buffer(
        _GET_DRIVER_INFORMATION.to_bytes(4, "little"), _DRIVER_INFORMATION_BYTES
    )
    request = pack("16sQ8x", device.encode(), ctypes.addressof(information))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            fcntl.ioctl(asking, _SIOCETHTOOL, request)
        except OSError:
            return ""
    return information.raw[4:36].partition(b"\0")[0].decode(errors="replace")


def family_of(host: str) -> int:
    return FAMILY_IPV6 if ":" in host else FAMILY_IPV4


def is_any(host: str) -> bool:
    return ip_address(host).is_unspecified


def _said(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    hint = _HINTS.get(error.errno or 0) if isinstance(error, BpfError) else None
    return f"{error.strerror} ({hint})" if hint else f"{error.strerror}"
