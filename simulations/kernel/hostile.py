"""Hosts that do not keep to the rules, as real processes: `holloway up`, `gateway` and `relay` with
the habits of `simulations.hosts.hostile`.

    python -m simulations.kernel.hostile PLAN      # a `Plan` as JSON; the token is in the variable
                                                   # HOLLOWAY_UP_TOKEN_FILE and the like

Everything else of such a process is what an operator starts: sockets, TUN device, routes, channel.
A client with a token that is none comes again each time it is refused.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import msgspec
import trio

from channel.dialer import Refused
from channel.messages import Ack
from channel.own_token import read_token
from clients.agent import ClientAgent
from clients.daemon import run_client
from clients.settings import ClientSettings
from gateways.agent import GatewayAgent
from gateways.daemon import run_gateway
from gateways.settings import GatewaySettings
from relays.daemon import run_relay
from relays.settings import RelaySettings
from relays.transports.udp import UdpSockets
from runtime.net.address import Address
from runtime.randomness import SeededRandomness
from simulations.hosts.hostile import (
    CLIENT_HABITS,
    EVERY_NS,
    Keeper,
    Recorder,
    Targets,
    carries,
    forged,
    spoof_clients,
)
from tunnel.agent import Outgoing
from tunnel.datagrams import Transmit
from tunnel.engine import Engine

AGAIN_S: Final = 1.0


@attrs.frozen(kw_only=True)
class Plan:
    """Who does what. `targets` are gateways and relays as the internet sees them, `resources` the
    addresses of resources; `listen` and `region` are a relay's."""

    kind: Literal["client", "gateway", "relay"]
    habit: str
    name: str
    seed: int
    state_dir: str = ""
    port: int = 0
    listen: tuple[str, ...] = ()
    region: str = ""
    targets: tuple[str, ...] = ()
    resources: tuple[bytes, ...] = ()

    def draws(self) -> SeededRandomness:
        return SeededRandomness(self.seed, f"{self.name} mischief")


# --- agents ---------------------------------------------------------------------------------------


