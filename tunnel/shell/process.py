"""A process that runs one agent: its secrets, its tasks, its control socket, an orderly end.

`run_agent` is what `clients.daemon` and `gateways.daemon` have in common. What the two change on
the system is behind `System`; everything changed is put back before the process ends, whether it
was told to (SIGTERM, SIGINT, `down`), was refused by the portal, or failed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import attrs
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from channel.credentials import decode_token
from channel.dialer import ChannelAgent, Dialer
from runtime.clock import SystemClock
from runtime.control import serve_control
from runtime.nursery import only_cause
from runtime.randomness import Randomness, SystemRandomness
from runtime.secret import Secret
from runtime.service import (
    Health,
    SecretUnavailable,
    get_logger,
    make_private_directory,
    read_secret,
    serve_observability,
)
from runtime.version import product_version
from tunnel.agent import AgentIdentity
from tunnel.engine import Engine
from tunnel.shell.driver import DrivenAgent, DriverStatistics, EngineDriver
from tunnel.shell.lock import only_one
from tunnel.shell.privileges import keep_only_network_administration
from tunnel.shell.tun import TunDevice

DEVICE_SEED_BYTES = 32
STOP_TIMEOUT_S = 20.0
HEALTH_INTERVAL_S = 0.5
LAST_WORDS_S = 0.1
CONTROL_SOCKET = "control.sock"


class Agent(ChannelAgent, DrivenAgent, Protocol):
    """An agent that a process can run. `metrics` are counts since the start, `sizes` present."""

    joined: bool

    def status(self, now: int) -> dict[str, Any]: ...
    def told_relays(self) -> list[dict[str, Any]]: ...
    def metrics(self) -> Mapping[str, int]: ...
    def sizes(self) -> Mapping[str, int]: ...


class System(Protocol):
    """What an agent changes on its machine. `stop` undoes `start` and `perform`."""

    async def start(self, tun: TunDevice) -> None: ...
    async def perform(self, event: object) -> None: ...
    async def stop(self) -> None: ...


MakeAgent = Callable[[AgentIdentity, Engine, Randomness, int], Agent]


@attrs.frozen(kw_only=True)
class ProcessOptions:
    """What a daemon knows before it begins. `mark` is the SO_MARK of every socket of the agent;
    `events` what its channel understands; `observability` is `host:port`, or empty for none; `lock`
    names what only one agent of a network namespace may have."""

    kind: Literal["client", "gateway"]
    name: str
    token: Secret = attrs.field(repr=False)
    device_seed: Secret = attrs.field(repr=False)
    events: dict[str, type]
    control_socket: Path
    observability: str
    tun_name: str
    mtu: int
    mark: int | None
    port: int
    lock: str


async def run_agent(options: ProcessOptions, make_agent: MakeAgent, system: System) -> None:
    """Run until a signal or `down` ends it.

    Raises channel.dialer.Refused when the portal will not have this agent, AlreadyRunning,
    InvalidToken, TunError, CommandFailed and OSError when the machine cannot be set up.
    """
    token = decode_token(options.token)
    keep_only_network_administration()
    clock, randomness = SystemClock(), SystemRandomness()
    now = clock.monotonic_ns()
    engine = Engine(private_key=randomness.bytes(32), randomness=randomness, now=now)
    identity = AgentIdentity(
        kind=options.kind,
        name=options.name,
        software=f"holloway {product_version()}",
        token=options.token,
        device_seed=options.device_seed,
        incarnation=int(clock.utc_now().timestamp() * 10**9),
    )
    agent = make_agent(identity, engine, randomness, now)
    health = Health()
    with only_one(options.lock), TunDevice.create(options.tun_name, options.mtu) as tun:
        driver = EngineDriver(
            agent,
            tun=tun,
            clock=clock,
            mark=options.mark,
            port=options.port,
            perform=system.perform,
            on_failure=lambda detail: health.set("system", False, detail),
        )
        dialer = Dialer(
            token.portal,
            token.pin,
            options.events,
            agent,
            clock,
            randomness,
            mark=options.mark,
            on_frame=driver.flush,
        )
        driver.sender = dialer
        process = _Process(options, agent, driver, dialer, health, tun, clock)
        try:
            await system.start(tun)
            health.set("system", True)
            await process.run()
        except BaseExceptionGroup as group:
            raise only_cause(group) from None
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + STOP_TIMEOUT_S):
                await system.stop()
            get_logger(options.kind).info("ended")


def device_seed_in(path: Path) -> Secret:
    """The device key of a file (64 hexadecimal digits, 0600), made at the first start.

    Raises SecretUnavailable for a file that is unfit or cannot be made.
    """
    try:
        make_private_directory(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_device_seed(path)
    except OSError as error:
        raise SecretUnavailable(f"{path}: {error.strerror}") from None
    seed = SystemRandomness().bytes(DEVICE_SEED_BYTES)
    with open(descriptor, "w") as file:
        file.write(seed.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
    return Secret(seed)


def fresh_device_seed() -> Secret:
    """A device key for this start alone."""
    return Secret(SystemRandomness().bytes(DEVICE_SEED_BYTES))


def _read_device_seed(path: Path) -> Secret:
    try:
        seed = bytes.fromhex(read_secret(file=path).reveal_text())
    except ValueError:
        seed = b""
    if len(seed) != DEVICE_SEED_BYTES:
        raise SecretUnavailable(f"{path} is no device key (64 hexadecimal digits)")
    return Secret(seed)


class _Process:
    """The tasks of a running agent."""

    def __init__(
        self,
        options: ProcessOptions,
        agent: Agent,
        driver: EngineDriver,
        dialer: Dialer,
        health: Health,
        tun: TunDevice,
        clock: SystemClock,
    ) -> None:
        self._options = options
        self._agent = agent
        self._driver = driver
        self._dialer = dialer
        self._health = health
        self._tun = tun
        self._clock = clock
        self._log = get_logger(options.kind)
        self._ending = trio.CancelScope()

    async def run(self) -> None:
        registry = CollectorRegistry()
        registry.register(_Metrics(self._options.kind, self._agent, self._driver))
        self._health.set("portal", False, "not joined yet")
        with self._ending:
            async with trio.open_nursery() as nursery:
                if self._options.observability:
                    await nursery.start(
                        partial(
                            serve_observability,
                            self._options.observability,
                            self._health,
                            registry,
                        )
                    )
                await nursery.start(
                    partial(
                        serve_control,
                        self._options.control_socket,
                        self._control,
                        allowed_uids={0, os.geteuid()},
                    )
                )
                nursery.start_soon(self._end_on_signal)
                nursery.start_soon(self._driver.run)
                nursery.start_soon(self._watch_health)
                self._log.info("started", tun=self._tun.name, name=self._options.name)
                await self._dialer.run()

    async def _control(self, request: dict[str, Any]) -> dict[str, Any]:
        command = request.get("command")
        if command == "status":
            return {
                **self._agent.status(self._clock.monotonic_ns()),
                "relays": self._agent.told_relays(),
                "interface": self._tun.name,
                "channel": attrs.asdict(self._dialer.statistics()),
                "driver": attrs.asdict(self._driver.statistics()),
            }
        if command == "down":
            self._end("down")
            return {"ok": True}
        return {"error": f"no such command: {str(command)[:40]!r}"}

    async def _end_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            number = await anext(signals)
            self._end(signal.Signals(number).name)

    def _end(self, reason: str) -> None:
        """End soon: what the agent says last, and the answer to `down`, go out before."""
        self._log.info("ending", reason=reason)
        self._driver.finish()
        self._ending.deadline = min(self._ending.deadline, trio.current_time() + LAST_WORDS_S)

    async def _watch_health(self) -> None:
        while True:
            joined = self._agent.joined
            error = self._dialer.statistics().last_error or "not joined yet"
            self._health.set("portal", joined, "" if joined else error)
            await trio.sleep(HEALTH_INTERVAL_S)


@attrs.frozen
class _Metrics(Collector):
    """Reads the counts when somebody asks for /metrics."""

    kind: str
    agent: Agent
    driver: EngineDriver

    def collect(self) -> Iterator[Metric]:
        driver: DriverStatistics = self.driver.statistics()
        counts = {
            **self.agent.metrics(),
            "datagrams_sent": driver.sent_datagrams,
            "datagrams_received": driver.received_datagrams,
            "datagrams_dropped": driver.dropped_datagrams,
            "system_changes_failed": driver.failed_events,
        }
        for name, value in counts.items():
            full_name = f"holloway_{self.kind}_{name}"
            yield CounterMetricFamily(full_name, name.replace("_", " "), value=value)
        for name, value in {**self.agent.sizes(), "sockets": len(driver.sockets)}.items():
            full_name = f"holloway_{self.kind}_{name}"
            yield GaugeMetricFamily(full_name, name.replace("_", " "), value=value)
