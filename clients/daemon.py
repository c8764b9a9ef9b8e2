"""The client as a process: `holloway up`."""

from __future__ import annotations

from collections.abc import Callable

from channel.messages import TO_CLIENT
from channel.own_token import read_token
from clients.agent import ClientAgent
from clients.posture import survey
from clients.routing import ClientRouting
from clients.settings import ClientSettings
from runtime.randomness import Randomness
from runtime.service import configure_logging
from tunnel.agent import AgentIdentity
from tunnel.engine import Engine
from tunnel.shell.process import (
    CONTROL_SOCKET,
    ProcessOptions,
    device_seed_in,
    run_agent,
)

MTU = 1280
DEVICE_KEY = "device.key"


async def run_client(
    settings: ClientSettings, make: Callable[..., ClientAgent] = ClientAgent
) -> None:
    """Run until a signal or `down` ends it; the machine is then as it was before. `make` is for the
    simulator, whose hostile clients are others.

    Raises SecretUnavailable and InvalidToken for the token or device key, AlreadyRunning, TunError,
    CommandFailed and OSError when the machine cannot be set up, and channel.dialer.Refused when
    the portal will not have this client.
    """
    configure_logging(settings.log_format, settings.log_level)
    token = read_token("up", "client", settings.token_file)
    options = ProcessOptions(
        kind="client",
        name=settings.name,
        token=token,
        device_seed=device_seed_in(settings.state_dir / DEVICE_KEY),
        events=TO_CLIENT,
        control_socket=settings.state_dir / CONTROL_SOCKET,
        observability=settings.observability,
        tun_name=settings.interface,
        mtu=MTU,
        mark=settings.mark,
        port=settings.port,
        lock=f"routing table {settings.routing_table}",
    )
    routing = ClientRouting(
        mark=settings.mark, table=settings.routing_table, priority=settings.rule_priority
    )

    def make_agent(
        identity: AgentIdentity, engine: Engine, randomness: Randomness, now: int
    ) -> ClientAgent:
        return make(identity, engine, randomness=randomness, now=now, survey=survey)

    await run_agent(options, make_agent, routing)
