"""The relay as a process: sockets, control channel, health, metrics, and an orderly end.

SIGTERM or SIGINT drains: the control channel is closed, so that the portal moves the agents, no
new allocation is given, and the process ends when the last one has left or after
`drain_timeout_s`; a second signal ends it at once.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import datetime
from functools import partial
from ipaddress import ip_address
from typing import Final

import trio
from prometheus_client import CollectorRegistry

from channel.credentials import DecodedToken, decode_token
from channel.dialer import Dialer
from channel.messages import TO_RELAY, IpText, SocketAddress
from channel.own_token import read_token
from relays.agent import DrainRequested, Joined, RelayAgent, UserRevoked
from relays.authentication import GRACE_S, Credentials, StampedCredentials, StaticCredentials
from relays.metrics import RelayMetrics
from relays.peers import PeerPolicy
from relays.requests import ServerLimits
from relays.server import Server
from relays.settings import Addresses, RelaySettings, check
from relays.transports.local import local_addresses
from relays.transports.quic import QuicDoor, quic_limits
from relays.transports.stream import StreamLimits, StreamSockets
from relays.transports.tls import LOOK_S, CertificateSource
from relays.transports.udp import UdpSockets, wanted_descriptors
from relays.users import read_users
from runtime.clock import Clock, SystemClock
from runtime.descriptors import raise_file_limit
from runtime.net.address import Address
from runtime.net.binding import binding
from runtime.randomness import SystemRandomness
from runtime.secret import Secret
from runtime.service import Health, configure_logging, get_logger, serve_observability

TICK_S: Final = 0.5
SOFTWARE: Final = "holloway-relay"


async def run_relay(
    settings: RelaySettings, sockets: Callable[..., UdpSockets] = UdpSockets
) -> None:
    """Run until a signal ends it. `sockets` is for the simulator, whose hostile relays have others.

    Raises SettingsError, runtime.service.SecretUnavailable, channel.credentials.InvalidToken,
    relays.transports.tls.CertificateError, OSError when an address cannot be bound, and
    channel.dialer.Refused when the portal will not have this relay.
    """
    configure_logging(settings.log_format, settings.log_level)
    addresses = check(settings)
    token, credentials, stamp_secret = _read_secrets(settings)
    decoded = None if token is None else decode_token(token)
    relay = _Relay(settings, addresses, credentials, sockets)
    try:
        relay.listen()
        agent = None
        if token is not None:
            agent = RelayAgent(
                token=token,
                addresses=[
                    SocketAddress(address=IpText(host), port=port, transport=transport)
                    for transport, (host, port) in addresses.announced
                ],
                certificate_pins=relay.pins,
                stamp_secret=stamp_secret,
                name=settings.name,
                region=settings.region,
                failure_domain=settings.failure_domain,
                software=SOFTWARE,
                incarnation=_unix_ns(relay.clock.utc_now()),
            )
        await relay.run(agent, decoded)
    except BaseExceptionGroup as group:
        raise _only_cause(group) from None
    finally:
        relay.streams.close_all()
        relay.sockets.close_all()


def _read_secrets(settings: RelaySettings) -> tuple[Secret | None, Credentials, bytes]:
    """The token (None for a stand-alone relay), the credentials to check, the stamp secret."""
    if settings.standalone:
        return None, StaticCredentials(read_users(settings)), b""
    token = read_token("relay", "relay", settings.token_file)
    stamp_secret = SystemRandomness().bytes(32)
    return token, StampedCredentials(stamp_secret), stamp_secret


class _Relay:
    """The parts of a running relay and the tasks that connect them."""

    def __init__(
        self,
        settings: RelaySettings,
        addresses: Addresses,
        credentials: Credentials,
        sockets: Callable[..., UdpSockets],
    ) -> None:
        self.clock: Clock = SystemClock()
        self.health = Health()
        self.sockets = sockets(bind_hosts=addresses.bind_hosts, clock=self.clock)
        self._settings = settings
        self._addresses = addresses
        self._credentials = credentials
        self._log = get_logger("relay")
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
            ),
            first_port=addresses.first_port,
            last_port=addresses.last_port,
            alternate_servers=addresses.alternate_servers,
            now=self.clock.monotonic_ns(),
            unix_s=_unix_ns(self.clock.utc_now()) // 10**9,
        )
        self.streams = StreamSockets(
            server=self.server,
            sockets=self.sockets,
            clock=self.clock,
            limits=StreamLimits(
                connections=connections,
                connections_per_prefix=settings.max_connections_per_prefix,
                connections_per_second=settings.connections_per_second,
            ),
        )
        self.certificates: CertificateSource | None = None
        self.quic_doors: list[QuicDoor] = []
        if addresses.listen_by_transport["tls"] or addresses.listen_by_transport["quic"]:
            self.certificates = CertificateSource(
                settings.tls_certificate, settings.tls_key, self.clock.utc_now()
            )

    @property
    def pins(self) -> tuple[str, ...]:
        """Of the certificate that is shown now."""
        return () if self.certificates is None else (self.certificates.current.pin,)

    def listen(self) -> None:
        listen_by_transport = self._addresses.listen_by_transport
        told_at = [told for transport, told in self._addresses.announced if transport == "udp"]
        known: dict[int, Address] = {}
        for address, told in zip(listen_by_transport["udp"], told_at, strict=True):
            with binding("listen", f"{address} (UDP)"):
                number, bound = self.sockets.listen(address)
            self.server.add_listener(number)
            if not ip_address(address.host).is_unspecified:
                known[number] = Address(told.host, bound.port)
            self._log.info("listening", address=str(bound), transport="udp")
        if self.server.offer_discovery(known):
            self._log.info("offering_discovery", reason="two addresses with the same two ports")
        for address in listen_by_transport["tcp"]:
            with binding("listen_tcp", f"{address} (TCP)"):
                bound = self.streams.listen(address)
            self._log.info("listening", address=str(bound), transport="tcp")
        for address in listen_by_transport["tls"]:
            with binding("listen_tls", f"{address} (TCP)"):
                bound = self.streams.listen(address, self.certificates)
            self._log.info("listening", address=str(bound), transport="tls", pins=self.pins)
        for address in listen_by_transport["quic"]:
            with binding("listen_quic", f"{address} (UDP)"):
                door = self._quic_door(address)
            self.quic_doors.append(door)
            self._log.info("listening", address=str(door.address), transport="quic", pins=self.pins)
        self.health.set("sockets", True)

    def _quic_door(self, address: Address) -> QuicDoor:
        assert self.certificates is not None
        return QuicDoor(
            address,
            certificates=self.certificates,
            server=self.server,
            sockets=self.sockets,
            clock=self.clock,
            limits=quic_limits(
                connections=self._settings.max_connections,
                connections_per_source=self._settings.max_connections_per_prefix,
            ),
        )

    async def run(self, agent: RelayAgent | None, token: DecodedToken | None) -> None:
        registry = CollectorRegistry()
        registry.register(
            RelayMetrics(
                server=self.server,
                sockets=self.sockets,
                transports=[self.streams, *self.quic_doors],
                certificates=self.certificates,
            )
        )
        channel_scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            if self._settings.observability:
                await nursery.start(
                    partial(
                        serve_observability, self._settings.observability, self.health, registry
                    )
                )
            nursery.start_soon(self.sockets.run, self.server)
            nursery.start_soon(self.streams.run)
            for door in self.quic_doors:
                nursery.start_soon(door.run)
            nursery.start_soon(self._end_on_signal, channel_scope, nursery.cancel_scope)
            nursery.start_soon(self._keep_certificate, agent)
            if agent is None or token is None:
                nursery.start_soon(self._tick, lambda: None)
                return
            with channel_scope:
                await self._keep_channel(agent, token)

    async def _keep_channel(self, agent: RelayAgent, token: DecodedToken) -> None:
        self.health.set("portal", False, "not joined yet")
        async with trio.open_nursery() as nursery:
            dialer = Dialer(
                token.portal,
                token.pin,
                TO_RELAY,
                agent,
                self.clock,
                SystemRandomness(),
                on_frame=lambda: self._hear(agent),
            )
            nursery.start_soon(dialer.run)
            nursery.start_soon(self._tick, lambda: self._speak(agent, dialer))

    def _hear(self, agent: RelayAgent) -> None:
        for event in agent.drain_events():
            if isinstance(event, Joined):
                self._log.info("joined", relay_id=str(event.relay_id))
                if isinstance(self._credentials, StampedCredentials):
                    self._credentials.relay_id = event.relay_id
            elif isinstance(event, DrainRequested):
                self._log.info("draining", reason="the portal asked for it")
                self.server.drain()
            elif isinstance(event, UserRevoked):
                self._revoke(event)

    def _revoke(self, event: UserRevoked) -> None:
        if isinstance(self._credentials, StampedCredentials):
            unix_s = _unix_ns(self.clock.utc_now()) // 10**9
            until_unix_s = unix_s + GRACE_S + event.for_ns // 10**9
            self._credentials.revoke(event.user, until_unix_s=until_unix_s, unix_s=unix_s)
        ended = self.server.revoke_user(event.user)
        self._log.info("user_revoked", allocations=ended)

    def _speak(self, agent: RelayAgent, dialer: Dialer) -> None:
        now = self.clock.monotonic_ns()
        self.health.set("portal", dialer.connected, "" if dialer.connected else "no channel")
        agent.load_changed(self.server.allocations, self.server.load, now)
        agent.handle_timeout(now)
        for message in agent.drain_messages():
            dialer.send(message)
        if agent.is_outdated:
            dialer.join_anew()

    async def _keep_certificate(self, agent: RelayAgent | None) -> None:
        """Look at the files of the certificate, and on SIGHUP even if they look the same."""
        with trio.open_signal_receiver(signal.SIGHUP) as hangups:
            while True:
                was_told = False
                with trio.move_on_after(LOOK_S):
                    await anext(hangups)
                    was_told = True
                if self.certificates is None or not self.certificates.look(again=was_told):
                    continue
                if agent is not None:
                    agent.certificates_changed(self.pins)

    async def _tick(self, act: Callable[[], None]) -> None:
        """What is done twice a second: tell the core the wall clock, and `act`."""
        while True:
            now, utc = self.clock.monotonic_ns(), self.clock.utc_now()
            self.server.synchronise(now, _unix_ns(utc) // 10**9)
            act()
            await trio.sleep(TICK_S)

    async def _end_on_signal(
        self, channel_scope: trio.CancelScope, everything: trio.CancelScope
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            await anext(signals)
            self._log.info("draining", reason="signal", allocations=self.server.allocations)
            self.health.set("draining", False, "no new allocations")
            self.server.drain()
            channel_scope.cancel()
            with trio.move_on_after(self._settings.drain_timeout_s):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._cancel_when_empty, nursery.cancel_scope)
                    await anext(signals)
                    nursery.cancel_scope.cancel()
        self._log.info("ended", allocations=self.server.allocations)
        everything.cancel()

    async def _cancel_when_empty(self, scope: trio.CancelScope) -> None:
        while self.server.allocations:
            await trio.sleep(TICK_S)
        scope.cancel()


def _allow_descriptors(settings: RelaySettings) -> tuple[int, int]:
    """Raise the limit of open files as far as allowed; how many allocations and connections it is
    good for. Where it is too low, a quarter of it is for connections."""
    allocations, connections = settings.max_allocations, settings.max_connections
    free = raise_file_limit(wanted_descriptors(allocations) + connections) - wanted_descriptors(0)
    if free < wanted_descriptors(allocations) - wanted_descriptors(0) + connections:
        connections = max(1, min(connections, free // 4))
    return max(1, min(allocations, (free - connections) // 2)), connections


def _only_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception behind nested groups; the group itself if there are more."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
        cause = cause.exceptions[0]
    return group if isinstance(cause, BaseExceptionGroup) else cause


def _unix_ns(instant: datetime) -> int:
    return int(instant.timestamp() * 10**9)
