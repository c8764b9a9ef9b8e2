"""The shell around the netcheck's core: names, sockets, one TLS connection, the interface.

Its UDP sockets carry the mark of the client's own where the system permits that, so that what they
see is the network and not a tunnel.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_interface
from typing import Final, Literal

import attrs
import msgspec
import trio

from channel.credentials import DEFAULT_PORTAL_PORT, UntrustedPortal, verify_portal
from channel.presented import presented_chain
from clients.netcheck.core import MAX_ENDPOINTS, SOCKETS, Endpoint, Netcheck
from clients.netcheck.findings import FamilyFinding, Link, PortalFinding, Report
from runtime.clock import NS_PER_S, Clock, SystemClock
from runtime.net.address import Address, split_host_port
from runtime.net.udp import UdpSocket
from runtime.randomness import SystemRandomness
from tunnel.shell.commands import CommandFailed, run_command

MAX_SERVERS: Final = 12
MAX_ADDRESSES_OF_A_NAME: Final = 2
"""Of each family: the others of a name are servers of the same place."""
RESOLVE_TIMEOUT_S: Final = 5.0
PORTAL_TIMEOUT_S: Final = 5.0
STUN_PORT: Final = 3_478
_BUFFER_BYTES: Final = 65_536

# No packet goes there (RFC 5737, RFC 3849): the kernel is only asked by which address it would.
_ELSEWHERE: Final = {"ipv4": Address("192.0.2.1", 9), "ipv6": Address("2001:db8::1", 9)}

Family = Literal["ipv4", "ipv6"]


@attrs.frozen(kw_only=True)
class Wanted:
    """What is to be checked. `servers` are `host:port` or hosts; `portal` is `host:port` or empty,
    `pin` that of its token's CA."""

    servers: Sequence[str]
    portal: str = ""
    pin: bytes | None = None
    mark: int | None = None


async def check(wanted: Wanted) -> Report:
    """Find out what there is. Takes at most about ten seconds; what fails is part of the report.

    Raises ValueError for a server that is no host and port, or more than MAX_SERVERS.
    """
    if len(wanted.servers) > MAX_SERVERS:
        raise ValueError(f"at most {MAX_SERVERS} servers are asked")
    named = [(name, *split_host_port(name, STUN_PORT)) for name in wanted.servers]
    notes: list[str] = []
    endpoints: list[Endpoint] = []
    for name, host, port in named:
        found = await _resolve(host, port)
        if not found:
            notes.append(f"{name}: this name has no address")
        endpoints += [Endpoint(name, address) for address in found]
    endpoints = list({each.address: each for each in reversed(endpoints)}.values())[::-1]
    families: dict[str, FamilyFinding] = {}
    portal: list[PortalFinding] = []
    packets = [0]
    async with trio.open_nursery() as nursery:
        for family in ("ipv4", "ipv6"):
            nursery.start_soon(
                _check_family, family, endpoints, wanted.mark, families, packets, SystemClock()
            )
        if wanted.portal:
            nursery.start_soon(_check_portal, wanted.portal, wanted.pin, portal)
    local = families["ipv4"].local_host or families["ipv6"].local_host
    return Report(
        ipv4=families["ipv4"],
        ipv6=families["ipv6"],
        portal=portal[0] if portal else None,
        link=None if local is None else await _link_of(local),
        packets_sent=packets[0],
        notes=tuple(notes),
    )


async def _resolve(host: str, port: int) -> list[Address]:
    """The first addresses of each family; none where there are none or it takes too long."""
    found: dict[int, list[Address]] = {socket.AF_INET: [], socket.AF_INET6: []}
    with trio.move_on_after(RESOLVE_TIMEOUT_S):
        try:
            infos = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        except OSError:
            return []
        for family, _, _, _, name in infos:
            if family in found and len(found[family]) < MAX_ADDRESSES_OF_A_NAME:
                found[family].append(Address(str(name[0]), int(name[1])))
    return [address for each in found.values() for address in each]


# --- one family -----------------------------------------------------------------------------------


