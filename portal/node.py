"""A portal node: everything of the control plane in one process, started and ended in order.

    observability     health and metrics answer from the first moment on
    PostgreSQL        embedded, kept running, or named by DATABASE_URL
    store             migrated; pool of connections
    actors            the scheduler on its trio host, the control plane's tree
    doors             feed of changes, control channel (QUIC), JSON API (HTTPS), certificates

What stands higher is up before what stands lower, and ends after it. SIGTERM or SIGINT ends the
node gracefully: no new calls or agents, those that are there are sent away, `drain_timeout_s` for
them to leave. A second signal ends it at once. A database that goes away takes nothing along:
calls are answered by 503 until it is back.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

import attrs
import trio
from prometheus_client import CollectorRegistry

from actors.store.embedded import EmbeddedPostgres
from actors.store.interface import Store, StoreError, Unavailable
from actors.store.postgres import Logins, PostgresStore, migrate
from actors.tree import ControlPlane
from channel.listener import ChannelServer, serve_channels
from portal.api.application import create_api
from portal.api.office import Office
from portal.api.openapi import product_version
from portal.authority import Authority, ServerCertificate
from portal.doors import Door
from portal.files import write_file
from portal.first_start import ensure_operator_token, load_reset_key, prepare_state
from portal.metrics import CallMetrics, StatisticsMetrics
from portal.presence import LivePresence
from portal.probe import prove_address
from portal.settings import Places, PortalSettings, check
from runtime.clock import Clock, SystemClock
from runtime.crashes import CrashJournal
from runtime.host import TrioHost
from runtime.net.address import Address
from runtime.randomness import Randomness, SystemRandomness
from runtime.scheduler import Scheduler
from runtime.service import (
    Health,
    SecretUnavailable,
    get_logger,
    read_secret,
    serve_observability,
)

NODE_NAME: Final = "portal"
NODE_LEASE_NS: Final = 3 * 10**9
NODE_RENEWAL_S: Final = 0.5
FAREWELL_TIMEOUT_S: Final = 1.0
DATABASE_CHECK_S: Final = 2.0
DATABASE_PATIENCE_S: Final = 5.0
RENEWAL_CHECK_S: Final = 3_600.0
FIRST_RETRY_S: Final = 0.1
LAST_RETRY_S: Final = 5.0
DRAIN_POLL_S: Final = 0.05
DRAIN_SPREAD: Final = 0.8
"""Of `drain_timeout_s`, in which agents are sent to the other nodes; the rest is for the last."""

log = get_logger("portal")


@attrs.frozen(kw_only=True)
class PortalNode:
    """A node that is up: where it listens, and its parts."""

    api: Address
    channel: Address
    observability: Address | None
    authority: Authority
    control: ControlPlane
    store: Store
    health: Health
    embedded: EmbeddedPostgres | None


async def run_portal(
    settings: PortalSettings,
    *,
    clock: Clock | None = None,
    randomness: Randomness | None = None,
    task_status: trio.TaskStatus[PortalNode] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a portal until a signal ends it; starts with a PortalNode once agents can join.

    Runs in the main thread (signals). Raises SettingsError, AuthorityError, SecretUnavailable,
    InvalidToken (the operator's file is damaged), StoreError (a database that is not ours, an
    embedded one that does not start, another portal that took this one's place), OSError (an
    address is taken). A database that cannot be reached yet is waited for.
    """
    node = _Node(settings, clock or SystemClock(), randomness or SystemRandomness())
    try:
        await node.run(task_status)
    except BaseExceptionGroup as group:
        raise _only_cause(group) from None


