"""What serves clients in one process: the core, sockets and connections, and the way of data.

`relays.daemon` has one of these, or several processes with one each (`relays.processes`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import Final

import trio

from relays.authentication import Credentials
from relays.fastpath import FastPath
from relays.fastpath.attaching import (
    Attached,
    Unavailable,
    add_listener,
    attach_fast_path,
    shared_fast_path,
)
from relays.fastpath.drain import load as load_drain
from relays.fastpath.several import SeveralFastPaths
from relays.fastpath.xdp import XdpFastPath
from relays.peers import PeerPolicy
from relays.requests import ServerLimits
from relays.server import Server
from relays.settings import Addresses, RelaySettings
from relays.transports.local import local_addresses
from relays.transports.quic import QuicDoor, quic_limits
from relays.transports.statistics import Transport, TransportStatistics
from relays.transports.stream import StreamLimits, StreamSockets
from relays.transports.tls import CertificateSource
from relays.transports.udp import UdpSockets, wanted_descriptors
from runtime.clock import Clock
from runtime.descriptors import raise_file_limit
from runtime.net.address import Address
from runtime.net.binding import binding
from runtime.randomness import SystemRandomness
from runtime.service import get_logger

TIDY_S: Final = 5.0


class Serving:
    """See the head of this file. Of `processes` that serve as one relay this is one: `inherited`
    are its listeners of UDP, in the order of the settings, and the others listen where it does;
    `flows_descriptor` is the map of the fast path that all of them share, -1 without one.
    `make_sockets` is for the simulator, whose hostile relays have others: those move all data."""

    def __init__(
        self,
        settings: RelaySettings,
        addresses: Addresses,
        credentials: Credentials,
        clock: Clock,
        *,
        certificates: CertificateSource | None,
        processes: int = 1,
        inherited: Mapping[Address, socket.socket] | None = None,
        flows_descriptor: int = -1,
        make_sockets: Callable[..., UdpSockets] = UdpSockets,
    ) -> None:
        wants_drain = settings.compiled_drain and make_sockets is UdpSockets
        drain = load_drain(SystemRandomness()) if wants_drain else None
        self.data_path = "python" if drain is None else "compiled"
        self.certificates = certificates
        self._settings = settings
        self._addresses = addresses
        self._clock = clock
        self._inherited = inherited
        self._shares_ports = inherited is not None
        self._log = get_logger("relay")
        self._attached: Attached | None = None
        self._kernel_path: XdpFastPath | None = None
        if flows_descriptor >= 0:
            self._kernel_path = shared_fast_path(
                flows_descriptor, relayed_hosts=addresses.bind_hosts
            )
        elif not self._shares_ports:
            self._attached = attach_if_wanted(settings, addresses)
            self._kernel_path = None if self._attached is None else self._attached.path
        paths: list[FastPath] = [] if self._kernel_path is None else [self._kernel_path]
        if drain is not None:
            paths.append(drain)
        self.sockets = make_sockets(bind_hosts=addresses.bind_hosts, clock=clock, drain=drain)
        limits = ServerLimits()
        allocations, connections = _allow_descriptors(settings)
        self.server = Server(
            credentials=credentials,
            realm=settings.realm,
            relay_addresses=addresses.told_hosts,
            own_addresses=local_addresses() | addresses.external_hosts,
            sockets=self.sockets,
            randomness=SystemRandomness(),
            peers=PeerPolicy.of(
                allow_private_peers=settings.allow_private_peers,
                allowed_peer_ranges=settings.allowed_peer_ranges,
            ),
            limits=ServerLimits(
                allocations_per_username=settings.max_allocations_per_user,
                allocations_per_source=settings.max_allocations_per_source,
                allocations=allocations,
                permissions_per_allocation=settings.max_permissions,
                channels_per_allocation=settings.max_channels,
                unauthenticated_per_second=settings.unauthenticated_per_second,
                unauthenticated_burst=2 * settings.unauthenticated_per_second,
                unanswered_per_host=-(-limits.unanswered_per_host // processes),
            ),
            first_port=addresses.first_port,
            last_port=addresses.last_port,
            alternate_servers=addresses.alternate_servers,
            fast_path=SeveralFastPaths(paths) if len(paths) > 1 else next(iter(paths), None),
            now=clock.monotonic_ns(),
            unix_s=int(clock.utc_now().timestamp()),
        )
        self._streams = StreamSockets(
            server=self.server,
            sockets=self.sockets,
            clock=clock,
            limits=StreamLimits(
                connections=connections,
                connections_per_prefix=settings.max_connections_per_prefix,
                connections_per_second=settings.connections_per_second,
            ),
        )
        self._quic_doors: list[QuicDoor] = []

    def listen(self) -> None:
        """Open the listeners, or take the inherited ones. Raises OSError."""
        self._listen_for_udp()
        by_transport = self._addresses.listen_by_transport
        for address in by_transport["tcp"]:
            with binding("listen_tcp", f"{address} (TCP)"):
                bound = self._streams.listen(address, reuse_port=self._shares_ports)
            self._tell_listening("tcp", bound)
        for address in by_transport["tls"]:
            with binding("listen_tls", f"{address} (TCP)"):
                bound = self._streams.listen(
                    address, self.certificates, reuse_port=self._shares_ports
                )
            self._tell_listening("tls", bound)
        for address in by_transport["quic"]:
            with binding("listen_quic", f"{address} (UDP)"):
                door = self._quic_door(address)
            self._quic_doors.append(door)
            self._tell_listening("quic", door.address)
        self._log.info("data_path", mode=self.data_path)

    async def run(self) -> None:
        """Serve, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.sockets.run, self.server)
            nursery.start_soon(self._streams.run)
            for door in self._quic_doors:
                nursery.start_soon(door.run)
            if self._kernel_path is not None:
                nursery.start_soon(self._tidy_fast_path, self._kernel_path)

    async def wait_serving(self) -> None:
        """Listeners are read as soon as `run` runs; what has come before waits in them."""

    def statistics(self) -> dict[str, int]:
        """Of the core and the sockets of UDP, which count all."""
        return {**self.server.statistics(), **self.sockets.statistics()}

    def transports(self) -> dict[str, TransportStatistics]:
        """Of the listeners whose clients have connections."""
        totals: dict[str, TransportStatistics] = {}
        listeners: list[Transport] = [self._streams, *self._quic_doors]
        for each in listeners:
            for name, one in each.transports().items():
                totals.setdefault(name, TransportStatistics()).add(one)
        return totals

    def close(self) -> None:
        if self._attached is not None:
            self._attached.close()
        self._streams.close_all()
        self.sockets.close_all()

    # --- helpers -------------------------------------------------------------------------------

    def _tell_fast_path(self, number: int, bound: Address) -> None:
        if self._kernel_path is None:
            return
        try:
            add_listener(self._kernel_path, self._addresses.bind_hosts, number, bound)
        except Unavailable as reason:
            self._log.warning("no_fast_path", listener=str(bound), reason=str(reason))

    async def _tidy_fast_path(self, path: XdpFastPath) -> None:
        while True:
            await trio.sleep(TIDY_S)
            path.handle_timeout(self._clock.monotonic_ns())

    def _listen_for_udp(self) -> None:
        listen = self._addresses.listen_by_transport["udp"]
        told_at = [told for transport, told in self._addresses.announced if transport == "udp"]
        inherited = None if self._inherited is None else iter(self._inherited.items())
        known: dict[int, Address] = {}
        for address, told in zip(listen, told_at, strict=True):
            if inherited is not None:
                bound, opened = next(inherited)
                number = self.sockets.adopt(opened)
            else:
                with binding("listen", f"{address} (UDP)"):
                    number, bound = self.sockets.listen(address)
                self._tell_listening("udp", bound)
            self.server.add_listener(number)
            self._tell_fast_path(number, bound)
            if not ip_address(address.host).is_unspecified:
                known[number] = Address(told.host, bound.port)
        if self.server.offer_discovery(known) and inherited is None:
            self._log.info("offering_discovery", reason="two addresses with the same two ports")

    def _quic_door(self, address: Address) -> QuicDoor:
        assert self.certificates is not None
        return QuicDoor(
            address,
            certificates=self.certificates,
            server=self.server,
            sockets=self.sockets,
            clock=self._clock,
            limits=quic_limits(
                connections=self._settings.max_connections,
                connections_per_source=self._settings.max_connections_per_prefix,
            ),
            reuse_port=self._shares_ports,
        )

    def _tell_listening(self, transport: str, bound: Address) -> None:
        if self._shares_ports and transport != "udp":
            return  # once, by the parent
        if transport in ("tls", "quic") and self.certificates is not None:
            pins = (self.certificates.current.pin,)
            self._log.info("listening", address=str(bound), transport=transport, pins=pins)
        else:
            self._log.info("listening", address=str(bound), transport=transport)


