"""The gateway as a process: `holloway gateway`."""

from __future__ import annotations

from collections.abc import Callable

from channel.messages import TO_GATEWAY
from channel.own_token import read_token
from gateways.agent import GatewayAgent
from gateways.forwarding import GatewayForwarding
from gateways.settings import GatewaySettings, ceiling_of
from runtime.randomness import Randomness
from runtime.service import configure_logging
from tunnel.agent import AgentIdentity
from tunnel.engine import Engine
from tunnel.shell.process import (
    CONTROL_SOCKET,
    ProcessOptions,
    device_seed_in,
    fresh_device_seed,
    run_agent,
)

MTU = 1280


async def run_gateway(
    settings: GatewaySettings, make: Callable[..., GatewayAgent] = GatewayAgent
) -> None:
    """Run until a signal or `down` ends it; the machine is then as it was before. `make` is for the
    simulator, whose hostile gateways are others.

    Raises SettingsError, SecretUnavailable and InvalidToken for the token or device key,
    AlreadyRunning, TunError, CommandFailed and OSError when the machine cannot be set up, and
    channel.dialer.Refused when the portal will not have this gateway.
    """
    configure_logging(settings.log_format, settings.log_level)
    ceiling = ceiling_of(settings)
    token = read_token("gateway", "gateway", settings.token_file)
    if settings.device_key_file is None:
        device_seed = fresh_device_seed()
    else:
        device_seed = device_seed_in(settings.device_key_file)
    options = ProcessOptions(
        kind="gateway",
        name=settings.name,
        token=token,
        device_seed=device_seed,
        events=TO_GATEWAY,
        control_socket=settings.state_dir / CONTROL_SOCKET,
        observability=settings.observability,
        tun_name=settings.interface,
        mtu=MTU,
        mark=None,
        port=settings.port,
        lock="forwarding",
    )

    def make_agent(
        identity: AgentIdentity, engine: Engine, randomness: Randomness, now: int
    ) -> GatewayAgent:
        return make(identity, engine, randomness=randomness, now=now, ceiling=ceiling)

    forwarding = GatewayForwarding(directory=settings.state_dir, masquerade=settings.masquerade)
    await run_agent(options, make_agent, forwarding)