class Wire:
    """An engine whose datagrams are recorded, and others sent beside them."""

    def __init__(self, engine: Engine, record: Recorder) -> None:
        self._engine = engine
        self._record = record
        self._locals: dict[Address, None] = {}
        self._hurled: list[tuple[Address, bytes]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def hurl(self, target: Address, data: bytes) -> None:
        """A datagram of no engine's, with the next ones of the engine."""
        self._hurled.append((target, data))

    def add_socket(self, local: Address, now: int, **keywords: Any) -> None:
        self._locals[local] = None
        self._engine.add_socket(local, now, **keywords)

    def remove_socket(self, local: Address, now: int) -> None:
        self._locals.pop(local, None)
        self._engine.remove_socket(local, now)

    def receive_datagrams(
        self, local: Address, datagrams: Iterable[tuple[bytes, Address]], now: int
    ) -> None:
        taken = [(bytes(data), source) for data, source in datagrams]
        for data, source in taken:
            self._record.note(source, data)
        self._engine.receive_datagrams(local, taken, now)

    def drain_transmits(self) -> list[Transmit]:
        drained = self._engine.drain_transmits()
        for transmit in drained:
            self._record.note(transmit.remote, bytes(transmit.data))
        hurled, self._hurled = self._hurled, []
        for target, data in hurled:
            for local in self._locals:
                if (":" in local.host) == (":" in target.host):
                    drained.append(Transmit(local, target, data))
        return drained


class Hand:
    """What the habits of `hosts.hostile` act with."""

    def __init__(self, agent: Any, plan: Plan, wire: Wire, record: Recorder) -> None:
        self._agent = agent
        targets = [Address.parse(each) for each in plan.targets]
        self.targets: Targets = lambda: targets
        self._wire = wire
        self.engine: Any = wire
        self.record = record
        self.draws = plan.draws()
        self.resources: Sequence[bytes] = plan.resources
        self.channel = self
        self.now = 0

    def hurl(self, target: Address, data: bytes) -> None:
        self._wire.hurl(target, data)

    def send(self, message: object) -> None:
        """To the portal."""
        self._agent._send(message)

    def addresses(self) -> tuple[bytes, bytes] | None:
        interface = self._agent.interface
        return None if interface is None else (interface.ipv4.packed, interface.ipv6.packed)


class HostileClientAgent(ClientAgent):
    """A client that acts every EVERY_NS."""

    def __init__(self, plan: Plan, identity: Any, engine: Engine, **keywords: Any) -> None:
        record = Recorder()
        wire: Any = Wire(engine, record)
        super().__init__(identity, wire, **keywords)
        self._hand = Hand(self, plan, wire, record)
        self._act = CLIENT_HABITS.get(plan.habit)
        self._act_at: int = keywords["now"] + EVERY_NS

    def poll_timeout(self) -> int | None:
        at = super().poll_timeout()
        return self._act_at if at is None else min(at, self._act_at)

    def handle_timeout(self, now: int) -> None:
        super().handle_timeout(now)
        if now >= self._act_at:
            self._act_at = now + EVERY_NS
            self._hand.now = now
            if self._act is not None:
                self._act(self._hand)


class KeepingClientAgent(Keeper, HostileClientAgent):
    """One that heeds no revocation, too."""


class HostileGatewayAgent(GatewayAgent):
    """A gateway with one of the habits."""

    def __init__(self, plan: Plan, identity: Any, engine: Engine, **keywords: Any) -> None:
        record = Recorder()
        wire: Any = Wire(engine, record)
        super().__init__(identity, wire, **keywords)
        self._habit = plan.habit
        self._hand = Hand(self, plan, wire, record)
        self._act_at: int = keywords["now"] + EVERY_NS

    def poll_timeout(self) -> int | None:
        at = super().poll_timeout()
        return self._act_at if at is None else min(at, self._act_at)

    def handle_timeout(self, now: int) -> None:
        super().handle_timeout(now)
        if now < self._act_at:
            return
        self._act_at = now + EVERY_NS
        if self._habit == "spoofs":
            spoof_clients(self.engine, self._hand.resources, now)
        elif self._habit == "replays":
            for peer, data in self._hand.record.some(self._hand.draws):
                self._hand.hurl(peer, data)

    def drain_messages(self) -> list[Outgoing]:
        drained = super().drain_messages()
        if self._habit != "silent":
            return drained
        return [each for each in drained if not isinstance(each.message, Ack)]

    def drain_packets(self) -> list[bytes]:
        drained = super().drain_packets()
        return [] if self._habit == "acknowledges_and_drops" else drained


# --- relays ---------------------------------------------------------------------------------------


class HostileSockets(UdpSockets):
    """What is to be relayed, either way, does not come out as it went in."""

    def __init__(self, plan: Plan, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._habit = plan.habit
        self._draws = plan.draws()
        self._record = Recorder()

    def _send(self, server: Any) -> None:
        sent: list[Any] = []
        for number, data, destination in server.transmits:
            whole = bytes(data)
            if number in self._listeners and not carries(whole):
                sent.append((number, whole, destination))
            else:
                sent += self._spoilt(number, whole, destination)
        server.transmits[:] = sent
        super()._send(server)

    def _spoilt(self, number: int, data: bytes, destination: Any) -> list[Any]:
        self._record.note(destination, data)
        match self._habit:
            case "drops":
                return []
            case "corrupts" if data:
                at = self._draws.integer(len(data))
                data = data[:at] + bytes((data[at] ^ 0x55,)) + data[at + 1 :]
            case "duplicates":
                return [(number, data, destination)] * 2
            case "redirects":
                destination = self._record.some(self._draws)[0][0]
            case "replays":
                peer, old = self._record.some(self._draws)[0]
                return [(number, old, peer), (number, data, destination)]
        return [(number, data, destination)]


# --- the process ----------------------------------------------------------------------------------


def main(text: str) -> None:
    plan = msgspec.json.decode(text, type=Plan)
    state = Path(plan.state_dir)
    if plan.kind == "relay":
        relay = RelaySettings(
            name=plan.name,
            listen=plan.listen,
            region=plan.region,
            token_file=Path(os.environ["HOLLOWAY_RELAY_TOKEN_FILE"]),
        )
        trio.run(run_relay, relay, partial(HostileSockets, plan))
    elif plan.kind == "gateway":
        gateway = GatewaySettings(
            name=plan.name,
            state_dir=state,
            port=plan.port,
            token_file=Path(os.environ["HOLLOWAY_GATEWAY_TOKEN_FILE"]),
        )
        trio.run(run_gateway, gateway, partial(HostileGatewayAgent, plan))
    else:
        _client(plan, state)


def _client(plan: Plan, state: Path) -> None:
    token_file = Path(os.environ["HOLLOWAY_UP_TOKEN_FILE"])
    if plan.habit == "stale_token":
        token = forged(read_token("up", "client", token_file))
        token_file = state.with_suffix(".forged")
        token_file.touch(mode=0o600)
        token_file.write_text(token.reveal_text())
    client = ClientSettings(
        name=plan.name, state_dir=state, port=plan.port, token_file=token_file
    )  # fmt: skip
    make = KeepingClientAgent if plan.habit == "trespasses" else HostileClientAgent
    while True:
        try:
            trio.run(run_client, client, partial(make, plan))
        except Refused:
            time.sleep(AGAIN_S)
        else:
            return


if __name__ == "__main__":
    main(sys.argv[1])