class _Node:
    def __init__(self, settings: PortalSettings, clock: Clock, randomness: Randomness) -> None:
        self._settings = settings
        self._clock = clock
        self._randomness = randomness
        self._places: Places = check(settings)
        prepare_state(settings.state_dir)
        self._authority = Authority(
            settings.state_dir / "authority", clock=clock, randomness=randomness
        )
        write_file(settings.state_dir / "ca.pem", self._authority.certificate_pem, mode=0o644)
        self._certificate = self._authority.server_certificate(self._places.names)
        self._health = Health()
        self._registry = CollectorRegistry()
        self._stop = trio.Event()
        self._is_up = False

    async def run(self, task_status: trio.TaskStatus[PortalNode]) -> None:
        self._health.set("started", False, "starting")
        async with trio.open_nursery() as outer:
            await outer.start(self._await_signals, outer.cancel_scope)
            observability = None
            if self._settings.observability:
                observability = await outer.start(
                    serve_observability, self._settings.observability, self._health, self._registry
                )
            embedded, logins = await self._database(outer)
            async with self._open_store(logins) as store:
                await self._patiently(partial(self._ensure_operator, store))
                async with self._cluster_of_one(store) as life, trio.open_nursery() as actors:
                    host, control = await self._start_actors(actors, store, life)
                    await self._serve(store, host, control, observability, embedded, task_status)
                    actors.cancel_scope.cancel()
            outer.cancel_scope.cancel()
        log.info("ended")

    # --- database ---

    async def _database(self, nursery: trio.Nursery) -> tuple[EmbeddedPostgres | None, Logins]:
        url = self._database_url()
        if url is not None:
            return None, Logins.of(url)
        embedded = EmbeddedPostgres(self._settings.state_dir / "database")
        await nursery.start(embedded.run)
        return embedded, embedded.logins()

    def _database_url(self) -> str | None:
        file = self._settings.database_url_file
        try:
            return read_secret(
                file=file,
                value=os.environ.get("DATABASE_URL"),
                credential="holloway-database-url",
            ).reveal_text()
        except SecretUnavailable:
            credentials = os.environ.get("CREDENTIALS_DIRECTORY")
            if file is not None or (
                credentials and os.path.exists(f"{credentials}/holloway-database-url")
            ):
                raise
            return None

    @asynccontextmanager
    async def _open_store(self, logins: Logins) -> AsyncIterator[PostgresStore]:
        async def bring_up_to_date() -> None:
            applied = await migrate(logins)
            if applied:
                log.info("database_migrated", files=len(applied))

        await self._patiently(bring_up_to_date)
        async with PostgresStore.open(
            logins, connections=self._settings.database_connections, migrated=True
        ) as store:
            yield store

    async def _ensure_operator(self, store: Store) -> None:
        await ensure_operator_token(
            self._settings.state_dir,
            store,
            portal=self._places.portal,
            pin=self._authority.pin,
            clock=self._clock,
            randomness=self._randomness,
        )

    async def _patiently(self, step: Callable[[], Awaitable[None]]) -> None:
        """Until the database can be reached."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                await step()
            except Unavailable as error:
                self._health.set("database", False, "cannot be reached")
                log.warning("database_unavailable", error=str(error), retry_in_s=retry_s)
                await trio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
            else:
                self._health.set("database", True)
                return

    async def _watch_database(self, store: Store) -> None:
        while True:
            await trio.sleep(DATABASE_CHECK_S)
            try:
                with trio.fail_after(DATABASE_PATIENCE_S):
                    await store.accounts(limit=1)
            except (StoreError, trio.TooSlowError) as error:
                self._health.set("database", False, "cannot be reached")
                log.warning("database_unavailable", error=type(error).__name__)
            else:
                self._health.set("database", True)

    @asynccontextmanager
    async def _cluster_of_one(self, store: Store) -> AsyncIterator[int]:
        """Be a node for the length of the block; its incarnation. A portal that starts on the same
        database takes over, and this one ends: raises Fenced."""
        lives: list[int] = []

        async def join() -> None:
            nowhere = "127.0.0.1:0"  # no other node will look for it
            lives.append(
                await store.join_node(
                    NODE_NAME,
                    link_address=nowhere,
                    door_address=nowhere,
                    version=product_version(),
                    ttl_ns=NODE_LEASE_NS,
                )
            )

        async def renew() -> None:
            while True:
                await trio.sleep(NODE_RENEWAL_S)
                with suppress(Unavailable):  # as the health check tells
                    await store.renew_node(
                        NODE_NAME, lives[-1], draining=self._stop.is_set(), ttl_ns=NODE_LEASE_NS
                    )

        await self._patiently(join)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(renew)
                yield lives[-1]
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(FAREWELL_TIMEOUT_S, shield=True), suppress(Unavailable):
                await store.leave_node(NODE_NAME, lives[-1])

    # --- actors ---

    async def _start_actors(
        self, nursery: trio.Nursery, store: Store, incarnation: int
    ) -> tuple[TrioHost, ControlPlane]:
        journal = CrashJournal(get_logger("portal.actors"), self._registry, prefix="holloway_")
        scheduler = Scheduler(clock=self._clock, randomness=self._randomness, report=journal)
        host = TrioHost(scheduler)
        control = ControlPlane(
            scheduler,
            store,
            self._clock,
            self._randomness,
            portal_name=self._places.portal,
            prove_address=partial(prove_address, randomness=self._randomness),
            node=NODE_NAME,
            incarnation=incarnation,
        )
        control.start()
        await nursery.start(host.run)
        return host, control

    async def _follow_changes(self, store: Store, control: ControlPlane) -> None:
        async with store.wakeups() as accounts:
            async for account_id in accounts:
                control.wake(account_id)

    # --- doors ---

    async def _serve(
        self,
        store: PostgresStore,
        host: TrioHost,
        control: ControlPlane,
        observability: Address | None,
        embedded: EmbeddedPostgres | None,
        task_status: trio.TaskStatus[PortalNode],
    ) -> None:
        office = Office(
            store=store,
            clock=self._clock,
            randomness=self._randomness,
            live=LivePresence(host, control),
            portal=self._places.portal,
            pin=self._authority.pin,
        )
        api = create_api(office, health=self._health, metrics=CallMetrics(self._registry))
        door = Door(
            api,
            listen=self._places.api_listen,
            certificate_chain=self._certificate.chain_file,
            certificate_key=self._certificate.key_file,
            max_connections=self._settings.api_connections,
        )
        async with trio.open_nursery() as doors:
            channels: ChannelServer = await doors.start(
                partial(
                    serve_channels,
                    self._places.listen,
                    self._certificate.chain_pem,
                    self._certificate.key_pem,
                    control.connected,
                    portal=self._places.portal,
                    clock=self._clock,
                    randomness=self._randomness,
                    reset_key=load_reset_key(self._settings.state_dir, self._randomness),
                )
            )
            doors.start_soon(self._follow_changes, store, control)
            doors.start_soon(self._watch_database, store)
            doors.start_soon(self._renew_certificates, door, channels)
            parts = {
                "api": api.statistics,
                "door": door.statistics,
                "channel": channels.statistics,
                "actors": control.statistics,
                "database": store.statistics,
            }
            self._registry.register(StatisticsMetrics(parts))
            self._health.set("started", True)
            self._is_up = True
            log.info(
                "ready",
                api=str(door.address),
                channel=str(channels.address),
                address=self._places.portal,
                pin=self._authority.pin.hex(),
            )
            task_status.started(
                PortalNode(
                    api=door.address,
                    channel=channels.address,
                    observability=observability,
                    authority=self._authority,
                    control=control,
                    store=store,
                    health=self._health,
                    embedded=embedded,
                )
            )
            async with trio.open_nursery() as serving:
                serving.start_soon(door.serve)
                await self._stop.wait()
                door.stop()
                await self._drain(control, channels)
            doors.cancel_scope.cancel()

    async def _drain(self, control: ControlPlane, channels: ChannelServer) -> None:
        """Send every agent away, with the advice to dial again, and see them leave."""
        self._health.set("started", False, "draining")
        spread_ns = round(self._settings.drain_timeout_s * 10**9)
        log.info("draining", channels=channels.statistics().channels)
        channels.refuse_newcomers()
        control.drain(round(spread_ns * DRAIN_SPREAD))
        with trio.move_on_after(self._settings.drain_timeout_s):
            while channels.statistics().channels:
                await trio.sleep(DRAIN_POLL_S)
        channels.drain(spread_ns)

    async def _renew_certificates(self, door: Door, channels: ChannelServer) -> None:
        while True:
            await trio.sleep(RENEWAL_CHECK_S)
            try:
                certificate = self._authority.server_certificate(self._places.names)
            except OSError as error:
                log.error("certificate_not_renewed", error=str(error))
                continue
            if certificate.chain_pem != self._certificate.chain_pem:
                self._use(certificate, door, channels)

    def _use(self, certificate: ServerCertificate, door: Door, channels: ChannelServer) -> None:
        self._certificate = certificate
        door.renew()
        channels.replace_certificate(certificate.chain_pem, certificate.key_pem)
        log.info("certificate_renewed", until=certificate.not_after.isoformat())

    async def _await_signals(
        self,
        everything: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            await anext(signals)
            self._stop.set()
            if self._is_up:
                await anext(signals)
                log.warning("ended_at_once", reason="a second signal")
            everything.cancel()


def _only_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception in a group of one, however deep; else the group."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
        cause = cause.exceptions[0]
    return cause
