"""A portal node: everything of the control plane in one process, started and ended in order.

    observability     health and metrics answer from the first moment on
    PostgreSQL        embedded, kept running, or named by DATABASE_URL
    store             migrated; pool of connections
    node              a life of this node in the cluster (of one, mostly), and links to the others
    actors            the scheduler on its trio host, the control plane's tree
    doors             feed of changes, control channel (QUIC, WebSocket), JSON API (HTTPS),
                      certificates

What stands higher is up before what stands lower, and ends after it. SIGTERM or SIGINT ends the
node gracefully: its accounts move to other nodes, no new calls or agents come, those that are there
are sent away, `drain_timeout_s` for them to leave. A second signal ends it at once. A database that
goes away takes nothing along: calls are answered by 503 until it is back.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio
from prometheus_client import CollectorRegistry

from actors.policy.conditions import NOWHERE
from actors.store.embedded import EmbeddedPostgres
from actors.store.interface import Store, StoreError, Unavailable
from actors.store.postgres import Logins, PostgresStore, migrate
from actors.store.sealing import reseal
from actors.tree import ControlPlane
from actors.wire import node_codec
from channel.listener import ChannelServer, serve_channels
from channel.messages import DoorAddress
from channel.websocket_listener import WebSocketDoor
from portal.answers import NodeAnswers
from portal.api.application import create_api
from portal.api.feeds import Feeds
from portal.api.office import Office
from portal.authority import Authority, ServerCertificate
from portal.doors import Door
from portal.first_start import (
    check_key_ring,
    ensure_operator_token,
    load_cluster_secret,
    load_key_ring,
    load_reset_key,
    prepare_state,
)
from portal.metrics import CallMetrics, StatisticsMetrics
from portal.presence import LivePresence
from portal.probe import prove_address
from portal.regions import RegionDatabase, RegionsUnreadable, follow
from portal.settings import Places, PortalSettings, SettingsError, check
from portal.websockets import admit_websockets, channel_limits
from runtime.clock import Clock, SystemClock
from runtime.cluster.process import NodeProcess
from runtime.cluster.tenure import Tenure
from runtime.crashes import CrashJournal
from runtime.files import write_file
from runtime.host import TrioHost
from runtime.net.address import Address
from runtime.randomness import Randomness, SystemRandomness
from runtime.scheduler import Scheduler
from runtime.service import (
    Health,
    SecretUnavailable,
    get_logger,
    has_credential,
    read_secret,
    serve_observability,
)
from runtime.version import product_version

DATABASE_CHECK_S: Final = 2.0
DATABASE_PATIENCE_S: Final = 5.0
STORAGE_FULL: Final = "the storage of PostgreSQL is full: nothing can be written, calls get 503"
RENEWAL_CHECK_S: Final = 3_600.0
FIRST_EXPIRY_S: Final = 60.0
EXPIRY_S: Final = 3_600.0
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
    process: NodeProcess
    answers: NodeAnswers
    host: TrioHost
    store: Store
    health: Health
    embedded: EmbeddedPostgres | None


async def run_portal(
    settings: PortalSettings,
    *,
    clock: Clock | None = None,
    randomness: Randomness | None = None,
    stop: trio.Event | None = None,
    database: Logins | None = None,
    task_status: trio.TaskStatus[PortalNode] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a portal until a signal ends it; starts with a PortalNode once agents can join.

    With `stop` that event ends it instead, and no signal is looked at: it need not run in the main
    thread then. `database` is one that runs already, and overrules the settings.

    Raises SettingsError, AuthorityError, SecretUnavailable, InvalidToken (the operator's file is
    damaged), StoreError (a database that is not ours, an embedded one that does not start),
    NodeSuperseded (another portal took this one's name), OSError (an address is taken). A database
    that cannot be reached yet is waited for.
    """
    node = _Node(
        settings,
        clock or SystemClock(),
        randomness or SystemRandomness(),
        stop=stop,
        database=database,
    )
    try:
        await node.run(task_status)
    except BaseExceptionGroup as group:
        raise only_cause(group) from None


