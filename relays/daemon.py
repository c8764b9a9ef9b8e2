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
from relays.processes.fleet import Fleet
from relays.processes.supervisor import Supervisor, process_count
from relays.server import Server
from relays.serving import Serving, certificates_of
from relays.settings import Addresses, RelaySettings, check
from relays.transports.tls import LOOK_S
from relays.transports.udp import UdpSockets
from relays.users import read_users
from runtime.clock import Clock, SystemClock
from runtime.nursery import only_cause
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
        raise only_cause(group) from None
    finally:
        relay.serving.close()


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
        self.certificates = certificates_of(settings, addresses, self.clock)
        count = process_count(settings)
        self.serving: Serving | Supervisor
        if count == 1:
            self.serving = Serving(
                settings,
                addresses,
                credentials,
                self.clock,
                certificates=self.certificates,
                make_sockets=sockets,
            )
        else:
            self.serving = Supervisor(
                settings,
                addresses,
                credentials,
                certificates=self.certificates,
                count=count,
                on_change=self._count_processes,
            )
        self._settings = settings
        self._credentials = credentials
        self._log = get_logger("relay")

    @property
    def server(self) -> Server | Fleet:
        return self.serving.server

    @property
    def pins(self) -> tuple[str, ...]:
        """Of the certificate that is shown now."""
        return () if self.certificates is None else (self.certificates.current.pin,)

    def listen(self) -> None:
        self.serving.listen()
        self.health.set("sockets", True)
        self._count_processes()

    def _count_processes(self) -> None:
        """Ready is a relay all of whose processes serve."""
        server = self.server
        if isinstance(server, Fleet):
            detail = f"{server.serving} of {server.count}"
            self.health.set("processes", server.serving == server.count, detail)

    async def run(self, agent: RelayAgent | None, token: DecodedToken | None) -> None:
        registry = CollectorRegistry()
        registry.register(RelayMetrics(self.serving))
        channel_scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            if self._settings.observability:
                await nursery.start(
                    partial(
                        serve_observability, self._settings.observability, self.health, registry
                    )
                )
            nursery.start_soon(self.serving.run)
            nursery.start_soon(self._end_on_signal, channel_scope, nursery.cancel_scope)
            nursery.start_soon(self._keep_certificate, agent)
            if agent is None or token is None:
                nursery.start_soon(self._tick, lambda: None)
                return
            with channel_scope:
                await self._keep_channel(agent, token)

    async def _keep_channel(self, agent: RelayAgent, token: DecodedToken) -> None:
        self.health.set("portal", False, "not joined yet")
        await self.serving.wait_serving()
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
                if isinstance(self.server, Fleet):
                    self.server.relay_known(event.relay_id)
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
                if isinstance(self.serving, Supervisor):
                    self.serving.certificate_renewed()
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


def _unix_ns(instant: datetime) -> int:
    return int(instant.timestamp() * 10**9)