async def _check_family(
    family: Family,
    endpoints: Sequence[Endpoint],
    mark: int | None,
    families: dict[str, FamilyFinding],
    packets: list[int],
    clock: Clock,
) -> None:
    wanted = (socket.AF_INET6,) if family == "ipv6" else (socket.AF_INET,)
    own = [each for each in endpoints if each.address.family in wanted]
    nothing = partial(FamilyFinding, family=family, udp="not_measured")
    local = _local_host(own[0].address if own else _ELSEWHERE[family], mark)
    if local is None:
        families[family] = nothing(local_host=None, notes=("this machine has no way out by it",))
        return
    if not own:
        families[family] = nothing(local_host=local, notes=("no server with such an address",))
        return
    with ExitStack() as open_sockets:
        sockets: dict[int, UdpSocket] = {}
        try:
            for number in range(SOCKETS):
                sockets[number] = _bind(local, mark)
                open_sockets.callback(sockets[number].close)
        except OSError as error:
            families[family] = nothing(local_host=local, notes=(f"no socket: {error.strerror}",))
            return
        core = Netcheck(
            own[:MAX_ENDPOINTS],
            {number: each.local_address for number, each in sockets.items()},
            randomness=SystemRandomness(),
            now=clock.monotonic_ns(),
        )
        await _drive(core, sockets, clock)
    packets[0] += core.packets_sent
    found = core.finding()
    if len(own) > MAX_ENDPOINTS:
        left = f"{len(own) - MAX_ENDPOINTS} further addresses of servers"
        found = attrs.evolve(found, notes=(*found.notes, left))
    families[family] = found


async def _drive(core: Netcheck, sockets: Mapping[int, UdpSocket], clock: Clock) -> None:
    """Carry datagrams and time to and from the core until it is done."""
    came, arrivals = trio.open_memory_channel[None](1)

    async def read(number: int) -> None:
        while True:
            await sockets[number].wait_readable()
            now = clock.monotonic_ns()
            for data, source in sockets[number].receive_batch():
                core.receive(number, data, source, now)
            try:
                came.send_nowait(None)
            except trio.WouldBlock:
                continue  # the sender is awake already

    async with trio.open_nursery() as nursery:
        for number in sockets:
            nursery.start_soon(read, number)
        while True:
            for number, data, destination in core.transmits:
                sockets[number].send(data, destination)
            core.transmits.clear()
            due = core.poll_timeout()
            if due is None:
                nursery.cancel_scope.cancel()
                return
            with trio.move_on_after(max(0, due - clock.monotonic_ns()) / NS_PER_S):
                await arrivals.receive()
            core.handle_timeout(clock.monotonic_ns())


def _local_host(to: Address, mark: int | None) -> str | None:
    """The address from which packets to `to` would leave; nothing is sent."""
    with socket.socket(to.family, socket.SOCK_DGRAM) as asking:
        try:
            _mark(asking, mark)
            asking.connect(to)
        except OSError:
            return None
        return Address.of(str(asking.getsockname()[0]), 0).host


def _mark(asking: socket.socket, mark: int | None) -> None:
    if mark is not None:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)


def _bind(host: str, mark: int | None) -> UdpSocket:
    return UdpSocket.bind(Address(host, 0), mark=mark, buffer_bytes=_BUFFER_BYTES)


def may_mark(mark: int) -> bool:
    """Whether this process may give its sockets a mark (CAP_NET_ADMIN, or CAP_NET_RAW)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            _mark(asking, mark)
        except OSError:
            return False
        return True


# --- the portal and the interface -----------------------------------------------------------------


async def _check_portal(portal: str, pin: bytes | None, found: list[PortalFinding]) -> None:
    host, port = split_host_port(portal, DEFAULT_PORTAL_PORT)
    started = trio.current_time()
    with trio.move_on_after(2 * PORTAL_TIMEOUT_S):
        try:
            chain = await trio.to_thread.run_sync(
                partial(presented_chain, host, port, timeout_s=PORTAL_TIMEOUT_S),
                abandon_on_cancel=True,
            )
        except (OSError, ValueError) as error:
            found.append(PortalFinding(address=portal, reachable=False, error=_printable(error)))
            return
        took_ns = int((trio.current_time() - started) * NS_PER_S)
        proved, why = None, ""
        if pin is not None:
            try:
                verify_portal(chain, pin=pin, host=host, at=datetime.now(UTC))
                proved = True
            except UntrustedPortal as error:
                proved, why = False, _printable(error)
        found.append(
            PortalFinding(
                address=portal, reachable=True, proved=proved, handshake_ns=took_ns, error=why
            )
        )
        return
    found.append(PortalFinding(address=portal, reachable=False, error="no answer in time"))


def _printable(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


class _AddressInfo(msgspec.Struct):
    local: str = ""
    prefixlen: int = 0


class _Interface(msgspec.Struct):
    ifname: str = ""
    mtu: int = 0
    addr_info: list[_AddressInfo] = []


async def _link_of(host: str) -> Link | None:
    """The interface that has this address; None where the system does not tell."""
    try:
        shown = await run_command(["ip", "-json", "address", "show", "up"])
        interfaces = msgspec.json.decode(shown, type=list[_Interface])
    except (CommandFailed, msgspec.MsgspecError):
        return None
    for each in interfaces:
        for info in each.addr_info:
            if info.local == host:
                prefix = str(ip_interface(f"{host}/{info.prefixlen}").network)
                return Link(name=each.ifname, mtu=each.mtu, prefix=prefix)
    return None
