"""The relay as a process: sockets, control channel, health, metrics, and an orderly end.

SIGTERM or SIGINT drains: the control channel is closed, so that the portal moves the agents, no
new allocation is given, and the process ends when the last one has left or after
`drain_timeout_s`; a second signal ends it at once.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Final

import attrs
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from channel.credentials import DecodedToken, decode_token
from channel.dialer import Dialer
from channel.messages import TO_RELAY, IpText, SocketAddress
from channel.own_token import read_token
from relays.agent import DrainRequested, Joined, RelayAgent, UserRevoked
from relays.authentication import GRACE_S, Credentials, StampedCredentials, StaticCredentials
from relays.fastpath.attaching import Attached, Unavailable, attach_fast_path
from relays.peers import PeerPolicy
from relays.requests import ServerLimits
from relays.server import Server
from relays.settings import Addresses, RelaySettings, check, parse_users
from relays.transports.local import local_addresses
from relays.transports.udp import UdpSockets, wanted_descriptors
from runtime.clock import Clock, SystemClock
from runtime.descriptors import raise_file_limit
from runtime.net.address import Address
from runtime.net.binding import binding
from runtime.randomness import SystemRandomness
from runtime.secret import Secret
from runtime.service import Health, configure_logging, get_logger, read_secret, serve_observability

TICK_S: Final = 0.5
SOFTWARE: Final = "holloway-relay"

_GAUGES: Final = frozenset(
    {"allocations", "reservations", "source_prefixes", "sockets", "fast_path_channels"}
)

_PASSED: Final = "fast_path_passed_"


async def run_relay(settings: RelaySettings) -> None:
    """Run until a signal ends it.

    Raises SettingsError, runtime.service.SecretUnavailable, channel.credentials.InvalidToken,
    OSError when an address cannot be bound, and channel.dialer.Refused when the portal will not
    have this relay.
    """
    configure_logging(settings.log_format, settings.log_level)
    addresses = check(settings)
    token, credentials, stamp_secret = _read_secrets(settings)
    decoded = None if token is None else decode_token(token)
    relay = _Relay(settings, addresses, credentials)
    try:
        relay.listen()
        agent = None
        if token is not None:
            agent = RelayAgent(
                token=token,
                addresses=[
                    SocketAddress(address=IpText(host), port=port)
                    for host, port in addresses.announced
                ],
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
        relay.close()


def _read_secrets(settings: RelaySettings) -> tuple[Secret | None, Credentials, bytes]:
    """The token (None for a stand-alone relay), the credentials to check, the stamp secret."""
    if settings.standalone:
        users = parse_users(read_secret(file=settings.users_file).reveal_text())
        return None, StaticCredentials(users), b""
    token = read_token("relay", "relay", settings.token_file)
    stamp_secret = SystemRandomness().bytes(32)
    return token, StampedCredentials(stamp_secret), stamp_secret


class _Relay:
    """The parts of a running relay and the tasks that connect them."""

    def __init__(
        self, settings: RelaySettings, addresses: Addresses, credentials: Credentials
    ) -> None:
        self.clock: Clock = SystemClock()
        self.health = Health()
        self.sockets = UdpSockets(bind_hosts=addresses.bind_hosts, clock=self.clock)
        self._settings = settings
        self._addresses = addresses
        self._credentials = credentials
        self._log = get_logger("relay")
        self._attached = self._attach_fast_path()
        allocations = _allow_descriptors(settings.max_allocations)
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
            fast_path=None if self._attached is None else self._attached.path,
            now=self.clock.monotonic_ns(),
            unix_s=_unix_ns(self.clock.utc_now()) // 10**9,
        )

    def listen(self) -> None:
        for address in self._addresses.listen:
            with binding("listen", f"{address} (UDP)"):
                number, bound = self.sockets.listen(address)
            self.server.add_listener(number)
            self._tell_fast_path(number, bound)
            self._log.info("listening", address=str(bound), transport="udp")
        self.health.set("sockets", True)

    def close(self) -> None:
        if self._attached is not None:
            self._attached.close()
        self.sockets.close_all()

    def _attach_fast_path(self) -> Attached | None:
        settings, addresses = self._settings, self._addresses
        if settings.fast_path == "off":
            return None
        try:
            attached = attach_fast_path(
                settings.fast_path,
                listen=addresses.listen,
                relayed_hosts=addresses.bind_hosts,
                devices=settings.fast_path_device,
            )
        except Unavailable as reason:
            self._log.warning("no_fast_path", wanted=settings.fast_path, reason=str(reason))
            return None
        self._log.info("fast_path", mode=attached.mode, devices=" ".join(attached.devices))
        return attached

    def _tell_fast_path(self, number: int, bound: Address) -> None:
        if self._attached is None:
            return
        try:
            self._attached.add_listener(number, bound)
        except Unavailable as reason:
            self._log.warning("no_fast_path", listener=str(bound), reason=str(reason))

    async def run(self, agent: RelayAgent | None, token: DecodedToken | None) -> None:
        registry = CollectorRegistry()
        registry.register(_Metrics(self.server, self.sockets))
        channel_scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            if self._settings.observability:
                await nursery.start(
                    partial(
                        serve_observability, self._settings.observability, self.health, registry
                    )
                )
            nursery.start_soon(self.sockets.run, self.server)
            nursery.start_soon(self._end_on_signal, channel_scope, nursery.cancel_scope)
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

    async def _tick(self, act: Callable[[], None]) -> None:
        """What is done twice a second: tell the core the wall clock, and `act`."""
        while True:
            now, utc = self.clock.monotonic_ns(), self.clock.utc_now()
            self.server.synchronise(now, _unix_ns(utc) // 10**9)
            if self._attached is not None:
                self._attached.path.handle_timeout(now)
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


@attrs.frozen
class _Metrics(Collector):
    """Reads the statistics when somebody asks for /metrics; nothing is counted twice."""

    server: Server
    sockets: UdpSockets

    def collect(self) -> Iterator[Metric]:
        errors = CounterMetricFamily(
            "holloway_relay_errors", "error responses by STUN code", labels=["code"]
        )
        passed = CounterMetricFamily(
            "holloway_relay_fast_path_passed_packets",
            "packets that the fast path left to the kernel",
            labels=["reason"],
        )
        for name, value in {**self.server.statistics(), **self.sockets.statistics()}.items():
            prefix, _, code = name.rpartition("_")
            described = name.replace("_", " ")
            if prefix == "errors":
                errors.add_metric([code], value)
            elif name.startswith(_PASSED):
                passed.add_metric([name.removeprefix(_PASSED)], value)
            elif name in _GAUGES:
                yield GaugeMetricFamily(f"holloway_relay_{name}", described, value=value)
            else:
                yield CounterMetricFamily(f"holloway_relay_{name}", described, value=value)
        yield errors
        yield passed


def _allow_descriptors(allocations: int) -> int:
    """Raise the limit of open files as far as allowed; how many allocations it is good for."""
    soft = raise_file_limit(wanted_descriptors(allocations))
    return min(allocations, max(1, (soft - wanted_descriptors(0)) // 2))


def _only_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception behind nested groups; the group itself if there are more."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
        cause = cause.exceptions[0]
    return group if isinstance(cause, BaseExceptionGroup) else cause


def _unix_ns(instant: datetime) -> int:
    return int(instant.timestamp() * 10**9)