class _Node:
    def __init__(
        self,
        settings: PortalSettings,
        clock: Clock,
        randomness: Randomness,
        *,
        stop: trio.Event | None,
        database: Logins | None,
    ) -> None:
        self._settings = settings
        self._logins = database
        self._has_signals = stop is None
        self._clock = clock
        self._randomness = randomness
        self._places: Places = check(settings)
        prepare_state(settings.state_dir)
        self._key_ring = load_key_ring(settings, self._randomness)
        self._authority = Authority(
            settings.state_dir / "authority", clock=clock, randomness=randomness
        )
        write_file(settings.state_dir / "ca.pem", self._authority.certificate_pem, mode=0o644)
        self._certificate = self._authority.server_certificate(self._places.names)
        self._regions = open_regions(settings.region_database)
        self._health = Health()
        self._registry = CollectorRegistry()
        self._stop = trio.Event() if stop is None else stop
        self._is_up = False

    async def run(self, task_status: trio.TaskStatus[PortalNode]) -> None:
        self._health.set("started", False, "starting")
        async with trio.open_nursery() as outer:
            if self._has_signals:
                await outer.start(self._await_signals, outer.cancel_scope)
            observability = None
            if self._settings.observability:
                observability = await outer.start(
                    serve_observability, self._settings.observability, self._health, self._registry
                )
            embedded, logins = await self._database(outer)
            async with self._open_store(logins) as store:
                await self._patiently(partial(check_key_ring, store, self._key_ring))
                await self._patiently(partial(self._ensure_operator, store))
                process = await self._join(store)
                async with trio.open_nursery() as actors:
                    host, control = await self._start_actors(actors, store, process)
                    await self._serve(
                        store, host, control, process, observability, embedded, task_status
                    )
                    await process.leave(host)
                    actors.cancel_scope.cancel()
            outer.cancel_scope.cancel()
        log.info("ended")

    # --- database ---

    async def _database(self, nursery: trio.Nursery) -> tuple[EmbeddedPostgres | None, Logins]:
        if self._logins is not None:
            return None, self._logins
        url = database_url(self._settings)
        if url is not None:
            return None, Logins.of(url)
        embedded = EmbeddedPostgres(self._settings.state_dir / "database")
        await nursery.start(embedded.run)
        return embedded, embedded.logins()

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

    async def _watch_database(self, store: PostgresStore) -> None:
        was_full = False
        while True:
            await trio.sleep(DATABASE_CHECK_S)
            try:
                with trio.fail_after(DATABASE_PATIENCE_S):
                    await store.accounts(limit=1)
            except (StoreError, trio.TooSlowError) as error:
                self._health.set("database", False, "cannot be reached")
                log.warning("database_unavailable", error=str(error) or type(error).__name__)
                continue
            is_full = store.storage_full
            self._health.set("database", True, STORAGE_FULL if is_full else "")
            if is_full and not was_full:
                log.error("database_storage_full", reason=STORAGE_FULL)
            elif was_full and not is_full:
                log.info("database_storage_has_room")
            was_full = is_full

    async def _expire(self, store: Store, process: NodeProcess) -> None:
        """Once an hour, remove what is kept for long enough: the first of the living nodes does."""
        await trio.sleep(FIRST_EXPIRY_S)
        while True:
            if min((row.name for row in process.tenure.rows), default="") == process.name:
                try:
                    expired = await store.expire(self._clock.utc_now())
                except StoreError as error:
                    log.warning("expiry_failed", error=str(error))
                else:
                    log.info("expired", **attrs.asdict(expired))
            await trio.sleep(EXPIRY_S)

    # --- the cluster ---

    async def _join(self, store: Store) -> NodeProcess:
        joined: list[NodeProcess] = []
        listen = self._places.link_listen
        secret = listen and load_cluster_secret(self._settings, self._randomness)

        async def join() -> None:
            joined.append(
                await NodeProcess.join(
                    self._settings.node,
                    store=store,
                    door_address=self._places.door,
                    version=product_version(),
                    clock=self._clock,
                    randomness=self._randomness,
                    secret=secret,
                    listen=listen,
                    advertise=self._settings.link_address,
                )
            )

        await self._patiently(join)
        return joined[-1]

    # --- actors ---

    async def _start_actors(
        self, nursery: trio.Nursery, store: Store, process: NodeProcess
    ) -> tuple[TrioHost, ControlPlane]:
        journal = CrashJournal(get_logger("portal.actors"), self._registry, prefix="holloway_")
        scheduler = Scheduler(
            clock=self._clock,
            randomness=self._randomness,
            node=process.name,
            incarnation=process.incarnation,
            report=journal,
        )
        host = TrioHost(scheduler)
        has_others = self._places.link_listen is not None
        control = ControlPlane(
            scheduler,
            store,
            self._clock,
            self._randomness,
            portal_name=self._places.portal,
            prove_address=partial(prove_address, randomness=self._randomness),
            tenure=process.tenure,
            doors=partial(_doors, process.tenure) if has_others else tuple,
            regions=self._regions or NOWHERE,
        )
        process.attach(scheduler, node_codec())
        control.start()
        await nursery.start(host.run)
        await nursery.start(process.run)
        return host, control

    async def _follow_changes(self, store: Store, control: ControlPlane, feeds: Feeds) -> None:
        async with store.wakeups() as accounts:
            async for account_id in accounts:
                control.wake(account_id)
                feeds.wake(account_id)

    # --- doors ---

    async def _serve(
        self,
        store: PostgresStore,
        host: TrioHost,
        control: ControlPlane,
        process: NodeProcess,
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
            regions=self._regions or NOWHERE,
            key_ring=self._key_ring,
        )
        api = create_api(office, health=self._health, metrics=CallMetrics(self._registry))
        door = Door(
            api,
            listen=self._places.api_listen,
            certificate_chain=self._certificate.chain_file,
            certificate_key=self._certificate.key_file,
            max_connections=self._settings.api_connections,
            max_connections_per_source=self._settings.api_connections_per_source,
        )
        limits = channel_limits(self._settings)
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
                    limits=limits,
                    reset_key=load_reset_key(self._settings.state_dir, self._randomness),
                )
            )
            websockets = WebSocketDoor(channels, limits)
            renewals = await admit_websockets(
                doors, websockets, door, self._places, channels.address.port, self._certificate
            )
            doors.start_soon(self._follow_changes, store, control, api.feeds)
            await doors.start(api.feeds.run)
            doors.start_soon(api.journal.run)
            answers = NodeAnswers(
                self._settings,
                process,
                host,
                control,
                self._health,
                reseal=partial(reseal, store, self._key_ring, now=self._clock.utc_now),
            )
            await doors.start(answers.serve)
            doors.start_soon(self._watch_database, store)
            doors.start_soon(self._expire, store, process)
            doors.start_soon(self._renew_certificates, renewals, channels)
            if self._regions is not None:
                doors.start_soon(follow, self._regions, control.regions_changed)
            parts = {
                "api": api.statistics,
                "door": door.statistics,
                "channel": channels.statistics,
                "websocket": websockets.statistics,
                "actors": control.statistics,
                "runtime": host.scheduler.statistics,
                "node": process.statistics,
                "database": store.statistics,
                "storage": lambda: {"full": store.storage_full},
            }
            self._registry.register(StatisticsMetrics(parts))
            self._health.set("started", True)
            self._is_up = True
            log.info(
                "ready",
                api=str(door.address),
                channel=str(channels.address),
                websocket=self._places.websocket,
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
                    process=process,
                    answers=answers,
                    host=host,
                    store=store,
                    health=self._health,
                    embedded=embedded,
                )
            )
            async with trio.open_nursery() as serving:
                serving.start_soon(door.serve)
                await self._stop.wait()
                door.stop()
                api.feeds.close()
                await self._drain(control, channels, process, host)
            doors.cancel_scope.cancel()

    async def _drain(
        self,
        control: ControlPlane,
        channels: ChannelServer,
        process: NodeProcess,
        host: TrioHost,
    ) -> None:
        """Have the accounts go to other nodes, send every agent away, with the advice to dial
        again, and see them leave."""
        self._health.set("started", False, "draining")
        await process.drain(host)
        spread_ns = round(self._settings.drain_timeout_s * 10**9)
        log.info("draining", channels=channels.statistics().channels)
        channels.refuse_newcomers()
        control.drain(round(spread_ns * DRAIN_SPREAD))
        with trio.move_on_after(self._settings.drain_timeout_s):
            while channels.statistics().channels or self._still_owns(control, process):
                await trio.sleep(DRAIN_POLL_S)
        channels.drain(spread_ns)

    def _still_owns(self, control: ControlPlane, process: NodeProcess) -> bool:
        """Whether accounts are still to go to other nodes, if there are any that take them."""
        has_takers = any(not row.draining for row in process.tenure.rows)
        return has_takers and control.statistics().accounts > 0

    async def _renew_certificates(
        self, renewals: Sequence[Callable[[], None]], channels: ChannelServer
    ) -> None:
        while True:
            await trio.sleep(RENEWAL_CHECK_S)
            try:
                certificate = self._authority.server_certificate(self._places.names)
            except OSError as error:
                log.error("certificate_not_renewed", error=str(error))
                continue
            if certificate.chain_pem != self._certificate.chain_pem:
                self._use(certificate, renewals, channels)

    def _use(
        self,
        certificate: ServerCertificate,
        renewals: Sequence[Callable[[], None]],
        channels: ChannelServer,
    ) -> None:
        self._certificate = certificate
        for renew in renewals:
            renew()
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


def database_url(settings: PortalSettings) -> str | None:
    """The database that is named, or None: the embedded one. Raises SecretUnavailable."""
    file = settings.database_url_file
    try:
        return read_secret(
            file=file,
            value=os.environ.get("DATABASE_URL"),
            credential="holloway-database-url",
        ).reveal_text()
    except SecretUnavailable:
        if file is not None or has_credential("holloway-database-url"):
            raise
        return None


def open_regions(path: Path | None) -> RegionDatabase | None:
    """The region database, if one is named. Raises SettingsError if it cannot be read."""
    try:
        return None if path is None else RegionDatabase(path)
    except RegionsUnreadable as error:
        raise SettingsError(f"region_database: {error}") from error


def _doors(tenure: Tenure) -> tuple[DoorAddress, ...]:
    """Where agents may go; a node that says something else of itself is left out."""
    doors = []
    for text in tenure.doors():
        with suppress(ValueError):
            doors.append(DoorAddress(text))
    return tuple(doors)


def only_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception in a group of one, however deep; else the group."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
        cause = cause.exceptions[0]
    return cause