def attach_if_wanted(settings: RelaySettings, addresses: Addresses) -> Attached | None:
    """The fast path of the kernel, if the settings ask for it and this machine has it; the log says
    which of it, or why not."""
    if settings.fast_path == "off":
        return None
    log = get_logger("relay")
    try:
        attached = attach_fast_path(
            settings.fast_path,
            listen=addresses.listen_by_transport["udp"],
            relayed_hosts=addresses.bind_hosts,
            devices=settings.fast_path_device,
        )
    except Unavailable as reason:
        log.warning("no_fast_path", wanted=settings.fast_path, reason=str(reason))
        return None
    log.info("fast_path", mode=attached.mode, devices=" ".join(attached.devices))
    return attached


def certificates_of(
    settings: RelaySettings, addresses: Addresses, clock: Clock
) -> CertificateSource | None:
    """The certificate of a relay that shows one, from the files of the settings or made now. Raises
    relays.transports.tls.CertificateError, runtime.service.SecretUnavailable."""
    by_transport = addresses.listen_by_transport
    if not by_transport["tls"] and not by_transport["quic"]:
        return None
    return CertificateSource(settings.tls_certificate, settings.tls_key, clock.utc_now())


def _allow_descriptors(settings: RelaySettings) -> tuple[int, int]:
    """Raise the limit of open files as far as allowed; how many allocations and connections it is
    good for. Where it is too low, a quarter of it is for connections."""
    allocations, connections = settings.max_allocations, settings.max_connections
    free = raise_file_limit(wanted_descriptors(allocations) + connections) - wanted_descriptors(0)
    if free < wanted_descriptors(allocations) - wanted_descriptors(0) + connections:
        connections = max(1, min(connections, free // 4))
    return max(1, min(allocations, (free - connections) // 2)), connections
